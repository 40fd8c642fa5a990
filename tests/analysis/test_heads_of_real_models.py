"""Head importance and attention profiles of trained models, out of PyPI packages: MiniLM and Whisper's encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from support.tiny import eager_attentions
from workbench import attention_profile, head_importance

TEXTS = [
    "A man is eating food.",
    "Attention heads of a sentence encoder, looked at one by one, are a strange crowd.",
    "The girl is carrying a baby past the bakery.",
]


def mute(projection: Any, head: int, width: int) -> None:
    """Nothing of a head's output goes on."""
    with torch.no_grad():
        projection.weight[:, head * width : (head + 1) * width] = 0


def change(now: Tensor, before: Tensor, counts: Tensor) -> Tensor:
    """[batch] mean over the counted tokens of 1 − cosine."""
    off = 1 - torch.cosine_similarity(now.double(), before.double(), dim=-1)
    return (off * counts).sum(-1) / counts.sum(-1)


def summed(output: Any, batch: Any) -> Tensor:
    """A number that has a gradient."""
    return output.last_hidden_state[:, 0, :7].sum(-1)


def test_heads_of_minilm(minilm: Path) -> None:
    model, tokenizer = workbench.models.load(minilm)
    mute(model.get_submodule("encoder.layer.3.attention.output.dense"), 5, 32)
    with workbench.attach(model, tokenizer) as wb:
        batch = dict(wb.tokenize(TEXTS))
        found = head_importance(
            wb, [batch], {"moved": "representation", "summed": summed}, ("zero", "mean", "gradient"), progress=False
        )
        with torch.no_grad():
            clean = model(**batch).last_hidden_state
            with wb.ablate("L5H2"):
                ablated = model(**batch).last_hidden_state
    assert len(found.heads) == 72
    assert found.mode == "resumed"
    dead = found.heads.index("L3H5")
    for key in found.scores:
        scores = found.examples(*key).abs().amax(1)
        assert scores[dead] < 1e-5 < scores.max() / 1e3, key
        assert (scores > 1e-5).sum() == 71, key
    want = change(ablated, clean, batch["attention_mask"])
    torch.testing.assert_close(found.examples("zero", "moved")[found.heads.index("L5H2")], want, rtol=1e-4, atol=1e-7)
    # A gate's gradient is the first-order estimate of zeroing the head.
    ranks = found.correlations.loc["zero, summed", "gradient, summed"]
    assert ranks > 0.5


@torch.no_grad()
def test_profile_of_minilm(minilm: Path) -> None:
    model, tokenizer = workbench.models.load(minilm)
    with workbench.attach(model, tokenizer) as wb:
        batch = dict(wb.tokenize(TEXTS))
        with wb.capture() as cap:
            model(**batch)
    found = attention_profile(cap)
    assert (found.kind, found.n_examples, len(found.labels)) == ("text", 3, 72)
    torch.testing.assert_close(found.mass_examples.sum(-1) + found.examples[..., found.measures.index("sink")],
                               torch.ones(3, 72).double(), rtol=1e-5, atol=1e-5)  # fmt: skip
    eager = eager_attentions(model, [site.name for site in cap.sites], batch).attentions
    lengths = batch["attention_mask"].sum(1).tolist()
    entropy, far = found.measures.index("entropy"), found.measures.index("mean_distance")
    for layer, weights in enumerate(eager):
        rows = slice(12 * layer, 12 * layer + 12)
        for b, n in enumerate(lengths):  # padded on the right
            a = weights[b, :, :n, :n].double()
            hops = (torch.arange(n)[:, None] - torch.arange(n)).abs()
            want = -torch.xlogy(a, a).sum(-1).mean(-1)
            torch.testing.assert_close(found.examples[b, rows, entropy], want, rtol=1e-3, atol=1e-4)
            rest = a * (torch.arange(n) > 0)
            want = (rest * hops).sum((-1, -2)) / rest.sum((-1, -2))
            torch.testing.assert_close(found.examples[b, rows, far], want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_heads_and_profile_of_whispers_encoder(whisper_base: Path) -> None:
    """Two heads of the first layer and all of the last, over the first ten seconds of positions."""
    whole, _ = workbench.models.load(whisper_base)
    encoder = whole.model.encoder
    mute(encoder.layers[5].self_attn.out_proj, 3, 64)
    n = encoder.config.max_source_positions = 500
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[:n])
    features = torch.randn(1, 80, 2 * n, generator=torch.Generator().manual_seed(0)) * 0.3
    batch = {"input_features": features}
    heads = [(layer, head) for layer in (0, 5) for head in ((1, 6) if layer == 0 else range(8))]
    with workbench.attach(encoder) as wb:
        found = head_importance(wb, [batch], "representation", "zero", heads=heads, progress=False)
        with torch.no_grad():
            with wb.capture() as cap:
                clean = encoder(**batch).last_hidden_state
            with wb.ablate((5, 6)):
                ablated = encoder(**batch).last_hidden_state
    assert found.mode == "resumed"
    scores = found.score("zero")
    dead = found.heads.index("L5H3")
    assert scores[dead].abs() < 1e-9
    assert (scores[[i for i in range(len(heads)) if i != dead]] > 1e-7).all()
    want = change(ablated, clean, torch.ones(1, n))
    torch.testing.assert_close(found.examples("zero")[found.heads.index("L5H6")], want, rtol=1e-4, atol=1e-9)
    profile = attention_profile(cap, "tokens", sink="keep", sites=[5])
    assert len(profile.labels) == 8
    torch.testing.assert_close(profile.mass.sum(-1), torch.ones(8).double(), rtol=1e-4, atol=1e-4)
