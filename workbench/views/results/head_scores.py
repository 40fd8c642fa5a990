"""Views of what heads need of a cache: scores on the atlas."""

from __future__ import annotations

import pandas as pd

from workbench.analysis.head_scores import RetrievalScores, StreamingScores
from workbench.counting import count
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.head_atlas import head_atlas


def _view_of_retrieval(found: RetrievalScores) -> View:
    """Every head on the atlas."""
    return head_atlas(
        {"retrieval": _frame(found.table, "score", True)}, title="Retrieval heads", unit="share", signed=False,
        caption=f"Share of the needle's tokens that each head copied; a mean over "
        f"{count(len(found.needles), 'prompt')}.",
        provenance=found.provenance,
    )  # fmt: skip


def _view_of_streaming(found: StreamingScores) -> View:
    """Every head on the atlas: the error, and the weights on what is kept."""
    frame = found.table
    return head_atlas(
        {
            "error": _frame(frame, "error", True), "weight kept": _frame(frame, "kept", False),
            "weight on sinks": _frame(frame, "sink", False), "weight near": _frame(frame, "near", False),
        },
        title="Streaming heads", unit="share", signed=False,
        caption=(
            f"What each head's output changes by with {found.sinks} sinks and {found.recent} recent keys alone, as a "
            f"share of its length; a mean over {count(len(found.lengths), 'prompt')}."
        ),
        provenance=found.provenance,
    )  # fmt: skip


def _frame(table: pd.DataFrame, value: str, interval: bool) -> pd.DataFrame:
    columns = ["layer", "head", value, *(["low", "high"] if interval else [])]
    return table[columns].rename(columns={value: "value"})


register(RetrievalScores, _view_of_retrieval)
register(StreamingScores, _view_of_streaming)
