"""`Report`: gather views, results, captures and words, and write them as one HTML file."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeGuard

from workbench.counting import count
from workbench.errors import ReportError
from workbench.report import captures, limits, origin
from workbench.report.form import FORM
from workbench.report.sections import Section, figures_of, table_of
from workbench.storage import disk
from workbench.storage.result import Result
from workbench.tokens import visible_text
from workbench.views import SHARED, SharedSelection, View, all_of
from workbench.views.base import page
from workbench.views.base.spec import ViewSpec

if TYPE_CHECKING:
    from workbench.capture.capture import Capture

    Addable = View | Sequence[View] | Result | Capture | str

REFUSED_BYTES = 50_000_000
PATTERN_CELLS = 3_000_000  # that the attention patterns of a page have together


@dataclass(frozen=True)
class _Entry:
    """One call of `add`."""

    thing: Any
    title: str | None
    text: str | None
    caption: str | None
    verification: Any
    batch: int
    note: str | None
    selected: SharedSelection  # as it was when the thing was added


class Report:
    """One HTML file that works from disk with the network off.

    Args:
        title: its heading.
        question: what it asks, one sentence. answer: what was found, Markdown.
        seeds: the seeds of everything random in it; seconds: what the work took before the report was begun; both for
            the provenance.

    >>> Report("Heads of a small model").add("Two heads copy *names*.")
    Report('Heads of a small model', 1 text)
    """

    def __init__(
        self,
        title: str,
        question: str | None = None,
        answer: str | None = None,
        *,
        seeds: Any = None,
        seconds: float = 0.0,
    ) -> None:
        if not isinstance(title, str) or not title.strip():
            raise ReportError(f"a report needs a title, not {title!r}", hint='write Report("Heads of my model")')
        self.title, self.question, self.answer, self.seeds = title, question, answer, seeds
        self._entries: list[_Entry] = []
        self._started = time.monotonic() - seconds

    def add(
        self,
        thing: Addable,
        *,
        title: str | None = None,
        text: str | None = None,
        caption: str | None = None,
        verification: Any = None,
        batch: int = 0,
        note: str | None = None,
    ) -> Self:
        """Add a section; returns the report.

        It shows what is selected and set at this moment.

        Args:
            thing: a view or several, an analysis's result (its views and table), a capture (its facts, sites, head
                atlas, attention pattern and tokens; of its first forward), or Markdown.
            title: the section's heading. note: Markdown above it. caption: replaces that of the first figure.
            text: the prompt of a capture as the person wrote it.
            verification: what `wb.verify(...)` returned for the capture's inputs. batch: which of its batch rows.

        Raises:
            ReportError: this is nothing of the kind, or it holds nothing to show.
        """
        if isinstance(thing, str):
            if not thing.strip():
                raise ReportError("the text is empty")
        elif _is_capture(thing):
            captures.check_batch(captures.first_call(thing), batch)
        elif not isinstance(thing, (View, Result)) and not _are_views(thing):
            raise ReportError(
                f"a report shows views, results, captures and Markdown, not {type(thing).__name__}",
                hint="pass the object that `with wb.capture() as cap` leaves behind, or what an analysis returned",
            )
        if not _is_capture(thing) and (verification is not None or batch or text is not None):
            raise ReportError("text=, verification= and batch= belong to captures", hint="pass words as note=")
        # A view is added as it is now; what is selected or set in it later is for another report.
        held: Any = thing.current if isinstance(thing, View) else thing
        if _are_views(thing):
            held = tuple(view.current for view in thing)
        self._entries.append(_Entry(held, title, text, caption, verification, batch, note, SHARED.copy()))
        return self

    def to_html(self, *, allow_large: bool = False) -> str:
        """The page as text.

        Raises:
            ReportError: the report is empty, or takes more than 50 MB and that is not asked for.
        """
        if not self._entries:
            raise ReportError("the report is empty", hint="add a capture: Report(title).add(cap)")
        sections = self._sections()
        specs = [spec for section in sections for spec in section.figures]
        block = origin.build(
            title=visible_text(self.title.strip()),
            question=None if self.question is None else visible_text(self.question),
            seeds=self.seeds,
            wall_time=time.monotonic() - self._started,
            sections=sections,
            figures=figures_of([(spec.kind, spec.title) for spec in specs]),
        )
        words = {
            "answer": self.answer,
            "sections": [section.to_json() for section in sections],
            "limits": limits.limits(sections),
        }
        html = page.render(self.title, specs, form=FORM, words=words, provenance=block)
        size = len(html.encode("utf-8"))
        if size > REFUSED_BYTES and not allow_large:
            raise ReportError(
                f"the report takes {size:,} bytes, and more than {REFUSED_BYTES:,} opens badly anywhere",
                hint=f"leave out or cut its largest figures ({_largest(specs)}), or pass allow_large=True",
            )
        return html

    def write(self, path: str | Path, *, allow_large: bool = False) -> Path:
        """Write the page and return its path; an older file there is replaced in one step or not at all.

        Raises:
            FileError: the folder does not exist or cannot be written, the disk is full. ReportError: the report is
                empty or too large.
        """
        target = disk.writable(path)
        html = self.to_html(allow_large=allow_large)
        size = len(html.encode("utf-8"))
        if size > page.LARGE_BYTES:
            message = f"the report takes {size / 1e6:.1f} MB: it may open slowly and be too large to send"
            warnings.warn(message, stacklevel=2)
        return disk.write(target, html)

    def _sections(self) -> list[Section]:
        n_captures = sum(_is_capture(entry.thing) for entry in self._entries)
        sections = [_section(entry, PATTERN_CELLS // max(1, n_captures)) for entry in self._entries]
        for entry, section in zip(self._entries, sections, strict=True):
            if not isinstance(entry.thing, (ViewSpec, tuple)):
                section.figures = [spec.choosing(entry.selected) for spec in section.figures]
        return sections

    def __repr__(self) -> str:
        title = repr(visible_text(self.title, 80))
        if not self._entries:
            return f"Report({title}, empty: add a capture)"
        kinds = [
            "text"
            if isinstance(entry.thing, str)
            else "capture"
            if _is_capture(entry.thing)
            else "view"
            if isinstance(entry.thing, (ViewSpec, tuple))
            else "result"
            for entry in self._entries
            for _ in (entry.thing if isinstance(entry.thing, tuple) else (None,))
        ]
        listed = [count(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)]
        return f"Report({title}, {', '.join(listed)})"


def _is_capture(thing: Any) -> TypeGuard[Capture]:
    from workbench.capture.capture import Capture

    return isinstance(thing, Capture)


def _are_views(thing: Any) -> TypeGuard[Sequence[View]]:
    return isinstance(thing, (list, tuple)) and len(thing) > 0 and all(isinstance(each, View) for each in thing)


def _section(entry: _Entry, budget: int) -> Section:
    thing, title, note = entry.thing, None if entry.title is None else visible_text(entry.title, 200), entry.note
    if isinstance(thing, str):
        return Section(heading=title, note=note, prose=thing)
    if _is_capture(thing):
        return captures.section(
            thing,
            title=entry.title,
            text=entry.text,
            verification=entry.verification,
            batch=entry.batch,
            note=entry.note,
            caption=entry.caption,
            budget=budget,
        )
    several = [view.spec for view in all_of(thing)] if isinstance(thing, Result) else thing
    spec, *more = several if isinstance(several, (list, tuple)) else [several]
    own = None if isinstance(thing, tuple) else entry.title  # several views keep their titles below the section's
    spec = replace(spec, title=own or spec.title, caption=entry.caption or spec.caption)
    found = Section(heading=title or visible_text(spec.title, 200), note=note, figures=[spec, *more])
    first: Mapping[str, Any] = next((each.provenance for each in (spec, *more) if each.provenance), {})
    found.origin = dict(thing.provenance or {}) if isinstance(thing, Result) else dict(first)
    if isinstance(thing, Result):
        found.tables.append(table_of(thing.table, "All numbers"))
    return found


def _largest(specs: Sequence[ViewSpec], most: int = 3) -> str:
    sizes = sorted(((len(str(spec.to_static())), n, spec) for n, spec in enumerate(specs, 1)), key=lambda x: -x[0])
    return ", ".join(
        f"figure {n} “{visible_text(spec.title, 60)}”, {size / 1e6:.1f} MB" for size, n, spec in sizes[:most]
    )
