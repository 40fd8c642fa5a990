"""Hand a softmax pattern to the C++ library and give its numbers the shapes that statistics have."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntFlag
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.masks import hidden_below
from workbench.kernels.native.build import library
from workbench.kernels.native.runs import Runs
from workbench.kernels.statistics import Options

if TYPE_CHECKING:
    from workbench.kernels.softmax import SoftmaxPattern


class _Flag(IntFlag):
    """What the library collects; the same numbers as in its source."""

    ONLINE = 1
    ENTROPY = 2
    SQUARES = 4
    PEAK = 8
    DISTANCE = 16
    TARGETS = 32
    MEMBER = 64
    INDUCTION = 128
    RECEIVED = 256
    TOP = 512
    POOLED = 1024


_FLAGS = {
    "entropy": _Flag.ENTROPY,
    "effective_keys": _Flag.SQUARES,
    "peak": _Flag.PEAK,
    "peak_key": _Flag.PEAK,
    "distance": _Flag.DISTANCE,
    "distance_var": _Flag.DISTANCE,
    "induction": _Flag.INDUCTION,
    "received": _Flag.RECEIVED,
    "received_mean": _Flag.RECEIVED,
    "top_keys": _Flag.TOP,
    "pooled_mean": _Flag.POOLED,
    "pooled_max": _Flag.POOLED,
}
_TARGET = ("sink", "current", "previous")
_AT_ONCE = 1 << 36  # products in one call of the library, a few seconds: only between calls can it be interrupted

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_FIELDS: list[tuple[str, type]] = [
    ("q", _P), ("k", _P),
    *((name, _I) for name in ("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row")),
    *((name, _I) for name in ("batch", "heads", "kv_heads", "n_queries", "n_keys", "d")),
    ("scale", _F), ("softcap", _F), ("lse", _P), ("sinks", _P), ("causal", _I), ("offset", _I), ("window", _I),
    ("mask", _P), ("bias", _P), *((name, _I) for name in ("mask_batch", "mask_head", "mask_row", "mask_key")),
    ("bias_hidden", _F), ("key_bias", _P),
    ("n_layouts", _I), ("run_of", _P), ("run_start", _P), ("run_stop", _P), ("run_word", _P), ("words", _P),
    ("flags", _I), ("n_targets", _I), ("targets", _P), ("member", _P), ("tokens", _P),
    ("n_top", _I), ("pool", _I), ("threads", _I), ("segments", _I), ("first_task", _I), ("last_task", _I),
    *((name, _P) for name in ("lse_out", "entropy", "squares", "peak", "peak_key", "distance", "distance_var",
                              "at_target", "on_member", "induction", "received", "top_weight", "top_key",
                              "pool_sum", "pool_max")),
]  # fmt: skip


class _Job(ctypes.Structure):
    """The C++ struct `Job`, field by field."""

    _fields_ = _FIELDS


def unsupported(pattern: SoftmaxPattern) -> str | None:
    """Why the library cannot stream this pattern; None if it can."""
    if pattern.device.type != "cpu":
        return f"it runs on the CPU, and the pattern is on {pattern.device.type}"
    if pattern.dtype != torch.float32:
        return "it computes in float32"
    if pattern.mask.additive and pattern.mask.tensor is not None and pattern.mask.tensor.dtype != torch.float32:
        return "it adds float32 masks only"
    if pattern.n_keys >= 1 << 31 or pattern.n_queries >= 1 << 31:
        return "its positions have 31 bits"
    if library() is None:
        return "there is no compiler"
    return None


def statistics(
    pattern: SoftmaxPattern, names: Sequence[str], options: Options, lse: Tensor | None
) -> dict[str, Tensor]:
    """One pass over the keys.

    Args:
        names: statistics; column statistics need `lse`.
        lse: [batch, head, query] finite log-sum-exp; None to find it in the same pass (then it is among the results).

    Returns:
        name -> tensor as `streaming.statistics` gives them, before rows that see no key are marked; "lse" if found.
    """
    lib = library()
    if lib is None:
        raise CaptureError("the C++ statistics are not there", hint="ask `unsupported` first")
    call = _Call(pattern, names, options, lse)
    call.run(lib)
    return call.results()


class _Call:
    """One call: its inputs made contiguous, its outputs, and the struct that points at them."""

    def __init__(self, pattern: SoftmaxPattern, names: Sequence[str], options: Options, lse: Tensor | None) -> None:
        self.pattern, self.names, self.options, self.lse = pattern, names, options, lse
        self.job = _Job()
        self.inputs: list[Tensor] = []
        self.outputs: dict[str, Tensor] = {}
        job, mask = self.job, pattern.mask
        job.batch, job.heads, job.n_queries, job.n_keys = pattern.shape
        job.kv_heads, job.d = pattern.n_kv_heads, pattern.q.shape[-1]
        job.scale, job.softcap = pattern.scale, pattern.softcap or 0.0
        job.causal, job.offset, job.window = mask.causal, mask.offset, mask.window or 0
        job.threads = torch.get_num_threads()
        groups = pattern.n_batch * pattern.n_heads
        job.segments = max(1, min(-(-3 * job.threads // max(1, groups)), -(-pattern.n_queries // 64)))
        for name, tensor in (("q", pattern.q), ("k", pattern.k)):
            tensor = tensor.float()
            tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
            self._input(name, tensor)
            for axis, stride in zip(("batch", "head", "row"), tensor.stride(), strict=False):
                setattr(job, f"{name}_{axis}", stride)
        if lse is not None:
            self._input("lse", lse.float().contiguous())
        if pattern.sinks is not None:
            self._input("sinks", pattern.sinks.float().contiguous())
        if pattern.key_bias is not None:
            self._input("key_bias", pattern.key_bias.float().expand(*pattern.shape[:2], -1).contiguous())
        self._mask()
        self._flags()

    def _input(self, name: str, tensor: Tensor) -> None:
        self.inputs.append(tensor)
        setattr(self.job, name, tensor.data_ptr())

    def _mask(self) -> None:
        mask, job = self.pattern.mask, self.job
        if mask.tensor is not None:
            whole = mask.tensor.expand(*self.pattern.shape)
            self._input("bias" if mask.additive else "mask", whole)
            job.mask_batch, job.mask_head, job.mask_row, job.mask_key = whole.stride()
            job.bias_hidden = hidden_below(torch.float32)
        if mask.layout is not None:
            runs = Runs.of(mask, _strip())
            job.n_layouts = mask.layout.n_layouts
            for name in ("run_of", "run_start", "run_stop", "run_word", "words"):
                self._input(name, getattr(runs, name))

    def _flags(self) -> None:
        pattern, options, job = self.pattern, self.options, self.job
        flags = _Flag(0)
        for name in self.names:
            flags |= _FLAGS.get(name, _Flag(0))
        self.targets = [name for name in _TARGET if name in self.names]
        if options.sink_keys is not None and "sink" in self.targets:
            self.targets.remove("sink")
            member = torch.zeros(pattern.n_keys)
            member[options.sinks(pattern.n_keys)] = 1
            self._input("member", member)
            flags |= _Flag.MEMBER
        if self.targets:
            flags |= _Flag.TARGETS
            self._input("targets", self._target_keys())
        if "induction" in self.names:
            ids = options.ids(pattern.n_batch, pattern.n_queries, pattern.n_keys, pattern.mask.offset)
            self._input("tokens", torch.unique(ids, return_inverse=True)[1].int().contiguous())
        job.n_targets = len(self.targets)
        job.n_top, job.pool = min(options.n_top, pattern.n_keys), options.block
        job.flags = flags | (_Flag.ONLINE if self.lse is None else 0)
        self._outputs(flags)

    def _target_keys(self) -> Tensor:
        """[target, batch, head, query] int32: the key whose weight is asked for; negative for none."""
        pattern = self.pattern
        position = torch.arange(pattern.n_queries) + pattern.mask.offset
        of = {"current": position, "previous": position - 1}
        keys = [pattern.seen.first_key if name == "sink" else of[name] for name in self.targets]
        return torch.stack([key.expand(pattern.shape[:3]) for key in keys]).int().contiguous()

    def _outputs(self, flags: _Flag) -> None:
        job, block = self.job, self.options.block
        b, h, n_q, n_k = self.pattern.shape
        row, top = (b, h, n_q), (b, h, n_q, job.n_top)
        blocks = (b, h, -(-n_q // block), -(-n_k // block))
        made = {} if self.lse is not None else {"lse_out": torch.zeros(row)}
        for flag, name in (
            (_Flag.ENTROPY, "entropy"),
            (_Flag.SQUARES, "squares"),
            (_Flag.PEAK, "peak"),
            (_Flag.DISTANCE, "distance"),
            (_Flag.DISTANCE, "distance_var"),
            (_Flag.MEMBER, "on_member"),
            (_Flag.INDUCTION, "induction"),
        ):
            if flags & flag:
                made[name] = torch.zeros(row)
        if flags & _Flag.PEAK:
            made["peak_key"] = torch.zeros(row, dtype=torch.int32)
        if flags & _Flag.TARGETS:
            made["at_target"] = torch.zeros(len(self.targets), *row)
        if flags & _Flag.TOP:
            made |= {"top_weight": torch.zeros(top), "top_key": torch.zeros(top, dtype=torch.int32)}
        if flags & _Flag.RECEIVED:
            made["received"] = torch.zeros(job.segments, b, h, n_k, dtype=torch.float64)
        if flags & _Flag.POOLED:
            made |= {"pool_sum": torch.zeros(blocks), "pool_max": torch.zeros(blocks)}
        self.outputs = made
        for name, tensor in made.items():
            setattr(job, name, tensor.data_ptr())

    def run(self, lib: ctypes.CDLL) -> None:
        """Run the library, a few seconds at a time."""
        job = self.job
        tasks = job.batch * job.heads * job.segments
        work = job.n_queries * job.n_keys * job.d // job.segments
        step = max(job.threads, _AT_ONCE // max(1, work) // job.threads * job.threads)
        for first in range(0, tasks if job.n_queries else 0, step):
            job.first_task, job.last_task = first, min(first + step, tasks)
            if lib.workbench_statistics(ctypes.byref(job), _gomp_parallel()):
                raise MemoryError("the statistics ran out of memory")

    def results(self) -> dict[str, Tensor]:
        """The statistics by name."""
        out, found = self.outputs, {}
        if "lse_out" in out:
            found["lse"] = out["lse_out"]
        for name in self.names:
            if name in ("entropy", "peak", "distance", "distance_var", "induction"):
                found[name] = out[name]
            elif name == "peak_key":
                found[name] = out["peak_key"].long()
            elif name == "effective_keys":
                found[name] = 1 / out["squares"]
            elif name in self.targets:
                found[name] = out["at_target"][self.targets.index(name)]
            elif name == "sink":
                found[name] = out["on_member"]
            elif name in ("received", "received_mean"):
                found["received"] = out["received"].sum(0)
            elif name == "top_keys":
                found["top_keys_weight"], found["top_keys_index"] = out["top_weight"], out["top_key"].long()
            elif name in ("pooled_mean", "pooled_max"):
                found["pooled_sum"], found["pooled_max"] = out["pool_sum"], out["pool_max"]
        return found


@cache
def _strip() -> int:
    """Queries per strip of the library."""
    lib = library()
    assert lib is not None
    lib.workbench_strip.restype = lib.workbench_job_bytes.restype = ctypes.c_int64
    if lib.workbench_job_bytes() != ctypes.sizeof(_Job):
        raise AssertionError("the C++ struct and its description here have come apart")
    return int(lib.workbench_strip())


@cache
def _gomp_parallel() -> ctypes.c_void_p:
    """The pool of threads that torch uses, null if it is not libgomp's; a second pool would fight it for the cores."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return ctypes.c_void_p(None)
