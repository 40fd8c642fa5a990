"""Models whose heads are split over two processes: all is as of the whole model, and what is elsewhere is said."""

import pytest

from support.processes import found_by
from support.tensor_parallel_ranks import CASES, RANKS, models


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, forked: list[str]) -> list[dict[str, str]]:
    """What each process found wrong, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, model in models().items():
        model.save_pretrained(folder / name)
    return found_by("support.tensor_parallel_ranks", RANKS, folder, forked)


@pytest.mark.parametrize("case", CASES)
def test_a_split_model_is_as_the_whole(found: list[dict[str, str]], case: str) -> None:
    for rank, wrong in enumerate(found):
        assert not wrong[case], f"in process {rank}:\n{wrong[case]}"


def test_a_process_that_ended_is_named(found: list[dict[str, str]]) -> None:
    assert "process 1 of the group (pid " in found[0]["told"]
    assert "has ended" in found[0]["told"]
