"""What a capture shows of itself: its heads, and what they look at."""

from __future__ import annotations

from workbench.capture.capture import Capture
from workbench.errors import WorkbenchError
from workbench.views.attention_pattern import attention_pattern
from workbench.views.base.registry import register
from workbench.views.base.selection import SharedSelection
from workbench.views.base.view import View
from workbench.views.head_atlas import head_atlas


def overview(capture: Capture, *, batch: int = 0, selection: SharedSelection | None = None) -> list[View]:
    """The views of a capture, linked: the head atlas, and the attention patterns where they were kept.

    Several forwards share the atlas; the patterns are those of the first.

    Raises:
        ReportError: the capture is empty.
    """
    return [head_atlas(capture, selection=selection), *_patterns(capture, batch, selection)]


def _patterns(capture: Capture, batch: int = 0, selection: SharedSelection | None = None) -> list[View]:
    first = capture.calls[0]
    try:
        for c in first:
            c.pattern  # noqa: B018 (raises where no pattern was kept)
    except WorkbenchError:
        return []
    n = len(capture.calls)
    title = "Attention pattern" if n == 1 else f"Attention pattern, the first of {n} calls"
    return [attention_pattern(first, batch=batch, title=title, selection=selection)]


register(Capture, head_atlas, _patterns)
