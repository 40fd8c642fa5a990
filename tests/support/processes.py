"""Several processes that run the same module side by side, and what each of them found."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.patience import PATIENCE

TESTS = Path(__file__).parents[1]


def found_by(module: str, n: int, folder: Path, command: Sequence[str]) -> list[Any]:
    """What `COMMAND MODULE RANK FOLDER` has written into `FOLDER/RANK.json`, in n processes at once."""
    known = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ranks: list[subprocess.Popen[str]] = []
    said = []
    try:
        for rank in range(n):
            ranks.append(
                subprocess.Popen(
                    [*command, module, str(rank), str(folder)],
                    cwd=folder, env=known, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        for one in ranks:
            said.append(one.communicate(timeout=2 * PATIENCE)[1])
    finally:
        for one in ranks:
            one.kill()
    assert all(one.returncode == 0 for one in ranks), "\n".join(said)[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]
