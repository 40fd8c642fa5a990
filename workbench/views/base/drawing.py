"""Pictures of views by matplotlib, and the HTML that stands where scripts do not run."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from workbench.counting import count
from workbench.errors import ReportError
from workbench.tokens import visible_text
from workbench.views.base import scales
from workbench.views.base.few_colours import few_colours

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
        "figure.autolayout": False,  # the layout is ours, whatever a user's settings say
        "figure.constrained_layout.use": False,
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
        "image.cmap": scales.sequential_name(theme),
        "image.interpolation": "nearest",
        "svg.hashsalt": "workbench",
        "pdf.fonttype": 42,  # TrueType, which journals ask for
    }
    with mpl.rc_context(settings):
        yield colours


@dataclass(frozen=True)
class Words:
    """What stands around a picture that goes into a paper: its title, its caption, and where its numbers come from."""

    title: str
    caption: str
    origin: str


class Places:
    """Where the axes of a picture, and the texts around them, stand: found once, for themes differ in colours alone.

    >>> places = Places()
    >>> light, dark = (png(lambda figure: figure.subplots(), (2, 1), theme=theme, dpi=50, places=places)
    ...                for theme in ("light", "dark"))
    >>> dark == png(lambda figure: figure.subplots(), (2, 1), theme="dark", dpi=50)
    True
    """

    def __init__(self) -> None:
        self._axes: list[dict[str, Any]] = []
        self._texts: list[tuple[float, float]] = []

    def give(self, figure: Any) -> bool:
        """Put what the figure holds into its places, if there are places for just that."""
        if not self._axes or (len(self._axes), len(self._texts)) != (len(figure.axes), len(figure.texts)):
            return False
        for axes, place in zip(figure.axes, self._axes, strict=True):
            axes.set(**place)
        for text, at in zip(figure.texts, self._texts, strict=True):
            text.set_position(at)
        return True

    def take(self, figure: Any) -> None:
        """Remember where all stands in a figure that is laid out."""
        names = ("anchor", "box_aspect", "aspect")
        self._axes = [
            {"position": axes.get_position(original=True)} | {name: getattr(axes, f"get_{name}")() for name in names}
            for axes in figure.axes
        ]
        self._texts = [text.get_position() for text in figure.texts]


def png(
    picture: Callable[[Any], None],
    size: tuple[float, float],
    *,
    theme: str,
    dpi: int,
    colours: int | None = None,
    places: Places | None = None,
) -> bytes:
    """The PNG that `picture(figure)` draws; the same every time.

    Args:
        colours: keep so many, which makes a picture of many faint lines several times smaller.
        places: of the same picture in another theme, or to be those of this one.
    """
    if colours is None:
        return drawn(picture, size, "png", theme=theme, dpi=dpi, places=places)
    from PIL import Image

    out = io.BytesIO()
    with _figure(picture, size, "png", theme=theme, dpi=dpi, places=places) as figure:
        figure.canvas.draw()
        image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
        few_colours(image, colours).save(out, format="png", optimize=True, dpi=(dpi, dpi))
    return out.getvalue()


def drawn(
    picture: Callable[[Any], None],
    size: tuple[float, float],
    form: str,
    *,
    theme: str,
    dpi: int,
    words: Words | None = None,
    transparent: bool = False,
    places: Places | None = None,
) -> bytes:
    """What `picture(figure)` draws as a file; the same every time.

    Args:
        form: "png", "svg" or "pdf".
        words: to stand around the picture, which grows by them. transparent: without a background. places: as of `png`.
    """
    dates = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    metadata: dict[str, Any] = dates.get(form, {"CreationDate": None, "Producer": None, "Creator": None})
    around: dict[str, Any] = {} if words is None else {"bbox_inches": "tight", "pad_inches": 0.1}
    out = io.BytesIO()
    with _figure(picture, size, form, theme=theme, dpi=dpi, words=words, places=places) as figure:
        figure.savefig(out, format=form, dpi=dpi, metadata=metadata, transparent=transparent, **around)
    return _numbered(out.getvalue()) if form == "svg" else out.getvalue()


@contextmanager
def _figure(
    picture: Callable[[Any], None],
    size: tuple[float, float],
    form: str,
    *,
    theme: str,
    dpi: int,
    words: Words | None = None,
    places: Places | None = None,
) -> Iterator[Any]:
    """A figure with the picture in it, and with its axes in their places where no words stand around it."""
    from matplotlib.backend_bases import get_registered_canvas_class
    from matplotlib.figure import Figure

    with _style(theme) as colours:
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        get_registered_canvas_class(form)(figure)
        picture(figure)
        if words is not None:
            _surround(figure, words, colours)
        with warnings.catch_warnings():
            # A script that no installed font has: the picture shows boxes, the page and the table the text.
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
            if words is None:
                _lay_out(figure, form, Places() if places is None else places)
            yield figure


def _lay_out(figure: Any, form: str, places: Places) -> None:
    """Give all axes their places, for which `savefig` would draw the whole figure once more, unseen."""
    if form != "png":
        figure.dpi = 72  # points, in which these forms are drawn
    if figure.axes and not places.give(figure):
        figure.get_layout_engine().execute(figure)
        places.take(figure)
    figure.set_layout_engine(None)


def _numbered(svg: bytes) -> bytes:
    """The drawing with clip paths that are numbered: Matplotlib names them after places in memory."""
    for i, name in enumerate(re.findall(rb'<clipPath id="(\w+)"', svg)):
        svg = svg.replace(b'id="%s"' % name, b'id="clip%d"' % i).replace(b"url(#%s)" % name, b"url(#clip%d)" % i)
    return svg


def _surround(figure: Any, words: Words, colours: dict[str, str]) -> None:
    """The title above the figure, the caption and the line of provenance below it."""
    width, height = figure.get_size_inches()
    figure.text(0.0, 1 + 0.08 / height, words.title, fontsize=12, fontweight="bold", va="bottom", ha="left")
    below = -0.1
    for text, size, colour in ((words.caption, 9, colours["ink"]), (words.origin, 7.5, colours["muted"])):
        lines = textwrap.wrap(text, max(20, int(width * 72 / (0.53 * size))))
        if lines:
            figure.text(0.0, below / height, "\n".join(lines), fontsize=size, color=colour, va="top", ha="left")
        below -= (1.3 * size * len(lines) + 4) / 72


# In a notebook's dark theme, as JupyterLab, Visual Studio Code and Colab mark it, the picture is another one. It stands
# in the style sheet: hosts that allow none show the light picture on its light card, and so does paper. The system's
# own theme is not asked: a host that is light on a dark system would get dark cards.
_STILL = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string("""\
<style>.jp-OutputArea-child:has(+ .jp-OutputArea-child .workbench-still:not([hidden])){display:none}
@media screen{:is([data-jp-theme-light="false"],.vscode-dark,[theme="dark"]) #{{ identity }}{\
background:{{ paper }}!important;color:{{ ink }}!important;border-color:{{ line }}!important;\
color-scheme:dark!important}
:is([data-jp-theme-light="false"],.vscode-dark,[theme="dark"]) #{{ identity }} img{\
content:url("data:image/png;base64,{{ dark }}")}}</style>
<figure class="workbench-still" id="{{ identity }}" style="margin:0;padding:10px 12px;width:fit-content;max-width:100%;\
box-sizing:border-box;border:1px solid #d8dde3;border-radius:8px;background:#fff;color:#1c2127;color-scheme:light">
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


def still(identity: str, *, title: str, caption: str, picture: str, dark: str, table: pd.DataFrame, n_rows: int) -> str:
    """A figure with its picture, caption and table; needs no script and no style sheet.

    Args:
        picture: a PNG in base64, for light themes. dark: one for dark themes.
    """
    return _STILL.render(
        {name: THEMES["dark"][name] for name in ("paper", "ink", "line")},
        identity=identity,
        dark=dark,
        title=visible_text(title),
        caption=visible_text(caption),
        picture=picture,
        columns=list(table.columns),
        rows=[[_cell(value) for value in row] for row in table.itertuples(index=False)],
        summary=f"Table, {count(n_rows, 'row')}" if n_rows <= len(table) else f"Table, {len(table)} of {n_rows:,} rows",
    )


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
