"""Packages of other people's models and weights, in a folder of their own (`tests/judges.txt`)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from support.unavailable import unavailable

FOLDER = Path(__file__).parents[2] / ".cache" / "judges"


@contextmanager
def judges() -> Iterator[None]:
    """They can be imported inside; some of them go on importing as they are used."""
    sys.path.append(str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))


def missing(error: Exception) -> NoReturn:
    """Skip the test, since one of them is not installed; with CI=true fail it."""
    unavailable(f"{error}: make .cache/judges/.ready")
