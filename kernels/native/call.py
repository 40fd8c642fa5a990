"""One call of the C++ library: its struct, what it reads and what it fills."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntFlag
from functools import cache

import torch
from torch import Tensor

from workbench.kernels.checks import LARGEST
from workbench.kernels.masks import hidden_below
from workbench.kernels.native.build import library
from workbench.kernels.native.layout_runs import LayoutRuns
from workbench.kernels.native.threads import gomp_parallel
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.statistics import Options


class Flag(IntFlag):
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


_ROW_OUTPUTS = (
    (Flag.ENTROPY, "entropy", torch.float32),
    (Flag.SQUARES, "squares", torch.float32),
    (Flag.PEAK, "peak", torch.float32),
    (Flag.PEAK, "peak_key", torch.int32),
    (Flag.DISTANCE, "distance", torch.float32),
    (Flag.DISTANCE, "distance_var", torch.float32),
    (Flag.MEMBER, "on_member", torch.float32),
    (Flag.INDUCTION, "induction", torch.float32),
)
"""What is one number per row: the flag that asks for it, the field of the struct, and its type."""


class Call:
    """One call: its inputs made contiguous, its outputs, and the struct that points at them.

    Args:
        flags: what to collect; those that targets and the problem's lse decide are added here.
        targets: for each, [batch, head, query] int32 keys whose weight is asked for.
    """

    def __init__(self, problem: SoftmaxProblem, options: Options, flags: Flag, targets: Sequence[Tensor]) -> None:
        self.problem, self.options = problem, options
        self.job = _Job()
        self.inputs: list[Tensor] = []
        job, mask = self.job, problem.mask
        job.batch, job.heads, job.n_queries, job.n_keys = problem.shape
        job.kv_heads, job.d = problem.n_kv_heads, problem.q.shape[-1]
        job.scale, job.softcap = problem.scale, problem.softcap or 0.0
        job.causal, job.offset, job.window = mask.causal, mask.offset, min(mask.window or 0, LARGEST)
        job.threads = torch.get_num_threads()
        groups = job.batch * job.heads
        job.segments = max(1, min(-(-3 * job.threads // max(1, groups)), -(-job.n_queries // 64)))
        self._problem_inputs()
        self._mask()
        job.n_targets = len(targets)
        job.n_top, job.pool = min(options.n_top, job.n_keys), options.block
        flags |= Flag.TARGETS if targets else Flag(0)
        self._option_inputs(flags, targets)
        job.flags = flags | (Flag.ONLINE if problem.lse is None else 0)
        self.outputs = self._outputs(flags)

    def _input(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_cpu:
            raise AssertionError(f"{name} is on {tensor.device}, and the library reads from the host")
        self.inputs.append(tensor)
        setattr(self.job, name, tensor.data_ptr())

    def _problem_inputs(self) -> None:
        problem, job = self.problem, self.job
        for name, tensor in (("q", problem.q), ("k", problem.k)):
            tensor = tensor.float()
            tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
            self._input(name, tensor)
            for axis, stride in zip(("batch", "head", "row"), tensor.stride(), strict=False):
                setattr(job, f"{name}_{axis}", stride)
        if problem.lse is not None:
            self._input("lse", problem.lse.float().contiguous())
        if problem.sinks is not None:
            self._input("sinks", problem.sinks.float().contiguous())
        if problem.key_bias is not None:
            self._input("key_bias", problem.key_bias.float().expand(*problem.shape[:2], -1).contiguous())

    def _mask(self) -> None:
        mask, job = self.problem.mask, self.job
        if mask.tensor is not None:
            whole = mask.tensor.expand(*self.problem.shape)
            self._input("bias" if mask.additive else "mask", whole)
            job.mask_batch, job.mask_head, job.mask_row, job.mask_key = whole.stride()
            job.bias_hidden = hidden_below(torch.float32)
        if mask.layout is not None:
            runs = LayoutRuns.of(mask, _strip())
            job.n_layouts = mask.layout.n_layouts
            for name in ("run_of", "run_start", "run_stop", "run_word", "words"):
                self._input(name, getattr(runs, name))

    def _option_inputs(self, flags: Flag, targets: Sequence[Tensor]) -> None:
        n_batch, _, n_queries, n_keys = self.problem.shape
        if targets:
            self._input("targets", torch.stack(list(targets)).contiguous())
        if flags & Flag.MEMBER:
            member = torch.zeros(n_keys, device="cpu")
            member[self.options.sinks(n_keys)] = 1
            self._input("member", member)
        if flags & Flag.INDUCTION:
            ids = self.options.ids(n_batch, n_queries, n_keys, self.problem.mask.offset)
            self._input("tokens", torch.unique(ids, return_inverse=True)[1].int().contiguous())

    def _outputs(self, flags: Flag) -> dict[str, Tensor]:
        job, block = self.job, self.options.block
        b, h, n_q, n_k = self.problem.shape
        row, top = (b, h, n_q), (b, h, n_q, job.n_top)
        blocks = (b, h, -(-n_q // block), -(-n_k // block))
        # The library writes every number of these, and adds to those of blocks.
        made = {} if self.problem.lse is not None else {"lse_out": torch.empty(row, device="cpu")}
        made |= {
            name: torch.empty(row, dtype=dtype, device="cpu") for flag, name, dtype in _ROW_OUTPUTS if flags & flag
        }
        if flags & Flag.TARGETS:
            made["at_target"] = torch.empty(job.n_targets, *row, device="cpu")
        if flags & Flag.TOP:
            made |= {
                "top_weight": torch.empty(top, device="cpu"),
                "top_key": torch.empty(top, dtype=torch.int32, device="cpu"),
            }
        if flags & Flag.RECEIVED:
            made["received"] = torch.empty(job.segments, b, h, n_k, dtype=torch.float64, device="cpu")
        if flags & Flag.POOLED:
            made |= {"pool_sum": torch.zeros(blocks, device="cpu"), "pool_max": torch.zeros(blocks, device="cpu")}
        for name, tensor in made.items():
            setattr(job, name, tensor.data_ptr())
        return made

    def run(self, lib: ctypes.CDLL) -> dict[str, Tensor]:
        """Run the library, a few seconds at a time; the outputs by the names of the struct."""
        job = self.job
        tasks = job.batch * job.heads * job.segments
        work = job.n_queries * job.n_keys * job.d // job.segments
        step = max(job.threads, _AT_ONCE // max(1, work) // job.threads * job.threads)
        for first in range(0, tasks if job.n_queries else 0, step):
            job.first_task, job.last_task = first, min(first + step, tasks)
            if lib.workbench_statistics(ctypes.byref(job), gomp_parallel()):
                raise MemoryError("the statistics ran out of memory")
        return self.outputs


@cache
def _strip() -> int:
    """Queries per strip of the library."""
    lib = library()
    assert lib is not None
    lib.workbench_strip.restype = lib.workbench_job_bytes.restype = ctypes.c_int64
    if lib.workbench_job_bytes() != ctypes.sizeof(_Job):
        raise AssertionError("the C++ struct and its description here have come apart")
    return int(lib.workbench_strip())
