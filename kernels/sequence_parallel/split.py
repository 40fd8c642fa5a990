"""A sequence whose parts lie on the processes of a group, in their order, and what is sent between them."""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError

PATIENCE = 50.0  # seconds: others are told within a minute


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
    patience: float = field(default=PATIENCE, compare=False, repr=False)
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
            patience: seconds after which a process that does not answer is an error in the others; 50 by default.

        Raises:
            CaptureError: a process has no position, or one ended.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return cls((n_here,), 0)
        patience = PATIENCE if patience is None else patience
        own = torch.tensor([n_here, uuid.getnode(), os.getpid()], device=device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        done(lambda: dist.all_gather(found, own, group=group, async_op=True), patience)
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
        return Gathering(found, self._begun(lambda: dist.all_gather(found, tensor, group=self.group, async_op=True)))

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor of one shape over all processes."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.contiguous().clone()
        self.sent.add("all_reduce", total)
        self._begun(lambda: dist.all_reduce(total, group=self.group, async_op=True))()
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
        self._begun(lambda: dist.broadcast(tensor, source, group=self.group, async_op=True))()
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

        self._begun(send)()
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

    def _begun(self, send: Callable[[], Any]) -> Callable[[], None]:
        """Begin an operation; what is given waits for it."""
        works = done(send, None, self.members)
        several = works if isinstance(works, list) else [works]

        def wait() -> None:
            for work in several:
                done(lambda work=work: work, self.patience, self.members)  # type: ignore[misc]

        return wait


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


def done(begin: Callable[[], Any], patience: float | None, members: Sequence[tuple[int, int]] = ()) -> Any:
    """Begin an operation of a group and, where a patience is given, wait for it; gives its work.

    Raises:
        CaptureError: another process ended, which is named where that can be seen, or is at another operation; there is
            no group of processes.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise CaptureError(
            "a sequence that is split over several processes needs a group of torch.distributed, and there is none",
            hint="start with torchrun, call init_process_group, and make the split with SplitSequence.of(n_here)",
        )
    try:
        work = begin()
        if patience is not None and work is not None:
            work.wait(datetime.timedelta(seconds=patience))
        return work
    except RuntimeError as error:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if isinstance(error, torch.OutOfMemoryError) or "alloc" in said.lower():
            raise  # of this process
        raise CaptureError(
            f"{ended(members) or 'another process of the group'} did not answer: {said}",
            hint="all processes make the same calls, on tensors of the same shapes, in the same order; one of them "
            "ended, or is elsewhere: look at its own error",
        ) from error


def ended(members: Sequence[tuple[int, int]]) -> str:
    """The first process that is not there any more, as far as they ran on this machine, "… has ended and"; or nothing.

    Args:
        members: of each process, a number of its machine and its own there.
    """
    for _ in range(10):  # one that has broken off its connections may need a moment to end
        here = [(rank, pid) for rank, (machine, pid) in enumerate(members) if machine == uuid.getnode()]
        gone = [f"process {rank} of the group (pid {pid}) has ended and" for rank, pid in here if not _runs(pid)]
        if gone:
            return gone[0]
        time.sleep(0.05)
    return ""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # one that has ended, and that its parent has not asked about, is still listed
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True
