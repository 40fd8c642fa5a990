"""Token strip: a text whose tokens are coloured by a value each."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.counting import count
from workbench.errors import ReportError, expect
from workbench.tokens import visible
from workbench.views.base import scales
from workbench.views.base.given import check_texts, real_numbers
from workbench.views.base.selection import SharedSelection, inputs_of
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURED = 400  # tokens in the picture; the page has them all
_PER_LINE = 105  # characters
_FONT = 8  # points
_CHARACTER, _LINE = 0.61 * _FONT / 72, 2.1 * _FONT / 72  # inches


class TokenStrip(View):
    """See `token_strip`."""

    def picture(self, figure: Figure) -> None:
        from matplotlib.patches import Rectangle

        every, channels = self.spec.facts["tokens"], self.spec.facts["channels"]
        labels = [each["label"] for each in channels]
        channel = labels.index(self.state["channel"]) if self.state.get("channel") in labels else 0
        about, values = channels[channel], self.spec.blocks["values"][channel]
        chosen = self.chosen.token
        start = 0 if chosen is None or not _PICTURED <= chosen < len(every) else chosen - _PICTURED // 2
        tokens = every[start : start + _PICTURED]
        colours = scales.colours(values, signed=about["signed"])[start : start + _PICTURED]
        places = list(_places([_columns(token) for token in tokens]))
        lines = places[-1][1] + 1
        figure.set_layout_engine("none")
        figure.set_size_inches((_PER_LINE + 2) * _CHARACTER, (lines + 1.6) * _LINE)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(-1, _PER_LINE + 1), ylim=(lines + 0.2, -1.4))
        rest = len(every) - len(tokens)
        unit = f", {about['unit']}" if about["unit"] else ""
        ends = " to ".join(f"{end:.3g}" for end in scales.limits(values, signed=about["signed"]))
        more = f"; {rest:,} more tokens are not in the picture" if rest else ""
        axes.text(0, -0.75, f"{about['label']}{unit}: colours run from {ends}{more}", fontsize=8, va="center")
        for i, (token, colour, (column, line)) in enumerate(zip(tokens, colours, places, strict=True), start):
            axes.add_patch(Rectangle((column, line), _columns(token) - 0.3, 0.86, color=colour, linewidth=0))
            if i == chosen:
                axes.add_patch(scales.frame_of(column, line, _columns(token) - 0.3, 0.86))
            axes.text(
                column + (_columns(token) - 0.3) / 2,
                line + 0.43,
                token,
                family="monospace",
                fontsize=_FONT,
                color=scales.ink_on(colour),
                ha="center",
                va="center",
            )


def _columns(token: str) -> float:
    """Room for a token in characters of a line; wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in token) + 1.3


def _places(widths: Sequence[float]) -> Iterator[tuple[float, int]]:
    """Where each token begins: column and line."""
    column, line = 0.0, 0
    for width in widths:
        if column and column + width > _PER_LINE:
            column, line = 0.0, line + 1
        yield column, line
        column += width


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
        ReportError: no token, or another number of values than of tokens; tokens that are no texts, values that are no
            real numbers.

    >>> token_strip([" a", "b"], [0.5, 1.0], label="received").data()
       position token  received
    0         0    ␣a       0.5
    1         1     b       1.0
    """
    channels = values if isinstance(values, Mapping) else {label: values}
    expect(Iterable, tokens=tokens)
    if not len(tokens):
        raise ReportError("there are no tokens to show")
    found = {name: real_numbers(channel, name) for name, channel in channels.items()}
    for name, channel in found.items():
        if channel.shape != (len(tokens),):
            raise ReportError(f"{name} has another shape than the {len(tokens)} tokens", shape=channel.shape)
    shown = [visible(token) for token in check_texts(tokens)]
    facts = {
        "tokens": shown,
        "channels": [
            {"label": name, "unit": unit, "signed": bool(np.nanmin(v, initial=0) < 0) if signed is None else signed}
            for name, v in found.items()
        ],
    }
    spec = ViewSpec(
        kind="token_strip",
        title=title,
        caption=caption or f"{count(len(tokens), 'token')}, coloured by {', '.join(found)}.",
        facts=facts,
        blocks={"values": np.stack(list(found.values())).astype(np.float32)},
        table={"position": np.arange(len(tokens), dtype=np.int32), "token": shown, **found},
        notes=_notes(found),
        provenance=provenance or {},
        inputs=inputs_of(shown),
    )
    return TokenStrip(spec, selection)


def _notes(channels: Mapping[str, Any]) -> tuple[str, ...]:
    """What the colours do not tell."""
    missing, infinite = (sum(int(odd(v).sum()) for v in channels.values()) for odd in (np.isnan, np.isinf))
    said = (
        (missing, "values are not known and grey."),
        (infinite, "values are infinite and have the colour at the end of the scale; the table tells them apart."),
    )
    return tuple(f"{n:,} {what}" for n, what in said if n)
