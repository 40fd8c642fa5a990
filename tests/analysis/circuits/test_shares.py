"""Shares of a task: their denominators and intervals, and circuits of one member or none."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import workbench
from support.circuits import Words, task_for, tiny
from workbench import Faithfulness, FaithfulnessCurve
from workbench.analysis.circuits.shares import Denominator
from workbench.analysis.statistics.intervals import mean_t, share_interval
from workbench.errors import InterventionError


def test_intervals_cover_as_often_as_they_say() -> None:
    """400 samples of 24, the denominator three standard errors from 0; and means of 8."""
    generator = torch.Generator().manual_seed(0)
    spread = 24**0.5 / 3
    inside = bounded = of_means = 0
    for _ in range(400):
        whole = 1 + spread * torch.randn(24, generator=generator, dtype=torch.float64)
        part = 0.7 * whole + 0.4 * torch.randn(24, generator=generator, dtype=torch.float64)
        low, high = share_interval(part, whole)
        bounded += low == low
        inside += low <= 0.7 <= high or low != low
        low, high = mean_t(whole[:8])
        of_means += low <= 1 <= high
    assert 0.92 < inside / 400 < 0.98
    assert 0.6 < bounded / 400 < 1
    assert 0.92 < of_means / 400 < 0.98


def test_a_share_is_undefined_exactly_where_its_denominator_may_be_none() -> None:
    whole, none = torch.tensor([2.0, -1.0, 3.0, -2.0]), torch.zeros(4)
    assert not Denominator.of(whole, none, 1).defined
    assert Denominator.of(whole + 9, none, 1).defined
    assert not Denominator.of(whole + 9, none, -1).defined  # the ablated model is better
    assert Denominator.of(whole[:1], none[:1], 1).defined
    assert Denominator.of(whole + 9, none, 1).interval(whole, whole + 9, none)[0] < 0.1
    assert Denominator.of(none, whole + 9).defined  # prompts and twins may differ either way
    assert not Denominator.of(whole, none).defined


def test_patches_of_prompts_that_are_not_told_apart_are_given_in_the_metrics_unit() -> None:
    """Right and wrong are exchanged in every other prompt of a random model."""
    with workbench.attach(tiny("llama-gqa"), Words()) as wb:
        task = task_for("llama-gqa", 6)
        examples = [replace(one, answers=one.wrong, wrong=one.answers) if i % 2 else one for i, one in enumerate(task)]
        swapped = replace(task, examples=tuple(examples))
        with pytest.warns(UserWarning, match=r"undefined as a share: m\(prompts\) − m\(twins\) is"):
            heads = workbench.ablate_heads(wb, swapped, "zero", progress=False)
        with pytest.warns(UserWarning, match="effect of patches on logit_diff is undefined"):
            layers = workbench.patch_layers(wb, swapped, "attn_out", positions=["end"], progress=False)
        circuit = workbench.find_circuit(wb, swapped, "ablation", progress=False)
    assert f"which may be 0: {heads.denominator}" in circuit.sign
    for found in (heads, layers):
        assert found.table["score"].isna().all()
        assert found.table["effect"].abs().is_monotonic_decreasing
        assert f"{found.table['effect'][0]:.3g}" in repr(found)
        assert "Shares are undefined: m(prompts)" in workbench.views.of(found).spec.caption


def measured(wb: Any, circuit: Any, task: Any, **how: Any) -> tuple[Faithfulness, FaithfulnessCurve]:
    return (
        workbench.circuit_faithfulness(wb, circuit, task, progress=False, **how),
        workbench.faithfulness_curve(wb, circuit, task, fractions=(0.5, 1.0), progress=False, **how),
    )


@pytest.mark.parametrize("name", ["llama-gqa", "mbart"])
def test_models_that_do_no_better_than_ablated_are_told(name: str) -> None:
    """Random models: whether all ablated do better is chance, so one of the two signs is always negative."""
    up = workbench.Metric("up", lambda output, batch: output.logits[:, 0, 5])
    down = workbench.Metric("down", lambda output, batch: output.logits[:, 0, 5], higher_is_better=False)
    told = 0
    with workbench.attach(tiny(name), Words()) as wb:
        task = task_for(name, 4)
        circuit = workbench.find_circuit(wb, task, "eap", n_edges=0.5, progress=False)
        for metric in (up, down):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                one, curve = measured(wb, circuit, task, metric=metric, ablation="zero")
            assert one.denominator == curve.denominator
            assert len([w for w in seen if "undefined as a share" in str(w.message)]) == 2 * (
                not one.denominator.defined
            )
            if not one.denominator.defined:
                told += 1
                assert "undefined" in repr(one)
                assert "undefined" in repr(curve)
                assert f"{one.denominator.value:.3g}" in str(seen[0].message)
                assert all(end != end for end in (*one.interval, *curve.cpr_interval, *curve.intervals()[0]))
                assert one.table["value"].isna().all()
                assert curve.table[["absolute", "signed", "low", "high"]].isna().all(axis=None)
                assert one.in_metric["value"].tolist() == [float(x.mean()) for x in (one.full, one.alone, one.none)]
                assert curve.in_metric["absolute"].tolist() == curve.examples[0].mean(-1).tolist()
            low, high = one.lost[1:]
            assert low <= one.lost[0] <= high
            assert f"lost {one.lost[0]:.3g}" in repr(one)
    assert told >= 1


@pytest.mark.filterwarnings("ignore:the faithfulness of")
@pytest.mark.parametrize("name", ["llama-gqa", "mbart"])
def test_completeness_of_a_single_member_leaves_the_rest_of_the_model(name: str) -> None:
    with workbench.attach(tiny(name), Words()) as wb:
        task = task_for(name, 3)
        found = workbench.find_circuit(wb, task, "eap", progress=False)
        edges = torch.zeros_like(found.edges_in)
        inputs = [found.graph.senders[i] for i in found.graph.inputs]
        mlp = [node for node in found.graph.senders if node not in inputs and ".h" not in node][-1]
        for edge in (f"{inputs[-1]}->{mlp}", f"{mlp}->logits"):
            edges[found.graph.edge(edge)] = True
        one = workbench.circuit_faithfulness(wb, found.with_edges(edges), task, n_subsets=1, progress=False)
        assert one.subsets == ((mlp,),)
        rest = found.graph.exists.clone()
        rest[found.graph.sender_index[mlp]] = False
        kept = workbench.circuit_faithfulness(wb, found.with_edges(rest), task, progress=False)
        torch.testing.assert_close(one.without[0], kept.alone)
        with pytest.raises(InterventionError, match="has no heads to compare"):
            workbench.circuit_overlap(found.with_edges(edges), found, unit="heads")


def test_a_number_of_edges_is_no_share_of_them() -> None:
    with workbench.attach(tiny("gpt2"), Words()) as wb:
        task = task_for("gpt2", 3)
        found = workbench.find_circuit(wb, task, "eap", n_edges=1.0, progress=False)
        assert found.n_edges == found.graph.n_edges
        assert found.top(1, prune=False).n_edges == 1
        for bad in (1.5, -0.1, True):
            with pytest.raises(InterventionError, match="between 0 and 1"):
                found.top(bad)
        with pytest.warns(UserWarning, match="the circuit is empty"):
            workbench.find_circuit(wb, task, "eap", n_edges=0, progress=False)
