"""`of`: the view of a result. The file of each view registers the results that it shows."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from workbench.errors import ReportError
from workbench.views.base import View


@singledispatch
def of(thing: Any) -> View:
    """The view that shows a capture or an analysis's result.

    Raises:
        ReportError: nothing shows such a thing.
    """
    raise ReportError(f"no view shows a {type(thing).__name__}", hint="pass a capture or the result of an analysis")
