"""The protocol of plans: what is refused, in which order steps run, what changes from one plan to the next."""

import json

import pytest

from workbench import FormatError
from workbench.investigator import ANALYSES, Plan, Step, ordered, parse
from workbench.investigator.analyses import RUNS
from workbench.investigator.plan import SAYS, prompt_of


def plan(*steps: object, **others: object) -> str:
    return json.dumps({"why": "so", "because": [0], "steps": list(steps), **others})


def test_every_analysis_of_the_protocol_can_be_run_and_is_told_of() -> None:
    assert set(RUNS) == set(ANALYSES) == set(SAYS)
    asked = prompt_of({"task": {"name": "x"}})
    assert all(f'- "{name}"' in asked for name in ANALYSES)


def test_a_plan_is_read_with_its_reasons() -> None:
    found = parse(plan({"analysis": "circuit", "arguments": {"method": "eap", "threshold": 0.1}, "why": "edges"}), 3)
    assert found == Plan("so", (0,), (Step("circuit", {"method": "eap", "threshold": 0.1}, "edges"),))
    assert parse(found.to_json(), 3) == found
    plain = parse(plan({"analysis": "roles"}), 1)
    assert parse(plain.to_json(), 1) == plain
    assert parse(plan(because=[]), 1).steps == ()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Sure! Let us look at the heads.", "no JSON"),
        ("[1, 2]", "JSON object"),
        (plan({"analysis": "os.system"}), 'no analysis "os.system"'),
        (plan({"analysis": "roles", "arguments": {"path": "/etc/passwd"}}), 'no argument "path"'),
        (plan({"analysis": "circuit", "arguments": {"threshold": 5}}), "a number from"),
        (plan({"analysis": "circuit", "arguments": {"method": "magic"}}), "one that this package knows"),
        (plan({"analysis": "roles"}, because=[7]), "a list of 0 to 3|whole number from 0 to 2"),
        (plan({"analysis": "roles", "after": [0]}), "after step 0"),
        (plan({"analysis": "roles", "after": [1]}, {"analysis": "circuit", "after": [0]}), "circle"),
        (plan({"analysis": "roles", "code": "1"}), 'unknown key "code"'),
        (plan(why=""), "a reason"),
        (json.dumps({"why": "so"}), "'steps'"),
        (plan(*[{"analysis": "roles"}] * 21), "a list of 0 to 20"),
        ("[" * 50_000, "the most"),
        ("[" * 10_000, "no JSON"),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(answer: str, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        parse(answer, 3)


def test_steps_come_behind_what_they_wait_for_and_keep_their_order_else() -> None:
    steps = [Step("roles", after=(2,)), Step("importance"), Step("circuit", after=(1,)), Step("repair", after=(0,))]
    found = [step.analysis for step in ordered(steps)]
    assert found == ["importance", "circuit", "roles", "repair"]
    for number, step in enumerate(steps):
        assert all(found.index(steps[i].analysis) < found.index(steps[number].analysis) for i in step.after)


def test_edits_tell_kept_new_and_dropped_steps() -> None:
    before = Plan("a", (0,), (Step("importance"), Step("circuit"), Step("roles")))
    now = Plan("b", (1,), (Step("circuit"), Step("overlap", {"with": "ioi"})))
    assert now.edits(before) == {"kept": ["circuit()"], "new": ["overlap(with=ioi)"], "dropped": ["roles()"]}
    assert now.edits(None)["new"] == ["circuit()", "overlap(with=ioi)"]
