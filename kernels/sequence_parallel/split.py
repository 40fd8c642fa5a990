"""A sequence whose parts lie on the processes of a group, in their order, and what is sent between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError


@dataclass
class Sent:
    """What this process has sent, by the name of the operation: how often, and bytes that it gave into it.

    "all_gather" and "all_reduce" are collectives of all processes, "send" goes to the next one of a ring.
    """

    calls: dict[str, int] = field(default_factory=dict)
    n_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        """Count one operation on a tensor."""
        self.calls[name] = self.calls.get(name, 0) + 1
        self.n_bytes[name] = self.n_bytes.get(name, 0) + tensor.numel() * tensor.element_size()

    def clear(self) -> None:
        """Begin again."""
        self.calls.clear()
        self.n_bytes.clear()


@dataclass(frozen=True)
class SplitSequence:
    """Who holds which positions.

    Make it once, with `of`, and hand it to every call: the lengths need not be asked for again.

    Attributes:
        lengths: positions on each process, in the order of the group. rank: of this process.
        group: of `torch.distributed`; None for all processes, or for a process that is alone.
        sent: what this process has sent with it.

    >>> SplitSequence((3, 4), rank=1).here
    range(3, 7)
    """

    lengths: tuple[int, ...]
    rank: int
    group: Any = field(default=None, compare=False, repr=False)
    sent: Sent = field(default_factory=Sent, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise CaptureError(f"parts of a sequence have at least one position each, not {list(self.lengths)}")
        if not 0 <= self.rank < len(self.lengths):
            raise CaptureError(f"there is no process {self.rank} among {len(self.lengths)}")

    @classmethod
    def of(cls, n_here: int, group: Any = None, device: torch.device | str = "cpu") -> SplitSequence:
        """The split in which this process holds `n_here` positions; all processes of the group call it at once.

        Args:
            device: on which the group sends; "cuda" for NCCL.

        Raises:
            CaptureError: a process has no position, or one ended.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return cls((n_here,), 0)
        own = torch.tensor([n_here], device=device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        _done(lambda: dist.all_gather(found, own, group=group))
        return cls(tuple(int(each) for each in found), dist.get_rank(group), group)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """First position of each process."""
        return tuple(sum(self.lengths[:rank]) for rank in range(self.size))

    @property
    def here(self) -> range:
        """The positions of this process."""
        return range(self.starts[self.rank], self.starts[self.rank] + self.lengths[self.rank])

    def check(self, name: str, tensor: Tensor, axis: int = 2) -> None:
        """Refuse a tensor that does not have this process's positions.

        Raises:
            CaptureError: it has others.
        """
        n_here = self.lengths[self.rank]
        if tensor.shape[axis] != n_here:
            raise CaptureError(
                f"{name} has {tensor.shape[axis]} positions, and process {self.rank} of the split {n_here}",
                shape=tensor.shape,
                hint="make the split anew with SplitSequence.of(n_here) where lengths change",
            )

    def gather(self, tensor: Tensor) -> Gathering:
        """Begin to gather a tensor of one shape from all processes; `wait` gives it."""
        if self.size == 1:
            return Gathering([tensor], None)
        import torch.distributed as dist

        tensor = tensor.contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self.sent.add("all_gather", tensor)
        return Gathering(found, _done(lambda: dist.all_gather(found, tensor, group=self.group, async_op=True)))

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor of one shape over all processes."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.contiguous().clone()
        self.sent.add("all_reduce", total)
        _done(lambda: dist.all_reduce(total, group=self.group))
        return total

    def passed_on(self, tensor: Tensor) -> Tensor:
        """What the process before holds, of a tensor of one shape, while this one's goes to the next."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        tensor, found = tensor.contiguous(), torch.empty_like(tensor)
        ranks = [rank if self.group is None else dist.get_global_rank(self.group, rank)
                 for rank in ((self.rank + 1) % self.size, (self.rank - 1) % self.size)]  # fmt: skip
        self.sent.add("send", tensor)

        def send() -> None:
            both = [dist.P2POp(dist.isend, tensor, ranks[0], self.group),
                    dist.P2POp(dist.irecv, found, ranks[1], self.group)]  # fmt: skip
            for work in dist.batch_isend_irecv(both):
                work.wait()

        _done(send)
        return found


@dataclass(frozen=True)
class Gathering:
    """Tensors that are on their way; `wait` gives them, by process."""

    found: Sequence[Tensor]
    work: Any

    def wait(self) -> Sequence[Tensor]:
        """All of them."""
        if self.work is not None:
            _done(self.work.wait)
        return self.found


def _done(send: Callable[[], Any]) -> Any:
    """What the operation gives.

    Raises:
        CaptureError: another process ended, or is at another operation; there is no group of processes.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise CaptureError(
            "a sequence that is split over several processes needs a group of torch.distributed, and there is none",
            hint="start with torchrun, call init_process_group, and make the split with SplitSequence.of(n_here)",
        )
    try:
        return send()
    except RuntimeError as error:
        raise CaptureError(
            f"another process of the group did not answer: {str(error).splitlines()[0][:200]}",
            hint="all processes make the same calls, on tensors of the same shapes, in the same order; one of them "
            "ended, or is elsewhere: look at its own error",
        ) from error
