"""Processes of their own for the interpreter and the compiler, each run once however many workers there are."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # triton_cases.py; the folder cannot be a package, since its name is triton's


@pytest.fixture(scope="session")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What a script of this folder prints as JSON, for arguments and environment variables (None: unset)."""

    def run(script: str, *arguments: str, **variables: str | None) -> Any:
        if find_spec("triton") is None:
            pytest.skip("triton has no wheel for this system")
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        kept = shared / "-".join((Path(script).stem, *arguments, "printed.json"))
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                wanted = os.environ | variables
                done = subprocess.run(
                    [sys.executable, str(HERE / script), *arguments],
                    cwd=HERE,
                    env={name: value for name, value in wanted.items() if value is not None},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                failed = {"error": done.stderr[-4000:]} if done.returncode else None
                kept.write_text(done.stdout if failed is None else json.dumps(failed))
        found = json.loads(kept.read_text())
        if "error" in found:
            pytest.fail(found["error"])
        return found

    return run
