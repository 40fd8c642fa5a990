"""Small models whose weights are given by a formula, and prompts, for figures that MIB's own code has printed.

It stands alone, because MIB's code runs with older libraries; see `analysis/circuits/mib_figures.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

VOCABULARY, LENGTH = 40, 7
BATCH, UNEVEN = 4, 5  # of 8 prompts
STEPS = 5
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def model() -> nn.Module:
    """Two layers of three heads; every parameter is a sine of its place."""
    made = GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=3, n_embd=24, n_inner=36, n_positions=16, vocab_size=VOCABULARY, bos_token_id=1,
            eos_token_id=2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    return _written(made)


def grouped_model() -> nn.Module:
    """Two layers of four query heads, two to a pair of keys and values; no position is embedded."""
    made = Qwen2ForCausalLM(
        Qwen2Config(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=24, intermediate_size=36,
            vocab_size=VOCABULARY, max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    return _written(made, 0.5)


def _written(made: nn.Module, scale: float = 0.35) -> nn.Module:
    made = made.double().eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(made.named_parameters())):
            place = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            size = scale if parameter.dim() > 1 else 0.15
            value = size * torch.sin(1.7 * number + 12.9898 * place + 0.01 * place**1.5)
            value = value + 1 if parameter.dim() == 1 and name.endswith("weight") else value
            parameter.copy_(value.float())  # TransformerLens takes weights in single precision
    return made


def chosen(sender: str, receiver: str) -> bool:
    """A circuit that no score has chosen: two edges of three. A receiver that heads share is their group's."""
    return (5 * sum(map(ord, sender)) + 7 * sum(map(ord, receiver))) % 3 != 0


def prompts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids [prompt, position] of 8 prompts and their twins, and the right and the wrong answer [prompt]."""
    row, column = torch.meshgrid(torch.arange(8), torch.arange(LENGTH), indexing="ij")
    ids = 3 + (7 * row + 11 * column + row * column) % (VOCABULARY - 3)
    twins = ids.clone()
    twins[:, 1] = 3 + (ids[:, 1] + 5) % (VOCABULARY - 3)
    twins[:, 5] = 3 + (ids[:, 5] + 9) % (VOCABULARY - 3)
    answers = 3 + (5 * torch.arange(8) + 1) % (VOCABULARY - 3)
    return ids, twins, answers, 3 + (answers + 2) % (VOCABULARY - 3)
