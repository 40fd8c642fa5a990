"""What each of two processes of a split model does until one of them ends, for benchmarks/kills.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import workbench
from support.split_model_ranks import IDS, LENGTHS, Stage, llama
from support.tensor_parallel_ranks import Attention, by_hand
from workbench.kernels.sequence_parallel import SplitSequence

DIED = 9


def save_always() -> None:
    """Whatever is done is kept at once."""
    from workbench.analysis.circuits.patching import running
    from workbench.analysis.corpus import run as corpus
    from workbench.analysis.saliency import estimate
    from workbench.sweep import run

    running._SAVE_EVERY = run._SAVE_EVERY = estimate._SAVE_EVERY = corpus._SAVED_EVERY = 0.0


def captures(rank: int, folder: Path, at: int | None) -> None:
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    end_at_exchange(rank, at)
    with torch.no_grad(), workbench.attach(model) as wb:
        for _ in turns(at):
            with wb.capture(["entropy", "received"]) as cap:
                run(model, split)
            cap.gathered(split=split)


def ablations(rank: int, folder: Path, at: int | None) -> None:
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    end_at_exchange(rank, at)
    with torch.no_grad(), workbench.attach(model) as wb, wb.ablate((0, 1)):
        for _ in turns(at):
            run(model, split)


def gradients(rank: int, folder: Path, at: int | None) -> None:
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    end_at_exchange(rank, at)
    with workbench.attach(model) as wb:
        for _ in turns(at):
            with wb.capture(["entropy"], gradients=True):
                run(model, split).sum().backward()


def sweeps(rank: int, folder: Path, at: int | None) -> None:
    """Of a sequence in two parts."""
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    here = torch.arange(split.here.start, split.here.stop)
    batch = {"input_ids": IDS[:, here], "position_ids": here.expand(len(IDS), -1)}
    end_at_exchange(rank, at)
    with workbench.split_over(split):
        swept(model, batch, folder / f"{rank}.safetensors")


def weights(rank: int, folder: Path, at: int | None) -> None:
    """Sweeps of a model whose weights are cut by FSDP2."""
    from torch.distributed.fsdp import fully_shard

    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    end_at_forward(model, rank, at)
    swept(model, {"input_ids": IDS}, folder / f"{rank}.safetensors")


def heads(rank: int, folder: Path, at: int | None) -> None:
    """Sweeps of a model whose heads are split."""
    _, model = by_hand(Attention, counts_its_own=False)
    end_at_forward(model.blocks[1], rank, at)
    swept(model, {"input_ids": IDS}, folder / f"{rank}.safetensors")


def stages(rank: int, folder: Path, at: int | None) -> None:
    """Captures of a model whose layers are split."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = Stage(llama(), rank)
    schedule = ScheduleGPipe(PipelineStage(stage, rank, 2, torch.device("cpu")), 1)
    given = [IDS] if rank == 0 else []
    with torch.no_grad(), workbench.attach(stage) as wb:
        schedule.step(*given)
        end_at_forward(stage, rank, at)
        for _ in turns(at):
            with wb.capture(["entropy"]) as cap:
                schedule.step(*given)
            cap.gathered(stages=SplitSequence.of(1))


RANKS = {one.__name__: one for one in (captures, ablations, gradients, sweeps, weights, heads, stages)}
RESUMED = ("sweeps", "weights", "heads")


def turns(at: int | None) -> Iterator[None]:
    """One; without end where a process is to be killed."""
    yield
    while at is not None:
        yield


def run(model: Any, split: SplitSequence) -> Any:
    here = torch.arange(split.here.start, split.here.stop)
    with workbench.split_over(split):
        return model(input_ids=IDS[:, here], position_ids=here[None], use_cache=False).logits


def swept(model: Any, batch: dict[str, Any], path: Path) -> None:
    save_always()
    variants = [workbench.Variant((layer, head)) for layer in range(2) for head in range(4)]
    with workbench.attach(model) as wb:
        workbench.run_sweep(wb, variants, [batch, batch], last, batched=False, resume=path, progress=False)


def last(output: Any, batch: Any) -> Any:
    return getattr(output, "logits", output)[:, -1, 7].double()


def end_at_exchange(rank: int, at: int | None) -> None:
    """The second process ends when it has exchanged so often."""
    left, begin = at, SplitSequence._begun

    def counted(self: SplitSequence, what: str, send: Any) -> Any:
        nonlocal left
        if rank == 1 and left is not None:
            left -= 1
            if left < 0:
                os._exit(DIED)
        return begin(self, what, send)

    SplitSequence._begun = counted  # type: ignore[method-assign]


def end_at_forward(module: Any, rank: int, at: int | None) -> None:
    left = at

    def hook(module: Any, args: Any) -> None:
        nonlocal left
        if rank == 1 and left is not None:
            left -= 1
            if left < 0:
                os._exit(DIED)

    module.register_forward_pre_hook(hook)  # behind the last forward the other process would miss nothing
