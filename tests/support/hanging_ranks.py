"""One of two processes takes no part any more, and what the other is told: cases of `support.split_model_ranks`.

Each has a group of its own, which it breaks. Patience is short only where nobody comes, so that nothing depends on how
fast the processes are.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import workbench
from support.tensor_parallel_ranks import Attention, Stack, by_hand
from workbench.errors import CaptureError
from workbench.kernels.sequence_parallel import SplitSequence, roll

SHORT = 1.5  # seconds, more than `roll.SLOW`
IDS = torch.arange(3, 14)[None]
Act = Callable[[], Any]


def hurried(group: Any) -> None:
    """A group's operations give up soon from now on."""
    for backend in roll.backends(group):
        backend._set_default_timeout(timedelta(seconds=SHORT))


def told(act: Act) -> str:
    try:
        act()
    except CaptureError as error:
        return str(error)
    return "nothing"


def left_alone(rank: int, gone: int, act: Act, group: Any, how: str = "hangs") -> str:
    """What a process is told by an act that another takes no part in: it hangs in its own code, or is stopped."""
    store, over = _get_default_store(), f"{how} {group.group_name}"
    store.set(f"{over} pid {rank}", str(os.getpid()))
    dist.barrier()
    if rank == gone:
        store.wait([over])
        return ""
    pid = int(store.get(f"{over} pid {gone}"))
    hurried(group)
    if how == "stopped":
        os.kill(pid, signal.SIGSTOP)
    try:
        return told(act)
    finally:
        os.kill(pid, signal.SIGCONT)
        store.set(over, "over")


def hangs_or_is_stopped(rank: int) -> None:
    """The other process is named, and what it does, whichever way a model is split; then patience is as it was."""
    wrong = {}
    for split_by in (by_positions, by_heads, by_weights, by_layers):
        how, what = ("stopped", "is stopped") if split_by is by_heads else ("hangs", "is there, but hangs or is slow")
        gone = 0 if split_by is by_layers else 1  # a stage that only sends waits for nobody
        group = dist.new_group()
        said = left_alone(rank, gone, split_by(rank, group), group, how)
        if rank != gone and not (said.startswith(f"process {gone} of the group (pid ") and what in said):
            wrong[split_by.__name__] = said
        kept = timedelta(minutes=30) if rank == gone else timedelta(seconds=SHORT)
        if [backend.options._timeout for backend in roll.backends(group)] != [kept]:
            wrong[f"patience, {split_by.__name__}"] = ""
        dist.barrier()
    assert not wrong, wrong


def is_elsewhere(rank: int) -> None:
    """Captures that are put together in another order."""
    group = dist.new_group()
    split = SplitSequence.of(4, group)
    dist.barrier()
    hurried(group)
    split, store = replace(split, patience=SHORT), _get_default_store()
    if rank:
        assert "did not answer" in told(lambda: split.summed(torch.ones(3)))
    else:
        while not store.check(["workbench/at/1"]) or store.get("workbench/at/1") == b"null":
            time.sleep(0.01)
        said = told(lambda: split.gather(torch.ones(2, 5)).wait())
        assert "waits for all_reduce of float32 [3], this one for all_gather of float32 [2, 5]" in said, said
    dist.barrier()


def captured(model: nn.Module, run: Act) -> Act:
    def act() -> None:
        with torch.no_grad(), workbench.attach(model) as wb, wb.capture(["entropy"]):
            run()

    run()  # while all are there; a pipeline finds its shapes
    act()
    return act


def by_positions(rank: int, group: Any) -> Act:
    split = SplitSequence.of(4, group)
    hasty = replace(split, patience=SHORT)
    split.summed(torch.ones(2))
    return lambda: hasty.summed(torch.ones(2))


def by_heads(rank: int, group: Any) -> Act:
    _, part = by_hand(Attention, counts_its_own=False, mesh=DeviceMesh.from_group(group, "cpu"))
    return captured(part, lambda: part(IDS))


def by_weights(rank: int, group: Any) -> Act:
    whole = Stack(Attention).eval()
    for block in (*whole.blocks, whole):
        fully_shard(block, mesh=DeviceMesh.from_group(group, "cpu"))
    return captured(whole, lambda: whole(IDS))


class Stage(nn.Module):
    """Attention that a pipeline runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def by_layers(rank: int, group: Any) -> Act:
    stage = Stage().eval()
    schedule = ScheduleGPipe(PipelineStage(stage, rank, 2, torch.device("cpu"), group=group), 1)
    given = [torch.randn(1, 5, 32)] if rank == 0 else []
    return captured(stage, lambda: schedule.step(*given))
