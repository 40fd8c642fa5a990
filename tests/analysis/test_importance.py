"""Ground truths of head importance: dead heads score nothing, a planted head comes first, linear models add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.tiny import family, make
from workbench import HeadImportance, PruningCurve, head_importance
from workbench.analysis.importance import METHODS, Hops
from workbench.errors import InterventionError, WorkbenchError
from workbench.metrics import METRICS

DEAD = (1, 2)


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 32}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=24, patch_size=8, num_labels=5)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return model


def images(n: int = 6) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    pixels, labels = torch.randn(n, 3, 24, 24), torch.arange(n) % 5
    return [
        {"pixel_values": pixels[i : i + 4], "labels": labels[i : i + 4], "output_hidden_states": True}
        for i in range(0, n, 4)
    ]


def output_weights(model: Any) -> list[Tensor]:
    return [m.weight for name, m in model.named_modules() if name.endswith("o_proj")]


def test_a_head_without_output_scores_nothing_in_every_measure() -> None:
    model = vit()
    with torch.no_grad():
        output_weights(model)[DEAD[0]][:, DEAD[1] * 8 : (DEAD[1] + 1) * 8] = 0
    parts = ["cls", "patches", ("inside", 1), ("outside", 1)]
    with workbench.attach(model) as wb:
        found = head_importance(wb, images(), list(METRICS), METHODS, partial_pruning=parts, progress=False)
    dead = found.heads.index("L1H2")
    assert len(found.scores) == 9 * 7 + 3 * 3
    for key in found.scores:
        assert found.examples(*key)[dead].abs().max() < 2e-5, key
    assert found.score("zero", "loss").abs().max() > 1e-3
    assert found.grid == (3, 3)


def test_a_planted_head_is_first_by_every_method() -> None:
    model = vit()
    with torch.no_grad():
        for layer, weight in enumerate(output_weights(model)):
            for head in range(4):
                if (layer, head) != (1, 1):
                    weight[:, head * 8 : head * 8 + 8] *= 1e-3
    with workbench.attach(model) as wb:
        batches = images()
        with torch.no_grad():
            for batch in batches:  # the model is right, and only the planted head can make it so
                batch["labels"] = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        found = head_importance(wb, batches, ["loss", "js_divergence"], METHODS, progress=False)
    for method, measure in found.scores:
        assert found.ranking(method, measure, absolute=True)[0] == "L1H1", (method, measure)


class Linear(nn.Module):
    """One layer of attention, no norm, and a linear readout."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(z.transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:the sweep runs whole forwards")
def test_scores_add_up_in_a_linear_model() -> None:
    torch.manual_seed(0)
    model = Linear().double().eval()
    x = torch.randn(3, 7, 16, dtype=torch.float64)

    def first(output: Tensor, batch: Any) -> Tensor:
        return output[:, -1, 0]

    with workbench.attach(model) as wb:
        found = head_importance(wb, [{"x": x}], first, ("zero", "gradient", "keep_only"), progress=False)
    whole = model(x)[:, -1, 0] - model.out.bias[0]
    for method in found.methods:
        torch.testing.assert_close(found.examples(method).sum(0), whole.detach())


def test_results_keep_in_a_file_and_rank_with_intervals(tmp_path: Path) -> None:
    with workbench.attach(make(family("gpt2"))) as wb:
        ids = torch.randint(3, 60, (5, 9), generator=torch.Generator().manual_seed(0))
        found = head_importance(
            wb, [{"input_ids": ids}], methods=("ablation", "gradient"), normalise=True, progress=False
        )
        curve = found.curve(wb, [{"input_ids": ids}], "greedy", n_random=2, rounds=1, progress=False)
    again = HeadImportance.load(found.save(tmp_path / "scores"))
    assert again.ranking() == found.ranking()
    assert torch.equal(again.interval("zero"), found.interval("zero"))
    ends, score = found.interval("zero"), found.score("zero")
    assert ((ends[:, 0] <= score) & (score <= ends[:, 1])).all()
    torch.testing.assert_close(found.score("gradient").view(2, 4).norm(dim=1), torch.ones(2).double())
    ranks = found.correlations
    assert ranks.loc["zero, loss", "zero, loss"] == pytest.approx(1)
    assert curve.counts == tuple(range(9))
    assert curve.largest_difference < 1e-5
    assert torch.equal(PruningCurve.load(curve.save(tmp_path / "curve")).mean(), curve.mean())
    assert curve.mean("greedy")[1] == pytest.approx(float(found.clean["loss"].mean() + score.min()), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "guess"}, 'no method "guess"'),
        ({"metric": "los"}, 'no metric "los"'),
        ({"metric": lambda output, batch: output.logits.mean()}, "expected one real number"),
        ({"metric": lambda output, batch: output.logits.mean(), "methods": "gradient"}, r"gave \[\], expected one"),
        ({"metric": lambda output, batch: output.logits.mean((0, 1)).view(1), "methods": "gradient"}, r"gave \[1\]"),
        ({"metric": lambda output, batch: output.logits[:, 0] / 0, "methods": "gradient"}, "is not finite"),
        ({"metric": lambda output, batch: output.logits[:, 0].detach(), "methods": "gradient"}, "has no gradient"),
        ({"metric": "accuracy", "methods": "gradient"}, "no method has a score"),
        ({"partial_pruning": "middle", "methods": ()}, 'no part "middle"'),
        ({"partial_pruning": [("inside", 1)], "grid": (4, 4), "methods": ()}, "4 x 4 patches does not match 10 tokens"),
        ({"partial_pruning": [("inside", 1)], "grid": (3, 3), "prefix": 2, "methods": ()}, "does not match 10 tokens"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with workbench.attach(vit()) as wb, pytest.raises(WorkbenchError, match=message):
        head_importance(wb, images(), progress=False, **options)


def test_a_model_without_heads_that_are_read_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with workbench.attach(model, check=False) as wb, pytest.raises(InterventionError, match="has no heads"):
        head_importance(wb, [{"input": torch.ones(1, 2, 4)}], lambda y, batch: y[:, 0, 0], progress=False)


def test_a_metric_without_a_gradient_is_told_before_the_sweep() -> None:
    model, ran = vit(), []
    model.register_forward_hook(lambda *_: ran.append(1))
    with workbench.attach(model) as wb, pytest.raises(WorkbenchError, match="has no gradient"):
        head_importance(wb, images(), lambda output, batch: output.logits[:, 0].detach(), progress=False)
    assert len(ran) == 1


def test_an_option_that_there_is_not_is_refused_whatever_the_methods() -> None:
    with workbench.attach(vit()) as wb, pytest.raises(TypeError, match="parts"):
        head_importance(wb, images(), methods="gradient", parts=["cls"], progress=False)  # type: ignore[call-arg]


def test_hops_on_a_grid_and_in_text() -> None:
    inside = Hops(1, inside=True, grid=(2, 3)).gone(7)
    assert not inside[0].any()
    assert inside[1, 1:].tolist() == [True, True, False, True, True, False]
    assert torch.equal(inside[1:, 1:], ~Hops(1, inside=False, grid=(2, 3)).gone(7)[1:, 1:])
    rows = Hops(0, inside=True, renormalise=True)(torch.full((1, 3, 3), 1 / 3), None, 0)
    assert rows[0, 0].tolist() == pytest.approx([0, 0.5, 0.5])
    with pytest.raises(InterventionError, match="counted from 0"):
        Hops(-1, inside=True)
