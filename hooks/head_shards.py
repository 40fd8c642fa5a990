"""The heads of a site that this process holds, where tensor parallelism splits them over several processes.

Nothing is sent while a model runs; what other processes hold is asked for with `HeadShard.gathered`, which all of them
call.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.patterns import in_whole
from workbench.kernels.sequence_parallel.split import SplitSequence


@dataclass(frozen=True)
class HeadShard:
    """The heads that this process holds, by their numbers in the whole model.

    Attributes:
        n_heads, n_kv_heads: of the whole model. first: the first that is here. n_here: how many are.
    """

    n_heads: int
    n_kv_heads: int
    first: int
    n_here: int
    _mesh: weakref.ref[Any] | None = field(default=None, compare=False, repr=False)
    _axis: int = field(default=0, compare=False, repr=False)

    @property
    def here(self) -> range:
        """The numbers of the heads that are here."""
        return range(self.first, self.first + self.n_here)

    def widened(self, tensor: Tensor, axis: int = 1) -> Tensor:
        """A tensor of the heads that are here in one of all; the others are NaN."""
        return in_whole(tensor, self.first, self.n_heads, axis)

    def narrowed(self, tensor: Tensor, axis: int = 1) -> Tensor:
        """The heads that are here of a tensor of all."""
        return tensor.narrow(axis, self.first, self.n_here)

    def gathered(self, tensor: Tensor, axis: int = 1) -> Tensor:
        """A tensor of the heads that are here, or of their groups, as one of all; every process of the group calls it
        at once.

        Raises:
            CaptureError: the processes are not known any more, one has ended, or they do not hold all heads together.
        """
        group = self._group()
        mine = tensor.detach().movedim(axis, 0).contiguous()
        place = torch.tensor([self.first, self.n_here, len(mine)], device=group.device)
        places = [tuple(map(int, each)) for each in group.gather(place).wait()]
        size = prod(mine.shape[1:]) * mine.element_size()
        room = torch.zeros(max(length for *_, length in places) * size, dtype=torch.uint8, device=group.device)
        room[: len(mine) * size] = mine.view(-1).view(torch.uint8).to(group.device)
        sent = group.gather(room).wait()
        done, parts = 0, []
        for (first, n, length), numbers in sorted(zip(places, sent, strict=True), key=lambda one: one[0]):
            if first != done:
                break
            parts.append(numbers[: length * size].to(tensor.device).view(tensor.dtype).view(length, *mine.shape[1:]))
            done += n
        if done != self.n_heads:
            raise CaptureError(f"the processes do not hold all {self.n_heads} heads once: {places}")
        return torch.cat(parts).movedim(0, axis).contiguous()

    def told(self, mine: Any) -> list[Any]:
        """What each process of the group has to say, in their order: values of JSON; every one calls it at once."""
        return self._group().told(mine)

    def _group(self) -> SplitSequence:
        """The processes, for what they send; every one of them calls it at once.

        Raises:
            CaptureError: they are not known any more; one has ended.
        """
        mesh = None if self._mesh is None else self._mesh()
        if mesh is None:
            raise CaptureError(
                "the processes that hold the other heads are not known any more",
                hint="gather while the model is there, and before a capture is saved or pickled",
            )
        known: dict[int, SplitSequence] = vars(mesh).setdefault("_workbench_groups", {})  # as long as it, on all alike
        if self._axis not in known:
            known[self._axis] = SplitSequence.of(1, mesh.get_group(self._axis), mesh.device_type)
        return known[self._axis]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mesh": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadShard:
        return self
