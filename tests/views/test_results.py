"""Results of analyses show their own numbers, and survive a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import workbench
from support.tiny import family, make
from workbench.analysis.importance import HeadImportance, PruningCurve
from workbench.report import check
from workbench.result import Result
from workbench.views import of


def shown(result: Result, folder: Path) -> None:
    """Its page is sound, its picture is one, and what a file brings back looks the same."""
    page = Path(result.to_html(folder / "result.html"))
    assert check(page) == []
    assert set(result._repr_mimebundle_()) == {"text/html", "image/png", "text/plain"}
    again = type(result).load(result.save(folder / "result.safetensors"))
    assert of(again).spec.digest == of(result).spec.digest


def test_head_importance_is_an_atlas_with_intervals(tmp_path: Path) -> None:
    scores = torch.tensor([[1.0, 1.2, 0.8], [-0.5, -0.4, -0.6], [0.0, 0.1, -0.1]], dtype=torch.float64)
    found = HeadImportance(
        heads=("L0H0", "L0H1", "L1H0"),
        sites=("blocks.0.attn", "blocks.0.attn", "blocks.1.attn"),
        layers=(0, 0, 1),
        numbers=(0, 1, 0),
        kinds=("self",) * 3,
        methods=("zero",),
        measures=("loss",),
        scores={("zero", "loss"): scores},
        clean={"loss": torch.zeros(3)},
        skipped={},
        higher={"loss": False},
        normalised=False,
        grid=None,
        seed=0,
        n_bootstrap=100,
        level=0.95,
        mode="full",
        provenance={},
    )
    spec = of(found).spec
    np.testing.assert_allclose(spec.blocks["values"], [[1.0, -0.5, 0.0]], atol=1e-6)
    assert spec.facts["metrics"][0] == {"label": "zero", "unit": "", "meaning": "", "signed": True, "interval": True}
    assert (spec.blocks["low"] <= spec.blocks["high"]).all()
    assert "over 3 examples" in spec.caption
    shown(found, tmp_path)


def test_a_pruning_curve_is_lines_against_the_number_of_heads(tmp_path: Path) -> None:
    values = torch.tensor([[[0.1, 0.3]], [[0.5, 0.7]]], dtype=torch.float64)  # [count, measure, example]
    curve = PruningCurve(
        counts=(0, 2),
        n_heads=4,
        orders={"zero": ("L0H0", "L0H1"), "random 1": ("L0H1", "L0H0")},
        measures=("loss",),
        higher={"loss": False},
        values={"zero": values, "random 1": values + 1},
        seconds=torch.tensor([[2.0], [1.0]]),
        seconds_full=torch.tensor([[2.0], [2.0]]),
        parameters=torch.tensor([100.0, 80.0]),
        largest_difference=0.0,
        reason="",
        provenance={},
    )
    view = of(curve)
    table = view.data()
    assert table.loc[table["order"] == "zero", "value"].tolist() == pytest.approx([0.2, 0.6])
    assert "2 heads pruned the model runs 2.00 times as fast" in view.spec.caption
    shown(curve, tmp_path)


def test_capacity_is_an_atlas_of_what_heads_hold(tmp_path: Path) -> None:
    found = family("gpt2")
    model = make(found)
    with workbench.attach(model) as wb:
        capacity = workbench.capacity(wb, [found.inputs()], repeats=3, resamples=10, progress=False)
    view = of(capacity)
    table = view.data()
    rule, query = capacity.rules[0], capacity.queries[0]
    np.testing.assert_allclose(table[f"n* of {rule}, {query}"], capacity.n_star[:, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(table["load"], capacity.effective_keys, rtol=1e-6)
    shown(capacity, tmp_path)


def test_conditioning_is_bars_of_effects(tmp_path: Path) -> None:
    found = workbench.conditioning(
        experiments=["blocking", "acquisition"], rules=("hebb", "delta"), repeats=8, resamples=20, progress=False
    )
    view = of(found)
    table = view.data()
    blocking = table[table["experiment"] == "blocking"].set_index("subject")
    assert blocking.loc["delta", "effect"] == 1
    assert blocking.loc["hebb", "effect"] == 0
    shown(found, tmp_path)
