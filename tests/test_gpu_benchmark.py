"""`benchmarks/gpu.py` in Triton's interpreter on tiny sizes, so that it works on the day that a GPU is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_it_runs_on_tiny_sizes(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "support.interpreter", str(SCRIPT)]
    command += ["--tiny", "--json", str(tmp_path / "found.json")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert max(found["errors"]["float32"].values()) < 1e-4
    wanted = {"lightning", "lightning, backward", "scan", "scan, backward", "attention"}
    wanted |= {"statistics, window", "statistics, shaped", "statistics, fading", "attention, backward"}
    assert wanted <= set(found["errors"]["float32"])
    assert [row["N"] for row in found["statistics"]] == [64]
    assert found["statistics"][0]["masked"] > 0
    assert found["mechanisms"]["S2 over SDPA"] > 0
    assert found["mechanisms"]["lightning's statistics over SDPA"] > 0
    assert found["model"]["compiled"] > 0
    assert not found["left_out"]
    assert "in Triton's interpreter" in done.stdout
