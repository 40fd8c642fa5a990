"""A positive score helps the task, by whichever metric and method it was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import workbench
from support.circuits import Words, task_for, tiny
from workbench.metrics import Metric, logit_diff

BETTER_LOW = Metric("minus", lambda output, batch: -logit_diff(output, batch), higher_is_better=False)


@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
@pytest.mark.filterwarnings("ignore:the faithfulness of", "ignore:the circuit is empty")
def test_a_metric_turned_round_gives_the_same_scores(name: str) -> None:
    with workbench.attach(tiny(name), Words()) as wb:
        task = task_for(name, 3)
        stages = [workbench.Stage("logits")]
        options: dict[str, dict[str, Any]] = {
            "eap": {}, "eap_ig": {"steps": 2}, "ablation": {"ablation": "zero"}, "path_patching": {"stages": stages},
        }  # fmt: skip
        for method, own in options.items():
            a, b = (
                workbench.find_circuit(wb, task, method, metric=metric, progress=False, **own)
                for metric in ("logit_diff", BETTER_LOW)
            )
            torch.testing.assert_close(a.edge_scores, b.edge_scores, equal_nan=True)
            torch.testing.assert_close(a.node_scores, b.node_scores, equal_nan=True)
            assert "improves the metric" in b.sign
        one, two = (
            workbench.patch_heads(wb, task, metric=metric, progress=False).scores
            for metric in ("logit_diff", BETTER_LOW)
        )
        torch.testing.assert_close(one, two)
        up, down = (
            workbench.faithfulness_curve(wb, a, task, metric=metric, fractions=(0.5, 1.0), progress=False)
            for metric in ("logit_diff", BETTER_LOW)
        )
        assert up.signed == pytest.approx(down.signed)
        assert (up.higher_is_better, down.higher_is_better) == (True, False)
        assert up.denominator.defined == down.denominator.defined


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "t5"])
def test_path_patching_and_attribution_agree_in_sign(name: str) -> None:
    """Also of a task on which the twins do better than the prompts."""
    with workbench.attach(tiny(name), Words()) as wb:
        task = task_for(name, 4)
        to_logits = [workbench.Stage("logits")]
        for metric in ("logit_diff", BETTER_LOW, Metric("other", lambda output, batch: -logit_diff(output, batch))):
            paths = workbench.find_circuit(wb, task, "path_patching", metric=metric, stages=to_logits, progress=False)
            edges = workbench.find_circuit(wb, task, "eap_ig", metric=metric, steps=4, progress=False)
            a, b = paths.edge_scores[:, -1], edges.edge_scores[:, -1]
            both = a.isfinite() & b.isfinite()
            assert torch.cosine_similarity(a[both], b[both], dim=0) > 0.3


def test_signed_choice_of_a_divergence_keeps_what_helps() -> None:
    with workbench.attach(*workbench.models.load("demo-lm")) as wb:
        task = workbench.tasks.ioi(6, seed=0)
        found = workbench.find_circuit(wb, task, "eap_ig", metric="kl_divergence", progress=False)
        curve = workbench.faithfulness_curve(
            wb, found, task, metric="kl_divergence", fractions=(0.05, 0.2, 1.0), progress=False
        )
    assert curve.signed[1] > 0.7
    assert curve.signed[2] == pytest.approx(1, abs=1e-4)
