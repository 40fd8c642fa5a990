"""Attention modules written out by hand in drawn ways: layout, letters, kernel, windows, shared keys, what follows.

Scores, masks, groups of heads, the values' width and dropout are drawn too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

LAYOUTS = {  # of queries, keys, values and what the kernel gives; n stands for queries or keys
    "b h n d": "",
    "h b n d": "",
    "(b h) n d": "",
    "(h b) n d": "",
    "(b w) h n d": "windows",
    "(b w h) n d": "windows",
    "(w b) h n d": "windows",
    "b w h n d": "windows",
    "b h w n d": "windows",
    "h (b w) n d": "windows",
}
FOLLOWED = (
    "linear",
    "function",
    "matrix",
    "einsum",
    "sequence first",
    "flat",
    "merged",
    "gate",
    "norm",
    "half",
    "untransposed",
    "nothing",
)


@dataclass(frozen=True)
class Drawn:
    """One drawn module. `stated`: it says how many heads it has. `shared`: one head of keys and values for all.
    `groups`: heads of queries to each of keys and values, which are repeated. `values`: their width. `dropout`: behind
    the softmax, which in eval mode does nothing. `rows`: how many queries each call of its kernel has; 0: all.
    """

    layout: str
    kernel: str
    followed: str
    letters: str
    batch: int
    windows: int
    heads: int
    length: int
    width: int
    values: int
    stated: bool
    shared: bool
    groups: int
    repeat: str
    mask: str
    scores: str
    dropout: bool
    calls: int
    rows: int
    seed: int

    @classmethod
    def draw(cls, seed: int) -> Drawn:
        """The module of a seed."""
        pick = random.Random(seed)
        layout = pick.choice(list(LAYOUTS))
        shared = pick.random() < 0.2 and layout in ("b h n d", "h b n d")
        heads, width = pick.choice([1, 2, 3, 4, 6]), pick.choice([2, 4, 5])
        drawn = cls(
            layout=layout,
            kernel=pick.choice(["sdpa", "matmul", "bmm", "einsum", "einsum", "baddbmm scores"]),
            followed=pick.choice(FOLLOWED),
            letters="".join(pick.sample("abcdefghijklmnopqrstuvwxyz", 7)),
            batch=pick.choice([1, 2, 2, 3, 4]),
            windows=pick.choice([2, 3]) if LAYOUTS[layout] else 1,
            heads=heads,
            length=pick.choice([5, 6, 7]),
            width=width,
            values=pick.choice([width, width, 3]),
            stated=pick.random() < 0.6,
            shared=shared,
            groups=pick.choice([1, 1, 2, 3]) if heads == 6 and not shared else 1,
            repeat=pick.choice(["repeat", "expand"]),
            mask=pick.choice(["", "", "causal", "padding", "bias"]),
            scores=pick.choice(["plain", "plain", "folded", "cosine"]),
            dropout=pick.random() < 0.3,
            calls=pick.choice([1, 1, 1, 2]),
            rows=pick.choice([0, 2, 3]),
            seed=seed,
        )
        return drawn if layout == "b h n d" and not drawn.mask else replace(drawn, rows=0)


class Attention(nn.Module):
    """The drawn module; its input is [batch, window · position, feature]."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn = drawn
        self.inner = drawn.heads * drawn.values
        if drawn.stated:
            self.num_heads = drawn.heads
        self.n_kv = 1 if drawn.shared else drawn.heads // drawn.groups
        self.q, self.k = nn.Linear(8, drawn.heads * drawn.width), nn.Linear(8, self.n_kv * drawn.width)
        self.v = nn.Linear(8, self.n_kv * drawn.values)
        self.o, self.gate, self.norm = nn.Linear(self.inner, 8), nn.Linear(8, self.inner), nn.LayerNorm(self.inner)
        self.matrix = nn.Parameter(torch.randn(drawn.heads, drawn.values, 8))
        self.dropout = nn.Dropout(0.3 if drawn.dropout else 0.0)

    def split(self, t: Tensor, heads: int) -> Tensor:
        """[batch, window, head, position, width]."""
        return rearrange(t, "b (w n) (h d) -> b w h n d", w=self.drawn.windows, h=heads)

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return 4.0 if self.drawn.scores == "cosine" else self.drawn.width**-0.5

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as `split` gives them; of the latter two as many heads as there are."""
        q, k, v = (
            self.split(self.q(x), self.drawn.heads),
            self.split(self.k(x), self.n_kv),
            self.split(self.v(x), self.n_kv),
        )
        if self.drawn.scores == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return q, k, v

    def mask(self) -> Tensor | None:
        """[batch, window, head, query, key]: True where a query sees a key, or what is added to its score."""
        drawn, n = self.drawn, self.drawn.length
        shape = (drawn.batch, drawn.windows, drawn.heads, n, n)
        match drawn.mask:
            case "causal":
                return torch.ones(n, n, dtype=torch.bool).tril().expand(shape)
            case "padding":
                seen = torch.ones(shape, dtype=torch.bool)
                seen[0, ..., n - 2 :] = False
                return seen
            case "bias":
                return torch.randn(drawn.heads, n, n, generator=torch.Generator().manual_seed(drawn.seed)).expand(shape)
        return None

    def by_hand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pattern [batch · window, head, query, key] and what the heads give, in float64."""
        q, k, v = (t.double() for t in self.projected(x))
        k, v = (t.repeat_interleave(self.drawn.heads // self.n_kv, 2) for t in (k, v))
        weights = hidden(q @ k.transpose(-1, -2) * self.scale, self.mask()).softmax(-1)
        return weights.flatten(0, 1), weights @ v

    def forward(self, x: Tensor) -> Tensor:
        drawn, to = self.drawn, self.drawn.layout
        into = f"b w h n d -> {to}" if drawn.windows > 1 else f"b 1 h n d -> {to}"
        q, k, v = self.projected(x)
        if drawn.groups > 1 and drawn.repeat == "repeat":
            k, v = (t.repeat_interleave(drawn.groups, 2) for t in (k, v))
        elif drawn.groups > 1:
            k, v = (t[:, :, :, None].expand(-1, -1, -1, drawn.groups, -1, -1).flatten(2, 3) for t in (k, v))
        q, k, v = (rearrange(t, into) for t in (q, k, v))
        mask = self.mask()
        mask = None if mask is None else rearrange(mask, into)
        z = torch.cat([self.kernel(part, k, v, mask) for part in q.split(drawn.rows or drawn.length, -2)], -2)
        sizes = {"b": drawn.batch, "h": drawn.heads}
        whole = f"{to} -> b w h n d" if drawn.windows > 1 else f"{to} -> b 1 h n d"
        z = rearrange(z, whole, **{name: n for name, n in sizes.items() if name in to})
        return self.follow(z, x)

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        drawn, scale = self.drawn, self.scale
        if drawn.scores == "folded":
            q, scale = q * scale, 1.0
        if drawn.kernel == "sdpa" and not drawn.shared:
            if drawn.mask == "causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if drawn.kernel == "einsum":
            return self.einsum(q, k, v, mask, scale)
        weights = self.dropout(torch.softmax(hidden(q @ k.transpose(-1, -2) * scale, mask), dim=-1))
        return torch.bmm(weights, v) if drawn.kernel == "bmm" and q.dim() == 3 else weights @ v

    def einsum(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """In drawn letters, the values without the axis that they share."""
        lead = self.drawn.letters[: q.dim() - 2]
        i, j, d = self.drawn.letters[-3:]
        own = lead
        if self.drawn.shared:
            axis = 1 if k.shape[1] == 1 and self.drawn.layout.startswith("b") else 0
            k, v, own = k.squeeze(axis), v.squeeze(axis), lead[1 - axis]
        scores = hidden(torch.einsum(f"{lead}{i}{d}, {own}{j}{d} -> {lead}{i}{j}", q, k) * scale, mask)
        return torch.einsum(f"{own}{j}{d},{lead}{i}{j}->{lead}{i}{d}", v, self.dropout(scores.softmax(-1)))

    def follow(self, z: Tensor, x: Tensor) -> Tensor:
        """From [batch, window, head, position, width] to the module's output."""
        merged = rearrange(z, "b w h n d -> b (w n) (h d)")
        match self.drawn.followed:
            case "linear":
                return self.o(merged)
            case "function":
                return F.linear(merged, self.o.weight)
            case "matrix":
                return merged @ self.matrix.flatten(0, 1)
            case "einsum":
                return torch.einsum("bnhd,hdm->bnm", rearrange(z, "b w h n d -> b (w n) h d"), self.matrix)
            case "sequence first":
                return self.o(merged.transpose(0, 1)).transpose(0, 1)
            case "flat":
                return self.o(merged.flatten(0, 1)).unflatten(0, merged.shape[:2])
            case "merged":
                return merged
            case "gate":
                return self.o(merged * torch.sigmoid(self.gate(x)))
            case "norm":
                return self.o(self.norm(merged))
            case "half":
                return self.o(0.5 * merged)
            case "untransposed":
                return self.o(z.reshape(merged.shape))
        return z.mean(dim=(1, 2)).mean(-1, keepdim=True)


def hidden(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask on them."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


class Model(nn.Module):
    """The module between other layers, called as often as was drawn, each time on what it gave."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        torch.manual_seed(drawn.seed)
        self.first, self.attn, self.drawn = nn.Linear(8, 8), Attention(drawn), drawn
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x, self.seen = self.first(x), []
        for _ in range(self.drawn.calls):
            self.seen.append(x)
            y = self.attn(x)
            x = x + y if y.shape == x.shape else x * 0.5
        return x

    def inputs(self) -> Tensor:
        """Its input."""
        generator = torch.Generator().manual_seed(self.drawn.seed)
        return torch.randn(self.drawn.batch, self.drawn.windows * self.drawn.length, 8, generator=generator)
