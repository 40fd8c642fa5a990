"""Saliency of decoders without an encoder and of classifiers: against captum and definitions in float64, and words."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.tiny import family, make
from workbench import Saliency, saliency
from workbench.analysis.saliency import gradients
from workbench.errors import WorkbenchError

PROMPT, SAID, INSTEAD = torch.tensor([7, 3, 9, 5]), torch.tensor([11, 4, 8]), torch.tensor([12, 13, 14])
DECODERS = ("gpt2", "llama-gqa")


def double(name: str) -> nn.Module:
    torch.manual_seed(0)
    return make(family(name)).double()


def explained(model: nn.Module, method: str = "spes", tokenizer: Any = None, **options: Any) -> Saliency:
    given: dict[str, Any] = {"hypothesis": SAID, "progress": False, "batch_size": 32} | options
    inputs = given.pop("inputs", {"input_ids": PROMPT[None]})
    with workbench.attach(model, tokenizer) as wb:
        return saliency(wb, inputs, method, **given)


class Plain:
    """ln P of each token behind the prompt as a function of the embeddings before it, in plain code."""

    def __init__(self, model: nn.Module, contrast: Tensor | None = None) -> None:
        self.model, self.contrast = model, contrast
        self.start = model.get_input_embeddings()(torch.cat([PROMPT, SAID[:-1]])[None]).detach()

    def every(self, embedded: Tensor) -> Tensor:
        """[batch, token, vocabulary]"""
        return self.model(inputs_embeds=embedded).logits[:, len(PROMPT) - 1 :].log_softmax(-1)

    def __call__(self, embedded: Tensor) -> Tensor:
        found = self.every(embedded)
        own = found[:, range(len(SAID)), SAID]
        return own if self.contrast is None else own - found[:, range(len(SAID)), self.contrast]


def causal(rows: Tensor) -> Tensor:
    """The cells that output k cannot see are zero."""
    return rows.tril(len(PROMPT) - 1)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_masks_enumerated_one_by_one(name: str) -> None:
    model = double(name)
    found = explained(model)
    assert found.exact
    plain = Plain(model)
    clean = plain.every(plain.start)[0]
    masks = torch.tensor([mask for mask in product([0, 1], repeat=6) if any(mask)]).double()
    scores = torch.stack(
        [(clean.exp() * (clean - plain.every(plain.start * (1 - z)[None, :, None])[0])).sum(-1) for z in masks]
    )
    truth = causal((scores.T @ masks) / masks.sum(0))
    torch.testing.assert_close(found.scores.double(), truth, atol=1e-6, rtol=1e-5)
    assert found.visible == (4, 5, 6)
    assert len(found.table) == 15


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("contrast", [None, INSTEAD])
def test_integrated_gradients_and_gradient_times_input_by_hand_and_by_captum(
    name: str, contrast: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum.attr import IntegratedGradients

    model = double(name)
    plain = Plain(model, contrast)
    base = plain.start.mean(1, keepdim=True).expand_as(plain.start)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    truth, simple = [], []
    for k in range(3):
        total = torch.zeros_like(plain.start)
        for node, weight in zip(nodes, weights, strict=True):
            point = (base + (node + 1) / 2 * (plain.start - base)).requires_grad_()
            total += weight / 2 * torch.autograd.grad(plain(point)[0, k], point)[0]
        truth.append(((plain.start - base) * total).sum(-1)[0])
        point = plain.start.clone().requires_grad_()
        simple.append((plain.start * torch.autograd.grad(plain(point)[0, k], point)[0]).sum(-1)[0])
    options: dict[str, Any] = {"contrast": contrast, "baseline": "mean", "n_steps": 16}
    found = explained(model, "integrated_gradients", **options)
    torch.testing.assert_close(found.scores.double(), torch.stack(truth), atol=1e-6, rtol=1e-5)
    assert found.details["completeness_gap"] < 1e-3
    change = (plain(plain.start) - plain(base))[0]
    torch.testing.assert_close(torch.tensor(found.details["change"]).double(), change.detach())
    for k in range(3):
        theirs = IntegratedGradients(plain).attribute(plain.start, base, target=k, n_steps=16)
        torch.testing.assert_close(found.scores[k].double(), theirs.sum(-1)[0].double(), atol=1e-6, rtol=1e-5)
    for few in (0, gradients._FEW):  # a backward for each token, or one for copies of the input
        monkeypatch.setattr(gradients, "_FEW", few)
        found = explained(model, "gradient_x_input", contrast=contrast)
        torch.testing.assert_close(found.scores.double(), torch.stack(simple), atol=1e-6, rtol=1e-5)
        assert found.details["evaluations"] == 2


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", ["occlusion", "feature_ablation"])
def test_occlusion_is_the_drop_without_a_token(name: str, method: str) -> None:
    from captum.attr import FeatureAblation

    model = double(name)
    plain = Plain(model, INSTEAD)
    truth = []
    for j in range(6):
        without = plain.start.clone()
        without[:, j] = 0
        truth.append((plain(plain.start) - plain(without))[0])
    found = explained(model, method, contrast=INSTEAD)
    torch.testing.assert_close(found.scores.double(), torch.stack(truth, 1), atol=1e-6, rtol=1e-5)
    for k in range(3):
        theirs = FeatureAblation(plain).attribute(
            plain.start, target=k, feature_mask=torch.arange(6)[None, :, None].expand_as(plain.start)
        )
        torch.testing.assert_close(found.scores[k].double(), theirs[0, :, 0].double(), atol=1e-6, rtol=1e-5)


def test_a_contrast_is_one_token_less_the_other() -> None:
    for name in ("gpt2", "t5"):
        model = double(name)
        inputs = {"input_ids": PROMPT[None]}
        for method in ("spes", "integrated_gradients"):
            options: dict[str, Any] = {"inputs": inputs, "method": method, "hypothesis": SAID[:1], "baseline": "mean"}
            options |= {"score": "log_probability"} if method == "spes" else {"n_steps": 200}
            both = explained(model, contrast=INSTEAD[:1], **options)
            own = explained(model, **options)
            other = explained(model, **options | {"hypothesis": INSTEAD[:1]})
            torch.testing.assert_close(both.scores, own.scores - other.scores, atol=1e-5, rtol=1e-4)
            assert both.contrast_ids == (12,)


def test_padding_changes_nothing() -> None:
    model = double("gpt2")
    plain = explained(model, exact=False, n_masks=40)
    for ids, mask in (
        ([0, 0, 7, 3, 9, 5], [0, 0, 1, 1, 1, 1]),
        ([7, 3, 9, 5, 0], [1, 1, 1, 1, 0]),
    ):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
        assert torch.equal(explained(model, inputs=inputs, exact=False, n_masks=40).scores, plain.scores)


def test_what_the_model_writes_is_explained(tmp_path: Path) -> None:
    model = make(family("llama-gqa"))
    found = explained(model, "occlusion", hypothesis=None, decoding={"max_new_tokens": 5})
    with torch.no_grad():
        written = model.generate(PROMPT[None], max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 4:]
    assert list(found.target_ids) == written.tolist()
    assert found.scores.shape == (len(written), 3 + len(written))
    found.save(tmp_path / "map.safetensors")
    back = Saliency.load(tmp_path / "map.safetensors")
    assert torch.equal(back.scores, found.scores)
    assert back.visible == found.visible


def test_noise_and_normalised_maps_count_visible_cells_alone() -> None:
    found = explained(make(family("gpt2")), exact=False, n_masks=200, precision=100.0)
    assert found.stopped == "precision"
    error, scores = found.standard_error, found.scores
    for k, limit in enumerate(found.visible):
        wanted = error[k, :limit].double().square().mean().sqrt() / scores[k, :limit].double().std(correction=0)
        torch.testing.assert_close(found.noise[k], wanted)
        assert not error[k, limit:].any()
        one = found.normalised()[0][k]
        assert (float(one[:limit].min()), float(one[:limit].max())) == (0.0, 1.0)
        assert not one[limit:].any()
    last = found.normalised()[0][2, 5]
    assert float(found.sentence()[5]) == pytest.approx(float(last))


class Words:
    """Decodes ids into given tokens."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(self.tokens[int(i)] for i in ids)


TEXT = Words(*("?" * 3), "ing", " big", " cat", "?", "Go", "?", " the", "?", "s", *"?????")


def test_words_are_summed_and_masked_together() -> None:
    model = make(family("gpt2"))
    found = explained(model, "integrated_gradients", TEXT)  # Go|ing| the| cat|s| big
    assert found.position_texts == ("Go", "ing", " the", " cat", "s", " big")
    assert found.position_words == (0, 0, 1, 2, 2, 3)
    words = found.by_word()
    assert words.position_texts == ("Going", " the", " cats", " big")
    torch.testing.assert_close(words.scores.sum(1), found.scores.sum(1))
    assert words.visible == (3, 3, 4)
    assert float(found.by_word("mean").scores[0, 2]) == pytest.approx(float(found.scores[0, 3]))  # " cat" alone is seen
    assert float(found.by_word("mean").scores[1, 2]) == pytest.approx(float(found.scores[1, 3:5].mean()))
    masked = explained(model, "feature_ablation", TEXT, segments="words")
    plain = Plain(model)
    without = plain.start.clone()
    without[:, :2] = 0
    with torch.no_grad():
        drop = (plain(plain.start) - plain(without))[0]
    torch.testing.assert_close(masked.scores[:, 0], drop, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.scores[:, 1], drop, atol=1e-5, rtol=1e-4)
    some = explained(model, "feature_ablation", TEXT, segments=["Going the", "big"])
    assert some.segments[0].tolist() == [0, 0, 0, 1, 2, 3]


def test_words_of_a_fast_tokenizer_are_those_of_its_offsets() -> None:
    from workbench.analysis.saliency.words import words_of

    _, tokenizer = workbench.models.load("demo-lm")
    ids = tokenizer("Then, Mary and John", return_tensors="pt")["input_ids"]
    numbers = words_of(tokenizer, ids[0])
    texts = ["" for _ in range(max(numbers) + 1)]
    for at, number in enumerate(numbers):
        texts[number] += tokenizer.decode([int(ids[0, at])]).strip()
    assert texts == tokenizer.decode(ids[0]).split()


def test_classes_of_texts_and_images() -> None:
    config = hf.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
        id2label={0: "no", 1: "yes", 2: "perhaps"}, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(config).double().eval()
    inputs = {"input_ids": PROMPT[None], "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    found = explained(model, "occlusion", inputs=inputs, hypothesis=2, contrast=0)
    assert (found.target_texts, found.contrast_texts) == (("perhaps",), ("no",))
    embedded = model.get_input_embeddings()(PROMPT[None])
    with torch.no_grad():
        clean = model(**inputs).logits[0]
        for j in range(3):
            without = embedded.clone()
            without[:, j] = 0
            lost = model(inputs_embeds=without, attention_mask=inputs["attention_mask"]).logits[0]
            wanted = (clean[2] - clean[0]) - (lost[2] - lost[0])
            assert float(found.scores[0, j]) == pytest.approx(float(wanted), abs=1e-6)
    assert found.scores.shape == (1, 3)
    vit = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    model = hf.ViTForImageClassification(vit).eval()
    found = explained(model, inputs={"pixel_values": torch.randn(1, 3, 16, 16)}, hypothesis=None)
    assert (found.kind, found.grid, found.scores.shape) == ("patches", (2, 2), (1, 4))


def refused(words: str, name: str = "gpt2", tokenizer: Any = None, method: str = "spes", **options: Any) -> None:
    with pytest.raises(WorkbenchError, match=words):
        explained(make(family(name)), method, tokenizer, **options)


def test_what_cannot_be_explained_is_named() -> None:
    refused("the hypothesis has the id 10000, the vocabulary", hypothesis=[10_000])
    refused("the hypothesis has the id 10000, the vocabulary", "t5", hypothesis=[10_000])
    refused("the prompt has the id -1", inputs={"input_ids": torch.tensor([[-1, 4]])})
    refused("the contrast has the id 10000", hypothesis=[4], contrast=[10_000])
    refused("contrast and output 1 are the same", contrast=[1, 4, 2])
    refused("the contrast has 1 tokens", contrast=3)
    refused("a KL divergence is of all outputs", contrast=INSTEAD, score="kl")
    refused("is a text, and there is no tokenizer", hypothesis=" cat")
    refused("of token ids, not of float32", hypothesis=torch.tensor([0.5]))
    refused("no continuation to explain", hypothesis=torch.zeros(0, dtype=torch.long))
    refused("prompt and hypothesis need", hypothesis=[3] * 5000)
    refused("hides tokens between", inputs={"input_ids": PROMPT[None], "attention_mask": torch.tensor([[1, 0, 1, 1]])})
    refused("hides every token", inputs={"input_ids": PROMPT[None], "attention_mask": torch.zeros(1, 4)})
    refused("should hold one example", inputs={"input_ids": PROMPT.repeat(2, 1)})
    refused("labels cannot be explained", inputs={"input_ids": PROMPT[None], "labels": PROMPT[None]})
    refused("no encoder beside a decoder", method="encoder_output")
    refused("p_tokens masks what a decoder beside", p_tokens=0.2)
    refused("prompt= is of encoder-decoders", prompt=[1])
    refused("frames= is of encoder-decoders", frames=9)
    refused("words need a tokenizer", segments="words")
    refused(
        "no boundary between tokens fits the word “Go”",
        tokenizer=Words(*"??", "?", " on", *"???", "Go s", *"?????"),
        segments=["Go"],
    )
    refused("the word “dog” is not in the text", tokenizer=TEXT, segments=["Going", "dog"])
    refused("gives no logits", "bert")
    broken = make(family("gpt2"))
    torch.nn.init.constant_(broken.transformer.ln_f.weight, torch.nan)
    with pytest.raises(WorkbenchError, match="probabilities for this input are not finite"):
        explained(broken)
    masked = hf.BertForMaskedLM(
        hf.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(WorkbenchError, match="is no decoder: what it says at a token changes with later ones"):
        explained(masked.eval())
    regression = hf.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    with pytest.raises(WorkbenchError, match="one number, not probabilities"):
        explained(hf.BertForSequenceClassification(regression).eval(), hypothesis=0)
    regression.num_labels = 3
    with pytest.raises(WorkbenchError, match="one class of 0 to 2"):
        explained(hf.BertForSequenceClassification(regression).eval(), hypothesis=3)


@pytest.mark.parametrize("method", ["integrated_gradients", "gradient_x_input"])
def test_a_model_that_says_the_same_of_everything_misses_nothing(method: str) -> None:
    model: Any = double("llama-gqa")
    nn.init.zeros_(model.lm_head.weight)
    found = explained(model, method)
    assert not found.scores.any()
    assert found.details["completeness_gap"] == 0.0
