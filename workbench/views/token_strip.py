"""Token strip: a text whose tokens are coloured by a value each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import ReportError
from workbench.tokens import visible
from workbench.views import scales
from workbench.views.base import View
from workbench.views.selection import SharedSelection
from workbench.views.spec import ViewSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURED = 400  # tokens in the picture; the page has them all
_PER_LINE = 110  # characters


class TokenStrip(View):
    """See `token_strip`."""

    def picture(self, figure: Figure) -> None:
        tokens, values = self.spec.facts["tokens"], self.spec.blocks["values"][0]
        colours = scales.colours(values, signed=self.spec.facts["channels"][0]["signed"])
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.set_xlim(0, _PER_LINE)
        column, line = 0.0, 0
        for token, colour in zip(tokens[:_PICTURED], colours, strict=False):
            width = len(token) + 1.0
            if column + width > _PER_LINE:
                column, line = 0.0, line + 1
            axes.text(
                column,
                -line,
                token,
                family="monospace",
                fontsize=8,
                color=scales.ink_on(colour),
                backgroundcolor=colour,
                va="center",
            )
            column += width
        axes.set_ylim(-line - 0.7, 0.7)
        if len(tokens) > _PICTURED:
            axes.set_title(f"the first {_PICTURED} of {len(tokens):,} tokens")


def token_strip(
    tokens: Sequence[str],
    values: Any,
    *,
    label: str = "value",
    unit: str = "",
    signed: bool | None = None,
    title: str = "Tokens",
    caption: str = "",
    provenance: Mapping[str, Any] | None = None,
    selection: SharedSelection | None = None,
) -> TokenStrip:
    """Tokens coloured by values.

    Args:
        tokens: their texts, as the tokenizer has them.
        values: one value per token, or {label: values} for several channels. NaN: not known.
        signed: colours run around zero; found from the values if None.

    Raises:
        ReportError: no token, or another number of values than of tokens.

    >>> token_strip([" a", "b"], [0.5, 1.0], label="received").data()
       position token  received
    0         0    ␣a       0.5
    1         1     b       1.0
    """
    channels = values if isinstance(values, Mapping) else {label: values}
    if not len(tokens):
        raise ReportError("there are no tokens to show")
    found = {name: np.asarray(channel, dtype=np.float64) for name, channel in channels.items()}
    for name, channel in found.items():
        if channel.shape != (len(tokens),):
            raise ReportError(f"{name} has another shape than the {len(tokens)} tokens", shape=channel.shape)
    shown = [visible(token) for token in tokens]
    facts = {
        "tokens": shown,
        "channels": [
            {"label": name, "unit": unit, "signed": bool(np.nanmin(v, initial=0) < 0) if signed is None else signed}
            for name, v in found.items()
        ],
    }
    missing = sum(int(np.isnan(v).sum()) for v in found.values())
    spec = ViewSpec(
        kind="token_strip",
        title=title,
        caption=caption or f"{len(tokens):,} tokens, coloured by {', '.join(found)}.",
        facts=facts,
        blocks={"values": np.stack(list(found.values())).astype(np.float32)},
        table={"position": np.arange(len(tokens), dtype=np.int32), "token": shown, **found},
        notes=(f"{missing:,} values are not known and grey.",) if missing else (),
        provenance=provenance or {},
    )
    return TokenStrip(spec, selection)
