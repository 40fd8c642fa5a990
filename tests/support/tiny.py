"""Tiny random models of the families that the tests cover, from their configs alone; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 60


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _padded(ids: Tensor, side: str) -> Tensor:
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = 0
    else:
        mask[0, -4:] = 0
    return mask


@dataclass(frozen=True)
class Family:
    """A model with inputs for it, and where its eager twin returns attentions by kind and tower."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    outputs: dict[str, tuple[str, str]]  # field of the eager output -> (tower, kind)


def _decoder(length: int = 17) -> dict[str, Any]:
    return {"input_ids": _ids(2, length)}


def _padded_decoder(side: str) -> dict[str, Any]:
    ids = _ids(2, 17)
    return {"input_ids": ids, "attention_mask": _padded(ids, side)}


def _seq2seq() -> dict[str, Any]:
    ids = _ids(2, 17)
    return {"input_ids": ids, "attention_mask": _padded(ids, "right"), "decoder_input_ids": _ids(2, 9, seed=1)}


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER_DECODER = {
    "encoder_attentions": ("encoder", "self"),
    "decoder_attentions": ("decoder", "self"),
    "cross_attentions": ("decoder", "cross"),
}


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=VOCABULARY, n_positions=64, **SPECIAL)
    )


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, hidden_size=48, intermediate_size=32,
            vocab_size=VOCABULARY, **SPECIAL,
        )
    )  # fmt: skip


def _bert() -> nn.Module:
    return hf.BertModel(
        hf.BertConfig(
            num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=32, vocab_size=VOCABULARY,
        )
    )  # fmt: skip


def _vit() -> nn.Module:
    return hf.ViTModel(
        hf.ViTConfig(
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_size=32,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
    )


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            num_layers=2, num_heads=4, d_model=32, d_kv=8, d_ff=32, vocab_size=VOCABULARY, decoder_start_token_id=0,
        )
    )  # fmt: skip


def _bart() -> nn.Module:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            encoder_layers=2, decoder_layers=2, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=VOCABULARY, decoder_start_token_id=2, **SPECIAL,
        )
    )  # fmt: skip


def _whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            encoder_layers=2, decoder_layers=2, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=VOCABULARY, num_mel_bins=8, max_source_positions=20,
            decoder_start_token_id=3, **SPECIAL,
        )
    )  # fmt: skip


def _speech() -> dict[str, Any]:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": _ids(2, 9)}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


ONE_TOWER = {"attentions": ("", "self")}
FAMILIES = [
    Family("gpt2", _gpt2, _decoder, ONE_TOWER),
    Family("gpt2-right-padded", _gpt2, lambda: _padded_decoder("right"), ONE_TOWER),
    Family("gpt2-left-padded", _gpt2, lambda: _padded_decoder("left"), ONE_TOWER),
    Family("llama-gqa", _llama, _decoder, ONE_TOWER),
    Family("bert", _bert, lambda: _padded_decoder("right"), ONE_TOWER),
    Family("vit", _vit, _image, ONE_TOWER),
    Family("t5", _t5, _seq2seq, ENCODER_DECODER),
    Family("bart", _bart, _seq2seq, ENCODER_DECODER),
    Family("whisper", _whisper, _speech, ENCODER_DECODER),
]


def make(family: Family, seed: int = 0) -> nn.Module:
    """The family's model in evaluation mode; weights are larger than usual, so that attention is not uniform."""
    torch.manual_seed(seed)
    model = family.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name.lower():
                parameter.mul_(3.0)
    return model


def eager_twin(model: Any) -> Any:
    """The same weights on Hugging Face's eager attention; the config is copied, since twins would share it."""
    import copy

    twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    return twin


def eager_attentions(model: Any, site_names: list[str], inputs: dict[str, Any]) -> Any:
    """The eager twin's output with attentions, where each attention module sees what it sees in `model`.

    Without that, what is compared in the last layers of a trained model is how far two models have drifted apart in
    float32, not whether a pattern is right.
    """
    seen: dict[str, tuple[Tensor, Tensor | None]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[name] = hidden, kwargs.get("key_value_states")

        return hook

    def replay(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, keys = seen[name]
            if keys is not None:
                kwargs = {**kwargs, "key_value_states": keys}
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(record(n), with_kwargs=True) for n in site_names]
    model(**inputs)
    for handle in handles:
        handle.remove()
    twin = eager_twin(model)
    for name in site_names:
        twin.get_submodule(name).register_forward_pre_hook(replay(name), with_kwargs=True)
    return twin(**inputs, output_attentions=True)
