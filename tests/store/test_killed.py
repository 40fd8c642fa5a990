"""kill -9 at any moment of writing leaves a store that opens and holds every finished forward."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import workbench

sys.path.insert(0, str(Path(__file__).parent))
import killed_writer

TIMES = 50


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@torch.no_grad()
def test_killed_fifty_times(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    command = [sys.executable, str(killed_writer.__file__), str(path), str(TIMES)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    found = [[int(n) for n in line.split()] for line in run.stdout.splitlines()]
    assert len(found) == TIMES
    for finished, held in found:
        assert finished <= held <= finished + 1  # the last may be in the store, and its writer not have said so
    done = found[-1][1]
    model = killed_writer.model()
    with workbench.attach(model) as wb:
        with wb.capture(("entropy", "received"), store=path):  # mends what the last one left half done
            model(killed_writer.inputs(done))
        opened = workbench.load_capture(path)
        assert len(opened.forwards) == done + 1
        for i in {*range(0, done, 7), *range(done - 5, done + 1), *(held for _, held in found)}:
            with wb.capture(("entropy", "received")) as alone:
                model(killed_writer.inputs(i))
            for name in ("entropy", "received"):
                assert torch.equal(opened.calls[i].stack(name), alone.stack(name))
    heads = pd.read_parquet(path / "tables" / "heads")
    assert heads.forward.value_counts().sort_index().tolist() == [2 * 2 * 4] * (done + 1)
