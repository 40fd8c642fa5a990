"""Attention over sequences that are split over processes: values, gradients and statistics are those of one process."""

from __future__ import annotations

import re

import pytest
import torch

from support.processes import found_by
from support.sequence_ranks import CASES, RANKS, compare, statistics, tensors
from workbench.errors import CaptureError
from workbench.kernels.lightning import lightning_attention
from workbench.kernels.sequence_parallel import SplitSequence, split_attention, split_lightning_attention


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, forked: list[str]) -> list[dict[str, object]]:
    """What each of four processes found wrong, and what it was told when one of them had ended."""
    folder = tmp_path_factory.mktemp("ranks")
    return found_by("support.sequence_ranks", RANKS, folder, forked)


@pytest.mark.parametrize("case", CASES)
def test_a_split_sequence_is_as_the_whole(found: list[dict[str, dict[str, str]]], case: str) -> None:
    for rank, each in enumerate(found):
        wrong = {name: said for name, said in each["wrong"].items() if name.split()[0] == case}
        assert not wrong, f"in process {rank}:\n" + "\n".join(wrong.values())


def test_where_a_process_ended_the_others_are_told(found: list[dict[str, str]]) -> None:
    """Others may have ended for it by then, and are named beside it."""
    for each in found[:-1]:
        assert re.search(r"process 3 of the group \(pid \d+\) has ended and did not answer", each["told"])


@pytest.mark.parametrize("how", ["lasp", "lasp_whole", "gather", "ring", "ring_whole"])
def test_a_process_that_is_alone(how: str) -> None:
    split = SplitSequence.of(19)
    compare(how, split)
    assert not split.sent.calls


def test_statistics_of_one_process() -> None:
    statistics(SplitSequence((17,), 0))


def test_parts_run_one_after_another_are_the_whole() -> None:
    """The sums by hand: a part reads the states of those before it, faded by the positions between."""
    q, k, v, _ = (t.detach() for t in tensors(23, kv=4))
    lengths, decay = (5, 9, 1, 8), torch.tensor([1.0, 0.9, 0.3, 1e-9], dtype=torch.float64)
    parts, state = [], None
    for part in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True):
        out, state = lightning_attention(*part, decay, initial_state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), lightning_attention(q, k, v, decay), rtol=1e-12, atol=1e-12)
    alone = split_lightning_attention(q, k, v, SplitSequence((23,), 0), decay)
    torch.testing.assert_close(alone, torch.cat(parts, dim=2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lengths", "rank", "says"), [((3, 0), 0, "at least one"), ((3, 4), 2, "no process 2")])
def test_splits_that_cannot_be(lengths: tuple[int, ...], rank: int, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        SplitSequence(lengths, rank)


def test_bad_input_is_named() -> None:
    q, k, v, _ = (t.detach() for t in tensors(6))
    with pytest.raises(CaptureError, match="gather or ring"):
        split_attention(q, k, v, SplitSequence((6,), 0), how="broadcast")  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="there is none"):
        split_attention(q, k, v, SplitSequence((6, 3), 0))
    with pytest.raises(CaptureError, match="5 positions, and process 0 of the split 6"):
        split_attention(q[:, :, :5], k[:, :, :5], v[:, :, :5], SplitSequence((6,), 0))
