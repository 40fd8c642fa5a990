"""Models on several processes, by positions, shards and stages: captures, edits and sweeps are those of one."""

from __future__ import annotations

import pytest
import torch

import workbench
from support.processes import found_by
from support.split_model_ranks import CASES, IDS, RANKS, close, llama
from workbench.kernels.sequence_parallel import SplitSequence, split


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, str]]]:
    """What each process found wrong, and what it was told when the other had ended."""
    return found_by("support.split_model_ranks", RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_a_part_is_as_the_whole(found: list[dict[str, dict[str, str]]], case: str) -> None:
    for rank, each in enumerate(found):
        assert not each["wrong"][case], f"in process {rank}:\n{each['wrong'][case]}"


def test_a_process_that_ended_is_named(found: list[dict[str, str]]) -> None:
    assert "process 1 of the group (pid " in found[0]["told"]
    assert "has ended" in found[0]["told"]


def test_one_process_is_the_whole() -> None:
    model, alone = llama(), SplitSequence.of(IDS.shape[1])
    with torch.no_grad(), workbench.attach(model) as wb, workbench.split_over(alone), wb.capture() as cap:
        found = model(input_ids=IDS, use_cache=False).logits
    with torch.no_grad():
        close(found, model(input_ids=IDS).logits)
    assert cap.bytes_to_gather(alone) == 0
    close(cap.gathered(split=alone)[1].entropy, cap[1].entropy)


def test_out_of_memory_is_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong here while something is sent is raised as it is."""
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)

    def full() -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        split.done(full, None)
