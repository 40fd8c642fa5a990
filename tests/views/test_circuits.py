"""What is measured of circuits: what the views draw and say is what the results hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from views.test_results import shown
from workbench.analysis.circuits.faithfulness import Faithfulness
from workbench.analysis.circuits.faithfulness_curve import FaithfulnessCurve
from workbench.analysis.circuits.patching import HeadPatching
from workbench.analysis.circuits.repair import Repair
from workbench.analysis.circuits.roles import HeadRoles
from workbench.analysis.circuits.stability import Stability
from workbench.views import of
from workbench.views.circuit_graph.facts import curve_facts

HOSTILE = "<img src=x onerror=alert(1)>"


def lines(view: object) -> list[dict]:  # type: ignore[type-arg]
    return view._whole["data"]  # type: ignore[attr-defined, no-any-return]


def curve(sizes: tuple[int, ...]) -> FaithfulnessCurve:
    examples = torch.tensor([[[0.1, 0.3], [0.5, 0.7], [1.0, 1.0]]] * 2, dtype=torch.float64)
    return FaithfulnessCurve(
        circuit="", task=HOSTILE, metric="logit_diff", ablation="mean", level="edge", fractions=(0.1, 0.5, 1.0),
        sizes=sizes, kept_absolute=sizes, kept_signed=sizes, examples=examples, full=torch.ones(2).double(),
        none=torch.zeros(2).double(), provenance={},
    )  # fmt: skip


def test_a_curve_shows_both_orders_and_both_areas(tmp_path: Path) -> None:
    found = curve((2, 4, 8))
    view = of(found)
    drawn = {trace["name"]: np.asarray(trace["y"]) for trace in lines(view)}
    np.testing.assert_allclose(drawn["by magnitude"], found.absolute)
    np.testing.assert_allclose(drawn["by signed score"], found.signed)
    assert f"CPR {found.cpr:.3f}" in view.spec.caption
    assert f"CMD {found.cmd:.3f}" in view.spec.caption
    assert HOSTILE in view.spec.title  # the page escapes it, once
    shown(found, tmp_path)


def test_undefined_shares_are_not_drawn_but_what_they_are_between(tmp_path: Path) -> None:
    """The metric of the whole model and with all ablated may be the same: both are said, and the metric is drawn."""
    found = replace(curve((2, 4, 8)), full=torch.tensor([3.0, -1.0]).double(), none=torch.tensor([0.0, 0.5]).double())
    view = of(found)
    drawn = {trace["name"]: np.asarray(trace["y"]) for trace in lines(view)}
    np.testing.assert_allclose(drawn["by magnitude"], found.examples[0].mean(-1))
    assert "Shares of the effect are undefined: m(model) − m(all ablated) is 0.75" in view.spec.caption
    assert "logit_diff itself, 1 of the whole model and 0.25 with all ablated" in view.spec.caption
    assert "CPR" not in view.spec.caption
    shown(found, tmp_path)
    facts = curve_facts(found)
    assert facts["undefined"].startswith("m(model)")
    assert facts["absolute"]["shares"] == []
    assert not curve_facts(curve((2, 4, 8)))["undefined"]
    values = torch.tensor([[0.5, 0.5], [3.0, -1.0], [0.0, 0.5]]).double()
    empty = torch.zeros(0, 2).double()
    one = Faithfulness(
        circuit="a circuit", task="ioi", metric="logit_diff", ablation="mean", alone=values[0], full=values[1],
        none=values[2], subsets=(), without=empty, alone_without=empty, members=(), minus_one=empty, provenance={},
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(lines(of(one))[0]["x"]), [1.0, 0.5, 0.25])
    assert "undefined" in of(one).spec.caption
    shown(one, tmp_path)


def test_faithfulness_is_bars(tmp_path: Path) -> None:
    ones = torch.ones(4).double()
    found = Faithfulness(
        circuit="a circuit", task="ioi", metric="logit_diff", ablation="mean", alone=0.5 * ones, full=ones,
        none=0 * ones, subsets=(("a0.h1",),), without=torch.full((1, 4), 0.8).double(),
        alone_without=torch.full((1, 4), 0.4).double(), members=("a0.h1",),
        minus_one=torch.full((1, 4), 0.3).double(), provenance={},
    )  # fmt: skip
    bars = lines(of(found))[0]
    np.testing.assert_allclose(np.asarray(bars["x"]), [0.5, 0.4, 0.2])
    shown(found, tmp_path)


def test_patching_is_an_atlas_of_shares_by_place(tmp_path: Path) -> None:
    found = HeadPatching(
        heads=("L0H0", "L1H1"), layers=(0, 1), numbers=(0, 1), activation="z", places=("end", "S2"),
        direction="noising", sign="positive helps", task="ioi", metric="logit_diff",
        effects=torch.tensor([[[-1.0, -1.0], [0.0, 0.0]], [[-0.5, -0.5], [0.5, 0.5]]]).double(),
        clean=torch.full((2,), 2.0).double(), corrupted=torch.zeros(2).double(), provenance={},
    )  # fmt: skip
    spec = of(found).spec
    values = spec.blocks["values"]
    np.testing.assert_allclose(np.sort(values[np.isfinite(values)].reshape(2, 2)), [[0.25, 0.5], [-0.25, 0.0]])
    assert [metric["label"] for metric in spec.facts["metrics"]] == ["end", "S2"]
    shown(found, tmp_path)


def test_roles_are_an_atlas_of_their_evidence(tmp_path: Path) -> None:
    nan = torch.full((2,), torch.nan)
    found = HeadRoles(
        heads=("L0H0", "L1H1"), roles=(("previous-token",), ()), threshold=0.3, task="ioi", errors={}, provenance={},
        evidence={"previous": torch.tensor([0.9, 0.1]), "to_question": nan},
    )  # fmt: skip
    spec = of(found).spec
    assert [metric["label"] for metric in spec.facts["metrics"]] == ["previous"]
    assert "previous-token: L0H0" in spec.caption
    assert "grey were not asked about" in spec.caption  # L0H1 and L1H0: rows of the map are equally long
    np.testing.assert_array_equal(spec.blocks["values"], np.float32([[0.9, np.nan, np.nan, 0.1]]))
    shown(found, tmp_path)


def test_stability_and_repair_are_bars(tmp_path: Path) -> None:
    stable = Stability(
        circuit="", level="edge", items=("a0.h1->logits", "m0->logits"), frequency=torch.tensor([0.5, 1.0]),
        inside=torch.tensor([True, True]), jaccard=torch.tensor([0.8]), unit="prompts", provenance={},
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(lines(of(stable))[0]["x"]), [0.5])  # full bars say nothing
    assert "1 of 2 are in every draw; the others are drawn" in of(stable).spec.caption
    full = replace(stable, frequency=torch.ones(2), items=("m0->logits", "m0->logits"))
    assert "2 of 2 are in every draw." in of(full).spec.caption
    assert lines(of(full))[0]["y"] == ["m0-&gt;logits", "m0-&gt;logits (2)"]  # labels without blanks, which shift them
    shown(stable, tmp_path)
    repaired = Repair(
        task="colored_objects", heads=("L1H1",), towards=("wrong_colour",), but="colour",
        before=torch.tensor([1.0, 0.0, 0.0, 1.0]), together=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        single=torch.tensor([[1.0, 1.0, 0.0, 0.0]]), random=torch.tensor([[0.0, 0.0, 0.0, 1.0]]),
        random_heads=(("L0H0",),), movers=(), attention_before=torch.zeros(0, 2, 4),
        attention_after=torch.zeros(0, 2, 4), provenance={},
    )  # fmt: skip
    view = of(repaired)
    np.testing.assert_allclose(np.asarray(lines(view)[0]["x"]), [0.5, 0.75, 0.5, 0.25])
    assert "0.500 before and 0.750 after, a change of 0.250 [-1, 1] prompt by prompt; 25.0%" in view.spec.caption
    shown(repaired, tmp_path)
