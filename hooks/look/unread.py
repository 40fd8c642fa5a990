"""Which modules mix tokens in a way that no tap reads, found by what they do.

A module is run again on what it was given, with one position changed, while every kernel that a tap has read gives
what it gave before. If other positions of its output change all the same, something in it mixes tokens unread. What
lies behind a kernel is reached by a change of what that gave at one query. A module around others is cleared as a whole
where nothing moves; else those inside are judged first, and the unread ones among them held fixed too, so that each
mixing is put down to the module that does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from workbench.hooks.look.positions import ROUNDING, moved, positions_of, reach, speaking
from workbench.hooks.look.replay import ModuleCall, Replays, tensors
from workbench.hooks.readers import reader_of
from workbench.hooks.sites import Unread

# Over the last axis, or element by element, by their definition. Where a model hands them its positions as features,
# the module around them is found instead.
_POSITION_WISE = (
    nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Identity, nn.modules.dropout._DropoutNd, nn.GELU, nn.ReLU,
    nn.SiLU, nn.Tanh, nn.Sigmoid,
)  # fmt: skip
_WINDOWED = (nn.modules.conv._ConvNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)


def find_unread(replays: Replays) -> list[Unread]:
    """Every module of a recorded forward that mixes tokens unread, in the order of the model's modules.

    A module that is called several times stands there once. A module whose replay does not give what it gave (it has a
    state of its own) cannot be tried; those inside it are, one by one.
    """
    judge = _Judge(replays)
    if replays.calls:
        judge.judge(replays.calls[-1])
    names = [name for name, _ in replays.model.named_modules()]
    return sorted(judge.found.values(), key=lambda one: names.index(one.name))


class _Judge:
    def __init__(self, replays: Replays) -> None:
        self.replays, self.found = replays, dict[str, Unread]()
        self._mixing: set[ModuleCall] = set()  # calls found unread, or read as a whole

    def judge(self, call: ModuleCall) -> None:
        """Judge one call, and those inside it where that is needed."""
        if (type(call.module) in _POSITION_WISE and not call.inner) or isinstance(call.module, ParametrizationList):
            return  # the latter makes weights
        if call.read_whole:
            self._mixing.add(call)
            self._judge_inner(call, _followed(call))
            return
        if isinstance(call.module, _WINDOWED) and self._resamples(call):
            self._overlapping(call)
            return
        spots = positions_of(call, self.replays.batch)
        again = self._run(call)
        if not spots or not _same(again, call.output):
            self._judge_inner(call)
            if spots and not call.inner:
                self._note(
                    call, "it has a state of its own: run again alone, it gives something else or fails", proved=False
                )
            return
        cleared = [self._moves(call, axis, n, ()) for axis, n in spots]
        if all(one == "" for one in cleared):
            return
        inside = self._judge_inner(call)
        for (axis, length), seen in zip(spots, cleared, strict=True):
            if seen is None or seen == "":
                continue
            left = self._moves(call, axis, length, inside) if inside else seen
            if left:
                self._note(call, left)
                self._mixing.add(call)
                return

    def _judge_inner(self, call: ModuleCall, followed: tuple[str, ...] = ()) -> list[ModuleCall]:
        """The calls inside, at any depth, that mix by themselves; but for those of these names, which are left out."""
        mixing: list[ModuleCall] = []
        for one in call.inner:
            if any(one.name == name or one.name.startswith(f"{name}.") for name in followed):
                continue
            self.judge(one)
            mixing += [one] if one in self._mixing else self._inside(one)
        return mixing

    def _inside(self, call: ModuleCall) -> list[ModuleCall]:
        return [c for one in call.inner for c in ([one] if one in self._mixing else self._inside(one))]

    def _moves(
        self, call: ModuleCall, axis: int, length: int, frozen: tuple[ModuleCall, ...] | list[ModuleCall]
    ) -> str | None:
        """What of other positions moves with the kernels held fixed; "": nothing; None: the output does not tell."""
        batch, tells = self.replays.batch, False
        which = speaking(call, length, batch)
        if which is None:
            return self._reads_others(call, axis, length, frozen)
        for j in sorted({1, length // 2}):  # an early one, for causal modules, and one in the middle
            inputs = moved(call, axis, length, j)
            got = reach(call.output, self._run(call, inputs, frozen), which, length, batch, j)
            if got is None:
                return None
            others = [at for at in got if at != j]
            if others:
                return _described(others, j, length)
            tells = tells or bool(got)
        j = length // 2  # where one position is chosen from many, most single ones move nothing
        again = self._run(call, moved(call, axis, length, j, which="others"), frozen)
        got = reach(call.output, again, which, length, batch, j)
        if got is not None and j in got:
            return f"mixes tokens: the others of {length} move position {j}"
        behind = self._behind(call, which, length, frozen)
        if behind is None:
            return "" if tells else None
        if len(behind) < 2:  # an attention module alone gives what its kernel gives
            return "" if tells or behind else None
        if call.reads[1] - call.reads[0] > 1:
            return None  # their queries may stand in different orders: those inside tell
        return f"mixes tokens: one query of its attention moves {len(behind)} positions of {length}"

    def _behind(
        self, call: ModuleCall, which: int, length: int, frozen: tuple[ModuleCall, ...] | list[ModuleCall]
    ) -> tuple[int, ...] | None:
        """Which positions move with one query of what the kernels inside give; None if there are none."""
        if call.reads[0] == call.reads[1]:
            return None
        again = self._run(call, frozen=frozen, changed=True)
        return reach(call.output, again, which, length, self.replays.batch, length // 2)

    def _reads_others(
        self, call: ModuleCall, axis: int, length: int, frozen: tuple[ModuleCall, ...] | list[ModuleCall]
    ) -> str | None:
        """What moves where positions of another input than the first do, as a class token's keys, and all the output
        may depend on them.
        """
        given, gave = (next(tensors(x), None) for x in ([call.args, call.kwargs], call.output))
        if given is None or gave is None or gave.dim() < 3 or given.shape != gave.shape or length in given.shape:
            return None
        inputs = moved(call, axis, length, length // 2)
        for held in (frozen, None):
            now = next(tensors(self._run(call, inputs, held)), None)
            if now is None or now.shape != gave.shape:
                return None
            if not _close(now, gave):
                return "" if held is None else f"mixes tokens: reads {length} positions of another input"
        return None

    def _resamples(self, call: ModuleCall) -> bool:
        """Whether it gives other positions than it takes."""
        spots = positions_of(call, self.replays.batch)
        return bool(spots) and speaking(call, spots[0][1], self.replays.batch) is None

    def _overlapping(self, call: ModuleCall) -> None:
        """A window to other positions mixes them if it overlaps the next; patches that do not are only taken in."""
        module: Any = call.module
        n = next(tensors([call.args, call.kwargs])).dim() - 2
        size, step, apart = (
            (given,) * n if isinstance(given, int) else tuple(given)
            for given in (module.kernel_size, module.stride, getattr(module, "dilation", 1))
        )
        spans = [(k - 1) * d + 1 for k, d in zip(size, apart, strict=True)]
        if any(span > stride for span, stride in zip(spans, step, strict=True)):
            self._note(call, f"mixes neighbours: each position reads {' × '.join(map(str, spans))}")
            self._mixing.add(call)

    def _run(
        self,
        call: ModuleCall,
        inputs: Any = None,
        frozen: Sequence[ModuleCall] | None = None,
        changed: bool = False,
    ) -> Any:
        """What the module gives, or None: it may need what only its own model gives it, and in the order it came."""
        try:
            return self.replays.run(call, inputs, frozen=frozen, changed=changed)
        except Exception:
            return None

    def _note(self, call: ModuleCall, reason: str, *, proved: bool = True) -> None:
        self.found.setdefault(call.name, Unread(call.name, type(call.module).__name__, reason, proved))


def _followed(call: ModuleCall) -> tuple[str, ...]:
    """Names of the modules inside whose mixing the module's reader takes into account."""
    reader = reader_of(call.module)
    return () if reader is None else tuple(f"{call.name}.{name}" if call.name else name for name in reader.follows)


def _described(others: list[int], j: int, length: int) -> str:
    first, last = min(others) - j, max(others) - j
    if len(others) <= 4 and last - first <= 8:
        return f"mixes neighbours: position {j} moves those at {first:+d} to {last:+d}"
    if first > 0:
        return f"mixes tokens: position {j} moves {len(others)} later ones of {length}"
    return f"mixes tokens: position {j} moves {len(others)} others of {length}"


def _same(again: object, before: object) -> bool:
    """Within rounding: a copy of a part of a tensor lies closer together, and kernels round by how their input lies."""
    a, b = list(tensors(again)), list(tensors(before))
    return len(a) == len(b) and all(x.shape == y.shape and _close(x, y) for x, y in zip(a, b, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a.nan_to_num(), b.nan_to_num()):
        return True
    if not a.is_floating_point() or a.dtype != b.dtype or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    finite, eps = a.isfinite(), torch.finfo(a.dtype).eps
    a, b = a[finite].double(), b[finite].double()
    return bool((a - b).abs().max() <= ROUNDING * eps * a.abs().max())
