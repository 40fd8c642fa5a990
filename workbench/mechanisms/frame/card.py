"""The card of a mechanism: what it is, what it needs, and where its claims stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from workbench.errors import WorkbenchError
from workbench.hooks.tap import Kind
from workbench.kernels.patterns import Grade

_CODE = re.compile("`([^`]+)`")
Outcome = Literal["not examined", "holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Claim:
    """What a paper says of its mechanism, and what was found at our scale.

    Attributes:
        says: the claim, in a sentence.
        how: what was measured, and the script that does it; empty while the claim is not examined.
        found: the figure with its interval.
        outcome: whether the claim came out.
        needs: of a claim that is not examined, what it would take.

    Raises:
        WorkbenchError: an outcome without a figure, a figure without an outcome, or an outcome with needs.

    >>> print(Claim("It is faster than softmax attention from 1,024 tokens on."))
    It is faster than softmax attention from 1,024 tokens on. Not examined yet.
    """

    says: str
    how: str = ""
    found: str = ""
    outcome: Outcome = "not examined"
    needs: str = ""

    def __post_init__(self) -> None:
        open_still = self.outcome == "not examined"
        if open_still == bool(self.how) or open_still == bool(self.found) or (self.needs and not open_still):
            raise WorkbenchError(
                f"a claim whose outcome is “{self.outcome}” has how={self.how!r} and found={self.found!r}, and needs "
                f"{self.needs!r}",
                hint="an examined claim says how, and what was found; one that was not examined says neither",
            )

    def __str__(self) -> str:
        if self.outcome == "not examined":
            return f"{self.says} Not examined{f': it needs {self.needs}' if self.needs else ' yet'}."
        return f"{self.says} {self.outcome.capitalize()} at our scale: {self.found} ({self.how})."


@dataclass(frozen=True)
class Card:
    """What a mechanism is.

    Attributes:
        title: its name in the paper. arxiv: the paper's number.
        equation: what it computes, for one head.
        map: what its map A is, in words: what is exact, what it leaves out.
        kind: what its sites mix. grade: of the map, as in `Pattern.grade`.
        parts: kind and grade of the sites for which these are others, by the name of the module inside.
        cost: time and memory for n tokens.
        causal: whether it runs "always", "never" or on demand ("either") without seeing later tokens.
        grid: whether tokens must be the patches of an image.
        leaks: how the future leaks into it although it is causal; empty where it does not.
        beside: what mixes tokens besides and is in no map; `wb.sites.unread` lists it.
        code: what there is of official code, and its licence; nothing of it is copied.
        claims: the paper's claims, and where they stand.
    """

    title: str
    arxiv: str
    equation: str
    map: str
    kind: Kind
    grade: Grade
    cost: str
    causal: Literal["always", "never", "either"]
    code: str
    claims: tuple[Claim, ...]
    grid: bool = False
    leaks: str = ""
    beside: str = ""
    parts: Mapping[str, tuple[Kind, Grade]] = field(default_factory=dict)

    def of(self, path: str) -> tuple[Kind, Grade]:
        """Kind and grade of the site at a path inside the module."""
        return self.parts.get(path, (self.kind, self.grade))

    def lines(self) -> list[tuple[str, str]]:
        """The card as (heading, text), for people."""
        needs = {"always": "causal only", "never": "not causal", "either": "causal or not"}[self.causal]
        needs += ", the patches of an image" if self.grid else ""
        sites = "; ".join([self.kind, *(f"{name}: {kind}, {grade}" for name, (kind, grade) in self.parts.items())])
        rows = [
            ("Paper", f"arXiv {self.arxiv}"), ("Equation", self.equation), ("Map", f"{self.map} Grade: {self.grade}."),
            ("Sites", sites), ("Cost", self.cost), ("Input", needs), ("Leaks", self.leaks), ("Beside", self.beside),
            ("Code", self.code),
        ]  # fmt: skip
        return [(head, text) for head, text in rows if text] + [("Claim", str(claim)) for claim in self.claims]

    def standing(self) -> list[tuple[str, str]]:
        """The claims as (heading, text), in several lines each: where it stands, what was found, and how."""
        found = []
        for claim in self.claims:
            found.append((f"Claim, {claim.outcome}", claim.says))
            if claim.outcome != "not examined":
                found += [("found at our scale", claim.found), ("examined how", claim.how)]
            elif claim.needs:
                found.append(("it needs", claim.needs))
        return found

    def __str__(self) -> str:
        rows = self.lines()
        width = max(len(head) for head, _ in rows)
        return "\n".join([self.title, *(f"  {head.ljust(width)}  {text}" for head, text in rows)])

    def _repr_html_(self) -> str:
        return table_of(self.title, self.lines())


def unmarked(text: str) -> str:
    """The text without the backticks around names in code, for where nothing draws them.

    >>> unmarked("`row_sum` has them")
    'row_sum has them'
    """
    return _CODE.sub(r"\1", text)


def table_of(title: str, lines: Sequence[tuple[str, str]]) -> str:
    """Lines of (heading, text) as HTML, for a notebook."""
    rows = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{escape(head)}</th>"
        f"<td style='text-align:left;white-space:normal'>{_code(text)}</td></tr>"
        for head, text in lines
    )
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def _code(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", escape(text))
