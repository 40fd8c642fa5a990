"""The page of `workbench gallery`: mechanisms against each other, each with its trained heads, then other papers."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from workbench.errors import WorkbenchError
from workbench.gallery.exhibits import EXHIBITS
from workbench.mechanisms import Room, rooms
from workbench.report import Report
from workbench.views import View, all_of
from workbench.views.results.mechanisms import matrix

_ABOUT = (
    "Every mechanism stands in the place of self-attention in the same small models: one that writes Python's own "
    "standard library byte by byte, and one that says which digit of a scene has the colour of a square. All of them "
    "are shown one text and three scenes, so that their heads can be compared. Weights are those that ship with the "
    "package; where none do, a model with random weights stands in, and its section says so."
)


class GalleryInterrupted(KeyboardInterrupt):
    """Ctrl-C during `build`.

    Attributes:
        partial: the report with what was looked at by then; None: nothing was.
        left: the names of what it lacks.
    """

    def __init__(self, partial: Report | None, left: Sequence[str]) -> None:
        self.partial, self.left = partial, tuple(left)
        super().__init__(f"stopped: {', '.join(left)} {'is' if len(left) == 1 else 'are'} not looked at")


def build(names: Sequence[str] | None = None, *, progress: bool = False) -> Report:
    """The report: a matrix over the mechanisms, a section for each, and one for each paper that brings no mechanism.

    Args:
        names: of mechanisms, with a variant behind a colon, or of `exhibits.EXHIBITS`; all mechanisms, variants that
            ship, and exhibits if None.
        progress: a bar that names the mechanism that is looked at.

    Raises:
        WorkbenchError: no such mechanism or variant, or no names at all.
        GalleryInterrupted: Ctrl-C; it has the report of what was looked at.
    """
    if isinstance(names, str) or (names is not None and not names):
        raise WorkbenchError(
            f"names={names!r} is no list of mechanisms", hint='["sqa:mha", "moh"], or None for all of them'
        )
    chosen = [*rooms.names(), *EXHIBITS] if names is None else list(names)
    names = [name for name in chosen if name not in EXHIBITS]
    exhibits = [name for name in chosen if name in EXHIBITS]
    found: list[Room] = []
    shown: list[tuple[str, list[View]]] = []
    try:
        with tqdm(names, disable=not progress, unit="mechanism") as bar:
            for name in bar:
                bar.set_postfix_str(name)
                found.append(rooms.room(name))
        for name in exhibits:
            shown.append((f"{name}: {EXHIBITS[name].card().title}", EXHIBITS[name].all()))
    except KeyboardInterrupt:
        left = [*names[len(found) :], *exhibits[len(shown) :]]
        raise GalleryInterrupted(_report(found, shown, left) if found else None, left) from None
    return _report(found, shown)


def _report(found: Sequence[Room], shown: Sequence[tuple[str, list[View]]], left: Sequence[str] = ()) -> Report:
    report = Report(
        "Mechanisms of papers",
        question="What does each mechanism do in the place of attention, at what cost, and what do its heads look at?",
    )
    if left:
        report.add(f"Stopped before its end: {', '.join(left)} are **not looked at**.")
    first = 3 if left else 2
    places = [f"section-{number}" for number in range(first, first + len(found))]
    if found:
        report.add(matrix(rooms.matrix(found), places), title="All mechanisms", note=_ABOUT)
    for one in found:
        title = f"{one.name}: {one.title}"
        plainly = "The heads below are those of a model with **random weights**: no trained weights are shipped."
        report.add(all_of(one), title=title, note=None if one.is_trained else plainly)
    for title, views in shown:
        report.add(views, title=title)
    return report
