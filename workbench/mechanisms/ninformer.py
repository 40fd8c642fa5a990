"""NiNformer: a gate that an MLP-Mixer block makes, in the place of attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from workbench.hooks.readers import reader
from workbench.hooks.readers.gates import through_token_mlp
from workbench.kernels.checks import check_range
from workbench.kernels.gates import AdditivePattern
from workbench.mechanisms.frame import Card, Claim, Gate, Mechanism, Place, read_gate, register


class TokenMixing(nn.Module):
    """(W₂ gelu(W₁ zᵀ + b₁) + b₂)ᵀ: an MLP over the tokens of each channel, z [batch, token, channel]."""

    def __init__(self, length: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(length, hidden), nn.Linear(hidden, length)

    def forward(self, z: Tensor) -> Tensor:
        """[batch, token, channel] to the same shape."""
        mixed: Tensor = self.second(F.gelu(self.first(z.transpose(1, 2))))
        return mixed.transpose(1, 2)


class MixerGate(Gate):
    """(W_u x + b_u) · g(x), g an MLP-Mixer block: tokens are mixed in the factor alone, which is neither bounded nor
    positive.

    Args:
        place: tokens of a fixed number.
        hidden: width of both MLPs of the block; twice d_model if None, as in the paper's models.

    Raises:
        WorkbenchError: a width below 1.
    """

    exact_length = True  # its weights are as many as the tokens

    def __init__(self, place: Place, hidden: int | None = None) -> None:
        super().__init__(place)
        d = place.d_model
        hidden = 2 * d if hidden is None else hidden
        check_range("hidden", hidden, 1, None)
        self.value = nn.Linear(d, d)
        self.token_norm, self.token = nn.LayerNorm(d), TokenMixing(place.length, hidden)
        self.channel_norm = nn.LayerNorm(d)
        self.channel = nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d))

    def parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """W_u x + b_u, and the Mixer block of x."""
        mixed = source + self.token(self.token_norm(source))
        return self.value(x), mixed + self.channel(self.channel_norm(mixed))

    def source_map(self, x: Tensor, source: Tensor) -> AdditivePattern:
        """What token j adds to channel d of the token-mixed part at i, its GELU held fixed, beside the biases.

        The block goes on from there at each token alone.
        """
        return through_token_mlp(self.token_norm.forward(source), self.token.first, self.token.second)


reader(MixerGate, kind="gate", follows=("token",))(read_gate)

NINFORMER = register(
    Mechanism(
        "ninformer",
        Card(
            title="NiNformer: a network in network transformer with token mixing generated gating",
            arxiv="2403.02411",
            equation="y = (W_u x + b_u) · g, g = m + MLP(LN m), m = x + (W₂ gelu(W₁ LN(x)ᵀ))ᵀ",
            map="The gate g. The map “source” tells what each token adds to m, with the activation held fixed; the "
            "MLP over channels that follows mixes no tokens.",
            kind="gate",
            grade="exact",
            cost="O(n·hidden·d_model), with weights for n tokens",
            causal="never",
            code="Abdullah-88/NiNformer, BSD-3-Clause; its gating unit is read, and agrees.",
            claims=(
                Claim("It is better than ViT, MLP-Mixer and Local-ViT on small images."),
                Claim("The gate adapts to the input what MLP-Mixer mixes in the same way for all."),
            ),
        ),
        MixerGate,
        variants={"narrow": {"hidden": 5}},
    )
)
