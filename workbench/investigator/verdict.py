"""The verdict of an investigation, from what was found alone, whoever planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workbench.investigator.findings import Finding, Sentence
from workbench.investigator.naming import listed, said_of_roles

_GROUND = {"baseline": "does", "all_heads": "carry"}
"""What has to hold before a circuit of heads can explain anything, and the number that says so."""


def standing(findings: Sequence[Finding]) -> tuple[int, int] | None:
    """The findings of the circuit that stands and of its faithfulness; None where none does.

    It is the last that was confirmed. None stands where the model was not seen to do the task, or not by heads.
    """
    done = _last_done(findings)
    ground = all(done[name].numbers[what] for name, what in _GROUND.items() if name in done)
    return _confirmed(findings) if ground else None


def _confirmed(findings: Sequence[Finding]) -> tuple[int, int] | None:
    latest, found = None, None
    for finding in findings:
        latest = finding.number if "circuit" in finding.results else latest
        if latest is not None and finding.analysis == "faithfulness" and finding.numbers.get("confirmed"):
            found = latest, finding.number
    return found


def verdict_of(findings: Sequence[Finding], ended: str, task: str) -> tuple[str, tuple[Sentence, ...]]:
    """The verdict, "circuit", "none" or "undecided", and sentences that say why.

    A model that surely does not do the task, or surely does it without heads, has no circuit of heads, whatever was
    confirmed; where that is not sure, a circuit decides nothing either.

    Args:
        ended: why the investigation ended.
    """
    done, stands, confirmed = _last_done(findings), standing(findings), _confirmed(findings)
    void = [] if confirmed is None or stands is not None else [_void(findings, confirmed)]
    if _surely_not(done, "baseline"):
        text = f"There is none: the model does not do {task}, so that there is nothing of which a circuit could be."
        return "none", (Sentence(text, (0,)), *void)
    if _surely_not(done, "all_heads"):
        text = f"There is none: the model does {task} without any head's help."
        return "none", (Sentence(text, (0, done["all_heads"].number)), *void)
    if stands is None:
        rests = tuple(sorted({finding.number for finding in findings[-2:]}))
        return "undecided", (Sentence(f"It is undecided: {ended}", rests), *void)
    kept = findings[stands[1]].numbers
    low, high = kept["interval"]
    said = [Sentence(
        f"{listed(kept['heads'])} {'does' if len(kept['heads']) == 1 else 'do'} {task}: their circuit alone keeps "
        f"{kept['value']:.0%} [{low:.0%}, {high:.0%}] of it on prompts that it was not found with.", stands,
    )]  # fmt: skip
    if "roles" in done:
        named = {head: several for head, several in done["roles"].numbers["roles"].items() if head in kept["heads"]}
        said += [Sentence(text, (done["roles"].number,)) for text in said_of_roles(named)[:1] if any(named.values())]
    return "circuit", tuple(said)


def _void(findings: Sequence[Finding], confirmed: tuple[int, int]) -> Sentence:
    heads = listed(findings[confirmed[1]].numbers["heads"])
    return Sentence(f"That a circuit of {heads} was confirmed decides nothing then.", confirmed)


def _last_done(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.analysis: finding for finding in findings if finding.status == "done"}


def _surely_not(done: Mapping[str, Finding], analysis: str) -> bool:
    """Whether an analysis says no, and is sure; what few prompts leave open is no answer."""
    found = done.get(analysis)
    return found is not None and not found.numbers[_GROUND[analysis]] and bool(found.numbers["sure"])
