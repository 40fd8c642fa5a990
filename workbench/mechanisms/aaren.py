"""Aaren: attention as a recurrent network, with one learned query for each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.kernels.patterns import Pattern
from workbench.kernels.scan import ScanState, scan_attention
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, at_places, register


class Aaren(Mixer):
    """Row t is attention of a learned query over tokens 0 to t: all rows by one scan, or token by token.

    The query is a parameter, projected as tokens are in other mixers; turning keys by their positions would make the
    weight of a key depend on where it stands alone, so it is left out.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.query = nn.Parameter(torch.randn(place.d_model) / place.d_model**0.5)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One query for all, [1, head, 1, d]; keys and values [batch, head, token, d]."""
        return self.learned(), self.split(self.k(x)), self.split(self.v(x))

    def learned(self) -> Tensor:
        """[1, head, 1, d]: the query of each head."""
        return self.split(self.q(self.query)[None, None])

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """All prefixes at once."""
        return scan_attention(q, k, v)

    def stream(self) -> ScanState:
        """A state of constant size, to be updated with the keys and values of one token after the other."""
        return ScanState(self.learned())


def last_row(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """The weights of the last token, which tell those of all rows where scores are the same in every one."""
    assert isinstance(module, Mixer)
    return {"last row": at_places(module.place, pattern.rows(pattern.n_queries - 1)[0, :, 0])}


AAREN = register(
    Mechanism(
        "aaren",
        Card(
            title="Attention as an RNN (Aaren)",
            arxiv="2405.13956",
            equation="A[t, j] = exp(s_j − Z_t), s_j = q·k_j/√d with one learned q, Z_t = log Σ_{j ≤ t} exp s_j",
            map="A causal softmax whose scores are the same in every row: two vectors say all of it.",
            kind="self",
            grade="exact",
            cost="O(n) time; O(1) memory token by token, width + 2 numbers a head",
            causal="always",
            code="No official code was found.",
            claims=(
                Claim("It is as good as a transformer of equal size on sequence tasks."),
                Claim("It takes a new token in constant memory and time, with about as many parameters."),
            ),
        ),
        Aaren,
        signature=Signature(
            "One score for each token",
            "The weights of the last token. Scores are the same in every row: any other row has these weights of its "
            "tokens, to a factor.",
            last_row,
        ),
    )
)
