"""The engine of the C++ library: what it knows, and which of its outputs each statistic is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import LARGEST
from workbench.kernels.engines import unknown
from workbench.kernels.native.build import library
from workbench.kernels.native.call import Call, Flag
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.statistics import Options

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Line:
    """How one statistic is computed: the flag that asks for it, and its raw sums out of the library's outputs."""

    flag: Flag
    raw: Callable[[Outputs], dict[str, Tensor]]


def _as_it_is(flag: Flag, name: str) -> _Line:
    return _Line(flag, lambda out: {name: out[name]})


_PEAK_KEY = _Line(Flag.PEAK, lambda out: {"peak_key": out["peak_key"].long()})
_RECEIVED = _Line(Flag.RECEIVED, lambda out: {"received": out["received"].sum(0)})
_POOLED = _Line(Flag.POOLED, lambda out: {"pooled_sum": out["pool_sum"], "pooled_max": out["pool_max"]})
_TOP = _Line(Flag.TOP, lambda out: {"top_keys_weight": out["top_weight"], "top_keys_index": out["top_key"].long()})
_LINES = {
    "entropy": _as_it_is(Flag.ENTROPY, "entropy"),
    "effective_keys": _Line(Flag.SQUARES, lambda out: {"effective_keys": 1 / out["squares"]}),
    "peak": _as_it_is(Flag.PEAK, "peak"),
    "peak_key": _PEAK_KEY,
    "distance": _as_it_is(Flag.DISTANCE, "distance"),
    "distance_var": _as_it_is(Flag.DISTANCE, "distance_var"),
    "induction": _as_it_is(Flag.INDUCTION, "induction"),
    "received": _RECEIVED,
    "received_mean": _RECEIVED,
    "top_keys": _TOP,
    "pooled_mean": _POOLED,
    "pooled_max": _POOLED,
}
_ON_SET = _Line(Flag.MEMBER, lambda out: {"sink": out["on_member"]})
_TARGET_KEYS: dict[str, Callable[[SoftmaxProblem, Tensor], Tensor]] = {
    "sink": lambda problem, position: problem.seen.first_key,
    "current": lambda problem, position: position,
    "previous": lambda problem, position: position - 1,
}
"""Statistics that are the weight on one key of each row: which key, given the absolute positions [query]."""
_OF_PATTERN = ("lse", "signed_mass", "row_sum")
_NAMES = {*_LINES, *_TARGET_KEYS, *_OF_PATTERN}
_OPTIONS = ("tokens", "token_before", "sink_keys", "n_top", "block")


class NativeEngine:
    """Streams statistics by the C++ library."""

    name = "native"

    def refusal(self, problem: SoftmaxProblem, names: Sequence[str], options: Options) -> str | None:
        """Why the library cannot stream this; None if it can."""
        if problem.device.type != "cpu":
            return f"it runs on the CPU, and the pattern is on {problem.device.type}"
        if problem.dtype != torch.float32:
            return "it computes in float32"
        if problem.lse is not None and problem.lse.dtype != torch.float32:
            return "its denominators are float32, too coarse for scores this large"
        mask = problem.mask
        if mask.additive and mask.tensor is not None and mask.tensor.dtype != torch.float32:
            return "it adds float32 masks only"
        if mask.farthest > LARGEST:
            return "its positions have 31 bits"
        why = unknown(names, options, _NAMES, _OPTIONS)
        return why or (None if library() is not None else "there is no compiler")

    def raw(self, problem: SoftmaxProblem, names: Sequence[str], options: Options) -> dict[str, Tensor]:
        """One pass over the keys: the raw sums, and "lse" where the problem has none."""
        lib = library()
        if lib is None:
            raise CaptureError("the C++ statistics are not there", hint="ask `refusal` first")
        lines = {name: line for name, line in _LINES.items() if name in names}
        targets = [name for name in _TARGET_KEYS if name in names]
        if options.sink_keys is not None and "sink" in targets:
            targets.remove("sink")
            lines["sink"] = _ON_SET
        flags = Flag(0)
        for line in lines.values():
            flags |= line.flag
        call = Call(problem, options, flags, [_target(problem, name) for name in targets])
        out = call.run(lib)
        found = {"lse": out["lse_out"]} if problem.lse is None else {}
        for line in dict.fromkeys(lines.values()):
            found |= line.raw(out)
        return found | {name: out["at_target"][i] for i, name in enumerate(targets)}


def _target(problem: SoftmaxProblem, name: str) -> Tensor:
    """[batch, head, query] int32: the key whose weight is asked for; negative for none."""
    position = torch.arange(problem.shape[2], device="cpu") + problem.mask.offset
    return _TARGET_KEYS[name](problem, position).expand(problem.shape[:3]).int()
