"""Models whose heads are split over two processes: all is as of the whole model, and what is elsewhere is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.patience import PATIENCE
from support.tensor_parallel_ranks import CASES, RANKS, models

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each process found wrong, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, model in models().items():
        model.save_pretrained(folder / name)
    known = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "support.tensor_parallel_ranks", str(rank), str(folder)],
            cwd=folder, env=os.environ | known, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    said = []
    try:
        for rank in ranks:
            said.append(rank.communicate(timeout=2 * PATIENCE)[1])
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_a_split_model_is_as_the_whole(found: list[dict[str, str]], case: str) -> None:
    for rank, wrong in enumerate(found):
        assert not wrong[case], f"in process {rank}:\n{wrong[case]}"
