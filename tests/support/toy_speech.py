"""Encoder-decoders small enough to reason about: frames of a spectrogram, one cross-attention head, two or more words.

States are frames of width `width`; the query of a decoder position is a row of a table; keys and values are the states
themselves. With the identity as spectrogram a head's scores are thus the table, whatever one writes into it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import Seq2SeqLMOutput

WORDS = 4


class EncoderAttn(nn.Module):
    """Cross-attention of one head without projections."""

    num_heads = 1

    def forward(self, queries: Tensor, states: Tensor) -> Tensor:
        q, k = queries[:, None], states[:, None]
        return F.scaled_dot_product_attention(q, k, k, scale=1.0)[:, 0]


class Encoder(nn.Module):
    """Any function of the spectrogram [batch, time, width]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, features: Tensor) -> Tensor:
        return self.function(features)


class ToySpeech(nn.Module):
    """P(word 0) grows with the sum of what is attended to: logits (gain · Σ z, 0, 0, 0).

    Attributes:
        table: [decoder position, width] queries.
        calls: forwards so far; `fail_at`: the forward that is interrupted by Ctrl-C.
    """

    def __init__(
        self, table: Tensor, gain: float = 5.0, encoder: Callable[[Tensor], Tensor] = lambda features: features
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            is_encoder_decoder=True, num_mel_bins=table.shape[1], decoder_start_token_id=1, eos_token_id=3,
            pad_token_id=3, model_type="toy",
        )  # fmt: skip
        self.encoder, self.encoder_attn = Encoder(encoder), EncoderAttn()
        self.table = nn.Parameter(table.clone(), requires_grad=False)
        self.gain = gain
        self.calls, self.fail_at = 0, -1

    def get_encoder(self) -> nn.Module:
        """The encoder."""
        return self.encoder

    def forward(
        self,
        input_features: Tensor | None = None,
        encoder_outputs: Any = None,
        decoder_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> Seq2SeqLMOutput:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        assert decoder_input_ids is not None
        states = self.encoder(input_features) if encoder_outputs is None else encoder_outputs[0]
        n = decoder_input_ids.shape[1]
        z = self.encoder_attn(self.table[:n].expand(len(states), -1, -1), states)
        first = self.gain * z.sum(-1, keepdim=True)
        logits = torch.cat([first, first.new_zeros(*first.shape[:2], WORDS - 1)], -1)
        return Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=states)


def identity_speech(frames: int, tokens: int, seed: int = 0, **options: Any) -> tuple[ToySpeech, dict[str, Tensor]]:
    """A model whose attention scores are random numbers, and the identity as its spectrogram [1, frames, frames]."""
    table = 2 * torch.randn(tokens, frames, generator=torch.Generator().manual_seed(seed))
    return ToySpeech(table, **options).eval(), {"input_features": torch.eye(frames)[None]}


def planted_speech(frames: int, at: int, tokens: int = 2, **options: Any) -> tuple[ToySpeech, dict[str, Tensor]]:
    """A model that looks at one frame only."""
    table = torch.zeros(tokens, frames)
    table[:, at] = 8.0
    return ToySpeech(table, **options).eval(), {"input_features": torch.eye(frames)[None]}
