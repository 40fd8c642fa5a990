"""Trained models that are shipped: what their files say is so, and what cards say of them follows from the runs."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Card, Claim
from workbench.mechanisms.frame import findings
from workbench.mechanisms.training import corpus, runs, scenes, score_images, score_text, shipped
from workbench.mechanisms.training.work import PLACES, SHOWN

ROOT = Path(__file__).parents[2]
FILES = sorted(path for work in PLACES for path in (shipped.WEIGHTS / work).glob("*.safetensors"))
MOST = 300_000  # bytes of a file


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules of benchmarks/trained that judge, as the script imports them."""
    folder = ROOT / "benchmarks" / "trained"
    spec = importlib.util.spec_from_file_location(
        "trained", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules["trained"] = importlib.util.module_from_spec(spec)
    try:
        yield _Modules()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trained"]:
            del sys.modules[name]


class _Modules:
    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(f"trained.{name}")


def test_every_file_is_small_trained_in_full_and_listed() -> None:
    listed = mechanisms.trained_models()
    assert len(listed) == len(FILES) > 0
    kept = {(run["work"], run["name"]): run for run in shipped.read_runs() if run["seed"] == 0 and run["hidden"]}
    for row in listed.itertuples():
        found = mechanisms.trained(row.name, row.work)
        assert shipped.file_of(row.name, row.work).stat().st_size <= MOST
        assert not found.model.training
        assert set(found.model.stack.layers) == {row.name}
        run = kept[row.work, row.name]
        steps, losses = zip(*found.facts["losses"], strict=True)
        assert losses[-1] < losses[0]
        assert steps[-1] == found.facts["steps"] == run["steps"] > 100
        assert (found.facts["quick"], found.facts["seed"], found.facts["rows"]) == (False, 0, run["rows"])
        assert all(run["scores"][name] == value for name, value in found.scores.items())


def test_all_models_of_a_work_had_the_same_budget_and_plain_attention_is_among_them() -> None:
    table = runs()
    for work in table["work"].unique():
        of_work = [run for run in shipped.read_runs() if run["work"] == work]
        assert len({(run["steps"], run["rows"]) for run in of_work}) == 1
        plain = next(run for run in of_work if (run["name"], run["seed"]) == ("sqa:mha", 0))
        for run in of_work:
            if run["hidden"] and run["parameters"] > plain["parameters"]:  # it has more by itself
                assert run["hidden"] == plain["hidden"]
            elif run["hidden"]:
                assert run["parameters"] > 0.98 * plain["parameters"]
        assert shipped.file_of("sqa:mha", work).is_file() == (work in SHOWN)


@pytest.mark.parametrize("work", ["text", "images"])
def test_scores_in_a_file_are_those_of_its_weights(work: str) -> None:
    found = mechanisms.trained("sqa:mha", work)
    if work == "images":
        again = score_images(found.model)
    elif corpus("held out").digest != found.facts["split_digest"]:
        pytest.skip("another Python has another library")
    else:
        again = score_text(found.model, corpus("held out"))
    assert again == pytest.approx(found.scores, abs=0.005)


def test_what_is_not_shipped_is_refused_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkbenchError, match='work="sound" is not known'):
        mechanisms.trained("moh", work="sound")
    with pytest.raises(WorkbenchError, match='no model of "sqa:mah" trained on text') as caught:
        mechanisms.trained("sqa:mah")
    assert 'did you mean "sqa:mha"' in str(caught.value.hint)
    assert "mechanisms.trained_models()" in str(caught.value.hint)
    monkeypatch.setattr(shipped, "_shipped", lambda: [("sqa:mha", "text"), ("agent", "images")])
    with pytest.raises(WorkbenchError) as caught:
        mechanisms.trained("agent")  # which sees images alone
    assert 'work="images"' in str(caught.value.hint)


@pytest.mark.parametrize("name", ["sqa-mha", "../text/moh", "", None, 3])
def test_only_names_that_are_listed_are_looked_for(name: Any) -> None:
    with pytest.raises(WorkbenchError, match="is shipped"):
        mechanisms.trained(name)


def test_models_of_one_s_own_are_trained_models_of_a_work() -> None:
    with pytest.raises(WorkbenchError, match="models='sound' is no work"):
        mechanisms.room("moh", {"sound": mechanisms.trained("moh")})
    with pytest.raises(WorkbenchError, match=r"models\['text'\] is ByteLM"):
        mechanisms.room("moh", {"text": mechanisms.trained("moh").model})  # type: ignore[dict-item]


def test_a_model_is_the_caller_s_own() -> None:
    first, second = (mechanisms.trained("sqa:mha").model for _ in range(2))
    with torch.no_grad():
        first.embed.weight.zero_()
    assert second.embed.weight.any()


def test_cards_say_what_follows_from_the_runs(bench: Any) -> None:
    judged = list(bench.claims.examined(bench.runs.Runs.read()))
    said: dict[str, dict[str, dict[str, str]]] = {}
    for rule, found in judged:
        claims = {claim.says: claim for claim in mechanisms.get(rule.mechanism).card.claims}
        claim = claims[rule.says]
        assert (claim.how, claim.found, claim.outcome) == (found.how, found.found, found.outcome)
        said.setdefault(rule.mechanism, {})[rule.says] = vars(found)
    assert json.loads(findings.FINDINGS.read_text(encoding="utf-8")) == said


def test_every_rule_is_of_a_claim_on_a_card_and_of_models_in_the_plan(bench: Any) -> None:
    for rule in bench.claims.RULES:
        assert rule.says in {claim.says for claim in mechanisms.get(rule.mechanism).card.claims}
    order = bench.plan.plan()
    assert len(order) == len(set(order))
    planned = {model for model, _ in order}
    for rule in bench.claims.RULES:
        assert {*rule.models, *getattr(rule, "beside", ())} <= planned
        if isinstance(rule, bench.claims.Compared):
            assert {replace(rule.than, work=each.work) for each in rule.models} <= planned
    assert {model.work for model in planned} == set(PLACES) == set(bench.plan.STEPS) == set(bench.plan.ROWS)


def _run(name: str, seed: int, **scores: float) -> dict[str, Any]:
    return {"work": "text", "name": name, "layout": "uniform", "hidden": 9, "seed": seed, "scores": scores}


def test_differences_have_the_spread_of_all_models(bench: Any) -> None:
    Model, Runs = bench.plan.Model, bench.runs.Runs
    sd, df = bench.runs.pooled([[1.0, 3.0], [10.0, 10.0, 13.0], [7.0]])
    assert (sd, df) == (pytest.approx((8 / 3) ** 0.5), 3)
    found = Runs([_run("a", 0, text=1.0), _run("a", 1, text=3.0), _run("b", 0, text=5.0, copy=0.5)])
    a, b = Model("text", "a"), Model("text", "b")
    worse = found.worse(b, a, "text")
    assert (worse.mean, worse.df) == (3.0, 1)
    half = 12.706 * 2**0.5 * (1 / 2 + 1) ** 0.5  # Student's t of one degree of freedom
    assert (worse.low, worse.high) == (pytest.approx(3 - half, abs=1e-3), pytest.approx(3 + half, abs=1e-3))
    assert found.worse(b, a, "copy") is None
    shares = Runs([_run("a", seed, copy=0.9 + seed / 100) for seed in range(3)] + [_run("b", 0, copy=0.5)])
    assert shares.worse(b, a, "copy").mean == pytest.approx(0.41, abs=0.001)  # a smaller share is worse


def test_shares_have_intervals_that_are_wide_in_the_middle_and_stay_between_none_and_all(bench: Any) -> None:
    """Seeds that differ by as much in log odds: of a model near the end their shares differ by less than half way."""
    Model, Runs = bench.plan.Model, bench.runs.Runs
    at = {"half": 0.0, "high": 3.0, "most": 5.0}
    made = {name: [1 / (1 + math.exp(-middle - d)) for d in (-0.4, 0.0, 0.4)] for name, middle in at.items()}
    found = Runs([_run(name, seed, copy=share) for name, each in made.items() for seed, share in enumerate(each)])
    assert found.spread("text", "copy") == (pytest.approx(0.4), 6)
    half, high, most = (Model("text", name) for name in at)
    close, far = found.worse(high, most, "copy"), found.worse(half, most, "copy")
    assert close.high - close.low < 0.1 < far.high - far.low
    assert far.low < far.mean < far.high <= far.b
    wide = 2.4469 * 0.4 / 3**0.5  # Student's t of six degrees of freedom
    ends = [1 / (1 + math.exp(-wide * sign)) for sign in (-1, 1)]
    b_ends = [1 / (1 + math.exp(-5.0 - wide * sign)) for sign in (-1, 1)]
    assert far.low == pytest.approx(far.mean - math.hypot(far.b - b_ends[0], ends[1] - 0.5), abs=1e-4)
    assert far.high == pytest.approx(far.mean + math.hypot(b_ends[1] - far.b, 0.5 - ends[0]), abs=1e-4)
    whole = Runs([_run("half", seed, copy=float(seed > 0)) for seed in range(3)] + [_run("most", 0, copy=1.0)])
    none_of_it = whole.worse(half, most, "copy")  # none and all have log odds without an end
    assert -1 <= none_of_it.low < none_of_it.high <= 1


def test_runs_that_another_process_wrote_meanwhile_are_kept(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "runs.json"
    for module in (bench.runs, shipped):
        monkeypatch.setattr(module, "RUNS", path)
    ours, theirs = bench.runs.Runs([]), bench.runs.Runs([])
    ours.add(_run("a", 0, text=1.0))
    theirs.add(_run("b", 0, text=2.0))
    ours.add(_run("a", 0, text=3.0))
    assert [(run["name"], run["scores"]) for run in ours.records] == [("a", {"text": 3.0}), ("b", {"text": 2.0})]
    assert json.loads(path.read_text(encoding="utf-8")) == ours.records


def test_differences_are_told_in_words_that_are_right(bench: Any) -> None:
    put, between = bench.claims.put, bench.claims.between
    assert (put(0.02), put(-0.003), put(-0.0001)) == ("worse by 0.020", "better by 0.003", "equal")
    assert between(0.01, 0.02) == "worse by 0.010 to 0.020"
    assert between(-0.02, -0.01) == "better by 0.010 to 0.020"
    assert between(-0.02, 0.01) == "better by 0.020 to worse by 0.010"


def test_a_claim_of_several_works_is_held_against_the_same_model_in_each(bench: Any) -> None:
    Model = bench.plan.Model
    made = [_run("sqa:mha", seed, text=1.6 + 0.001 * seed) for seed in range(3)]
    made += [_run("aaren", seed, text=1.59 + 0.001 * seed) for seed in range(3)]
    for name, share in (("sqa:mha", 0.99), ("aaren", 0.2)):
        made += [{**_run(name, seed, copy=share + 0.001 * seed), "work": "induction"} for seed in range(3)]
    rule = bench.claims.Compared(
        "aaren", "It is as good.", (Model("text", "aaren"), Model("induction", "aaren")), Model("text", "sqa:mha"),
        "less", score={"text": "text", "induction": "copy"},
    )  # fmt: skip
    found = rule.examine(bench.runs.Runs(made))
    assert found.outcome == "does not hold"
    assert found.found.startswith("text: plain attention 1.601; aaren 1.591, better by 0.010")
    assert "copy: plain attention 0.991; aaren 0.201, worse by 0.790" in found.found
    assert rule.examine(bench.runs.Runs(made[:6])) is None


def test_heads_that_are_needed_for_the_same_examples_are_found(bench: Any) -> None:
    torch.manual_seed(0)
    one, other, nothing = torch.randn(30), torch.randn(30), torch.zeros(30)
    theirs = [(0, 0, one, None), (0, 1, other, None), (1, 0, nothing, None)]
    ours = [(0, 0, 3 * other.exp(), None), (1, 0, one, None)]
    assert bench.measured.needed(ours, theirs) == [[pytest.approx(1)], [0.0]]
    model = mechanisms.trained("sqa:mha", "images").model
    drawn = scenes(6, torch.Generator().manual_seed(1), 3)
    found = list(bench.measured.without_each(model, drawn.images, drawn.classes))
    layer, head, cost, _ = found[2]
    with torch.no_grad(), workbench.attach(model) as wb:
        whole = F.cross_entropy(model(drawn.images), drawn.classes, reduction="none")
        with wb.ablate((layer, head), how="zero"):
            without = F.cross_entropy(model(drawn.images), drawn.classes, reduction="none")
    torch.testing.assert_close(cost, without - whole)


def test_what_models_in_groups_read_of_everything_is_measured_and_not_taken_for_granted(bench: Any) -> None:
    Model, Runs = bench.plan.Model, bench.runs.Runs
    found = Runs([_run("sqa:mha", 0, text=1.6), _run("long_lora", 0, text=1.7)])
    assert found.values(Model("text", "sqa:mha"), "text, all seen") == [1.6]  # which sees all anyway
    assert found.values(Model("text", "long_lora"), "text, all seen") == []


def test_heads_are_ranked_within_their_model_whatever_others_have(bench: Any) -> None:
    """Two models in which gates say nothing of costs: that one has more heads, and larger figures, says nothing too."""
    few = [{"gate": g, "cost": c} for g, c in ((1.0, 2.0), (2.0, 1.0), (3.0, 1.0), (4.0, 2.0))]
    many = [{"gate": 10 + i, "cost": 10.0 + abs(i - 9.5)} for i in range(20)]
    runs = [_run("moh", 0) | {"heads": few}, _run("moh:half", 0) | {"heads": many}]
    models = tuple(bench.plan.Model("text", name) for name in ("moh", "moh:half"))
    found = bench.claims.Likes("moh", "Gates follow costs.", models).examine(bench.runs.Runs(runs))
    assert found.found.startswith(("ρ = +0.00", "ρ = -0.00"))
    assert found.outcome == "undecided"


@pytest.mark.parametrize(
    ("loss", "as_good", "better"),
    [
        (1.5, "holds", "does not hold"),
        (1.615, "undecided", "undecided"),
        (1.7, "does not hold", "holds"),
    ],
)
def test_outcomes_follow_from_intervals(bench: Any, loss: float, as_good: str, better: str) -> None:
    Model = bench.plan.Model
    plain = [_run("sqa:mha", seed, text=1.6 + 0.01 * (seed - 1)) for seed in range(3)]
    other = [_run("moh", seed, text=loss + 0.01 * (seed - 1)) for seed in range(3)]
    found = bench.runs.Runs([*plain, *other])
    moh, sqa, aaren = (Model("text", name) for name in ("moh", "sqa:mha", "aaren"))
    less = bench.claims.Compared("moh", "It is as good.", (moh,), sqa, "less").examine(found)
    assert less.outcome == as_good
    assert "plain attention 1.600" in less.found
    assert "seeds: 3 against 3" in less.how
    more = bench.claims.Compared("sqa", "It is better.", (moh,), sqa, "more", margin=0.0).examine(found)
    assert more.outcome == better
    assert bench.claims.Compared("moh", "It is as good.", (moh, aaren), sqa, "less").examine(found) is None
    nothing_to_lose = bench.claims.Compared("moh", "It is as good.", (moh,), sqa, "less", needs=2.0)
    assert nothing_to_lose.examine(found).outcome == "undecided"


def test_alignment_is_of_what_heads_give_but_for_turning_and_scale(bench: Any) -> None:
    torch.manual_seed(0)
    x, turn = torch.randn(40, 5, dtype=torch.float64), torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert bench.measured.cka(x, 3 * x @ turn + 1) == pytest.approx(1)
    y = torch.randn(40, 3, dtype=torch.float64)
    centred = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, its = (centred @ t @ t.mT @ centred for t in (x, y))  # the definition, with kernels
    assert bench.measured.cka(x, y) == pytest.approx(float((k * its).sum() / (k.norm() * its.norm())))
    model = mechanisms.trained("sqa:mha", "images").model
    images = torch.randn(2, 3, 32, 32)
    found = torch.tensor(bench.measured.alike(model, model, images))
    torch.testing.assert_close(found, torch.ones(2, 4), atol=1e-5, rtol=0)


def test_only_open_claims_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"mean": {"It mixes.": {"how": "a script", "found": "12", "outcome": "holds"}}}
    monkeypatch.setattr(findings, "findings", lambda: found)
    done = Claim("It is small.", "another script", "10 %", "undecided")
    card = Card("Mean", "2601.00001", "A", "m", "self", "exact", "O(n)", "never", "None.", (Claim("It mixes."), done))
    filled = findings.with_findings("mean", card)
    assert filled.claims == (Claim("It mixes.", "a script", "12", "holds"), done)
    assert findings.with_findings("mean", filled) is filled
    assert findings.with_findings("other", card) is card
