"""An independent judge of which modules mix tokens: each is run alone, and one position of what it is given is changed.

It knows nothing of kernels, taps or sites. Modules are tried from the innermost outwards. What a mixer that is known
already does inside another module is confined: other positions than the changed one get what they got in the whole
model. If they move all the same, the module mixes by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_EPSILON = 1e-5  # of the largest number: less is rounding
_SEED = torch.default_generator.manual_seed  # `torch.manual_seed` keeps a stack for each device that there may be


@dataclass(eq=False)
class _Run:
    """One call of a module, as the whole model made it."""

    name: str
    module: nn.Module
    given: Any
    gave: Any = None
    inner: list[_Run] = field(default_factory=list)


def mixers(model: nn.Module, inputs: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, str]:
    """Names of the modules that mix tokens by themselves, each with what was seen.

    Args:
        lengths: what an axis of positions may be long. No other axis is as long as one of them.
    """
    found: dict[str, str] = {}
    with torch.no_grad():
        for run in _recorded(model, inputs):
            for length in lengths:
                if run.name not in found and (seen := _mixes(run, length, lengths, set(found))):
                    found[run.name] = seen
    return found


def _recorded(model: nn.Module, inputs: Mapping[str, Any]) -> list[_Run]:
    """All calls of modules in one forward, the innermost first."""
    ended: list[_Run] = []
    running: list[_Run] = []
    names = {module: name for name, module in model.named_modules()}

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(_Run(names[module], module, copy.deepcopy((args, kwargs))))

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run = running.pop()
        run.gave = copy.deepcopy(_tensors(output))
        if running:
            running[-1].inner.append(run)
        ended.append(run)

    with ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(end, with_kwargs=True).remove)
        _SEED(0)
        model(**copy.deepcopy(dict(inputs)))
    return ended


def _mixes(run: _Run, length: int, lengths: Sequence[int], known: set[str]) -> str:
    """What other positions move with one of so many; "": none."""
    if not any(_axes(t, length) for t in _tensors(run.given)):
        return ""
    again = _again(run, run.given, lambda name, before, now: now, known)
    if again is None or not _equal(again, run.gave):
        return ""  # it depends on more than what it is given
    for j in (1, length // 2):
        changed = _mapped(lambda t: t.contiguous(), copy.deepcopy(run.given))  # expanded tensors cannot be written
        for t in _tensors(changed):
            if axes := _axes(t, length):
                _change(t, axes, j)

        def confined(name: str, before: Tensor, now: Tensor, j: int = j) -> Tensor:
            return _confine(before, now, length, j)

        after = _again(run, changed, confined, known)
        for before, now in zip(run.gave, after or [], strict=False):
            moved = _moved(before, now, length, j, lengths)
            if moved:
                return f"position {j} of {length} moves {moved}"
    return ""


def _again(run: _Run, given: Any, confine: Callable[[str, Tensor, Tensor], Tensor], known: set[str]) -> Any:
    """What the module gives, with what known mixers inside give changed by `confine`; None: it cannot run alone."""
    queue: dict[nn.Module, list[_Run]] = {}
    todo = list(run.inner)
    while todo:
        one = todo.pop(0)
        if one.name in known:
            queue.setdefault(one.module, []).append(one)
        todo[:0] = one.inner

    def hold(module: nn.Module, args: Any, output: Any) -> Any:
        if not queue[module]:
            return output
        before, index = queue[module].pop(0), iter(range(10**6))

        def held(t: Tensor) -> Tensor:
            i = next(index)
            return confine(before.name, before.gave[i], t) if before.gave[i].shape == t.shape else t

        return _mapped(held, output)

    args, kwargs = copy.deepcopy(given)
    with ExitStack() as hooks:
        for module in queue:
            hooks.callback(module.register_forward_hook(hold).remove)
        _SEED(0)
        try:
            return _tensors(run.module(*args, **kwargs))
        except Exception:
            return None


def _axes(t: Tensor, length: int) -> list[int]:
    """The axes of positions of a tensor: one, or both sides of an image; none of masks."""
    axes = [axis for axis, n in enumerate(t.shape) if n == length]
    if t.dtype == torch.long:
        return axes if t.dim() == 2 and axes == [1] else []
    if not t.is_floating_point() or t.dim() < 3 or (len(axes) == 2 and (t.dim() != 4 or t.shape[1] == 1)):
        return []
    return axes if len(axes) in (1, 2) else []


def _at(t: Tensor, axes: Sequence[int], j: int) -> Tensor:
    """[...] bool: the elements of one position."""
    here = torch.ones((), dtype=torch.bool)
    for axis in axes:
        only = torch.zeros(t.shape[axis], dtype=torch.bool)
        only[j] = True
        here = here & only.view([-1] + [1] * (t.dim() - axis - 1))
    return here.expand(t.shape)


def _change(t: Tensor, axes: Sequence[int], j: int) -> None:
    here = _at(t, axes, j)
    if t.is_floating_point():
        noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t.dtype) * (t.std() + 1e-3)
        t += torch.where(here, noise, 0)
    elif t.unique().numel() > 2:
        t.copy_(torch.where(here, (t + 2) % (int(t.max()) - 2) + 3, t))  # the first three are special, such as padding


def _confine(before: Tensor, now: Tensor, length: int, j: int) -> Tensor:
    """What a mixer gives now at the changed position, and what it gave before at all others."""
    axes = _axes(now, length)
    return torch.where(_at(now, axes, j), now, before) if axes else before


def _moved(before: Tensor, now: Tensor, length: int, j: int, lengths: Sequence[int]) -> str:
    """The positions that differ, other than j."""
    if before.shape != now.shape or not before.is_floating_point() or before.dim() < 3:
        return ""
    apart = (now.double() - before.double()).abs() > _EPSILON * before.abs().max().double()
    axes = _axes(before, length)
    if axes:
        apart = apart & ~_at(before, axes, j)
        return "others" if bool(apart.any()) else ""
    axes = next((found for n in lengths if (found := _axes(before, n))), [])
    if not axes:
        return ""
    rest = [axis for axis in range(apart.dim()) if axis not in axes]
    n = int(apart.permute(*axes, *rest).flatten(len(axes)).any(-1).sum())
    return f"{n} positions of another length" if n > 1 else ""  # resampled: a single position is still one


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x.double(), y.double(), atol=1e-6, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    values = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else ()
    return [t for value in values for t in _tensors(value)]


def _mapped(f: Callable[[Tensor], Tensor], x: Any) -> Any:
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, Mapping):
        made: Any = copy.copy(x)
        for key in x:
            made[key] = _mapped(f, x[key])
        return made
    if isinstance(x, (tuple, list)):
        parts = [_mapped(f, value) for value in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x
