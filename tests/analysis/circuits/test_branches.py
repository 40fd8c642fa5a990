"""Patching by layer where the stream is no plain sum over heads: against hooks by hand, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.circuits import Words, random_task, tiny
from support.patched_by_hand import after, before, before_in_place, by_hand
from workbench.errors import AttachError, InterventionError
from workbench.inputs import decoder_start
from workbench.metrics import logit_diff

SMALL: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NARROW: dict[str, Any] = {
    **SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip
BUILT: dict[str, Callable[[], nn.Module]] = {
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**NARROW)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(n_layer=2, n_head=4, n_embd=32, rotary_dim=4, **SMALL)),
    "gpt1": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=60)),
}


def model_of(name: str) -> nn.Module:
    """Weights that matter to the logits, in float64."""
    if name not in BUILT:
        return tiny(name)
    torch.manual_seed(0)
    model = BUILT[name]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def points(model: nn.Module, name: str) -> dict[str, list[tuple[nn.Module, Any]]]:
    """For each activation the module and kind of hook of every block, by the names of the model's own code."""
    blocks: Any
    if name == "bart":
        found: dict[str, list[tuple[nn.Module, Any]]] = {}
        for tower in (model.model.encoder, model.model.decoder):
            for block in tower.layers:
                for what, module in (
                    ("attn_out", block.self_attn), ("cross_attn_out", getattr(block, "encoder_attn", None)),
                    ("mlp_out", block.fc2),
                ):  # fmt: skip
                    if module is not None:
                        found.setdefault(what, []).append((module, after))
        return found
    if name in ("gemma2", "olmo2"):
        blocks, attention, mlp = model.model.layers, "post_attention_layernorm", "post_feedforward_layernorm"
    elif name == "bloom":
        blocks, attention, mlp = model.transformer.h, "self_attention.dense", "mlp.dense_4h_to_h"
    else:
        blocks, attention, mlp = model.transformer.h, "attn", "mlp"
    reads = {"gemma2": "pre_feedforward_layernorm", "bloom": "post_attention_layernorm"}
    return {
        "resid_pre": [(block, before) for block in blocks],
        "resid_post": [(block, after) for block in blocks],
        "attn_out": [(block.get_submodule(attention), after) for block in blocks],
        "mlp_out": [(block.get_submodule(mlp), after) for block in blocks],
        **(
            {"resid_mid": [(getattr(block, reads[name]), before_in_place) for block in blocks]} if name in reads else {}
        ),
    }


NO_MIDDLE = {
    "gptj": "read the same stream, side by side", "bart": "goes through a norm in", "gpt1": "goes through a norm in",
}  # fmt: skip


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "bloom", "gptj", "gpt1", "bart"])
def test_it_is_what_hooks_by_hand_give(name: str) -> None:
    model, task = model_of(name), random_task(2, 5, 60, seed=3, written=name == "bart")
    start = decoder_start(model)
    clean, twin = (next(iter(task.batches(Words(), 2, twins=twins, start_token=start))) for twins in (False, True))
    how = {"return_dict": True} if name == "gpt1" else {"use_cache": False}  # which that has not
    with torch.no_grad():
        plain = logit_diff(model(**twin, **how), clean)
    moved = 0.0
    with workbench.attach(model, Words()) as wb:
        for activation, where in points(model, name).items():
            found = workbench.patch_layers(wb, task, activation, progress=False)
            of = [place.rpartition(" ")[0] for place in found.places]
            assert len(found.rows) == len(where)
            hand = by_hand(model, where, twin, clean, [of.count(stream) for stream in found.streams], **how)
            for row, stream in enumerate(found.streams):
                own = [j for j, other in enumerate(of) if other == stream]
                for column, j in enumerate(own):
                    effect = hand[row, column] - plain
                    assert torch.allclose(found.effects[row, j], effect, atol=1e-8), (activation, row, column)
                    moved = max(moved, float(effect.abs().max()))
        if name in NO_MIDDLE:
            with pytest.raises(InterventionError, match=NO_MIDDLE[name]):
                workbench.patch_layers(wb, task, "resid_mid", progress=False)
    assert moved > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_everything_is_one_and_nothing_is_zero(name: str) -> None:
    task = random_task(3, 6, 60, seed=1)
    with workbench.attach(model_of(name), Words()) as wb:
        for activation in ("resid_pre", "resid_mid", "resid_post"):
            whole = workbench.patch_layers(wb, task, activation, by_position=False, progress=False)
            assert torch.allclose(whole.scores, torch.ones(2, 1).double(), atol=1e-9)
            found = workbench.patch_layers(wb, task, activation, progress=False)
            assert bool((found.effects[:, 0] == 0).all())


class Bent(nn.Module):
    """A block whose attention is added after it was bent by no module."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = block.attn
        self.ln_1, self.mlp, self.ln_2 = block.ln_1, block.mlp, block.ln_2

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {name: value for name, value in kwargs.items() if name == "attention_mask"}
        x = x + self.inner(self.ln_1(x), **kwargs)[0].tanh()
        return x + self.mlp(self.ln_2(x))


def test_what_is_added_by_no_module_is_refused_and_the_stream_is_there() -> None:
    model = tiny("gpt2")
    model.transformer.h[1] = Bent(model.transformer.h[1])
    task = random_task(2, 5, 60)
    with workbench.attach(model, Words()) as wb:
        for activation in ("attn_out", "mlp_out", "resid_mid"):
            says = rf"no {activation}: the block transformer\.h\.1 adds something"
            with pytest.raises(InterventionError, match=says) as caught:
                workbench.patch_layers(wb, task, activation, progress=False)
            assert '"resid_pre"' in str(caught.value)
        found = workbench.patch_layers(wb, task, "resid_post", by_position=False, progress=False)
        assert torch.allclose(found.scores, torch.ones(2, 1).double(), atol=1e-9)
        with pytest.raises(AttachError, match=r"transformer\.h\.1"):
            workbench.patch_heads(wb, task, progress=False)
