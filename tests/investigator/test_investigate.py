"""The investigator on models whose circuits were planted: what it finds, what it says, what it refuses."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from support.circuits import random_task, tiny
from workbench import FileError, Investigation, Memory, TaskError, WorkbenchError, investigate
from workbench.investigator import Finding, analyses, asking, manager, parse
from workbench.investigator.analyses import NATS
from workbench.investigator.budget import Budget, Meter
from workbench.investigator.investigation import FILE
from workbench.investigator.naming import listed, said_of_roles
from workbench.investigator.rules import plan_by_rules
from workbench.investigator.verdict import verdict_of
from workbench.models.planted import KINDS, WITHOUT, Planted, planted
from workbench.report import check

WITH = [kind for kind in KINDS if kind not in WITHOUT]


def run(made: Planted, **options: Any) -> Investigation:
    with workbench.attach(made.model, made.tokenizer) as wb:
        return investigate(wb, made.task, progress=False, **options)


@pytest.fixture(scope="module")
def mover() -> Planted:
    return planted("mover", n=16)


@pytest.fixture(scope="module")
def found(mover: Planted) -> Investigation:
    return run(mover)


def told(one: Investigation) -> Any:
    """All that is said and found, without how long it took."""
    return [one.verdict, one.ended, one.sentences, [finding.told() for finding in one.findings], one.plans]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", WITH)
def test_planted_circuits_are_found_and_named_with_their_evidence(kind: str, seed: int) -> None:
    made = planted(kind, seed, n=16)
    one = run(made)
    assert one.verdict == "circuit"
    assert set(one.heads) == set(made.heads)
    assert all(head in one.answer[0].text for head in made.heads)
    rests = [one.findings[number] for number in one.answer[0].rests_on]
    assert [finding.analysis for finding in rests] == ["circuit", "faithfulness"]
    assert rests[1].numbers["value"] > max(rests[1].numbers["random"], default=0)


@pytest.mark.parametrize("kind", WITHOUT)
def test_where_nothing_is_planted_it_says_so(kind: str) -> None:
    one = run(planted(kind, n=16))
    assert (one.verdict, one.heads, one.circuit) == ("none", (), None)
    assert "There is none" in one.answer[0].text
    assert one.forwards < 1000  # what cannot be there is not looked for


@pytest.mark.parametrize(("n", "verdict"), [(16, "undecided"), (600, "none")])
def test_a_random_transformer_has_no_circuit_and_few_prompts_leave_it_open(n: int, verdict: str) -> None:
    with workbench.attach(tiny("gpt2"), planted("copy").tokenizer) as wb:
        one = investigate(wb, random_task(n, 6, 60), progress=False, batch_size=200)
    low, high = one.findings[0].numbers["difference"]
    assert low < 0
    assert (one.verdict, one.heads) == (verdict, ())
    assert (high >= NATS) == (verdict == "undecided")
    assert ("more prompts" in one.answer[0].text) == (verdict == "undecided")


def test_heads_that_are_not_surely_idle_leave_it_open() -> None:
    base = Finding(0, "baseline", {}, "done", {"does": True, "sure": True}, (), 1, 0.0)
    for sure, verdict in ((True, "none"), (False, "undecided")):
        heads = Finding(1, "all_heads", {}, "done", {"carry": False, "sure": sure}, (), 1, 0.0)
        assert verdict_of([base, heads], "It ended.", "it")[0] == verdict


@pytest.mark.parametrize("sure", [True, False])
@pytest.mark.parametrize(("analysis", "what"), [("baseline", "does"), ("all_heads", "carry")])
def test_a_confirmed_circuit_of_nothing_is_no_circuit(
    found: Investigation, analysis: str, what: str, sure: bool
) -> None:
    """As a planner can come to that goes on whatever the first findings say."""
    assert found.verdict == "circuit"
    findings = [
        replace(one, numbers={**one.numbers, what: False, "sure": sure}) if one.analysis == analysis else one
        for one in found.findings
    ]
    verdict, answer = verdict_of(findings, "It ended.", "it")
    assert verdict == ("none" if sure else "undecided")
    assert "decides nothing" in answer[1].text
    assert [findings[number].analysis for number in answer[1].rests_on] == ["circuit", "faithfulness"]
    one = replace(found, findings=tuple(findings), verdict=verdict, answer=answer)
    assert (one.heads, one.circuit) == ((), None)


def test_heads_are_told_of_by_role(found: Investigation) -> None:
    named = {f"L0H{i}": ["previous-token"] for i in range(9)} | {"L1H0": ["mover", "induction"], "L1H1": []}
    first, second = said_of_roles(named)
    told = [part.split(" ", 1)[0] for part in first.split(": ")[1].split("; ")]
    assert told == ["previous-token", "mover", "induction"]
    assert "previous-token L0H0–8; mover L1H0; induction L1H0" in first
    assert listed(["encoder.0.attn.H1"] * 6).count("H1") == 6
    assert listed([*(f"encoder.0.attn.H{i}" for i in range(8)), "odd"]) == "encoder.0.attn.H0–7 and odd"
    assert second == "No role is suggested for L1H1."
    roles = next(one for one in found.findings if one.analysis == "roles")
    more = replace(roles, numbers={"roles": {"L9H9": ["mover"], found.heads[0]: ["mover"]}})
    findings = [more if one is roles else one for one in found.findings]
    answer = verdict_of(findings, "It ended.", "it")[1]
    assert f"mover {found.heads[0]}." in answer[1].text  # those of the circuit alone


def test_the_model_is_left_as_it_was(mover: Planted, found: Investigation) -> None:
    assert not mover.model._forward_pre_hooks
    assert found.forwards == sum(finding.forwards for finding in found.findings) > 0


def test_every_sentence_rests_on_a_finding_and_the_page_links_to_it(found: Investigation, tmp_path: Path) -> None:
    assert all(sentence.rests_on for sentence in found.sentences)
    page = found.report().write(tmp_path / "page.html")
    assert check(page) == []
    text = page.read_text(encoding="utf-8")
    for finding in found.findings:
        assert f'id="section-{3 + finding.number}"' in text
        assert f'href="#section-{3 + finding.number}"' in text
        assert f"Finding {finding.number}:" in text
    assert "<k>" not in text


def test_saved_and_loaded_it_says_the_same(found: Investigation, tmp_path: Path) -> None:
    again = Investigation.load(found.save(tmp_path / "kept"))
    assert told(again) == told(found)
    assert again.heads == found.heads
    torch.testing.assert_close(again.circuit.edge_scores, found.circuit.edge_scores, equal_nan=True)  # type: ignore[union-attr]
    assert repr(again) == repr(found)
    assert len(again.table) == len(found.findings)


def test_an_investigation_that_was_killed_goes_on_to_the_same_report(
    mover: Planted, found: Investigation, tmp_path: Path
) -> None:
    """Killed by the system in the midst of its third analysis, and gone on with in this process."""
    child = os.fork()
    if child == 0:  # pragma: no cover
        analyses.RUNS["circuit"] = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        run(mover, resume=tmp_path / "run")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    held = Investigation.load(tmp_path / "run")
    assert 0 < len(held.findings) < len(found.findings)
    assert held.ended == ""
    assert "It has not ended" in held.report().to_html()
    assert told(run(mover, resume=tmp_path / "run")) == told(found)
    assert told(run(mover, resume=tmp_path / "run")) == told(found)  # one that has ended is read


def test_ctrl_c_keeps_what_is_done(
    mover: Planted, found: Investigation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(analyses.RUNS, "circuit", stop)
        with pytest.raises(workbench.InvestigationInterrupted) as caught:
            run(mover)
    kept = caught.value.partial.save(tmp_path / "kept")
    assert told(run(mover, resume=kept)) == told(found)


def test_a_folder_of_another_investigation_is_refused(mover: Planted, found: Investigation, tmp_path: Path) -> None:
    kept = found.save(tmp_path / "kept")
    with pytest.raises(workbench.FormatError, match=r"of another .*prompts"):
        run(planted("mover", n=18), resume=kept)
    (kept / "finding-03-circuit.safetensors").write_bytes(b"nothing")
    with pytest.raises(workbench.FormatError, match="finding-03"):
        Investigation.load(kept)
    assert told(Investigation.load(found.save(kept))) == told(found)  # what stood there is written anew


def test_one_whose_analyses_failed_is_gone_on_with(mover: Planted, tmp_path: Path) -> None:
    plans = {"why": "x", "because": [0], "steps": [{"analysis": "circuit"}, {"analysis": "roles"}]}
    answers = [plans, {**plans, "steps": [{"analysis": "faithfulness"}, {"analysis": "roles"}]}, {**plans, "steps": []}]

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    def ask(prompt: str) -> Any:
        return answers.pop(0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(analyses.RUNS, "faithfulness", broken)
        patched.setitem(analyses.RUNS, "roles", broken)
        one = run(mover, planner=ask, proactive=False, resume=tmp_path / "run")
    assert [finding.status for finding in one.findings[1:]] == ["done", "failed", "failed"]
    assert told(run(mover, planner=ask, proactive=False, resume=tmp_path / "run")) == told(one)


DAMAGE: list[tuple[list[Any], Any]] = [
    (["findings", 0, "numbers"], {}),
    (["findings", 0, "numbers"], [1]),
    (["findings", 1, "numbers", "carry"], "yes"),
    (["findings", 3, "results"], []),
    (["identity"], [1]),
    (["memory"], {}),
    (["memory", "nearest"], {"asked": "x", "found": "y"}),
    (["budget"], {"forwards": 1}),
    (["verdict"], "none"),
    (["findings", 0, "arguments"], 3),
]


@pytest.mark.parametrize(("where", "value"), DAMAGE)
def test_a_file_of_a_stranger_is_refused_by_name(
    found: Investigation, tmp_path: Path, where: list[Any], value: Any
) -> None:
    kept = found.save(tmp_path / "kept")
    whole = json.loads((kept / FILE).read_text())
    part = whole
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    (kept / FILE).write_text(json.dumps(whole))
    with pytest.raises(workbench.FormatError, match=r"investigation\.json"):
        Investigation.load(kept)


def test_a_share_that_is_undefined_is_shown_so(found: Investigation) -> None:
    last = next(finding for finding in found.findings if finding.analysis == "faithfulness")
    one = replace(last, numbers={**last.numbers, "random": [None, 0.5]})
    page = replace(found, findings=(*found.findings[: one.number], one, *found.findings[one.number + 1 :])).report()
    assert "undefined" in page.to_html()


@pytest.mark.parametrize("forwards", [0, -3, float("nan")])
def test_a_budget_of_nothing_is_refused(mover: Planted, forwards: float) -> None:
    with pytest.raises(WorkbenchError, match="allows nothing"):
        run(mover, forwards=forwards)
    with pytest.raises(WorkbenchError, match="allows nothing"):
        Budget(10, 0)


@pytest.mark.parametrize("forwards", [3, 60, 200, 700])
def test_a_budget_is_kept_and_says_where_it_ended(mover: Planted, forwards: int) -> None:
    one = run(mover, forwards=forwards)
    assert one.forwards <= forwards
    assert one.verdict in ("undecided", "circuit")
    assert one.findings[-1].status in ("stopped", "refused") or one.verdict == "circuit"
    assert one.ended
    assert one.report().to_html()


def test_the_meter_counts_examples_and_gradients_three_times() -> None:
    model, meter = torch.nn.Linear(2, 2), Meter(Budget(100, 1))
    with meter.reading(model):
        with torch.no_grad():
            model(torch.zeros(5, 2))
        assert meter.forwards == 5
        model(input=torch.zeros(4, 2))
        assert meter.forwards == 17
        with pytest.raises(WorkbenchError, match="84 more forwards do not fit"), torch.no_grad():
            model(torch.zeros(84, 2))
    model(torch.zeros(200, 2))
    assert meter.forwards == 17


def test_time_that_is_over_stops_it(mover: Planted) -> None:
    one = run(mover, minutes=1e-9)
    assert (one.findings[-1].status, one.verdict, one.forwards) == ("stopped", "undecided", 0)


# Planners


def test_a_planner_of_ones_own_comes_to_the_same_as_the_rules(mover: Planted, found: Investigation) -> None:
    asked = []

    def planner(prompt: str) -> str:
        asked.append(prompt)
        return json.dumps(plan_by_rules(json.loads(prompt.split("What is known:\n")[1])))

    one = run(mover, planner=planner)
    assert len(asked) == len(one.plans)
    assert {planned.by for planned in one.plans} == {"planner"}
    assert [finding.told() for finding in one.findings] == [finding.told() for finding in found.findings]
    assert one.answer == found.answer


NONSENSE = ["I think so.", "{}", None, 7, "", '{"why": "x", "because": [], "steps": [{"analysis": "rm -rf"}]}']


@pytest.mark.parametrize("answer", NONSENSE)
def test_nonsense_is_recorded_and_the_rules_plan(mover: Planted, found: Investigation, answer: Any) -> None:
    one = run(mover, planner=lambda prompt: answer)
    assert one.heads == found.heads
    assert all(planned.by == "rules" and len(planned.refused) == 2 for planned in one.plans)
    assert "refused:" in one.report().to_html()


def test_a_planner_that_raises_loses_nothing(mover: Planted, found: Investigation) -> None:
    def planner(prompt: str) -> str:
        raise ConnectionError("the service is away")

    one = run(mover, planner=planner)
    assert one.heads == found.heads
    assert "the service is away" in one.plans[0].refused[0]


def test_a_planner_that_never_answers_is_asked_once(mover: Planted, found: Investigation) -> None:
    asked, ended = [], threading.Event()

    def planner(prompt: str) -> str:
        asked.append(prompt)
        ended.wait()
        return ""

    one = run(mover, planner=planner, planner_seconds=0.05)
    ended.set()
    assert len(asked) == 1
    assert one.heads == found.heads
    assert "did not answer" in one.plans[0].refused[0]
    assert one.plans[1].refused == ()


def test_a_planner_that_goes_in_circles_is_stopped(mover: Planted) -> None:
    again = json.dumps({"why": "again", "because": [0], "steps": [{"analysis": "importance"}]})
    one = run(mover, planner=lambda prompt: again)
    assert [finding.status for finding in one.findings] == ["done", "done", "refused", "refused", "refused"]
    assert "the same" in one.findings[-1].says[0]
    assert one.verdict == "undecided"


def test_what_a_planner_says_does_not_become_the_verdict(mover: Planted) -> None:
    ends = json.dumps({"why": "L2H0 does it **all** <b>[x](https://evil.example)", "because": [0], "steps": []})
    one = run(mover, planner=lambda prompt: ends)
    assert (one.verdict, one.heads) == ("undecided", ())
    page = one.report().to_html()
    assert "evil.example" in page
    assert 'href="https://evil' not in page


def test_an_empty_circuit_is_told_of_and_has_no_picture() -> None:
    steps = [{"analysis": "circuit", "arguments": {"method": "eap", "threshold": 0.9}}, {"analysis": "faithfulness"}]
    answer = json.dumps({"why": "x", "because": [0], "steps": steps})
    one = run(planted("pair", n=16), planner=lambda prompt: answer, proactive=False)
    assert (one.findings[1].numbers["heads"], one.findings[2].status) == ([], "failed")
    assert "through no heads" in one.report().to_html()


def test_steps_in_a_wrong_order_fail_and_are_recorded(mover: Planted, found: Investigation) -> None:
    answers: Iterator[str] = iter(["roles", "minimality"])
    told_of = []

    def planner(prompt: str) -> Any:
        name = next(answers, None)
        state = json.loads(prompt.split("What is known:\n")[1].split("\n\n")[0])
        told_of.append([(finding["analysis"], finding["status"]) for finding in state["findings"]])
        return plan_by_rules(state) if name is None else {"why": "x", "because": [0], "steps": [{"analysis": name}]}

    one = run(mover, planner=planner)
    assert [finding.status for finding in one.findings[1:3]] == ["failed", "failed"]
    assert "there is no circuit yet" in one.findings[1].says[0]
    assert told_of[2] == [("baseline", "done"), ("roles", "failed"), ("minimality", "failed")]


def test_planning_anew_skips_what_a_finding_made_needless_and_the_reactive_way_does_not() -> None:
    made = planted("direct", n=16)
    eager, reactive = run(made), run(made, proactive=False)
    assert [finding.analysis for finding in eager.findings] == ["baseline", "all_heads"]
    assert "importance" in [finding.analysis for finding in reactive.findings]
    assert eager.verdict == reactive.verdict == "none"
    assert eager.forwards < reactive.forwards


def test_an_analysis_that_fails_leaves_the_others(mover: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(analyses.RUNS, "importance", broken)
    one = run(mover)
    assert one.findings[2].status == "failed"
    assert "RuntimeError: out of memory" in one.findings[2].says[0]
    assert set(one.heads) == set(mover.heads)


# Memory


def test_past_investigations_are_remembered_and_their_circuits_compared(mover: Planted, tmp_path: Path) -> None:
    other = planted("mover", n=20)
    first = run(mover, memory=tmp_path)
    with workbench.attach(mover.model, mover.tokenizer) as wb:
        renamed = workbench.tasks.Task("another name", other.task.examples, "here")
        second = investigate(wb, renamed, memory=tmp_path, progress=False)
    assert second.memory["circuits"] == ["planted mover"]
    (overlap,) = [finding for finding in second.findings if finding.analysis == "overlap"]
    assert overlap.numbers["jaccard"] == 1.0
    third = run(mover, memory=tmp_path)
    assert third.memory["asked before"]["found"] == first.answer[0].text
    assert third.memory["nearest"]["asked"] == second.question
    assert len(Memory(tmp_path)) == 2  # the same question takes the place of itself


def test_an_empty_memory_knows_nothing_and_the_question_itself_is_no_neighbour(found: Investigation) -> None:
    memory, key = Memory(), ("a", "b", "c")
    assert memory.nearest("How?", key) is None
    assert memory.asked_before(key) is None
    memory.add(manager._remembered(found, key))
    assert memory.nearest(found.question, key) is None  # the only one is the question itself
    near, cosine = memory.nearest(found.question, ("a", "b", "other")) or (None, 0)
    assert near is not None
    assert cosine == pytest.approx(1)


def by_hand(asked: str, other: str = "how does n do inductions?") -> float:
    """The cosine of counts of three letters, in float64."""
    texts = [f"  {text.lower()}  " for text in (asked, other)]
    runs = sorted({text[i : i + 3] for text in texts for i in range(len(text) - 2)})
    a, b = (
        torch.tensor([sum(text[i:].startswith(run) for i in range(len(text))) for run in runs]).double()
        for text in texts
    )
    return float(a @ b / (a.norm() * b.norm()))


def test_the_nearest_question_is_that_of_the_highest_cosine(found: Investigation) -> None:
    memory, several = Memory(), ["How does M do ioi?", "How does M do induction?", "Why?"]
    for i, asked in enumerate(several):
        one = manager._remembered(found, (str(i), "p", "w"))
        memory.add(type(one)(**{**one.__dict__, "asked": asked}))
    near, cosine = memory.nearest("How does N do inductions?", ("x", "p", "w")) or (None, 0)
    assert near is not None
    assert near.asked == max(several, key=by_hand) == "How does M do induction?"
    assert cosine == pytest.approx(by_hand(near.asked))


def test_a_memory_of_several_processes_keeps_what_each_adds(found: Investigation, tmp_path: Path) -> None:
    several = [Memory(tmp_path), Memory(tmp_path)]
    for number, one in enumerate(several):
        one.add(replace(manager._remembered(found, ("task", str(number), "weights")), file=""))
    assert [len(one) for one in (*several, Memory(tmp_path))] == [1, 2, 2]


def test_an_investigation_outlives_a_memory_that_cannot_be_written(
    mover: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="cannot be written"):
        run(mover, resume=tmp_path / "file", forwards=40)

    def full(*_: Any) -> None:
        raise FileError("no room")

    monkeypatch.setattr(Memory, "add", full)
    with pytest.warns(UserWarning, match="is not remembered: no room"):
        assert run(mover, memory=tmp_path, forwards=40).findings


def test_a_damaged_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text('[{"asked": "x"}]')
    with pytest.raises(workbench.FormatError, match=r"memory\.json"):
        Memory(tmp_path)
    with pytest.raises(WorkbenchError, match="no folder"):
        Memory(tmp_path / "none")


def test_too_few_prompts_or_no_task_are_refused(mover: Planted) -> None:
    with workbench.attach(mover.model, mover.tokenizer) as wb:
        with pytest.raises(TaskError, match="7 prompts are too few"):
            investigate(wb, mover.task[:7], progress=False)
        with pytest.raises(TaskError, match="`task` is a str, and no Task"):
            investigate(wb, "ioi", progress=False)  # type: ignore[arg-type]
        with pytest.raises(TaskError, match="`task` is a str, and no Task"):
            investigate(wb, mover.task, known=["ioi"], progress=False)  # type: ignore[list-item]
        with pytest.raises(TaskError, match="cannot be compared with itself"):
            investigate(wb, mover.task, known=[mover.task], progress=False)
        with pytest.raises(TaskError, match="two tasks to compare with are called 'other'"):
            investigate(wb, mover.task, known=[replace(mover.task, name="other")] * 2, progress=False)


def test_many_known_tasks_fit_into_plans(found: Investigation) -> None:
    state: dict[str, Any] = {
        "findings": [finding.told() for finding in found.findings], "known": [f"task {i}" for i in range(50)],
        "task": {"answer_place": True, "examples": 16}, "model": {"edges": 1}, "budget": {"forwards": 10},
    }  # fmt: skip
    for n in range(1, len(found.findings) + 1):
        assert parse(plan_by_rules({**state, "findings": state["findings"][:n]}), n).steps


def test_asking_leaves_the_rules_alone() -> None:
    numbers = {"does": False, "sure": True, "accuracy": 1}
    state: dict[str, Any] = {
        "findings": [{"numbers": numbers, "status": "done", "analysis": "baseline", "number": 0}], "known": [],
        "task": {"answer_place": False, "examples": 8}, "model": {"edges": 1}, "budget": {"forwards": 10},
    }  # fmt: skip
    assert asking.Asked(None, 1.0).plan(state, 1, 1.0)[1:] == ("rules", [])
