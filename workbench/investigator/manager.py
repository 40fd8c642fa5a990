"""`investigate`: plan analyses of how a model does a task, run them, and plan anew after each finding.

The plan for the whole and the steps that carry it out are apart, as in Agent S2 (2504.00906): whoever plans sees all
findings and past investigations, and nothing runs that is not one of our analyses.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from workbench.errors import FileError, FormatError, WorkbenchError, expect
from workbench.inputs import decoder_start, device_for_inputs
from workbench.investigator.analyses import RUNS, baseline
from workbench.investigator.asking import Asked, Planner
from workbench.investigator.budget import Budget, BudgetSpent, Meter
from workbench.investigator.findings import Finding, Planned, Sentence
from workbench.investigator.investigation import FILE, Investigation
from workbench.investigator.memory import Memory, Remembered, plain
from workbench.investigator.plan import Plan, Step
from workbench.investigator.subject import Found, Subject, check_tasks, places_of
from workbench.investigator.verdict import verdict_of
from workbench.session.workbench import Workbench
from workbench.storage import disk
from workbench.storage.json_text import finite
from workbench.storage.provenance import describe
from workbench.sweep.inputs import digest
from workbench.sweep.inputs import plain as plain_batch
from workbench.tasks.base import Task

log = logging.getLogger(__name__)
_MOST_FINDINGS = 40
_MOST_REFUSED = 3  # one after another


class InvestigationInterrupted(KeyboardInterrupt):
    """Ctrl-C during an investigation. `partial` holds what is done; `save` it, and pass the folder as `resume`."""

    def __init__(self, partial: Investigation, path: Path | None) -> None:
        self.partial = partial
        where = f"they are in {path}" if path else "keep them with error.partial.save(folder)"
        super().__init__(f"{len(partial.findings)} findings are done; {where}, and go on with resume=folder")


def investigate(
    wb: Workbench,
    task: Task,
    *,
    known: Sequence[Task] = (),
    planner: Planner | None = None,
    forwards: int = 20_000,
    minutes: float = 15.0,
    memory: Memory | str | Path | None = None,
    places: Mapping[str, Sequence[str]] | None = None,
    resume: str | Path | None = None,
    proactive: bool = True,
    planner_seconds: float = 60.0,
    batch_size: int = 25,
    seed: int = 0,
    progress: bool = True,
) -> Investigation:
    """Investigate how a model does a task: which heads it needs, which circuit does it, what its heads do.

    Half of the prompts find, the other half confirms. A circuit is the verdict only where it does the task alone on
    the half that it was not found with, and better than random circuits of its size; whoever plans, the verdict
    follows from the findings by the same rule.

    Args:
        wb: the model, attached with its tokenizer. task: prompts with twins.
        known: other tasks of the model, whose circuits are compared with that of this one.
        planner: `planner(prompt)` that returns the next plan as JSON, such as a language model; rules by default. What
            it answers is checked, refusals are recorded, and where it fails twice the rules plan in its place.
        forwards: examples that may run through the model; one whose gradients are kept counts as three. minutes: of
            wall time. Neither is exceeded by more than the forward that is running.
        memory: of past investigations, or a folder for it.
        places: where the task keeps its "answer", "wrong", "repeated" and "question"; known for the shipped tasks.
        resume: a folder to go on from, if an investigation is there, and to write to after every finding.
        proactive: plan anew after every finding; otherwise only after one that failed.
        planner_seconds: how long the planner may take for an answer.
        batch_size: examples in one forward. seed: of what is drawn at random.

    Raises:
        TaskError: a task, or one of `known`, that is none or has fewer than eight prompts; `known` has the task itself,
            or one twice; answers that this tokenizer does not know.
        WorkbenchError: a budget of nothing, no folder for the memory. FileError: nothing can be written to a folder.
        FormatError: the folder holds an investigation of another model, task or settings, or a damaged one.
        InvestigationInterrupted: on Ctrl-C, with what is done.

    Warns:
        UserWarning: the memory cannot be written any more when the investigation ends.
    """
    expect(Workbench, wb=wb)
    expect(Task, task=task)
    began, budget = time.monotonic(), Budget(forwards, minutes)
    check_tasks(task, known)
    remembering = memory if isinstance(memory, Memory) or memory is None else Memory(memory)
    if remembering is not None and remembering.folder is not None:
        disk.folder(remembering.folder)  # an error, before minutes go by
    wb.check_ready()
    identity = _identity(wb, task, known, planner, budget, places, proactive, batch_size, seed)
    key = (task.name, identity["prompts"], identity["weights"])
    folder = None if resume is None else disk.folder(resume)
    now = _begin(wb, task, folder, identity, budget, remembering, key)
    circuits = {} if remembering is None else remembering.circuits(key)
    subject = Subject(
        wb, task, {one.name: one for one in known},
        {name: one for name, one in circuits.items() if name in now.memory["circuits"]},
        places_of(task, places), seed, batch_size,
    )  # fmt: skip
    for finding in (one for one in now.findings if one.status == "done"):
        subject.take(finding.analysis, Found(dict(finding.numbers), finding.says, dict(finding.results)))
    run = _Run(subject, now, Asked(planner, planner_seconds), Meter(budget, now.forwards, now.seconds), folder)
    own_before = now.own_seconds
    try:
        with tqdm(disable=not progress, desc=f"investigating {task.name}", unit="finding") as bar:
            while not run.now.ended:
                run.on(proactive, bar)
    except KeyboardInterrupt:
        run.keep()
        raise InvestigationInterrupted(run.now, folder) from None
    if not now.ended:
        own = time.monotonic() - began - run.busy
        run.now = replace(run.now, own_seconds=own_before + own)
        run.keep()
        if remembering is not None:
            try:
                remembering.add(_remembered(run.now, key), run.now.circuit)
            except FileError as error:  # what was found is worth more than that it is remembered
                warnings.warn(f"the investigation is not remembered: {error.message}", stacklevel=2)
    return run.now


def _begin(
    wb: Workbench, task: Task, folder: Path | None, identity: dict[str, Any], budget: Budget,
    memory: Memory | None, key: tuple[str, str, str],
) -> Investigation:  # fmt: skip
    if folder is not None and (folder / FILE).is_file():
        held = Investigation.load(folder)
        odd = [name for name in identity if held.identity.get(name) != identity[name]]
        if odd:
            raise FormatError(
                f"the investigation in {folder} is of another {', '.join(odd)}", hint="give another folder"
            )
        return held
    model = describe(wb.model)["model_name"]
    question = f"How does {model} do {task.name}?"
    before = None if memory is None else memory.asked_before(key)
    nearest = None if memory is None else memory.nearest(question, key)
    circuits = sorted(memory.circuits(key)) if memory is not None else []
    remembered = {
        "asked before": None if before is None else plain(before),
        "nearest": None if nearest is None else plain(nearest[0]) | {"cosine": round(nearest[1], 4)},
        "circuits": circuits,
    }
    return Investigation(
        task=task.name, model=model, question=question, plans=(), findings=(), verdict="undecided",
        answer=(), ended="", budget={"forwards": budget.forwards, "minutes": budget.minutes}, own_seconds=0.0,
        identity=identity, memory=remembered,
    )  # fmt: skip


class _Run:
    """An investigation under way.

    Attributes:
        now: as far as it has come. busy: seconds in analyses and waiting for the planner.
    """

    def __init__(self, subject: Subject, now: Investigation, asked: Asked, meter: Meter, folder: Path | None) -> None:
        self.subject, self.now, self.asked, self.meter, self.folder = subject, now, asked, meter, folder
        self.busy, self.kept = 0.0, len(now.findings)
        self.circuits = [0] * len(now.findings)  # how many circuits there were when each finding was made
        seen = 0
        for i, finding in enumerate(now.findings):
            self.circuits[i] = seen
            seen += "circuit" in finding.results and finding.analysis in ("circuit", "minimality")

    def keep(self) -> None:
        """Write what is done."""
        if self.folder is not None:
            self.now.save(self.folder, since=self.kept)
            self.kept = len(self.now.findings)

    def on(self, proactive: bool, bar: Any) -> None:
        """One step: the baseline, or a plan and its first analysis."""
        now = self.now
        if not now.findings:
            self._add("baseline", {}, lambda: baseline(self.subject))
            if self.now.findings[-1].status != "done":
                self._end("the model could not be measured on the task")
        else:
            plan, at = self._plan(proactive)
            if at >= len(plan.steps):
                self._end(plan.why if not plan.steps else "the plan was carried out to its end")
            else:
                step = plan.steps[at]
                bar.set_postfix_str(str(step))
                self._run(step)
        bar.update()

    def _plan(self, proactive: bool) -> tuple[Plan, int]:
        """The plan, and which of its steps is next."""
        now = self.now
        if now.plans:
            at = len(now.findings) - now.plans[-1].at
            failed = at > 0 and now.findings[-1].status != "done"
            if at == 0 or not (proactive or failed):
                return now.plans[-1].plan, at
        began = time.monotonic()
        plan, by, refused = self.asked.plan(self.state, len(now.findings), 60 * self.meter.left[1])
        self.busy += time.monotonic() - began if by != "rules" or refused else 0.0
        self.now = replace(now, plans=(*now.plans, Planned(len(now.findings), plan, by, tuple(refused))))
        self.keep()
        return plan, 0

    def _run(self, step: Step) -> None:
        again = next(
            (
                finding
                for finding, seen in zip(self.now.findings, self.circuits, strict=True)
                if Step(finding.analysis, finding.arguments).key == step.key and seen == len(self.subject.circuits)
            ),
            None,
        )
        forwards, _ = self.meter.left
        cost = self._costs(str(step.arguments.get("method", ""))).get(step.analysis, 0)
        if again is not None:
            self._refuse(step, f"finding {again.number} is the same, and nothing that it rests on has changed")
        elif cost > forwards:
            self._refuse(step, f"it takes about {cost:,} forwards, and {forwards:,} are left")
        else:
            self._add(step.analysis, dict(step.arguments), lambda: RUNS[step.analysis](self.subject, **step.arguments))
        last = self.now.findings[-_MOST_REFUSED:]
        if self.now.findings[-1].status == "stopped":
            self._end(f"the budget is spent: {self.now.findings[-1].says[0]}")
        elif len(last) == _MOST_REFUSED and all(finding.status in ("failed", "refused") for finding in last):
            self._end(f"{_MOST_REFUSED} analyses one after another could not be done")
        elif len(self.now.findings) >= _MOST_FINDINGS:
            self._end(f"there are {_MOST_FINDINGS} findings, the most that an investigation makes")

    def _add(self, analysis: str, arguments: dict[str, Any], run: Any) -> None:
        """Run an analysis, and keep what it found, or why it did not."""
        began, before = time.monotonic(), self.meter.forwards
        status, found = "done", Found({}, ())
        try:
            self.meter.check()
            with self.meter.reading(self.subject.wb.model):
                found = run()
        except BudgetSpent as error:
            status, found = "stopped", Found({}, (error.message,))
        except Exception as error:  # such as no memory on a device; what was found before is kept
            if analysis == "baseline":
                raise
            log.info("%s failed", analysis, exc_info=True)
            said = error.message if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
            status, found = "failed", Found({}, (f"{analysis} could not be done: {said}",))
        seconds = time.monotonic() - began
        self.busy += seconds
        self._take(analysis, arguments, status, found, self.meter.forwards - before, seconds)

    def _refuse(self, step: Step, why: str) -> None:
        said = f"{step} was not run: {why}."
        self._take(step.analysis, dict(step.arguments), "refused", Found({}, (said,)), 0, 0.0)

    def _take(
        self, analysis: str, arguments: dict[str, Any], status: str, found: Found, forwards: int, seconds: float
    ) -> None:
        number = len(self.now.findings)
        self.circuits.append(len(self.subject.circuits))
        finding = Finding(
            number, analysis, arguments, status, finite(found.numbers), found.says, forwards, seconds, found.results
        )
        if status == "done":
            self.subject.take(analysis, found)
        self.now = replace(self.now, findings=(*self.now.findings, finding))
        self.keep()

    def _end(self, why: str) -> None:
        ended = why if why.endswith(".") else f"{why}."
        verdict, answer = verdict_of(self.now.findings, ended, self.now.task)
        answer += tuple(self._remembered())
        self.now = replace(self.now, ended=ended, verdict=verdict, answer=answer)
        self.keep()

    def _remembered(self) -> list[Sentence]:
        before = self.now.memory["asked before"]
        return [] if before is None else [Sentence(f"Asked before, the answer was: {before['found']}", ())]

    def _costs(self, method: str = "") -> dict[str, int]:
        """About how many forwards each analysis takes, those with gradients three times.

        Args:
            method: by which a circuit is found.
        """
        n = len(self.subject.task)
        half = (n + 1) // 2
        try:
            graph = self.subject.graph
        except WorkbenchError:
            return {}
        heads, latest = len(graph.head_names), self.subject.circuits[-1:]
        nodes = len(latest[0].nodes) if latest else 0
        cuts = graph.n_edges if method == "acdc" else 12
        return {
            "all_heads": 4 * half, "importance": (heads + 1) * half, "circuit": cuts * half, "faithfulness": 6 * half,
            "minimality": (nodes + 3) * half, "roles": 2 * n, "overlap": 12 * n, "repair": 3 * n,
        }  # fmt: skip

    @property
    def state(self) -> dict[str, Any]:
        """What a planner is told."""
        forwards, minutes = self.meter.left
        try:
            graph = self.subject.graph
            model: dict[str, Any] = {
                "layers": len(graph.layers),
                "heads": len(graph.head_names),
                "edges": graph.n_edges,
            }
        except WorkbenchError as error:
            model = {"layers": 0, "heads": 0, "edges": 0, "error": error.message}
        before = self.now.plans[-1].plan.to_json() if self.now.plans else None
        remembered = self.now.memory["circuits"]
        return {
            "task": {
                "name": self.now.task, "examples": len(self.subject.task),
                "answer_place": bool(self.subject.places.get("answer")),
            },
            "model": {"name": self.now.model, **model},
            "budget": {"forwards": forwards, "minutes": round(minutes, 2), "costs": self._costs()},
            "findings": [finding.told() for finding in self.now.findings],
            "known": sorted({*self.subject.known, *remembered}),
            "memory": dict(self.now.memory), "plan before": before,
        }  # fmt: skip


def _identity(
    wb: Workbench, task: Task, known: Sequence[Task], planner: Planner | None, budget: Budget,
    places: Mapping[str, Sequence[str]] | None, proactive: bool, batch_size: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    device, start = device_for_inputs(wb.model), decoder_start(wb.model)

    def prompts(one: Task) -> str:
        several = [
            [plain_batch(batch) for batch in one.batches(wb.tokenizer, batch_size, twins=twins, device=device,
                                                         start_token=start)]
            for twins in (False, True)
        ]  # fmt: skip
        return digest(several)

    return {
        "model": type(wb.model).__name__, "weights": wb.weights_identity(), "task": task.name, "prompts": prompts(task),
        "known": {one.name: prompts(one) for one in known}, "planner": "rules" if planner is None else "a callable",
        "forwards": budget.forwards, "minutes": budget.minutes, "proactive": proactive, "batch_size": batch_size,
        "seed": seed, "places": {key: list(names) for key, names in (places or {}).items()},
    }  # fmt: skip


def _remembered(now: Investigation, key: tuple[str, str, str]) -> Remembered:
    found = now.answer[0].text if now.answer else now.ended
    return Remembered(
        asked=now.question, task=key[0], prompts=key[1], model=now.model, weights=key[2], verdict=now.verdict,
        found=found, heads=now.heads, forwards=now.forwards, seconds=now.seconds,
    )  # fmt: skip
