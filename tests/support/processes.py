"""Several processes that run the same module side by side, and what each of them found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.patience import PATIENCE

TESTS = Path(__file__).parents[1]


def found_by(module: str, n: int, folder: Path) -> list[Any]:
    """What `python -m MODULE RANK FOLDER` has written into `FOLDER/RANK.json`, in n processes at once."""
    known = {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(rank), str(folder)],
            cwd=folder, env=os.environ | known, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(n)
    ]  # fmt: skip
    said = []
    try:
        for rank in ranks:
            said.append(rank.communicate(timeout=2 * PATIENCE)[1])
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]
