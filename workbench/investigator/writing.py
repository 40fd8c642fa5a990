"""The report of an investigation: the answer, how it came about, and each finding with the result it rests on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from workbench.investigator.findings import Finding, Planned, Sentence
from workbench.investigator.naming import rounded
from workbench.report import Report

_FIRST = 3  # the section of finding 0, behind the answer and the reasoning
_MARKS = re.compile(r"([\\`*_{}\[\]()#+.!|<>~&-])")
_TITLES = {
    "baseline": "Does the model do it?", "all_heads": "All heads at once", "importance": "Which heads does it need?",
    "circuit": "Which edges carry it?", "faithfulness": "Does the circuit do it alone?",
    "minimality": "What of the circuit is not needed?", "roles": "What do its heads do?",
    "overlap": "Does another task use it?", "repair": "Can it be repaired?",
}  # fmt: skip
_VERDICTS = {"circuit": "A circuit was found.", "none": "There is no circuit.", "undecided": "It is undecided."}


class Told(Protocol):
    """What a report is written of: an `Investigation`, or as much of one."""

    @property
    def task(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def answer(self) -> tuple[Sentence, ...]: ...
    @property
    def ended(self) -> str: ...
    @property
    def plans(self) -> tuple[Planned, ...]: ...
    @property
    def findings(self) -> tuple[Finding, ...]: ...
    @property
    def forwards(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def own_seconds(self) -> float: ...
    @property
    def budget(self) -> Mapping[str, float]: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...
    @property
    def memory(self) -> Mapping[str, Any]: ...


def report_of(found: Told) -> Report:
    """The page; every sentence links to the findings that it rests on."""
    page = Report(
        f"Investigation: {found.task} in {found.model}", question=found.question, answer=_answer(found),
        seeds=found.identity.get("seed"), seconds=found.seconds + found.own_seconds,
    )  # fmt: skip
    ended = f"It ended so: {found.ended}" if found.ended else "It has not ended: resume goes on with it."
    page.add(_costs(found), title="What it cost", note=_linked([Sentence(ended, _last(found))]))
    page.add(_reasoning(found), title="How it went")
    for finding in found.findings:
        _add(page, finding)
    return page


def _last(found: Told) -> tuple[int, ...]:
    """The findings on which the end rests: those of the plan that ended it, or the last one."""
    plan = found.plans[-1].plan if found.plans else None
    if plan is not None and not plan.steps and plan.because:
        return plan.because
    return tuple(finding.number for finding in found.findings[-1:])


def _answer(found: Told) -> str:
    verdict = _VERDICTS[found.verdict] if found.ended else "It is not finished."
    return f"**{verdict}** {_linked(found.answer)}"


def _add(page: Report, finding: Finding) -> None:
    title = f"Finding {finding.number}: {_TITLES[finding.analysis]}"
    says = _linked([Sentence(text, ()) for text in finding.says]) or "Nothing was found."
    if finding.status != "done":
        says = f"**{finding.status.capitalize()}.** {says}"
    cost = f"{finding.forwards:,} forwards."
    if finding.main is None:
        page.add(f"{says}\n\n{cost}{_numbers(finding)}", title=title)
    else:
        page.add(finding.main, title=title, note=f"{says} {cost}{_numbers(finding)}")


def _numbers(finding: Finding) -> str:
    """Numbers that no view has, as a small table."""
    shown: list[tuple[str, str]] = []
    if finding.analysis == "baseline" and finding.numbers:
        numbers = finding.numbers
        low, high = numbers["difference"]
        shown = [
            ("prompts", f"{numbers['prompts']}"), ("logit difference, prompts", rounded(numbers["clean"], 4)),
            ("logit difference, twins", rounded(numbers["corrupted"], 4)),
            ("prompts minus twins, 95 %", f"{rounded(low, 4)} to {rounded(high, 4)}"),
            ("accuracy", f"{numbers['accuracy']:.1%}"),
        ]  # fmt: skip
    if finding.analysis == "faithfulness" and finding.numbers:
        own = finding.numbers.get("value")
        shown = [("the circuit", "undefined" if own is None else f"{own:.1%}")]
        shown += [
            (f"random circuit {i}", "undefined" if value is None else f"{value:.1%}")
            for i, value in enumerate(finding.numbers["random"], 1)
        ]
    head = "kept of the difference" if finding.analysis == "faithfulness" else "value"
    return _table(("", head), shown) if shown else ""


def _costs(found: Told) -> str:
    rows = [
        (f"[{f.number}](#{_place(f.number)})", _plain(f.analysis), f.status, f"{f.forwards:,}", f"{f.seconds:.1f}")
        for f in found.findings
    ]
    rows.append(("all", "", "", f"{found.forwards:,} of {found.budget['forwards']:,.0f}",
                 f"{found.seconds:.1f} of {60 * found.budget['minutes']:,.0f}"))  # fmt: skip
    own = f"Planning and keeping files took {found.own_seconds:.2f} s besides."
    return f"{_table(('finding', 'analysis', 'status', 'forwards', 'seconds'), rows)}\n\n{_plain(own)}"


def _reasoning(found: Told) -> str:
    """The plans in order: who planned, why, what is kept, new and dropped, and which answers were refused."""
    parts = [_memory(found)]
    before: Planned | None = None
    for number, planned in enumerate(found.plans, 1):
        plan, edits = planned.plan, planned.plan.edits(None if before is None else before.plan)
        lines = [f"**{number}.** {_linked([_why(planned)])}"]
        lines += [f"- refused: {_plain(why)}" for why in planned.refused]
        if plan.steps:
            lines.append(f"- next: {_plain(str(plan.steps[0]))}{_because(plan.steps[0].why)}")
        for what in ("new", "dropped") if before is not None else ():
            rest = [step for step in edits[what] if not (what == "new" and step == str(plan.steps[0]))]
            if rest:
                lines.append(f"- {what}: {_plain(', '.join(rest))}")
        if before is None and len(plan.steps) > 1:
            lines.append(f"- then: {_plain(', '.join(str(step) for step in plan.steps[1:]))}")
        parts.append("\n".join([lines[0], "", *lines[1:]]))
        before = planned
    return "\n\n".join(part for part in parts if part)


def _why(planned: Planned) -> Sentence:
    who = "The rules planned: " if planned.by == "rules" else "The planner wrote: "
    return Sentence(who + planned.plan.why, planned.plan.because or (0,))


def _because(why: str) -> str:
    return f", {_plain(why)}" if why else ""


def _memory(found: Told) -> str:
    before, nearest = found.memory.get("asked before"), found.memory.get("nearest")
    said = []
    if before is not None:
        said.append(f"The same was asked before, and the answer was: {before['found']}")
    if nearest is not None:
        said.append(
            f"The most alike of other past questions (cosine {nearest['cosine']:.2f}) was “{nearest['asked']}” and the "
            f"answer: {nearest['found']}"
        )
    return _plain(" ".join(said)) if said else "Nothing was remembered of past investigations."


def _linked(sentences: Iterable[Sentence]) -> str:
    """Sentences as Markdown, each with links to the findings that it rests on."""
    return " ".join(f"{_plain(one.text)}{_links(one.rests_on)}" for one in sentences)


def _links(numbers: Sequence[int]) -> str:
    links = ", ".join(f"[{number}](#{_place(number)})" for number in numbers)
    return f" \\[{links}\\]" if links else ""


def _place(number: int) -> str:
    return f"section-{_FIRST + number}"


def _plain(text: str) -> str:
    """Text as it is, whatever Markdown would make of it."""
    return _MARKS.sub(r"\\\1", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines)
