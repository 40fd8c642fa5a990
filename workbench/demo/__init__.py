"""The page of `workbench demo`: what the workbench finds in the models that ship with it, one file per section."""

from __future__ import annotations

from collections.abc import Callable

from tqdm.auto import tqdm

from workbench.demo import capacity, circuits, heads, induction, language, speech
from workbench.report import Report

_SECTIONS: dict[str, Callable[[Report, int], None]] = {
    "induction head": induction.add,
    "language model": language.add,
    "heads of a vision model": heads.add,
    "circuit": circuits.add,
    "capacity": capacity.add,
    "speech": speech.add,
}


def build(seed: int = 3, *, progress: bool = False) -> Report:
    """The report, its sections computed one after the other on this machine.

    Args:
        seed: of everything random in it.
        progress: a bar that names the section being computed.
    """
    report = Report(
        "Heads of small models",
        question="What does each attention head of the models that ship with the package look at, and what does it do?",
        seeds=[seed],
    )
    with tqdm(_SECTIONS.items(), disable=not progress, unit="section") as bar:
        for name, add in bar:
            bar.set_postfix_str(name)
            add(report, seed)
    return report
