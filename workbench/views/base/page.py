"""One self-contained HTML page with views: a policy that names its scripts, data with digests, nothing loaded.

A page is a function of the data in it: `render` puts data blocks together, and `made_of` makes the page of them, the
same to the byte for whoever has the blocks. That is how `workbench check` knows a page of ours.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from workbench import __version__
from workbench.counting import count
from workbench.errors import ReportError
from workbench.storage.json_text import digest, finite, json_for_html
from workbench.tokens import visible_text
from workbench.views.base import modules
from workbench.views.base.kinds import kind_of
from workbench.views.base.spec import KINDS, ViewSpec

LARGE_BYTES = 10_000_000
"""Above this a page says that it opens slowly."""
WORDS, PROVENANCE = "words", "provenance"
"""The data blocks of a page besides those of its views, `view-0` and on."""

FALLBACK_ROWS = 12  # of a view's table, where no script runs
# Filled in when the page is whole. No text of ours or of a user holds such characters: `visible_text` spells them out.
_SIZE, _SEAL = Markup("\ue000"), Markup("\ue001")


def _seen(value: Any) -> Any:
    """Text with nothing in it that cannot be seen; what is HTML already stays as it is."""
    return visible_text(value, len(value)) if type(value) is str and not value.isprintable() else value


TEMPLATES = Environment(
    loader=FunctionLoader(modules.asset),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_seen,
    trim_blocks=True,
    lstrip_blocks=True,
)


Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """A kind of page.

    Attributes:
        template: one that extends "page.html", in `environment`.
        style: CSS after the views' own.
        context: what the template wants besides `title`, `views`, `sizes` (bytes of each view's data) and `size` (the
            file's), made of the page's words and provenance and of the specs of its views.
    """

    template: str = "page.html"
    environment: Environment = TEMPLATES
    style: Callable[[], str] = str
    context: Callable[[Spec, Spec, Sequence[Spec]], dict[str, Any]] = lambda words, provenance, specs: {}


PLAIN = Form()
"""Views below each other."""


def single(spec: ViewSpec) -> str:
    """A page with one view."""
    return together([spec])


def together(specs: Sequence[ViewSpec]) -> str:
    """A page with views of one thing below each other; the first one names it."""
    return render(specs[0].title, specs, provenance=specs[0].provenance)


def render(
    title: str,
    specs: Sequence[ViewSpec],
    *,
    form: Form = PLAIN,
    words: Mapping[str, Any] | None = None,
    provenance: Any = None,
) -> str:
    """A page of this form.

    Args:
        words: what the form's context is made of. provenance: both JSON values, kept in the page.
    """
    blocks = {f"view-{i}": spec.to_static() for i, spec in enumerate(specs)}
    blocks[WORDS] = {"form": form.template, "title": visible_text(title.strip()), **finite(words or {})}
    blocks[PROVENANCE] = finite(provenance or {})
    return made_of(blocks, form)


def made_of(
    blocks: Mapping[str, Any], form: Form, texts: Mapping[str, str] | None = None, *, minified: bool = True
) -> str:
    """The page of these data blocks.

    Args:
        blocks: JSON values by the name of their block: those of the views in order, the words, and the provenance.
        texts: the same as text, where that is known to be what `json_for_html` makes of them.
        minified: with the smaller scripts of a release, where there are any.

    Raises:
        ReportError: a view that does not exist or whose facts are not those of its kind.
    """
    texts = {name: json_for_html(value) for name, value in blocks.items()} if texts is None else texts
    specs: list[Mapping[str, Any]] = [value for name, value in blocks.items() if name not in (WORDS, PROVENANCE)]
    words, provenance = blocks[WORDS], blocks[PROVENANCE]
    kinds = [str(spec["kind"]) for spec in specs]
    scripts = scripts_for(kinds, minified=minified)
    css = f"{modules.style(kinds)}\n{modules.asset('page.css')}\n{form.style()}"
    # plotly writes style attributes, so a page with it cannot name its styles one by one.
    styles = "'unsafe-inline'" if needs_plotly(kinds) else f"'{digest(css)}'"
    allowed = " ".join(f"'{digest(script)}'" for script in scripts)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {allowed}",
            f"style-src {styles}",
            "img-src data: blob:",
            *(["media-src data: blob:"] if any("audio" in spec["blocks"] for spec in specs) else []),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    html = form.environment.get_template(form.template).render(
        title=words["title"],
        version=__version__,
        policy=Markup(policy),  # our own words and hashes; escaped, its quotes would be hard to read
        css=Markup(css),
        scripts=[Markup(script) for script in scripts],
        blocks=[(name, Markup(text), digest(text)) for name, text in texts.items()],
        views=[Markup(_VIEW.render(_fallback(spec), index=i)) for i, spec in enumerate(specs)],
        specs=specs,
        sizes=[len(texts[f"view-{i}"]) for i in range(len(specs))],
        size=_SIZE,
        seal=_SEAL,
        **form.context(words, provenance, specs),
    )
    return _sealed(_sized(html))


def scripts_for(kinds: Iterable[str], *, minified: bool = True) -> list[str]:
    """The scripts of a page with these kinds of views, in order."""
    wanted = list(kinds)
    plotly = [modules.plotly()] if needs_plotly(wanted) else []
    return [*plotly, modules.static(wanted, minified=minified)]


def needs_plotly(kinds: Iterable[str]) -> bool:
    """Whether a page with these kinds of views holds plotly."""
    return any(kind_of(kind).plotly for kind in set(kinds))


def seal(html: str) -> str:
    """The digest that a page carries of itself: of its text with that digest left out.

    It shows damage, not intent: whoever changes a page can make it anew.
    """
    return digest(html)


def _sized(html: str) -> str:
    """The page with its own size in it."""
    bare = len(html.replace(_SIZE, "").encode("utf-8")) + len(digest("")) - len(_SEAL.encode("utf-8"))
    times, size = html.count(_SIZE), 0
    for _ in range(4):  # a digit more may make it a digit longer
        size = bare + times * len(_size_text(size).encode("utf-8"))
    return html.replace(_SIZE, _size_text(size))


def _size_text(size: int) -> str:
    slow = f", more than {LARGE_BYTES // 10**6} MB: it may open slowly" if size > LARGE_BYTES else ""
    return f"{size:,} bytes{slow}"


def _sealed(html: str) -> str:
    before, _, after = html.partition(_SEAL)
    return f"{before}{seal(before + after)}{after}"


_VIEW = TEMPLATES.from_string("""\
<div class="workbench-view" data-view="view-{{ index }}">
<div class="scriptless">
<p class="claim">This view needs JavaScript, which does not run here.</p>
<p>{{ caption }}</p>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
{% if rows %}
<p>Not drawn; in numbers:</p>
<div class="wide"><table><thead><tr>{% for name in columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p>{{ shown }}</p>
{% endif %}
</div>
</div>
""")


def _fallback(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in a view's place until its script has drawn it, and where none runs."""
    columns = {str(column["name"]): _first(column, spec["blocks"]) for column in spec["table"]}
    n = max((n for n, _ in columns.values()), default=0)
    shown, whole = min(n, FALLBACK_ROWS), n + spec["left_out"]
    return {
        "caption": visible_text(spec["caption"]),
        "notes": [visible_text(note) for note in spec["notes"]],
        "columns": [visible_text(name) for name in columns],
        "rows": [[_cell(values[i]) for _, values in columns.values()] for i in range(shown)],
        "shown": count(n, "row") if shown == whole else f"The first {shown} of {whole:,} rows",
    }


def _first(column: Mapping[str, Any], blocks: Mapping[str, Any]) -> tuple[int, Any]:
    """The length of a column of a view's table, and its first values."""
    if "text" in column:
        return len(column["text"]), column["text"][:FALLBACK_ROWS]
    block = blocks[column["block"]]
    if block["dtype"] not in KINDS:
        raise ReportError(f"a table holds {block['dtype']!r}, which no page can read")
    dtype, n = np.dtype(f"<{block['dtype']}"), math.prod(block["shape"])
    raw, wanted = base64.b64decode(block["base64"], validate=True), min(n, FALLBACK_ROWS) * dtype.itemsize
    # No more than is shown: how much a few deflated bytes become is for their writer to say.
    found = zlib.decompressobj().decompress(raw, wanted) if block["deflate"] and wanted else raw[:wanted]
    return n, np.frombuffer(found, dtype)


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return "–" if np.isnan(value) else f"{value:.6g}"
    return visible_text(str(value))
