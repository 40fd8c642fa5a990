"""The kernels compiled ahead of time: none spills, all fit shared memory, half precision runs on tensor cores.

What a build needs is kept in figures.json under a digest of all that it follows from, and compiled where that changed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from triton_targets import Build, builds

from support.triton_builds import TARGETS, assert_kept

BUILDS = [(target, build) for target in TARGETS for build in builds(target)]


def _figures(printed: Callable[..., Any], target: str) -> Any:
    return printed("compiled.py", target, TRITON_INTERPRET=None)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "build"), BUILDS, ids=str)
def test_resources(target: str, build: Build, printed: Callable[..., Any]) -> None:
    needs = _figures(printed, target)[str(build)]
    assert needs["shared"] <= TARGETS[target][2]
    assert needs["spilled"] == 0
    if build.dtype != "fp32" or build.precision == "tf32":
        assert needs["tensor"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_spilling_kernel_is_seen(target: str, printed: Callable[..., Any]) -> None:
    found = _figures(printed, target)
    (meter,) = set(found) - {str(build) for build in builds(target)}
    assert found[meter]["spilled"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_kept_is_what_compiling_gives(target: str, printed: Callable[..., Any]) -> None:
    """Of the builds that are compiled every time."""
    kept = Path(__file__).parent / "figures.json"
    assert_kept(kept, target, _figures(printed, target), "python tests/kernels/triton/compiled.py keep")
