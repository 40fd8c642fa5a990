"""What a capture shows of itself: its heads, and what they look at."""

from __future__ import annotations

from workbench.capture.capture import Capture
from workbench.errors import WorkbenchError, expect
from workbench.views.attention_pattern import attention_pattern
from workbench.views.base.registry import register
from workbench.views.base.selection import SharedSelection
from workbench.views.base.view import View
from workbench.views.head_atlas import head_atlas
from workbench.views.head_gallery import head_gallery
from workbench.views.results.recurrences import half_lives, recurrences, states


def overview(capture: Capture, *, batch: int = 0, selection: SharedSelection | None = None) -> list[View]:
    """The views of a capture, linked: the head atlas, and where patterns were kept every head's, small and large.

    Of linear and recurrent layers also how fast heads forget, content and decay apart, and a state. Several forwards
    share the atlas; the patterns are those of the first.

    Raises:
        ReportError: the capture is empty.
    """
    expect(Capture, capture=capture)
    return [head_atlas(capture, selection=selection), *_patterns(capture, batch, selection)]


def _patterns(capture: Capture, batch: int = 0, selection: SharedSelection | None = None) -> list[View]:
    first = capture.calls[0]
    try:
        for c in first:
            c.pattern  # noqa: B018 (raises where no pattern was kept)
    except WorkbenchError:
        return []
    n = len(capture.calls)
    which = "" if n == 1 else f", the first of {n} calls"
    return [
        head_gallery(first, batch=batch, title=f"Every head's pattern{which}", selection=selection),
        attention_pattern(first, batch=batch, title=f"Attention pattern{which}", selection=selection),
        *_of_recurrences(first, batch, selection),
    ]


def _of_recurrences(capture: Capture, batch: int, selection: SharedSelection | None) -> list[View]:
    """Of linear and recurrent layers: how fast heads forget, content and decay apart, and the first one's states."""
    found = list(recurrences(capture))
    made: list[View] = []
    if any(pattern.log_decay is not None for _, pattern in found):
        made += [
            half_lives(capture, selection=selection),
            attention_pattern(
                capture, batch=batch, apart=True, title="Content and decay of recurrent layers", selection=selection
            ),
        ]
    first = next((one.site for one, pattern in found if pattern.values is not None), None)
    return made if first is None else [*made, states(capture, first, batch=batch, selection=selection)]


register(Capture, head_atlas, _patterns)
