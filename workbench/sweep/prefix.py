"""The part of a forward below an edited block: run once, kept, and put in place when the rest runs again.

The model's own forward runs each time, only that modules which ended before the block began give what they gave before.
Masks, positions and whatever else the model hands to its blocks are its own. Whether the result is the same is
checked by whoever uses this; a block that does more than return its output shows there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from typing import Any

from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks.changes import Changes
from workbench.hooks.heads import block_of
from workbench.hooks.nested import map_tensors, tensors
from workbench.hooks.sites import Sites
from workbench.sweep.variants import repeat


@dataclass(frozen=True)
class KeptBlocks:
    """One forward.

    Attributes:
        batch: its number of examples. outputs: what blocks gave, by name. before: for each block that runs once, in the
            order in which they run, what has ended before it begins.
    """

    batch: int = 1
    outputs: dict[str, Any] = field(default_factory=dict)
    before: dict[str, list[str]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of what the blocks gave."""
        return sum(tensor.nbytes for output in self.outputs.values() for tensor in tensors(output))


class Prefix:
    """Keeps what blocks give in one forward, and hands it out in later ones.

    Args:
        model: the model. sites: its sites, from which the lists of blocks are found.

    Attributes:
        kept: the forward that later ones resume from; one that was kept earlier may be put there again.
        reason: why no forward can be resumed; "" if some can.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model = model
        modules = dict(model.named_modules())
        found = dict.fromkeys(block_of(model, sites, site.name) or _numbered(site.name) for site in sites)
        lists = list(dict.fromkeys(name.rpartition(".")[0] for name in found if name))
        self.blocks = [
            f"{name}.{child}".lstrip(".")
            for name in lists
            for child, _ in modules[name].named_children()
            if child.isdigit() or f"{name}.{child}".lstrip(".") in found
        ]
        self.units = list(dict.fromkeys([*self.blocks, *_towers(lists)]))
        self.kept = KeptBlocks()
        self.reason = "" if self.blocks else "no list of blocks was found in the model"
        self._events: list[tuple[str, bool]] = []
        self._recording = False
        self._skipped: frozenset[str] = frozenset()
        self._times = 1

    @contextmanager
    def open(self) -> Iterator[None]:
        """The blocks' forwards go through here; at the end the model is as it was."""
        modules = dict(self.model.named_modules())
        try:
            with Changes() as changes:
                for name in self.units:
                    own = modules[name].forward
                    changes.forward(modules[name], update_wrapper(partial(self._run, name, own), own))
                yield
        finally:
            self.kept = KeptBlocks()

    @contextmanager
    def recording(self, batch: int) -> Iterator[None]:
        """The forward inside is the one that later ones resume from.

        Args:
            batch: its number of examples.
        """
        self.kept, self._recording = KeptBlocks(batch), True
        self._events.clear()
        try:
            yield
        finally:
            self._recording = False
        self.kept.before.update(self._order())

    @contextmanager
    def resuming(self, block: str | None, times: int) -> Iterator[None]:
        """The forward inside begins at a block, on `times` repeats of the batch."""
        self._skipped, self._times = frozenset(self.kept.before.get(block or "", ())), times
        try:
            yield
        finally:
            self._skipped = frozenset()

    def start(self, sites: frozenset[str]) -> str | None:
        """The first block that holds one of the modules, or None if one of them is in no block that runs once."""
        holding: list[str] = []
        for site in sites:
            block = next((name for name in self.blocks if site == name or site.startswith(f"{name}.")), None)
            if block is None or block not in self.kept.before:
                return None
            holding.append(block)
        order = {name: i for i, name in enumerate(self.kept.before)}
        return min(holding, key=order.__getitem__, default=None)

    @property
    def starts(self) -> list[str]:
        """The blocks that a forward can begin at, in the order in which they run."""
        return list(self.kept.before)

    @property
    def widest(self) -> int:
        """Bytes of the largest tensor that a block gave."""
        sizes = [t.nbytes for name in self.blocks for t in tensors(self.kept.outputs.get(name))]
        return max(sizes, default=0)

    @property
    def rows(self) -> int:
        """The most vectors, examples times positions, in what a block gave."""
        found = [
            t.numel() // t.shape[-1]
            for name in self.blocks
            for t in tensors(self.kept.outputs.get(name))
            if t.dim() > 1
        ]
        return max(found, default=0)

    def _run(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name in self._skipped:
            given = self.kept.outputs[name]
            return repeat(given, self._times, self.kept.batch) if self._times > 1 else _copy(given)
        if not self._recording:
            return forward(*args, **kwargs)
        self._events.append((name, True))
        output = forward(*args, **kwargs)
        self._events.append((name, False))
        self.kept.outputs[name] = _copy(output)
        return output

    def _order(self) -> dict[str, list[str]]:
        """For each block that runs once, in the order in which they run: what has ended before it begins."""
        begun = [name for name, begins in self._events if begins]
        once = {name for name in begun if begun.count(name) == 1}
        twice = next((name for name in begun if name not in once), None)
        if twice is not None:
            self.reason = f"{twice} runs {begun.count(twice)} times in one forward"
        before: dict[str, list[str]] = {}
        ended: list[str] = []
        for name, begins in self._events:
            if not begins and name in once:
                ended.append(name)
            elif begins and name in once and name in self.blocks:
                before[name] = list(ended)
        return before


def exchanged(batch: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Inputs of the same shapes with other content: each example in the place of the next, or turned if it is alone.

    A forward on them shows what blocks keep beside what they give: keys of an earlier layer in an attribute, say, which
    would be those of another forward where these blocks are passed over.
    """

    def one(tensor: Tensor, axis: int) -> Tensor:
        mine = tensor.dim() > axis and tensor.shape[0] == size
        return tensor.roll(1, axis) if mine else tensor

    for axis in (0, 1):
        found = {name: map_tensors(partial(one, axis=axis), value) for name, value in batch.items()}
        pairs = zip(tensors(found), tensors(batch), strict=True)
        if not all(a.equal(b) for a, b in pairs):
            break
    return found


def starts_to_try(starts: Sequence[Any]) -> list[Any]:
    """From where to try to resume, the last first: two in a row, since layers may share by twos, and in the middle."""
    return list(dict.fromkeys((*starts[-1:], *starts[-2:-1], *starts[len(starts) // 2 :][:1])))


def resumes_wrongly(others: Callable[[], Any], agrees: Callable[[Any], bool], starts: Iterable[Any]) -> str:
    """Why no forward can begin at one of these blocks; "" if it can at each.

    Args:
        others: a forward on `exchanged` inputs.
        agrees: whether a forward that begins at a block gives the numbers of a whole one.

    Raises:
        WorkbenchError: as such a forward.
    """
    with suppress(RuntimeError, ValueError, IndexError, TypeError):  # the model may not take its inputs turned
        others()
    for start in starts:
        try:
            if agrees(start):
                continue
        except WorkbenchError:
            raise
        except Exception as error:  # a block that was passed over did more than give its output
            return f"a forward resumed at {start} ends in {type(error).__name__}: {error}"
        return f"a forward resumed at {start} does not give the same numbers"
    return ""


def _copy(value: Any) -> Any:
    """The same with copies of its tensors: the model may write into its own."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


def _numbered(name: str) -> str:
    """A module in a list, which is a block that attends itself; "" for others."""
    return name if name.rpartition(".")[2].isdigit() else ""


def _towers(lists: Sequence[str]) -> list[str]:
    """For each list of blocks, the largest module that holds it and no other list."""
    found = []
    for name in lists:
        parts = name.split(".")
        others = [other.split(".") for other in lists if other != name]
        for end in range(1, len(parts)):
            if all(other[:end] != parts[:end] for other in others):
                found.append(".".join(parts[:end]))
                break
    return found if len(lists) > 1 else []
