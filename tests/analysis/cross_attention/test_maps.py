"""Cross-attention maps against eager models, rollout and weightings against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.encoder_decoders import HYPOTHESIS, NAMES, encoder_decoder
from support.tiny import eager_twin, family, make
from workbench import CrossAttention, cross_attention
from workbench.errors import WorkbenchError


def decoder_ids(model: nn.Module) -> Tensor:
    return torch.tensor([[int(model.config.decoder_start_token_id), *HYPOTHESIS[:-1].tolist()]])


def mapped(name: str, **options: Any) -> tuple[CrossAttention, nn.Module, dict[str, Tensor]]:
    model, inputs = encoder_decoder(name)
    with workbench.attach(model) as wb:
        return cross_attention(wb, inputs, hypothesis=HYPOTHESIS, **options), model, inputs


def eager(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Output of an eager copy with its attentions."""
    twin = eager_twin(model)
    return twin, twin(**inputs, decoder_input_ids=decoder_ids(model), output_attentions=True, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["whisper", "t5", "bart"])
def test_rows_equal_the_eager_model(name: str) -> None:
    found, model, inputs = mapped(name)
    _, output = eager(model, inputs)
    truth = torch.stack(output.cross_attentions)[:, 0]
    torch.testing.assert_close(found.maps, truth, atol=1e-5, rtol=1e-4)
    assert found.maps.shape[2] == len(HYPOTHESIS)
    torch.testing.assert_close(found.mass, torch.ones_like(found.mass))


@torch.no_grad()
@pytest.mark.parametrize("name", ["whisper", "t5", "bart"])
def test_rollout_equals_dense_products(name: str) -> None:
    found, model, inputs = mapped(name, rollout=True)
    _, output = eager(model, inputs)
    rows = torch.stack(output.cross_attentions)[:, 0].double()
    for layer in reversed(output.encoder_attentions):
        mean = layer[0].double().mean(0)
        rows = rows @ (mean + torch.eye(len(mean))) / 2
    torch.testing.assert_close(found.maps.double(), rows, atol=1e-6, rtol=1e-4)
    assert found.rollout


def test_attention_times_gradient_equals_autograd() -> None:
    found, model, inputs = mapped("bart", weighting="gradient")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    twin, output = eager(model, inputs)
    for one in output.cross_attentions:
        one.retain_grad()
    output.logits[0].log_softmax(-1).gather(1, HYPOTHESIS[:, None]).sum().backward()
    truth = torch.stack([(one * one.grad)[0] for one in output.cross_attentions]).detach()
    torch.testing.assert_close(found.maps, truth, atol=1e-5, rtol=1e-3)
    assert twin is not model


@torch.no_grad()
def test_value_weights() -> None:
    found, model, inputs = mapped("bart", weighting="value_weighted")
    _, output = eager(model, inputs)
    states = output.encoder_last_hidden_state
    for layer, attention in zip(model.model.decoder.layers, output.cross_attentions, strict=True):
        values = layer.encoder_attn.v_proj(states)[0].unflatten(-1, (4, -1)).transpose(0, 1)
        weighted = attention[0] * values.norm(dim=-1)[:, None]
        truth = weighted / weighted.sum(-1, keepdim=True)
        index = int(layer.encoder_attn.layer_idx)
        torch.testing.assert_close(found.maps[index], truth, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_special_positions_in_and_out() -> None:
    whole, _, _ = mapped("captioner")
    out, _, _ = mapped("captioner", special_positions=False)
    again, _, _ = mapped("captioner", special_positions=False, renormalise=True)
    assert whole.maps.shape[-1] == 5
    assert out.kept_positions == (1, 2, 3, 4)
    torch.testing.assert_close(out.maps, whole.maps[..., 1:])
    torch.testing.assert_close(out.mass, 1 - whole.maps[..., 0])
    torch.testing.assert_close(again.maps.sum(-1), torch.ones_like(again.mass))
    assert (out.renormalised, again.renormalised) == (False, True)


@pytest.mark.parametrize("name", NAMES)
def test_averages_over_any_set_keep_rows_stochastic(name: str) -> None:
    found, _, _ = mapped(name)
    ones = torch.ones(len(HYPOTHESIS))
    for aggregate in found.aggregates():
        torch.testing.assert_close(found.aggregate(aggregate).sum(-1), ones)
    torch.testing.assert_close(found.mean([1], [0, 2]), found.maps[1, [0, 2]].mean(0))
    torch.testing.assert_close(found.of_heads([(0, 1), (1, 3)]), (found.maps[0, 1] + found.maps[1, 3]) / 2)


def test_the_model_stays_on_its_kernel_and_unhooked() -> None:
    model, inputs = encoder_decoder("whisper")
    before = model(**inputs, decoder_input_ids=decoder_ids(model)).logits
    with workbench.attach(model) as wb:
        cross_attention(wb, inputs, hypothesis=HYPOTHESIS, rollout=True)
        assert model.config._attn_implementation == "sdpa"
    assert torch.equal(before, model(**inputs, decoder_input_ids=decoder_ids(model)).logits)


def test_site_sets_and_alignment_heads() -> None:
    found, _, _ = mapped("bart", sites=["decoder.1.cross_attn"], alignment_heads=[(0, 1), (1, 2)])
    assert found.layers == (1,)
    assert found.maps.shape[0] == 1
    assert found.alignment_heads == ((1, 2),)
    torch.testing.assert_close(found.aggregate("alignment heads"), found.maps[0, 2])
    assert len(found.table) == 1 * 4 * len(HYPOTHESIS)
    for options, words in (
        ({"weighting": "norm"}, "weighting is one of"),
        ({"weighting": "gradient", "rollout": True}, "signed"),
        ({"sites": ["decoder.1.attn"]}, "no cross-attention"),
        ({"alignment_heads": [(0, 9)]}, "no cross-attention head"),
    ):
        with pytest.raises(WorkbenchError, match=words):
            mapped("bart", **options)
    with pytest.raises(WorkbenchError, match="no layer 7"):
        found.mean(7)
    with pytest.raises(WorkbenchError, match="no aggregate"):
        found.aggregate("L9")


def test_a_decoder_alone_has_no_cross_attention() -> None:
    with workbench.attach(make(family("gpt2"))) as wb, pytest.raises(WorkbenchError, match="no encoder-decoder"):
        cross_attention(wb, {"input_ids": torch.tensor([[3, 4]])})
