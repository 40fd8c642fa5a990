"""One self-contained HTML page with views: a policy that names its scripts, data with digests, nothing loaded."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from workbench import __version__
from workbench.errors import ReportError
from workbench.storage.json_text import digest, json_for_html
from workbench.tokens import visible_text
from workbench.views.base import modules
from workbench.views.base.kinds import kind_of
from workbench.views.base.kinds import kinds as all_kinds
from workbench.views.base.spec import ViewSpec

LARGE_BYTES = 10_000_000
"""Above this a page says that it opens slowly."""

FALLBACK_ROWS = 12  # of a view's table, where no script runs
# Filled in when the page is whole. No text of ours or of a user holds such characters: `visible_text` spells them out.
_SIZE, _SEAL = "\ue000", "\ue001"

TEMPLATES = Environment(
    loader=FunctionLoader(modules.asset),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


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
    template: str = "page.html",
    environment: Environment = TEMPLATES,
    provenance: Any = None,
    style: str = "",
    **context: Any,
) -> str:
    """A page from a template that has `views`: one element each, filled by the page's script.

    The template may also use `sizes`, the bytes of each view's data, and `size`, the whole file's.

    Args:
        template: a template that extends "page.html", in `environment`.
        provenance: JSON values.
        style: CSS after the views' own.
        context: what else the template wants.
    """
    kinds = [spec.kind for spec in specs]
    scripts = scripts_for(kinds)
    css = f"{modules.style(kinds)}\n{modules.asset('page.css')}\n{style}"
    # plotly writes style attributes, so a page with it cannot name its styles one by one.
    styles = "'unsafe-inline'" if needs_plotly(kinds) else f"'{digest(css)}'"
    allowed = " ".join(f"'{digest(script)}'" for script in scripts)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {allowed}",
            f"style-src {styles}",
            "img-src data: blob:",
            *(["media-src data: blob:"] if any("audio" in spec.blocks for spec in specs) else []),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    blocks = {f"view-{i}": json_for_html(spec.to_static()) for i, spec in enumerate(specs)}
    sizes = [len(text) for text in blocks.values()]
    blocks["provenance"] = json_for_html(provenance or {})
    html = environment.get_template(template).render(
        title=visible_text(title.strip()),
        version=__version__,
        policy=Markup(policy),  # our own words and hashes; escaped, its quotes would be hard to read
        css=Markup(css),
        scripts=[Markup(script) for script in scripts],
        blocks=[(name, Markup(text), digest(text)) for name, text in blocks.items()],
        views=[Markup(_VIEW.render(_fallback(spec), index=i)) for i, spec in enumerate(specs)],
        specs=specs,
        sizes=sizes,
        size=_SIZE,
        seal=_SEAL,
        **context,
    )
    return _sealed(_sized(html))


def scripts_for(kinds: Iterable[str]) -> list[str]:
    """The scripts of a page with these kinds of views, in order."""
    wanted = list(kinds)
    plotly = [modules.plotly()] if needs_plotly(wanted) else []
    return [*plotly, modules.static(wanted)]


def known_scripts(kinds: Iterable[str]) -> list[str]:
    """The scripts that this version puts on such a page, from a checkout and from a release."""
    wanted = list(kinds)
    return [*scripts_for(wanted), modules.static(wanted, minified=False)]


def needs_plotly(kinds: Iterable[str]) -> bool:
    """Whether a page with these kinds of views holds plotly; kinds that this version does not know do not count."""
    return any(kind_of(kind).plotly for kind in set(kinds).intersection(all_kinds()))


def seal(html: str) -> str:
    """The digest that a page carries of itself: of its text with that digest left out."""
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
<p>This view needs JavaScript, which does not run here.</p>
<p>{{ caption }}</p>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
{% if rows %}
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


def _fallback(spec: ViewSpec) -> dict[str, Any]:
    """What stands in a view's place until its script has drawn it, and where none runs."""
    columns: Mapping[str, Any] = spec.table
    n = len(next(iter(columns.values()), ()))
    shown = min(n, FALLBACK_ROWS)
    return {
        "caption": visible_text(spec.caption),
        "notes": [visible_text(note) for note in spec.notes],
        "columns": [visible_text(str(name)) for name in columns],
        "rows": [[_cell(column[i]) for column in columns.values()] for i in range(shown)],
        "shown": f"{n:,} rows" if shown == n else f"The first {shown} of {n:,} rows",
    }


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return "–" if np.isnan(value) else f"{value:.6g}"
    return visible_text(str(value))


def writable(path: str | Path) -> Path:
    """The path, if a file can stand there.

    Raises:
        ReportError: its folder does not exist, or it is a folder itself.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ReportError(f"there is no folder {target.parent}", hint="create it, or write somewhere else")
    if target.is_dir():
        raise ReportError(f"{target} is a folder", hint=f"write to {target / 'report.html'}")
    return target


def write(path: str | Path, content: str | bytes) -> Path:
    """Write a file in one step: an older one there stays whole until the new one is complete.

    Raises:
        ReportError: the folder does not exist or cannot be written, the disk is full.
    """
    target = writable(path)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only here, and the old file must not go before
        os.replace(unfinished, target)
    except OSError as error:
        hint = "free some space, or write somewhere else" if error.errno == errno.ENOSPC else None
        raise ReportError(f"{target} cannot be written: {error.strerror or error}", hint=hint) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target
