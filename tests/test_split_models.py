"""Models on several processes, by positions, shards and stages: captures, edits and sweeps are those of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import workbench
from support.circuits import Words, random_task
from support.processes import found_by
from support.split_model_ranks import CASES, IDS, RANKS, close, llama
from workbench.errors import CaptureError
from workbench.kernels.sequence_parallel import SplitSequence, roll

WHOLE: dict[str, Callable[[Any], object]] = {
    "importance by gradients": lambda wb: workbench.head_importance(
        wb, [{"input_ids": IDS}], lambda y, b: y.logits[:, -1, 7], ("ablation", "gradient"), progress=False
    ),
    "saliency": lambda wb: workbench.saliency(wb, {"input_ids": IDS[:1]}, hypothesis=[7], progress=False),
    "rollout": lambda wb: workbench.attention_rollout(wb, {"input_ids": IDS[:1]}),
    "logit lens": lambda wb: workbench.logit_lens(wb, {"input_ids": IDS[:1]}),
    "circuits": lambda wb: workbench.patch_layers(wb, random_task(3, 5, 60), metric="kl_divergence", progress=False),
    "corpora": lambda wb: workbench.head_atlas_over(wb, [IDS.flatten()], tokens=None, length=9, progress=False),
    "capacity": lambda wb: workbench.capacity(wb, [{"input_ids": IDS}], progress=False),
    "conditioning": lambda wb: workbench.conditioning(wb, cues=range(3, 50), progress=False),
}
"""Analyses that look at all positions at once, one for each place where they begin."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, forked: list[str]) -> list[dict[str, dict[str, str]]]:
    """What each process found wrong, and what the second was told when the first had ended."""
    folder = tmp_path_factory.mktemp("ranks")
    return found_by("support.split_model_ranks", RANKS, folder, forked)


@pytest.mark.parametrize("case", CASES)
def test_a_part_is_as_the_whole(found: list[dict[str, dict[str, str]]], case: str) -> None:
    for rank, each in enumerate(found):
        assert not each["wrong"][case], f"in process {rank}:\n{each['wrong'][case]}"


@pytest.mark.parametrize("split_by", ["positions", "layers"])
def test_a_process_that_ended_is_named(found: list[dict[str, dict[str, str]]], split_by: str) -> None:
    assert found[1]["told"][split_by].startswith("process 0 of the group (pid ")
    assert "has ended" in found[1]["told"][split_by]


def test_those_who_do_not_answer_are_told_from_those_who_wait_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what each has said in the store: of five, two say nothing, then one; then one is elsewhere, then nobody."""
    store, known = dist.HashStore(), {rank: (1, 100 + rank) for rank in range(5)}
    monkeypatch.setattr(roll, "_store", lambda: (store, 0))

    def says(rank: int, what: str | None) -> str:
        store.set(f"workbench/at/{rank}", json.dumps(what))
        return roll.absent("sums", range(5), known, 0.1)

    for rank in (1, 2):
        store.set(f"workbench/at/{rank}", json.dumps("sums"))
    assert "process 3 of the group (pid 103) or process 4 of the group (pid 104) is there" in says(2, "sums")
    assert says(3, "rows").startswith("process 4 of the group (pid 104) is there, but hangs")
    assert says(4, "sums").startswith("process 3 of the group (pid 103) waits for rows, this one for sums")
    assert not says(3, "sums")
    assert "process 3 of the group (pid 103) is there" in says(3, None)  # it has gone on since
    known[2] = roll.here()[0], 2**22 + 1  # of no process
    assert says(3, "sums").startswith(f"process 2 of the group (pid {2**22 + 1}) has ended")


def test_patience_is_that_of_the_group(tmp_path: Path) -> None:
    """What was asked for, or less than a minute."""
    for seconds, want in ((None, roll.PATIENCE), (7, 7.0)):
        asked = {} if seconds is None else {"timeout": timedelta(seconds=seconds)}
        dist.init_process_group("gloo", f"file://{tmp_path}/{seconds}", world_size=1, rank=0, **asked)
        try:
            assert roll.patience_of() == roll.patience_of(dist.new_group()) == want < 60
        finally:
            dist.destroy_process_group()


def test_one_process_is_the_whole() -> None:
    model, alone = llama(), SplitSequence.of(IDS.shape[1])
    with torch.no_grad(), workbench.attach(model) as wb, workbench.split_over(alone), wb.capture() as cap:
        found = model(input_ids=IDS, use_cache=False).logits
    with torch.no_grad():
        close(found, model(input_ids=IDS).logits)
    assert cap.bytes_to_gather(alone) == 0
    close(cap.gathered(split=alone)[1].entropy, cap[1].entropy)


@pytest.mark.parametrize("analysis", WHOLE)
def test_what_reads_whole_sequences_is_refused_in_parts(analysis: str) -> None:
    """Before anything runs: each process would take its own part for the whole."""
    model = llama()
    ran: list[object] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with workbench.attach(model, Words()) as wb, workbench.split_over(SplitSequence.of(IDS.shape[1])):
        with pytest.raises(CaptureError, match="reads whole sequences, and inside split_over") as refused:
            WHOLE[analysis](wb)
        assert "call it outside" in str(refused.value)
    assert not ran


def test_out_of_memory_is_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong here while something is sent is raised as it is."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)

    def full() -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        SplitSequence((1,), 0)._done("", full)
