"""What an investigation leaves behind: its plans, its findings with the results they rest on, and its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.faithfulness import Faithfulness
from workbench.analysis.circuits.overlap_result import CircuitOverlap
from workbench.analysis.circuits.repair import Repair
from workbench.analysis.circuits.roles import HeadRoles
from workbench.analysis.importance import HeadImportance
from workbench.errors import FormatError
from workbench.investigator.findings import Finding, Planned, Sentence
from workbench.investigator.plan import ANALYSES, parse
from workbench.investigator.verdict import standing, verdict_of
from workbench.investigator.writing import report_of
from workbench.report import Report
from workbench.storage import disk
from workbench.storage.json_text import finite
from workbench.storage.parts import Part, each_text
from workbench.storage.parts import parse as read_json
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd

FILE = "investigation.json"
_VERSION = 2
_STATUSES = ("done", "failed", "refused", "stopped")
_KINDS: dict[str, type[Result]] = {
    "faithfulness": Faithfulness, "random": Faithfulness, "circuit": Circuit, "importance": HeadImportance,
    "roles": HeadRoles, "overlap": CircuitOverlap, "repair": Repair,
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Investigation:
    """An investigation of how a model does a task.

    Attributes:
        task, model: names. question: in words.
        verdict: "circuit", "none" or "undecided". answer: sentences that say why.
        circuit: what stands, confirmed, of a model that does the task by heads; None where there is none.
        plans, findings: in order. ended: why it ended.
        budget: "forwards" and "minutes" that were allowed. own_seconds: what planning and keeping files took.
        identity: what a folder must share to be gone on from. memory: what was remembered when it began.
    """

    task: str
    model: str
    question: str
    plans: tuple[Planned, ...]
    findings: tuple[Finding, ...]
    verdict: str
    answer: tuple[Sentence, ...]
    ended: str
    budget: Mapping[str, float]
    own_seconds: float
    identity: Mapping[str, Any]
    memory: Mapping[str, Any]

    @property
    def circuit(self) -> Circuit | None:
        """The circuit that was confirmed."""
        stands = standing(self.findings)
        found = None if stands is None else self.findings[stands[0]].results["circuit"]
        return found if isinstance(found, Circuit) else None

    @property
    def heads(self) -> tuple[str, ...]:
        """Labels of the heads of the circuit; none where there is none."""
        return () if self.circuit is None else self.circuit.heads

    @property
    def forwards(self) -> int:
        """Examples that ran through the model."""
        return sum(finding.forwards for finding in self.findings)

    @property
    def seconds(self) -> float:
        """Wall time of the analyses."""
        return sum(finding.seconds for finding in self.findings)

    @property
    def sentences(self) -> tuple[Sentence, ...]:
        """Everything that is said: the answer, then reasons and findings in the order in which they came."""
        found, plans = list(self.answer), list(self.plans)
        for finding in self.findings:
            while plans and plans[0].at <= finding.number:
                found.append(_reason(plans.pop(0)))
            found += [Sentence(text, (finding.number,)) for text in finding.says]
        return (*found, *map(_reason, plans))

    @property
    def table(self) -> pd.DataFrame:
        """One row per finding: the analysis, how it went, what it said first, and what it cost."""
        import pandas as pd

        rows = [
            (f.number, f.analysis, f.status, f.says[0] if f.says else "", f.forwards, f.seconds) for f in self.findings
        ]
        return pd.DataFrame(rows, columns=["finding", "analysis", "status", "says", "forwards", "seconds"])

    def report(self) -> Report:
        """The whole as a page: the answer, the reasoning, and each finding with the result it rests on."""
        return report_of(self)

    def save(self, folder: str | Path, *, since: int = 0) -> Path:
        """Write the plans and findings as JSON, and each result as a file beside them.

        Args:
            since: number of the first finding whose results are not there yet.

        Raises:
            FileError: the folder cannot be made or written.
        """
        path = disk.folder(folder)
        for finding in self.findings[since:]:
            for name, result in finding.results.items():
                result.save(path / _file_of(finding.number, name))
        told = {
            "version": _VERSION, "task": self.task, "model": self.model, "question": self.question,
            "verdict": self.verdict, "ended": self.ended, "budget": dict(self.budget), "own_seconds": self.own_seconds,
            "identity": dict(self.identity), "memory": dict(self.memory),
            "answer": [{"text": one.text, "rests_on": list(one.rests_on)} for one in self.answer],
            "plans": [
                {"at": one.at, "by": one.by, "refused": list(one.refused), "plan": one.plan.to_json()}
                for one in self.plans
            ],
            "findings": [
                finding.told() | {"seconds": finding.seconds, "results": list(finding.results)}
                for finding in self.findings
            ],
        }  # fmt: skip
        disk.write(path / FILE, json.dumps(finite(told), indent=1, ensure_ascii=True))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Investigation:
        """Read what `save` wrote.

        Raises:
            FormatError: there is none, or it is damaged, or a result of it is missing.
        """
        path = disk.readable(folder)
        if not (path / FILE).is_file():
            raise FormatError(f"there is no investigation in {path}", hint="the folder that resume= or save() wrote")
        told = read_json(disk.content(path / FILE), FILE)
        if told["version"].integer() != _VERSION:
            raise FormatError(f"{FILE} is of another version", hint="investigate again")
        findings = tuple(_finding(part, i, path) for i, part in enumerate(told["findings"].list()))
        plans = tuple(_planned(part, len(findings)) for part in told["plans"].list())
        ended, task = told["ended"].text(), told["task"].text()
        verdict = told["verdict"].one_of(("circuit", "none", "undecided"))
        if verdict != (verdict_of(findings, ended, task)[0] if ended else "undecided"):
            raise told["verdict"].wrong("what follows from its findings")
        return cls(
            task=task, model=told["model"].text(), question=told["question"].text(), plans=plans,
            findings=findings, verdict=verdict,
            answer=tuple(_sentence(part, len(findings)) for part in told["answer"].list()),
            ended=ended, budget={name: told["budget"][name].number() for name in ("forwards", "minutes")},
            own_seconds=told["own_seconds"].number(), memory=_memory(told["memory"]),
            identity={name: value.plain() for name, value in told["identity"].items().items()},
        )  # fmt: skip

    def __repr__(self) -> str:
        said = {"circuit": f"a circuit of {', '.join(self.heads)}", "none": "no circuit", "undecided": "undecided"}
        return (
            f"Investigation({self.task} in {self.model}: {said[self.verdict]}; {len(self.findings)} findings, "
            f"{self.forwards:,} of {self.budget['forwards']:,.0f} forwards)"
        )


def _reason(planned: Planned) -> Sentence:
    who = "" if planned.by == "rules" else "The planner's reason: "
    return Sentence(f"{who}{planned.plan.why}", planned.plan.because or (0,))


def _file_of(number: int, name: str) -> str:
    return f"finding-{number:02}-{name.replace(' ', '-')}.safetensors"


def _finding(part: Part, number: int, folder: Path) -> Finding:
    part["number"].integer(number, number)
    results = {}
    for each in part["results"].list(40):
        name = each.text()
        kind = _KINDS.get(name.split(" ")[0])
        if kind is None or not name.replace(" ", "").isalnum():
            raise each.wrong("the name of a result")
        results[name] = kind.load(folder / _file_of(number, name))
    analysis = part["analysis"].one_of(("baseline", *ANALYSES))
    status = part["status"].one_of(_STATUSES)
    if status == "done":
        _check_numbers(analysis, part["numbers"])
        if analysis in ("circuit", "roles") and analysis not in results:
            raise part["results"].wrong(f"what {analysis!r} finds")
    return Finding(
        number, analysis, _object(part["arguments"]), status, _object(part["numbers"]),
        tuple(each.text() for each in part["says"].list()), part["forwards"].integer(0), part["seconds"].number(),
        results,
    )  # fmt: skip


def _object(part: Part) -> dict[str, Any]:
    return {name: value.plain() for name, value in part.items().items()}


def _check_numbers(analysis: str, numbers: Part) -> None:
    """Refuse a finding without the numbers that the verdict, the rules and the page rest on."""
    for name, read in _NUMBERS.get(analysis, {}).items():
        read(numbers[name])
    if analysis == "faithfulness" and numbers["confirmed"].flag():
        _ = numbers["value"].number(), _pair(numbers["interval"])


def _pair(part: Part) -> list[float]:
    return [each.number() for each in part.list(2, 2)]


def _shares(part: Part) -> list[float | None]:
    """Shares, which may be undefined."""
    return [None if each.value is None else each.number() for each in part.list()]


def _roles_of(part: Part) -> list[list[str]]:
    return [each_text(several) for several in part.items().values()]


_NUMBERS: dict[str, dict[str, Callable[[Part], Any]]] = {
    "baseline": {
        "does": Part.flag, "sure": Part.flag, "clean": Part.number, "corrupted": Part.number, "difference": _pair,
        "accuracy": Part.number, "prompts": Part.integer,
    },
    "all_heads": {"carry": Part.flag, "sure": Part.flag},
    "importance": {"heads": each_text},
    "circuit": {"heads": each_text, "threshold": Part.number},
    "faithfulness": {"confirmed": Part.flag, "random": _shares, "heads": each_text},
    "minimality": {"dropped": each_text},
    "roles": {"roles": _roles_of},
}  # fmt: skip


def _memory(part: Part) -> dict[str, Any]:
    """What was remembered, as `manager` keeps it."""
    before, nearest = part.get("asked before"), part.get("nearest")
    for one in (before, nearest):
        _ = None if one is None else (one["asked"].text(), one["found"].text())
    if nearest is not None:
        nearest["cosine"].number()
    return {
        "asked before": None if before is None else before.plain(),
        "nearest": None if nearest is None else nearest.plain(), "circuits": each_text(part["circuits"]),
    }  # fmt: skip


def _planned(part: Part, n_findings: int) -> Planned:
    at = part["at"].integer(1, n_findings)
    plan = parse(part["plan"].plain(), at)
    return Planned(at, plan, part["by"].text(), tuple(each.text() for each in part["refused"].list()))


def _sentence(part: Part, n_findings: int) -> Sentence:
    rests = part["rests_on"].list()
    return Sentence(part["text"].text(), tuple(each.integer(0, n_findings - 1) for each in rests))
