"""RCMHA: queries, keys and values are smeared over three tokens, and scores know how far a key lies back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.patterns import Pattern
from workbench.kernels.relative import relative_attention
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, by_blocks, register

_BLOCK = 8  # tokens, in the signature
_FARTHEST = 64  # tokens back, likewise


class RelativeConvolutional(Mixer):
    """softmax(((q + u) kᵀ + q R_δ + β_δ) / √d) v, of queries, keys and values that a short filter has smeared.

    Positions are the distances alone: queries and keys are not turned.

    Args:
        place: a sequence.
        taps: tokens that the filters of each channel see, their own among them; heads share them. 0 for no filters.

    Raises:
        WorkbenchError: fewer taps than none.
    """

    def __init__(self, place: Place, taps: int = 3) -> None:
        super().__init__(place)
        if taps < 0:
            raise WorkbenchError(f"taps={taps}: filters see at least their own token", hint="1 or more, 0 for none")
        self.taps = taps
        d, wide = self.d_head, self.n_heads * self.d_head
        self.q, self.k = (nn.Linear(place.d_model, wide, bias=False) for _ in range(2))
        self.v = nn.Linear(place.d_model, wide)
        self.filters = nn.ModuleDict({name: nn.Conv1d(d, d, taps, groups=d) for name in "qkv"} if taps else {})
        self.likes = nn.Parameter(torch.zeros(self.n_heads, d))
        self.table = nn.Parameter(torch.zeros(self.n_heads, place.length, d))
        self.bias = nn.Parameter(torch.zeros(self.n_heads, place.length))

    def smeared(self, name: str, t: Tensor) -> Tensor:
        """[batch, head, token, d] of "q", "k" or "v", each channel a weighted sum of the token and those before."""
        if name not in self.filters:
            return t
        made: Tensor = self.filters[name](F.pad(t.flatten(0, 1).mT, (self.taps - 1, 0)))
        return made.mT.unflatten(0, t.shape[:2])

    def heads(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x; keys and values of the memory and x, where there is one. The filters pass from it to x."""
        whole = x if memory is None else torch.cat([memory, x], dim=1)
        made = (self.split(self.q(x)), self.split(self.k(whole)), self.split(self.v(whole)))
        q, k, v = (self.smeared(name, t) for name, t in zip("qkv", made, strict=True))
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """All four parts of the scores."""
        return relative_attention(q, k, v, self.likes, self.table, self.bias)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """[batch, token, d_model] to the same shape.

        Args:
            memory: inputs of this layer before x, [batch, token, d_model]; with x at most the place's length.
        """
        self.check(x if memory is None else torch.cat([memory, x], dim=1))
        q, k, v = self.heads(x, memory)
        return self.finish(self.mix(q, k, v, x), v, x)

    def on_tokens(self, weights: Tensor) -> Tensor:
        """[batch, head, query, key, channel]: a map [batch, head, query, key] as it acts on values before the filter.

        Σ_r A[i, j + r] w_r of each channel: a head that looks at the token before may look two or three back.
        """
        if "v" not in self.filters:
            return weights[..., None].expand(*weights.shape, self.d_head)
        taps, n = self.filters["v"].get_parameter("weight")[:, 0].flip(1), weights.shape[-1]  # [channel, lag]
        return sum(
            (F.pad(weights, (0, lag))[..., lag : lag + n, None] * taps[:, lag] for lag in range(taps.shape[1])),
            weights.new_zeros(()),
        )


def _parts(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """How large each part of the scores is, in blocks of tokens."""
    made = {name: by_blocks(part.dense()[0].abs(), _BLOCK) / _BLOCK for name, part in pattern.factors.items()}
    seen = by_blocks(pattern.dense()[0], _BLOCK).isnan()
    return {name: each.nan_to_num(0.0).masked_fill(seen, torch.nan) for name, each in made.items()}


def _by_distance(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """How large each part of the scores is at each distance, a mean over the queries that have a key there."""
    far = range(min(_FARTHEST, pattern.n_keys))
    sizes = {name: part.dense()[0].abs() for name, part in pattern.factors.items()}
    return {
        name: torch.stack([size.diagonal(-back, 1, 2).mean(1) for back in far], dim=1)[:, None]
        for name, size in sizes.items()
    }


RCMHA = register(
    Mechanism(
        "rcmha",
        Card(
            title="RCMHA: relative convolutional multi-head attention",
            arxiv="2308.03429",
            equation="A = softmax(((q + u) kᵀ + q R_δ + β_δ)/√d), δ = i − j; q, k and v smeared by filters of 3 taps",
            map="The softmax on smeared values; the four parts of its scores are its factors.",
            kind="self",
            grade="exact",
            cost="O(n²) time and memory, and a table of n·d_model",
            causal="always",
            beside="The filters. On values before them the map is another one for each channel: `on_tokens(A)`.",
            code="hermansh-id/rcmha names two licences, which contradict each other: unused.",
            claims=(
                Claim("It is more accurate than relative attention without filters."),
                Claim("It takes less memory than relative attention without filters."),
            ),
        ),
        RelativeConvolutional,
        variants={"relative": {"taps": 0}},
        signature=Signature(
            "The four parts of the scores",
            f"How large each part is, in blocks of {_BLOCK} tokens, before the softmax: what a query looks for, what "
            "a head likes of any key, distance as the query wants it, and distance alone.",
            _parts,
            rows="block of queries",
            columns="block of keys",
            value="size of the score",
        ),
        also=Signature(
            "The four parts by distance",
            "How large each part is where the key is so many tokens back, a mean over queries: distance alone is the "
            "learned curve β_δ, in size.",
            _by_distance,
            columns="tokens back",
            value="size of the score",
        ),
    )
)
