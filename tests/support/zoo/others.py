"""Models of other libraries: PyTorch's own modules and TransformerLens."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from support.zoo.decoders import DECODERS
from support.zoo.family import ONE_TOWER, VOCABULARY, Family, ids
from support.zoo.twins import bridge_patterns, torch_modules


def _transformer() -> nn.Module:
    return nn.Transformer(
        d_model=32, nhead=4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=32, batch_first=True
    )


def _sequences() -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    return {"src": torch.randn(2, 17, 32, generator=make), "tgt": torch.randn(2, 9, 32, generator=make)}


def _bridge() -> nn.Module:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    with tempfile.TemporaryDirectory() as folder:  # the bridge loads the tokenizer again from where it came
        PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bridge: nn.Module = TransformerBridge.boot_transformers(
            "gpt2", hf_model=DECODERS[0].build(), tokenizer=tokenizer, device="cpu"
        )
    return bridge


def _tokens() -> dict[str, Any]:
    return {"input": ids(2, 17)}


OTHERS = [
    Family("torch-transformer", _transformer, _sequences,
           {"encoder self": ("encoder", "self"), "decoder self": ("decoder", "self"),
            "decoder cross": ("decoder", "cross")},
           truth=torch_modules, label="torch.nn.Transformer", note="native operators of the encoder"),
    Family("bridge-gpt2", _bridge, _tokens, ONE_TOWER, truth=bridge_patterns, label="TransformerBridge",
           note="TransformerLens keeps the wrapped model on eager attention"),
]  # fmt: skip
