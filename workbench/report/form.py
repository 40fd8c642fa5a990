"""The form of a report's page: its template, and what that says of the words and the provenance in the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, FunctionLoader
from markupsafe import Markup

from workbench.errors import ReportError
from workbench.report import markdown, origin
from workbench.report.sections import figures_of
from workbench.tokens import visible_text
from workbench.views.base import page

MOST_MARKDOWN = 300_000
"""Characters of Markdown on a page; some texts of a few thousand already take a second to read as Markdown."""


@cache
def _asset(name: str) -> str:
    # The policy hashes the text between the tags, and a browser reads \r\n there as \n.
    return files("workbench.report").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _environment() -> Environment:
    ours = FunctionLoader(lambda name: _asset(name) if name == "report.html" else None)
    return page.TEMPLATES.overlay(loader=ChoiceLoader([ours, page.TEMPLATES.loader]))  # type: ignore[list-item]


def _context(
    words: Mapping[str, Any], provenance: Mapping[str, Any], specs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the template says.

    Args:
        words: answer (Markdown), sections (as `Section.to_json` makes them), limits.
        provenance: as `origin.build` makes it.
    """
    figures = figures_of([(spec["kind"], spec["title"]) for spec in specs])
    counts = [section["n_figures"] for section in words["sections"]]
    counted = all(type(n) is int and 0 <= n <= len(specs) for n in counts) and sum(counts) == len(specs)
    if figures != provenance["figures"] or not counted:
        raise ReportError("the figures that the page tells of are not those that it has")
    written = [words["answer"], *(section[key] for section in words["sections"] for key in ("note", "prose"))]
    if sum(len(text) for text in written if text is not None) > MOST_MARKDOWN:
        raise ReportError(f"the texts have more than {MOST_MARKDOWN:,} characters together", hint="leave some out")
    sections, at = [], 0
    for number, (section, n) in enumerate(zip(words["sections"], counts, strict=True), 1):
        rendered = {key: _rendered(section[key]) for key in ("note", "prose")}
        sections.append((f"section-{number}", {**section, **rendered}, list(range(at, at + n))))
        at += n
    return {
        "question": provenance["question"],
        "answer": _rendered(words["answer"]),
        "created": provenance["created"],
        "command_line": visible_text(provenance["command_line"]),
        "sections": sections,
        "figures": figures,
        "limits": words["limits"],
        "provenance_groups": origin.shown(provenance),
    }


def _rendered(text: str | None) -> Markup | None:
    return None if text is None else markdown.render(text)


FORM = page.Form("report.html", _environment(), lambda: _asset("report.css"), _context)
