"""The model: atoms as tokens whose place is their distance from the centre, and a reader that asks in turns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks.readers import Mixing, ModuleRun, reader
from workbench.kernels.patterns import DensePattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Place, register
from workbench.mechanisms.s2snet.crystals import MASK

_CENTRES, _STEP, _WIDTH = 512, 0.01, 0.25  # ångström; squared for the last
_VOCABULARY = MASK + 1


class AtomAttention(nn.Module):
    """Softmax attention between atoms; padding is seen by none. Distances between atoms play no part."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place, d = place, place.d_model
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """[batch, atom, d_model] to the same shape.

        Args:
            real: [batch, atom], zero or false for padding; None for none.
        """
        place = self.place
        if x.dim() != 3 or not 1 <= x.shape[1] <= place.length or x.shape[2] != place.d_model:
            raise WorkbenchError(f"x must be [batch, 1 to {place.length} tokens, {place.d_model}]", shape=x.shape)
        if real is not None and real.shape != x.shape[:2]:
            raise WorkbenchError(f"real must be {list(x.shape[:2])}, [batch, atom]", shape=real.shape)
        q, k, v = (each(x).unflatten(-1, (place.n_heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        hidden = None if real is None else (real != 0)[:, None, None]
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
        y: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return y


class SetReader(nn.Module):
    """Set2Set: a recurrent cell asks, reads what its question finds among the atoms, and asks again with that.

    Args:
        d_model: of the atoms. turns: how often it asks.
    """

    def __init__(self, d_model: int, turns: int = 10) -> None:
        super().__init__()
        self.cell, self.turns = nn.LSTMCell(2 * d_model, d_model), turns

    def ask(self, h: Tensor, real: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [batch, turn, atom], and [last question, last answer] [batch, 2 · d_model].

        Args:
            h: [batch, atom, d_model]. real: [batch, atom] bool.
            read: [batch, turn, d_model], answers in the place of what the weights read of h.
        """
        q = cell = h.new_zeros(len(h), h.shape[2])
        told, weights = torch.cat((q, q), dim=-1), []
        for turn in range(self.turns):
            q, cell = self.cell(told, (q, cell))
            scores = (h @ q[..., None])[..., 0].masked_fill(~real, -torch.inf)
            weights.append(scores.softmax(-1))
            answer = (weights[-1][:, None] @ h)[:, 0] if read is None else read[:, turn]
            told = torch.cat((q, answer), dim=-1)
        return torch.stack(weights, dim=1), told

    def forward(self, h: Tensor, real: Tensor) -> Tensor:
        """[batch, 2 · d_model]."""
        return self.ask(h, real)[1]


@reader(SetReader, kind="cross")
def _asked(run: ModuleRun) -> Mixing:
    """The turns are the queries, and atoms are both keys and values."""
    module, h, real = run.module, run.inputs["h"], run.inputs["real"]
    assert isinstance(module, SetReader)
    pattern = DensePattern(module.ask(h, real)[0][:, None])
    pattern.values = values = h[:, None]
    return Mixing(pattern, values, lambda z: module.ask(h, real, z[:, 0].to(h.dtype))[1], kernel="set2set")


class S2SNet(nn.Module):
    """Whether a crystal follows the rule, from the numbers of its atoms and how far they stand from their centre.

    Args:
        place: of the attention; length is the most atoms. layers: of the encoder. turns: of the reader.

    >>> from workbench.mechanisms.s2snet import crystals
    >>> found = crystals(4)
    >>> S2SNet(Place(16, 2, 8, causal=False))(found.numbers, found.positions).shape
    torch.Size([4, 2])
    """

    def __init__(self, place: Place, layers: int = 2, turns: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        d = place.d_model
        self.place = place
        self.embed = nn.Embedding(_VOCABULARY, d, padding_idx=0)
        self.distance, self.first, self.drop = nn.Linear(_CENTRES, d), nn.LayerNorm(d), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(place) for _ in range(layers))
        self.last = nn.LayerNorm(d)
        self.read = SetReader(d, turns)
        self.head = nn.Sequential(nn.Linear(2 * d, 2 * d), nn.GELU(), nn.Linear(2 * d, 2))
        self.fill = nn.Linear(d, _VOCABULARY)

    @staticmethod
    def radii(numbers: Tensor, positions: Tensor) -> Tensor:
        """[crystal, atom] distances from the mean position of the atoms."""
        real = (numbers > 0)[..., None]
        centre = (positions * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return (positions - centre).norm(dim=-1)

    @staticmethod
    def shells(radii: Tensor) -> Tensor:
        """[crystal, atom, 512]: Gaussians around 0 to 5.11 Å; an atom much farther out is at no distance at all."""
        centres = torch.arange(_CENTRES, device=radii.device) * _STEP
        return (-(radii[..., None] - centres).square() / _WIDTH).exp()

    def atoms(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """[crystal, atom, d_model]: what the encoder is given."""
        if numbers.dim() != 2 or positions.shape != (*numbers.shape, 3):
            raise WorkbenchError(
                f"numbers are [crystal, atom], and positions [crystal, atom, 3], not {list(positions.shape)}",
                shape=numbers.shape,
            )
        bad = numbers[(numbers < 0) | (numbers >= _VOCABULARY)]
        if len(bad):
            raise WorkbenchError(f"{int(bad[0])} is no atomic number from 1 to {MASK - 1}", hint="0 is padding")
        if bool((numbers == 0).all(1).any()):
            raise WorkbenchError("a crystal has no atoms")
        where = F.gelu(self.distance(self.shells(self.radii(numbers, positions)).to(self.distance.weight.dtype)))
        return self.first(self.place.d_model**0.5 * self.embed(numbers) + self.drop(where))

    def encoded(self, atoms: Tensor, real: Tensor) -> Tensor:
        """[crystal, atom, d_model] after all blocks."""
        for block in self.blocks:
            atoms = block(atoms, real)
        made: Tensor = self.last(atoms)
        return made

    def filled(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """Logits [crystal, atom, number] of what atoms are, for those that are hidden."""
        made: Tensor = self.fill(self.encoded(self.atoms(numbers, positions), numbers > 0))
        return made

    def forward(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """Logits [crystal, 2] of numbers [crystal, atom] and positions [crystal, atom, 3]."""
        real = numbers > 0
        logits: Tensor = self.head(self.read(self.encoded(self.atoms(numbers, positions), real), real))
        return logits


class _Block(nn.Module):
    def __init__(self, place: Place) -> None:
        super().__init__()
        d = place.d_model
        self.norm1, self.attention = nn.LayerNorm(d), AtomAttention(place)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), real)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _inputs(place: Place) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    real = torch.ones(2, place.length)
    real[1, place.length * 2 // 3 :] = 0
    return {"x": torch.randn(2, place.length, place.d_model, generator=random), "real": real}


S2SNET = register(
    Mechanism(
        "s2snet",
        Card(
            title="S2SNet: attention over the atoms of a crystal",
            arxiv="2306.16270",
            equation="A = softmax(q kᵀ/√d) between atoms; h = LN(√d·Emb(Z) + gelu(W e(r))), r from the centre",
            map="A softmax that hides padding. It knows of geometry what distances from the centre tell, and nothing "
            "of pairs or of the lattice.",
            kind="self",
            grade="exact",
            cost="O(atoms²)",
            causal="never",
            code="zjuKeLiu/S2SNet has no licence: unused. Written from the equations.",
            claims=(
                Claim("It tells superconductors from structure that it was not trained on."),
                Claim("Filling in hidden atoms before makes it more accurate."),
            ),
        ),
        AtomAttention,
        places=(Place(24, 4, 9, causal=False), Place(16, 2, 15, causal=False)),
        inputs=_inputs,
    )
)
