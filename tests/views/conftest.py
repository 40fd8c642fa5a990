"""The form of the views' modules that a release ships, for tests of what it weighs and whether it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.unavailable import unavailable
from workbench.views.base import modules

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def release() -> dict[str, dict[str, str]]:
    """What `make release-assets` writes."""
    if shutil.which("node") is None or not (ROOT / "node_modules" / "esbuild").is_dir():
        unavailable("esbuild: install node and run npm ci")
    done = subprocess.run(
        ["node", ROOT / "docs" / "make_release_assets.mjs"],
        input=json.dumps(modules.sources()),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, dict[str, str]] = json.loads(done.stdout)
    return made


@pytest.fixture
def released(release: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within a test the package is that of a release."""
    _forget()
    with monkeypatch.context() as patched:
        patched.setattr(modules, "_released", lambda: release)
        yield
    _forget()


def _forget() -> None:
    modules.live.cache_clear()
    modules.later.cache_clear()
    modules._chunk.cache_clear()
