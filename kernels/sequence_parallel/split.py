"""A sequence whose parts lie on the processes of a group, in their order, and what is sent between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.sequence_parallel import roll


@dataclass
class Sent:
    """What this process has sent, by the name of the operation: how often, and bytes that it gave into it.

    "all_gather" and "all_reduce" are collectives of all processes, "broadcast" goes to all others, "send" to the next
    one of a ring.
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
        patience: seconds that an operation waits for the other processes.
        members: of each process, a number of its machine and its own there; empty where they were not asked.
        device: on which the group sends.
        sent: what this process has sent with it.

    >>> SplitSequence((3, 4), rank=1).here
    range(3, 7)
    """

    lengths: tuple[int, ...]
    rank: int
    group: Any = field(default=None, compare=False, repr=False)
    patience: float = field(default=roll.PATIENCE, compare=False, repr=False)
    members: tuple[tuple[int, int], ...] = field(default=(), compare=False, repr=False)
    device: torch.device | str = field(default="cpu", compare=False, repr=False)
    sent: Sent = field(default_factory=Sent, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise CaptureError(f"parts of a sequence have at least one position each, not {list(self.lengths)}")
        if not 0 <= self.rank < len(self.lengths):
            raise CaptureError(f"there is no process {self.rank} among {len(self.lengths)}")

    @classmethod
    def of(
        cls, n_here: int, group: Any = None, device: torch.device | str = "cpu", *, patience: float | None = None
    ) -> SplitSequence:
        """The split in which this process holds `n_here` positions; all processes of the group call it at once.

        Args:
            device: on which the group sends; "cuda" for NCCL.
            patience: seconds after which a process that does not answer is an error in the others; by default what
                `init_process_group(timeout=…)` says, or 50.

        Raises:
            CaptureError: a process has no position, or one ended.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return cls((n_here,), 0)
        patience = roll.patience_of(group) if patience is None else patience
        roll.enter()
        own = torch.tensor([n_here, *roll.here()], device=device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        asked = cls((1,), 0, group, patience, device=device)
        asked._begun("the beginning of a split", lambda: dist.all_gather(found, own, group=group, async_op=True))()
        told = [tuple(each.tolist()) for each in found]
        members = tuple((machine, pid) for _, machine, pid in told)
        return cls(tuple(n for n, *_ in told), dist.get_rank(group), group, patience, members, device)

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
        send = lambda: dist.all_gather(found, tensor, group=self.group, async_op=True)  # noqa: E731
        return Gathering(found, self._begun(_called("all_gather", tensor), send))

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor of one shape over all processes."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.contiguous().clone()
        self.sent.add("all_reduce", total)
        self._begun(_called("all_reduce", total), lambda: dist.all_reduce(total, group=self.group, async_op=True))()
        return total

    def sent_by(self, rank: int, tensor: Tensor) -> Tensor:
        """What one process holds, in all of them, where it has one shape."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        tensor = tensor.contiguous() if rank == self.rank else torch.empty_like(tensor)
        source = rank if self.group is None else dist.get_global_rank(self.group, rank)
        if rank == self.rank:
            self.sent.add("broadcast", tensor)
        send = lambda: dist.broadcast(tensor, source, group=self.group, async_op=True)  # noqa: E731
        self._begun(_called("broadcast", tensor), send)()
        return tensor

    def passed_on(self, tensor: Tensor) -> Tensor:
        """What the process before holds, of a tensor of one shape, while this one's goes to the next."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        tensor, found = tensor.contiguous(), torch.empty_like(tensor)
        ranks = [rank if self.group is None else dist.get_global_rank(self.group, rank)
                 for rank in ((self.rank + 1) % self.size, (self.rank - 1) % self.size)]  # fmt: skip
        self.sent.add("send", tensor)

        def send() -> list[Any]:
            return dist.batch_isend_irecv([
                dist.P2POp(dist.isend, tensor, ranks[0], self.group),
                dist.P2POp(dist.irecv, found, ranks[1], self.group),
            ])  # fmt: skip

        self._begun(_called("send", tensor), send)()
        return found

    def told(self, mine: Any) -> list[Any]:
        """What each process has to say, in their order: small values of Python."""
        if self.size == 1:
            return [mine]
        text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([len(text)], device=self.device)).wait()
        room = torch.zeros(max(int(n) for n in lengths), dtype=torch.uint8, device=self.device)
        room[: len(text)] = text.to(self.device)
        each = self.gather(room).wait()
        return [json.loads(bytes(one[: int(n)].tolist())) for one, n in zip(each, lengths, strict=True)]

    def _begun(self, what: str, send: Callable[[], Any]) -> Callable[[], None]:
        """Begin an operation; what is given waits for it."""
        works = self._done(what, partial(_entered, send))
        several = works if isinstance(works, list) else [works]
        again = not isinstance(works, list) and torch.device(self.device).type == "cpu"

        def wait() -> None:
            for work in several:
                self._done(what, lambda work=work: roll.waited(work, what, self.patience, again=again))  # type: ignore

        return wait

    def _done(self, what: str, act: Callable[[], Any]) -> Any:
        """What an act of a group gives.

        Raises:
            CaptureError: another process ended, hangs or is at another operation, and is named where that can be seen;
                there is no group of processes.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise CaptureError(
                "a sequence that is split over several processes needs a group of torch.distributed, and there is none",
                hint="start with torchrun, call init_process_group, and make the split with SplitSequence.of(n_here)",
            )
        try:
            return act()
        except RuntimeError as error:
            said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            if isinstance(error, torch.OutOfMemoryError) or "alloc" in said.lower():
                raise  # of this process
            ranks = dist.get_process_group_ranks(self.group)
            known = dict(zip(ranks, self.members, strict=True)) if self.members else {}
            who = roll.absent(what, ranks, known, self.patience) or "another process of the group"
            raise CaptureError(f"{who} did not answer: {said}", hint=roll.HINT) from error


def _entered(send: Callable[[], Any]) -> Any:
    roll.enter()
    return send()


def _called(name: str, tensor: Tensor) -> str:
    """An operation in words that are the same in all processes that call it."""
    return f"{name} of {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@dataclass(frozen=True)
class Gathering:
    """Tensors that are on their way; `wait` gives them, by process."""

    found: Sequence[Tensor]
    work: Callable[[], None] | None

    def wait(self) -> Sequence[Tensor]:
        """All of them."""
        if self.work is not None:
            self.work()
        return self.found
