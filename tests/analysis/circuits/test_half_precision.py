"""Circuits in bfloat16, float16 and under autocast: found as in float32, and refused where the stream is no sum."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import workbench
from support.circuits import Words, task_for, tiny
from support.tiny import family
from workbench.analysis.circuits.model.anatomy import find_anatomy
from workbench.analysis.circuits.model.recording import same_product, same_sum
from workbench.errors import AttachError

MODELS = ["llama-gqa", "mbart"]  # shared keys and RMSNorm; an encoder-decoder
WAYS = {
    "bfloat16": (torch.bfloat16, None), "float16": (torch.float16, None),
    "bfloat16 and float32": (torch.float32, torch.bfloat16),
}  # fmt: skip


def measured(name: str, dtype: torch.dtype, autocast: torch.dtype | None, like: Any = None) -> dict[str, Any]:
    """Circuits, and the faithfulness of the one by attribution or of the one that is given."""
    to_logits = {"stages": [workbench.Stage("logits")]}
    with (
        workbench.attach(tiny(name, dtype), Words()) as wb,
        nullcontext() if autocast is None else torch.autocast("cpu", autocast),
    ):
        task = task_for(name, 4, lengths=2)
        found = {
            "eap": workbench.find_circuit(wb, task, "eap", n_edges=0.5, progress=False),
            "ablation": workbench.find_circuit(wb, task, "ablation", progress=False),
            "path_patching": workbench.find_circuit(wb, task, "path_patching", progress=False, **to_logits),
        }
        kept = workbench.faithfulness_curve(wb, like or found["eap"], task, fractions=(0.3, 0.7), progress=False)
    return {**found, "curve": kept}


@pytest.fixture(scope="module")
def exact() -> dict[str, dict[str, Any]]:
    return {name: measured(name, torch.float32, None) for name in MODELS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:the faithfulness of")
def test_results_are_those_of_float32_up_to_rounding(exact: Any, name: str, way: str) -> None:
    whole = exact[name]
    found = measured(name, *WAYS[way], like=whole["eap"])
    for method in ("eap", "ablation", "path_patching"):
        level = "edge_scores" if method == "eap" else "node_scores"
        a, b = (getattr(one[method], level) for one in (found, whole))
        assert torch.equal(a.isnan(), b.isnan())
        off = (a - b).nan_to_num(0.0).norm() / b.nan_to_num(0.0).norm()
        assert off < 0.2, method  # eight bits, some dozen roundings, which random models amplify
        assert found[method].provenance["precision"] == way
        assert f"in {way}" in repr(found[method])
    assert "in " not in repr(whole["eap"]).partition(";")[0]
    span = (whole["curve"].full - whole["curve"].none).abs().mean()
    assert (found["curve"].examples - whole["curve"].examples).abs().max() < 0.2 * whole["curve"].examples.abs().max()
    assert (found["curve"].full - whole["curve"].full).abs().max() < 0.1 * (span + whole["curve"].full.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "says"), [("gemma2", "post_attention_layernorm first"), ("bart", "final_layer_norm")])
def test_streams_that_are_no_sum_are_refused_in_half_precision_too(name: str, says: str, dtype: torch.dtype) -> None:
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in family(name).inputs().items()
    }
    with workbench.attach(tiny(name, dtype)) as wb, pytest.raises(AttachError, match=says):
        find_anatomy(wb, inputs)


def test_tolerances_follow_the_dtype_and_each_number() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 40, generator=generator) for _ in range(2))
    a[:, 0] = 1e3  # a number as large as some streams have, which must not excuse the others
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        eps, x, y = torch.finfo(dtype).eps, a.to(dtype), b.to(dtype)
        assert same_sum(x + y, x.double() + y.double(), x.abs() + y.abs(), eps)
        assert not same_sum(x + 1.2 * y, x.double() + y.double(), x.abs() + y.abs(), eps)
        assert same_product((x + y)[:, 1:], (x.double() + y.double())[:, 1:], eps)
        assert not same_product(y.roll(1, 0), y, eps)
