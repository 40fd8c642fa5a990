"""One self-contained HTML page with views: a policy that names its scripts, data with digests, nothing loaded."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from workbench.errors import ReportError
from workbench.json_text import digest, json_for_html
from workbench.tokens import visible_text
from workbench.views import modules
from workbench.views.spec import ViewSpec

PLOTLY = "plotly-cartesian.min.js"
NEEDS_PLOTLY = frozenset({"figure"})
"""Kinds of views whose module draws with plotly; a page holds its bundle only then."""

TEMPLATES = Environment(
    loader=FunctionLoader(modules.asset),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def single(spec: ViewSpec) -> str:
    """A page with one view."""
    return render(spec.title, [spec], provenance=spec.provenance)


def render(
    title: str,
    specs: Sequence[ViewSpec],
    *,
    template: str = "page.html",
    environment: Environment = TEMPLATES,
    provenance: Any = None,
    style: str = "",
    media: Iterable[str] = (),
    **context: Any,
) -> str:
    """A page from a template that has `views`: one element each, filled by the page's script.

    Args:
        template: a template that extends "page.html", in `environment`.
        style: CSS after the views' own.
        media: kinds of embedded media besides images that the page plays, such as "media".
        context: what else the template wants.
    """
    kinds = [spec.kind for spec in specs]
    scripts = [modules.static(kinds)]
    plotly = bool(NEEDS_PLOTLY.intersection(kinds))
    if plotly:
        scripts.insert(0, modules.asset(PLOTLY))
    css = f"{modules.asset(modules.STYLE)}\n{modules.asset('page.css')}\n{style}"
    # plotly writes style attributes, so a page with it cannot name its styles one by one.
    styles = "'unsafe-inline'" if plotly else f"'{digest(css)}'"
    allowed = " ".join(f"'{digest(script)}'" for script in scripts)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {allowed}",
            f"style-src {styles}",
            "img-src data: blob:",
            *(f"{kind}-src data: blob:" for kind in media),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    blocks = {f"view-{i}": json_for_html(spec.to_static()) for i, spec in enumerate(specs)}
    blocks["provenance"] = json_for_html(provenance or {})
    return environment.get_template(template).render(
        title=visible_text(title.strip()),
        policy=Markup(policy),  # our own words and hashes; escaped, its quotes would be hard to read
        css=Markup(css),
        scripts=[Markup(script) for script in scripts],
        blocks=[(name, Markup(text), digest(text)) for name, text in blocks.items()],
        views=[Markup(_VIEW.format(i)) for i in range(len(specs))],
        specs=specs,
        **context,
    )


_VIEW = (
    '<div class="workbench-view" data-view="view-{}">'
    '<p class="scriptless">This view needs JavaScript, which does not run here.</p></div>'
)


def write(path: str | Path, content: str | bytes) -> Path:
    """Write a file in one step: an older one there stays whole until the new one is complete.

    Raises:
        ReportError: the folder does not exist or cannot be written, the disk is full.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ReportError(f"there is no folder {target.parent}", hint="create it, or write somewhere else")
    if target.is_dir():
        raise ReportError(f"{target} is a folder", hint=f"write to {target / 'report.html'}")
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(unfinished, target)
    except OSError as error:
        raise ReportError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target
