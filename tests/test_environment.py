"""environment.yml and constraints.txt agree with pyproject.toml."""

import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"pytorch": "torch"}


def _by_name(lines: list[str]) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(CONDA_NAMES.get(r.name, r.name)): r for r in requirements}


@pytest.fixture(scope="module")
def environment() -> dict[str, Requirement]:
    """What environment.yml installs, from either source, without pip and the project itself."""
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [item for item in content["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in content["dependencies"] if isinstance(item, dict)]
    assert pip[-1] == "-e ."
    everything = _by_name(conda + pip[:-1])
    assert len(everything) == len(conda) + len(pip) - 1, "a package is listed twice"
    del everything["pip"]
    return everything


def test_environment_has_the_runtime_dependencies(environment: dict[str, Requirement]) -> None:
    for name, wanted in _by_name(PROJECT["dependencies"]).items():
        assert name in environment, f"{name} is missing from environment.yml"
        assert environment[name].specifier == wanted.specifier, name
        assert environment[name].marker == wanted.marker, name


def test_environment_has_nothing_else(environment: dict[str, Requirement]) -> None:
    known = _by_name(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lab"])
    for name, requirement in environment.items():
        if name != "python":
            assert requirement.specifier == known[name].specifier, name


def test_environment_has_the_python_version(environment: dict[str, Requirement]) -> None:
    assert str(environment["python"].specifier) == PROJECT["requires-python"]


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = _by_name([line for line in lines if line and not line.startswith("#")])
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for name, wanted in _by_name(list(chain.from_iterable(lists))).items():
        assert name in pins, f"{name} is missing from constraints.txt"
        (pin,) = pins[name].specifier
        assert pin.operator == "==", name
        assert wanted.specifier.contains(pin.version), f"{name}: {pin} is outside {wanted.specifier}"
