"""Tiny random encoder-decoders of four kinds: speech, text (twice), and an image captioner; one example for each."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from support.tiny import VOCABULARY, family, make
from support.zoo.family import ids

HYPOTHESIS = torch.tensor([5, 6, 7, 2])
"""What is explained: three words and the end token."""
NAMES = ("whisper", "t5", "bart", "captioner")


def captioner() -> nn.Module:
    """A ViT encoder of 2 x 2 patches and a class token, and a GPT-2 decoder."""
    torch.manual_seed(0)
    encoder = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=16, patch_size=8
    )
    decoder = hf.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=VOCABULARY, n_positions=64, add_cross_attention=True,
        is_decoder=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2
    )
    model = hf.VisionEncoderDecoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def t5gemma() -> nn.Module:
    """An encoder and a decoder whose heads share keys, with RMS norms before and after everything."""
    torch.manual_seed(0)
    side = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
    }  # fmt: skip
    config = hf.T5GemmaConfig(encoder=dict(side), decoder=dict(side), vocab_size=40)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = hf.T5GemmaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def speech_to_text() -> nn.Module:
    """Convolutions that shorten the frames, and layer norms before attention and MLP."""
    torch.manual_seed(0)
    config = hf.Speech2TextConfig(
        vocab_size=VOCABULARY, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, d_model=32, input_feat_per_channel=8,
        conv_channels=16, max_source_positions=40, max_target_positions=20, init_std=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return hf.Speech2TextForConditionalGeneration(config).eval()


def encoder_decoder(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and one example without its output."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {
        "whisper": {"input_features": torch.randn(1, 8, 40, generator=generator)},
        "speech-to-text": {"input_features": torch.randn(1, 40, 8, generator=generator)},
        "captioner": {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)},
    }
    made = {"captioner": captioner, "t5gemma": t5gemma, "speech-to-text": speech_to_text}
    model = made[name]() if name in made else make(family(name))
    return model, inputs.get(name, {"input_ids": ids(1, 7, seed) % 40 if name == "t5gemma" else ids(1, 7, seed)})
