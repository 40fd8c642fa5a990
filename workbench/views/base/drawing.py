"""Pictures of views by matplotlib, and the HTML that stands where scripts do not run."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

from workbench.errors import ReportError
from workbench.tokens import visible_text

THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1c2127", "muted": "#59636e", "line": "#d8dde3"},
    "dark": {"paper": "#14171b", "ink": "#e4e8ec", "muted": "#9aa5b1", "line": "#333a42"},
}
SERIES = ("#2f6fb7", "#d1662b", "#3a8f5c", "#b03a78", "#7a6bc9", "#8a6d1f")
"""Colours of lines and bars that are told apart: at most six."""

_FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Noto Sans", "sans-serif"]


@contextmanager
def _style(theme: str) -> Any:
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib import font_manager

    if theme not in THEMES:
        raise ReportError(f"there is no theme {theme!r}", hint=f"one of {', '.join(THEMES)}")
    colours = THEMES[theme]
    known = {font.name for font in font_manager.fontManager.ttflist}
    settings: Any = {
        "text.parse_math": False,  # a token may hold dollar signs
        "font.family": [name for name in _FONTS if name in known] or ["sans-serif"],
        "font.size": 9,
        "figure.facecolor": colours["paper"],
        "axes.facecolor": colours["paper"],
        "axes.edgecolor": colours["line"],
        "axes.labelcolor": colours["ink"],
        "axes.titlesize": 10,
        "axes.titlecolor": colours["ink"],
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=SERIES),
        "text.color": colours["ink"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "xtick.labelcolor": colours["ink"],
        "ytick.labelcolor": colours["ink"],
        "grid.color": colours["line"],
        "legend.frameon": False,
        "image.cmap": "viridis",
        "image.interpolation": "nearest",
        "svg.hashsalt": "workbench",
    }
    with mpl.rc_context(settings):
        yield colours


def png(
    picture: Callable[[Any], None], size: tuple[float, float], *, theme: str, dpi: int, colours: int | None = None
) -> bytes:
    """The PNG that `picture(figure)` draws; the same every time.

    Args:
        colours: keep so many, which makes a picture of many faint lines several times smaller.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _style(theme):
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        picture(figure)
        out = io.BytesIO()
        with warnings.catch_warnings():
            # A script that no installed font has: the picture shows boxes, the page and the table the text.
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
            figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue() if colours is None else _fewer(out, colours)


def _fewer(picture: io.BytesIO, colours: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    with Image.open(picture) as image:
        # Of the ways to choose colours this one keeps those of small areas, such as the end of a scale.
        few = image.convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(out, format="png", optimize=True, dpi=image.info.get("dpi"))
    return out.getvalue()


_STILL = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string("""\
<style>.jp-OutputArea-child:has(+ .jp-OutputArea-child .workbench-still:not([hidden])){display:none}</style>
<figure class="workbench-still" id="{{ identity }}" style="margin:0">
<figcaption><b>{{ title }}</b> {{ caption }}</figcaption>
<img alt="{{ title }}. {{ caption }}" style="max-width:100%" src="data:image/png;base64,{{ picture }}">
{% if rows %}
<details><summary>{{ summary }}</summary>
<table><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></details>
{% endif %}
</figure>
""")


def still(identity: str, *, title: str, caption: str, picture: str, table: pd.DataFrame, n_rows: int) -> str:
    """A figure with its picture, caption and table; needs no script and no style sheet."""
    return _STILL.render(
        identity=identity,
        title=visible_text(title),
        caption=visible_text(caption),
        picture=picture,
        columns=list(table.columns),
        rows=[[_cell(value) for value in row] for row in table.itertuples(index=False)],
        summary=f"Table, {n_rows:,} rows" if n_rows <= len(table) else f"Table, {len(table)} of {n_rows:,} rows",
    )


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
