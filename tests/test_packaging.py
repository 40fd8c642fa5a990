"""What gets installed: every package and data file, the version, and an import that is light and silent."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import workbench

ROOT = Path(__file__).parents[1]
PLACES = {"workbench": "workbench", "kernels": "workbench/kernels", "hooks": "workbench/hooks"}
HEAVY = {"captum", "jupyterlab", "plotly", "ray", "transformer_lens", "transformers", "triton", "wandb"}


def _python(code: str, **variables: str) -> str:
    """What a fresh interpreter prints for `code`; fails with its error output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",  # not the root, where `kernels` would be a package of its own
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources: setuptools would leave its build folder, and take stale files from it."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for folder in PLACES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("attention_workbench-*.whl")
    return path


def test_version() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert workbench.__version__ == declared
    assert importlib.metadata.version("attention-workbench") == declared


def test_changelog_has_the_version() -> None:
    assert f"## [{workbench.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_file_is_in_the_wheel(wheel: Path) -> None:
    on_disk = {
        f"{place}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, place in PLACES.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert on_disk - packed == set(), (
        "a folder without __init__.py, or a kind of data file that pyproject.toml leaves out"
    )
    assert packed - on_disk == set()


def test_the_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import workbench.hooks, workbench.kernels as k; print(k.__file__)"
    assert Path(_python(code, PYTHONPATH=str(tmp_path)).strip()).is_relative_to(tmp_path)


def test_folders_at_the_top_import_by_their_installed_names() -> None:
    code = "import workbench.hooks as h, workbench.kernels as k; print(h.__name__, k.__name__)"
    assert _python(code).split() == ["workbench.hooks", "workbench.kernels"]


def test_import_is_light() -> None:
    code = "import json, sys, workbench; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    assert HEAVY & set(json.loads(_python(code))) == set()


def test_import_makes_no_network_access() -> None:
    code = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError(f"network access while importing: {event} {arguments}")

sys.addaudithook(refuse)
import workbench, workbench.hooks, workbench.kernels
for module in (workbench, workbench.hooks, workbench.kernels):
    for name in getattr(module, "__all__", ()):  # the lazy ones too
        getattr(module, name)
"""
    _python(code)
