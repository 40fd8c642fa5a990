"""Studies: their data are what they say, every form trains, files come back, cards say what follows from the runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from workbench import FormatError, WorkbenchError, mechanisms
from workbench.mechanisms import studies
from workbench.mechanisms.frame import findings
from workbench.mechanisms.rooms.studied import see_study
from workbench.mechanisms.s2snet import follows_rule
from workbench.mechanisms.studies import actions, driving, lesions, shipped, spiking
from workbench.mechanisms.studies.study import Phase, fit
from workbench.views import all_of

ROOT = Path(__file__).parents[2]
ALL = studies.studies()
FORMS = [(name, arm) for name, one in ALL.items() for arm in one.arms]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def trained(name: str, arm: str) -> studies.Studied:
    """A form after a few steps, which leave the state of random numbers as it was."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = studies.run(studies.study(name), arm, seed=3, quick=True)
    assert torch.equal(torch.get_rng_state(), before)
    return found


@pytest.mark.parametrize(("name", "arm"), FORMS)
def test_every_form_is_trained_scored_kept_and_the_same_every_time(name: str, arm: str, tmp_path: Path) -> None:
    one = studies.study(name)
    found = trained(name, arm)
    assert found.arm == arm
    assert not found.model.training
    untrained = dict(one.built(arm, 3).named_parameters())
    moved = [not torch.equal(p, untrained[n].half().float()) for n, p in found.model.named_parameters()]
    assert any(moved)
    assert {type(value) for value in found.scores.values()} == {float}
    studies.save(found, tmp_path / "a.safetensors")
    again = studies.load(tmp_path / "a.safetensors")
    example = one.example()
    with torch.no_grad():
        assert torch.equal(found.model(**example), again.model(**example))
    assert (again.scores, again.facts) == (found.scores, found.facts)
    assert one.score(again.model) == pytest.approx(found.scores)


def test_what_there_is_no_study_of_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match='no study of "cas"') as caught:
        studies.studied("cas")
    assert "csa" in str(caught.value.hint)
    with pytest.raises(WorkbenchError, match='has no form "bath"'):
        studies.run(studies.study("csa"), "bath")
    with pytest.raises(FormatError, match=r"is not a workbench\.mechanism_study file"):
        studies.load(shipped.WEIGHTS.parent / "text" / "sqa-mha.safetensors")


def test_training_lowers_a_loss_that_can_be_lowered() -> None:
    model = nn.Linear(3, 1)

    def loss(linear: nn.Linear, random: torch.Generator) -> Tensor:
        x = torch.randn(16, 3, generator=random)
        return (linear(x) - x.sum(1, keepdim=True)).square().mean()

    losses = [value for _, value in fit(model, Phase(200, loss, 3e-2), 200, random())]
    assert losses[-1] < 1e-3 < losses[0]
    torch.testing.assert_close(model.weight, torch.ones(1, 3), atol=0.05, rtol=0)


def test_actions_have_the_classes_of_their_scene_and_bursts_are_of_others() -> None:
    found = actions.actions(200, random())
    for labels, present in zip(found.labels, found.present, strict=True):
        parts = actions.segments(labels)
        assert {kind - 1 for kind, _, _ in parts} <= set(present.nonzero().flatten().tolist())
        assert len(parts) <= 3
        assert all(6 <= stop - start <= 14 for _, start, stop in parts)
    assert set(found.present.sum(1).tolist()) == {1.0, 2.0}
    assert actions.found_again(found.labels, found.labels) == 1.0
    assert actions.found_again(torch.zeros_like(found.labels), found.labels) == 0.0
    shifted = found.labels.roll(4, dims=1)
    assert 0 < actions.found_again(shifted, found.labels) < 1
    assert actions.found_again(torch.zeros(1, 4), torch.zeros(1, 4)) == 1.0


def test_drives_come_nearer_and_decisions_are_those_of_what_matters() -> None:
    found = driving.drives(50, random())
    grid = found.matters.unflatten(2, (6, 6))
    assert torch.equal(grid[:, 1:, 1:], grid[:, :-1, :-1])  # a row further down in each frame
    assert torch.equal(found.decisions[..., 2], found.matters.sum(-1) - 1)
    mean = driving.drives(50, random()).frames.unflatten(2, (6, 6))
    slot = mean[..., 0].flatten(2).argmax(-1)  # noise: right in most
    assert float(((slot % 6) // 2 == found.decisions[..., 0]).float().mean()) > 0.5
    assert float(((slot // 6) // 2 == found.decisions[..., 1]).float().mean()) > 0.5
    assert driving.steadiness(grid.double().flatten(2)) == pytest.approx(1)
    assert abs(driving.steadiness(torch.rand(200, 3, 36, generator=random()))) < 0.1


def test_lesions_lie_where_the_mask_says_and_gates_are_held_against_it() -> None:
    found = lesions.lesions(300, random())
    bright = torch.nn.functional.avg_pool2d(found.images, 2)[:, 0]
    for kind in (1, 2):
        of_kind = found.classes == kind
        inside = (bright * found.masks)[of_kind].sum() / found.masks[of_kind].sum()
        outside = (bright * (1 - found.masks))[of_kind].sum() / (1 - found.masks)[of_kind].sum()
        assert float(inside - outside) > 0.3
    masks = found.masks[found.classes > 0].flatten(1)
    assert lesions.inside(masks, masks) == 1.0
    assert lesions.inside(torch.ones_like(masks), masks) == 0.5
    assert lesions.inside(-masks, masks) == 0.0
    assert lesions.inside(masks, torch.zeros_like(masks)) != lesions.inside(
        masks, masks
    )  # nothing to find: not a number


@torch.no_grad()
def test_a_scale_that_is_told_nothing_has_the_same_gate_for_every_image() -> None:
    torch.manual_seed(0)
    model = lesions.Reader("shared").eval()
    images = lesions.lesions(4, random()).images
    free = lesions.gates_of(model, images)
    with lesions.told_nothing(model, 1):
        held = lesions.gates_of(model, images)
    assert float(free[1].std(0).max()) > 1e-5
    assert float(held[1].std(0).max()) < 1e-6
    torch.testing.assert_close(held[0], free[0])
    open_gates = lesions.gates_of(lesions.Reader("open").eval(), images)
    assert all(torch.equal(gates, torch.ones_like(gates)) for gates in open_gates)
    shared, separate = (sum(p.numel() for p in lesions.Reader(arm).parameters()) for arm in ("shared", "separate"))
    assert 0.9 < separate / shared < 1.1


@torch.no_grad()
def test_composition_sees_no_geometry() -> None:
    shown = studies.study("s2snet").example()
    for arm, same in (("composition", True), ("labels alone", False)):
        model = studies.study("s2snet").built(arm)
        moved = model(shown["numbers"], 2 * shown["positions"])
        assert torch.allclose(model(**shown), moved) == same
    assert follows_rule(shown["numbers"], shown["positions"]).tolist() == [True, False] * 2


@torch.no_grad()
def test_steps_of_a_spiking_model_are_changed_everywhere() -> None:
    model: Any = studies.study("spikformer").built("patches")
    images = studies.study("spikformer").example()["images"]
    with workbench.attach(model) as wb:
        for steps in (2, 5):
            spiking.with_steps(model, steps)
            with wb.capture([]) as cap:
                model(images)
            assert cap[0].pattern.n_batch == 3 * steps


@pytest.mark.parametrize("name", ALL)
def test_what_a_study_shows_is_drawn(name: str) -> None:
    seen = see_study(trained(name, studies.study(name).main))
    views = [view for each in seen.exhibits for view in all_of(each)]
    titles = [view.spec.title for view in views]
    assert titles[-1] == "Training"
    assert len(set(titles)) == len(titles) >= 3
    assert all(view.to_png() for view in views[:2])


def test_gates_are_left_out_of_the_maps_of_heads_and_named() -> None:
    """Their maps are diagonals; attention that stands beside them is drawn."""
    seen = see_study(trained("control_aided", studies.study("control_aided").main))
    room = mechanisms.Room("control_aided", mechanisms.get("control_aided"), (), study=seen)
    maps = next(view for view in all_of(room) if view.spec.title == "Every head, driving")
    attention = [site for site in seen.capture.sites if site.kind != "gate"]
    drawn = [site for site in attention if seen.capture[site.name].shape[2] == seen.capture[site.name].shape[3]]
    assert len(maps.spec.blocks["maps"]) == sum(site.n_heads for site in drawn)
    assert any("1 of 3 sites are left out" in note for note in maps.spec.notes), maps.spec.notes


SHIPPED = [name for name in ALL if shipped.file_of(name).is_file()]


@pytest.mark.parametrize("name", SHIPPED)
def test_models_that_are_shipped_are_small_and_those_of_the_runs(name: str) -> None:
    found, one = studies.studied(name), studies.study(name)
    assert shipped.file_of(name).stat().st_size <= 300_000
    kept = {(run["mechanism"], run["arm"], run["seed"]): run for run in studies.read_runs()}
    run = kept[name, one.main, 0]
    assert found.scores == run["scores"]
    assert found.facts["steps"] == run["steps"] == sum(phase.steps for phase in one.phases(one.main))
    assert not found.facts["quick"]
    again = one.score(found.model)
    assert again == pytest.approx(found.scores, abs=0.01)
    assert len(mechanisms.study_runs()) == len(kept)


def test_gates_of_the_trained_models_are_where_something_is() -> None:
    """Actions and lesions that nobody pointed at: factors are larger inside."""
    if "csa" in SHIPPED:
        model: Any = studies.studied("csa").model
        found = actions.actions(64, random(12))
        with torch.no_grad(), workbench.attach(model) as wb, wb.capture([]) as cap:
            model(found.features)
        gates = cap["attend.time"].row_sum[:, 0]
        inside = found.labels > 0
        assert float(gates[inside].mean()) > float(gates[~inside].mean())
    if "medusa" in SHIPPED:
        scores = studies.studied("medusa").scores
        assert scores["accuracy"] > 0.5  # a third by chance
        assert all(scores[f"inside, scale {s}"] > 0.5 for s in range(3))  # larger in the lesion than elsewhere


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """benchmarks/trained/studies.py, as its script imports it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("trained.studies")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in [name for name in sys.modules if name.partition(".")[0] in ("trained", "shared")]:
            del sys.modules[name]


def test_cards_say_what_follows_from_the_runs(bench: Any) -> None:
    if not findings.STUDIES.is_file():
        pytest.skip("no study was trained")
    runs, said = studies.read_runs(), {}
    for rule in bench.RULES:
        claims = {claim.says: claim for claim in mechanisms.get(rule.mechanism).card.claims}
        found = rule.examine(runs)
        if found is None:
            assert claims[rule.says].outcome == "not examined"
            continue
        assert (claims[rule.says].found, claims[rule.says].outcome) == (found.found, found.outcome)
        said.setdefault(rule.mechanism, {})[rule.says] = vars(found)
    held = json.loads(findings.STUDIES.read_text(encoding="utf-8"))
    for rule in importlib.import_module("trained.shown").SHOWS:
        assert rule.says in {claim.says for claim in mechanisms.get(rule.mechanism).card.claims}
        if (found := rule.examine(held.get("measured", {}))) is not None:
            said.setdefault(rule.mechanism, {})[rule.says] = vars(found)
    assert held["claims"] == said
    told = bench.section(runs, held.get("measured", {}))
    assert all(f"**{run['mechanism']}**" in told for run in runs)


def test_every_rule_is_of_a_claim_on_a_card_and_every_claim_of_a_study_has_one(bench: Any) -> None:
    ruled = {(rule.mechanism, rule.says) for rule in bench.RULES}
    assert ruled == {(name, claim.says) for name in ALL for claim in mechanisms.get(name).card.claims}


def _run(arm: str, seed: int, **scores: float) -> dict[str, Any]:
    return {"mechanism": "csa", "arm": arm, "seed": seed, "scores": scores}


@pytest.mark.parametrize(
    ("more", "outcome", "beyond"),
    [(0.2, "holds", "holds"), (0.0, "undecided", "undecided"), (-0.2, "does not hold", "does not hold")],
)
def test_outcomes_follow_from_intervals(bench: Any, more: float, outcome: str, beyond: str) -> None:
    runs = [
        _run(arm, seed, a=0.5 + (more if arm == "both" else 0) + 0.01 * (seed - 1))
        for arm in ("both", "none")
        for seed in range(3)
    ]
    found = bench.Above("csa", "It is better.", (("both", "none"),), "a").examine(runs)
    assert found.outcome == outcome
    half = 2.776 * 0.01 * (2 / 3) ** 0.5  # Student's t of four degrees of freedom
    assert f"{more:+.3f} (95 %: {more - half:+.3f} to {more + half:+.3f})" in found.found
    assert bench.Beyond("csa", "It is large.", "both", ("a",), 0.5).examine(runs).outcome == beyond
    turned = {"holds": "does not hold", "does not hold": "holds"}.get(beyond, beyond)
    assert bench.Beyond("csa", "It is small.", "both", ("a",), 0.5, below=True).examine(runs).outcome == turned
    assert bench.Above("csa", "It is better.", (("both", "time"),), "a").examine(runs) is None
    assert bench.Beyond("csa", "It is large.", "both", ("b",), 0.5).examine(runs) is None
    assert bench.Above("csa", "It is better.", (("both", "none"),), "a").examine(runs[::3]) is None  # one seed of each
