"""How a capture keeps the tensors of a call: as copies, by reference where that is safe and saves much, or in the
host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from workbench.capture.arena import Arena
from workbench.capture.site_capture import Forward
from workbench.kernels.checks import place_of
from workbench.kernels.patterns import Pattern

_LAST = 4  # masks that may come again: models have one or two, in turns


class Keeper:
    """Keeps the tensors of one call.

    Args:
        compiled: the call is of compiled code, which writes over its tensors.
        mask_key: of such a call, what tells its mask (`AttentionCall.mask_key`).

    Attributes:
        held: what is kept by reference, with its version.
    """

    def __init__(self, arena: Arena, masks: Masks, *, compiled: bool = False, mask_key: Hashable | None = None) -> None:
        self.arena, self.masks = arena, masks
        self.compiled, self.mask_key = compiled, mask_key
        self.held: list[tuple[Tensor, int]] = []

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a part of a pattern; the values stay the model's own until it is clear whether they are wanted."""
        if name == "values":
            return tensor
        if name == "mask":
            return self.masks.copy(tensor, self.mask_key) if self.compiled else self.shared(tensor)
        return self(tensor)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Keep a tensor that belongs to one call."""
        part_of_more = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        if self.compiled or tensor.device.type == "cpu" or part_of_more or tensor.is_inference():
            # A slice would hold the whole packed projection or cache; an inference tensor cannot tell of changes.
            return self.arena.copy(tensor)
        return self.shared(tensor)

    def shared(self, tensor: Tensor) -> Tensor:
        """Keep a tensor that several calls may share, by reference, noting its version."""
        tensor = tensor.detach()  # its history would hold on to the model's weights
        if not tensor.is_inference():
            self.held.append((tensor, tensor._version))
        return tensor


class Masks:
    """Copies of masks, one for all layers that have the same.

    What is the same is told by its key. Where that does not tell, numbers are compared: at once on the CPU, and
    elsewhere on the device, whose answer is asked for once, at the end.

    Args:
        make: makes a copy.
    """

    def __init__(self, make: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self._make = make
        self._last: list[tuple[Hashable | None, Tensor]] = []
        self._in_doubt: list[tuple[Tensor, Tensor, Tensor]] = []  # copy, an earlier one, whether they are the same

    def copy(self, mask: Tensor, key: Hashable | None) -> Tensor:
        """A copy, which may be that of an earlier mask."""
        mask = mask.detach()
        alike = [(known, kept) for known, kept in reversed(self._last) if _place(kept) == _place(mask)]
        for known, kept in alike:
            if (key is not None and known == key) or (not is_away(mask.device) and torch.equal(kept, mask)):
                return kept
        made = self._make(mask)
        if alike and is_away(mask.device):
            self._in_doubt.append((made, alike[0][1], (made == alike[0][1]).all()))
        self._last = [*self._last[1 - _LAST :], (key, made)]
        return made

    def settle(self) -> dict[int, Tensor]:
        """By the id of a copy, the earlier one that it is the same as; for this the host waits for the device once."""
        doubts, self._in_doubt = self._in_doubt, []
        self._last.clear()
        if not doubts:
            return {}
        same: dict[int, Tensor] = {}
        answers = torch.stack([answer.to(doubts[0][2].device) for *_, answer in doubts]).tolist()
        for (made, before, _), answer in zip(doubts, answers, strict=True):
            if answer:
                same[id(made)] = same.get(id(before), before)
        return same


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def is_away(device: torch.device) -> bool:
    """Whether what lies there is not in the host's memory."""
    return device.type != "cpu"


@dataclass
class Landing:
    """What of patterns is on its way to the host's memory: pinned, so that the device copies while the host goes on.

    Copies stand in the device's own order, behind what made the tensors and before what may write over them.
    """

    n_bytes: int = 0
    _masks: list[tuple[Tensor, tuple[Any, ...], Tensor]] = field(default_factory=list)
    _begun: dict[Any, Any] = field(default_factory=dict)  # by device and stream, what was asked for last

    def of(self, pattern: Pattern) -> Callable[[], Pattern]:
        """Begin to copy a pattern; to be called once it has landed, for the pattern there."""
        facts, tensors = pattern.state()
        moved = {name: self._mask(t) if name == "mask" else self._begin(t) for name, t in tensors.items()}
        before, made = pattern.before, type(pattern)
        gone = None if before is None else self._begin(before)

        def landed() -> Pattern:
            found = made.rebuild(facts, moved)
            found.before = gone
            return found

        return landed

    def _mask(self, mask: Tensor) -> Tensor:
        """Layers share theirs, which is held until it has landed."""
        at = None if mask.is_inference() else (mask.data_ptr(), mask.dtype, *place_of(mask))
        for _, known, kept in self._masks:
            if at is not None and known == at:
                return kept
        moved = self._begin(mask)
        if at is not None:
            self._masks = [*self._masks[1 - _LAST :], (mask, at, moved)]
        return moved

    def _begin(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        host = _pinned(tensor)
        _send(tensor, host)
        self.n_bytes += host.nbytes
        self._note(tensor.device)
        return host

    def _note(self, device: torch.device) -> None:
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            event = self._begun.setdefault((device, stream), torch.cuda.Event())
            event.record(stream)

    def wait(self) -> None:
        """Until all has landed."""
        self._masks.clear()
        for event in self._begun.values():
            event.synchronize()
        self._begun.clear()


@dataclass(frozen=True)
class UnderWay:
    """What of a site's call in a forward is on its way to the host: its pattern and further maps, and their bytes."""

    forward: Forward
    site: str
    pattern: Callable[[], Pattern]
    others: dict[str, Callable[[], Pattern]]
    nbytes: int

    @classmethod
    def begun(
        cls, landing: Landing, forward: Forward, site: str, pattern: Pattern, others: Mapping[str, Pattern]
    ) -> UnderWay:
        """The copies are begun."""
        before = landing.n_bytes
        goes = landing.of(pattern), {name: landing.of(one) for name, one in others.items()}
        return cls(forward, site, *goes, landing.n_bytes - before)

    def arrive(self) -> None:
        """All has landed: the site has its pattern, unless it was taken back."""
        known = self.forward.sites.get(self.site)
        if known is not None:
            others = {name: made() for name, made in self.others.items()}
            self.forward.sites[self.site] = replace(known, lazy=self.pattern(), others=others)


def _send(tensor: Tensor, host: Tensor) -> None:
    host.copy_(tensor, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
