"""Attention modules written out by hand in drawn ways: layout, letters, kernel, windows, shared keys, what follows."""

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
    "nothing",
)


@dataclass(frozen=True)
class Drawn:
    """One drawn module. `stated`: it says how many heads it has. `shared`: one head of keys and values for all.
    `rows`: how many queries each call of its kernel has; 0: all.
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
    stated: bool
    shared: bool
    causal: bool
    calls: int
    rows: int
    seed: int

    @classmethod
    def draw(cls, seed: int) -> Drawn:
        """The module of a seed."""
        pick = random.Random(seed)
        layout = pick.choice(list(LAYOUTS))
        shared = pick.random() < 0.2 and layout in ("b h n d", "h b n d")
        drawn = cls(
            layout=layout,
            kernel=pick.choice(["sdpa", "matmul", "bmm", "einsum", "einsum", "baddbmm scores"]),
            followed=pick.choice(FOLLOWED),
            letters="".join(pick.sample("abcdefghijklmnopqrstuvwxyz", 7)),
            batch=pick.choice([1, 2, 2, 3, 4]),
            windows=pick.choice([2, 3]) if LAYOUTS[layout] else 1,
            heads=pick.choice([1, 2, 3, 4]),
            length=pick.choice([5, 6, 7]),
            width=pick.choice([2, 4, 5]),
            stated=pick.random() < 0.6,
            shared=shared,
            causal=pick.random() < 0.3,
            calls=pick.choice([1, 1, 1, 2]),
            rows=pick.choice([0, 0, 2, 3]),
            seed=seed,
        )
        return drawn if layout == "b h n d" and not drawn.causal else replace(drawn, rows=0)


class Attention(nn.Module):
    """The drawn module; its input is [batch, window · position, feature]."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn = drawn
        self.inner = drawn.heads * drawn.width
        if drawn.stated:
            self.num_heads = drawn.heads
        kv = drawn.width if drawn.shared else self.inner
        self.q, self.k, self.v = nn.Linear(8, self.inner), nn.Linear(8, kv), nn.Linear(8, kv)
        self.o, self.gate, self.norm = nn.Linear(self.inner, 8), nn.Linear(8, self.inner), nn.LayerNorm(self.inner)
        self.matrix = nn.Parameter(torch.randn(drawn.heads, drawn.width, 8))

    def split(self, t: Tensor, heads: int) -> Tensor:
        """[batch, window, head, position, width]."""
        return rearrange(t, "b (w n) (h d) -> b w h n d", w=self.drawn.windows, h=heads)

    def by_hand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pattern [batch · window, head, query, key] and what the heads give, in float64."""
        heads = 1 if self.drawn.shared else self.drawn.heads
        q, k, v = self.split(self.q(x), self.drawn.heads), self.split(self.k(x), heads), self.split(self.v(x), heads)
        scores = q.double() @ k.double().transpose(-1, -2) / self.drawn.width**0.5
        if self.drawn.causal:
            n = self.drawn.length
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        weights = scores.softmax(-1)
        return weights.flatten(0, 1), weights @ v.double()

    def forward(self, x: Tensor) -> Tensor:
        drawn, to = self.drawn, self.drawn.layout
        into = f"b w h n d -> {to}" if drawn.windows > 1 else f"b 1 h n d -> {to}"
        q = rearrange(self.split(self.q(x), drawn.heads), into)
        kv = [self.k(x), self.v(x)]
        if drawn.shared:
            k, v = (t[:, None] if to.startswith("b") else t[None] for t in kv)
        else:
            k, v = (rearrange(self.split(t, drawn.heads), into) for t in kv)
        z = torch.cat([self.kernel(part, k, v) for part in q.split(drawn.rows or drawn.length, -2)], -2)
        sizes = {"b": drawn.batch, "h": drawn.heads}
        whole = f"{to} -> b w h n d" if drawn.windows > 1 else f"{to} -> b 1 h n d"
        z = rearrange(z, whole, **{name: n for name, n in sizes.items() if name in to})
        return self.follow(z, x)

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        drawn, n = self.drawn, self.drawn.length
        if drawn.kernel == "sdpa" and not drawn.shared:
            return F.scaled_dot_product_attention(q, k, v, is_causal=drawn.causal)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        if drawn.kernel == "einsum":
            return self.einsum(q, k, v, hidden)
        scores = q @ k.transpose(-1, -2) / drawn.width**0.5
        scores = scores.masked_fill(hidden, -torch.inf) if drawn.causal else scores
        weights = torch.softmax(scores, dim=-1)
        return torch.bmm(weights, v) if drawn.kernel == "bmm" and q.dim() == 3 else weights @ v

    def einsum(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """In drawn letters, the values without the axis that they share."""
        lead = self.drawn.letters[: q.dim() - 2]
        i, j, d = self.drawn.letters[-3:]
        own = lead
        if self.drawn.shared:
            axis = 1 if k.shape[1] == 1 and self.drawn.layout.startswith("b") else 0
            k, v, own = k.squeeze(axis), v.squeeze(axis), lead[1 - axis]
        scores = torch.einsum(f"{lead}{i}{d}, {own}{j}{d} -> {lead}{i}{j}", q, k) / self.drawn.width**0.5
        scores = scores.masked_fill(hidden, -torch.inf) if self.drawn.causal else scores
        return torch.einsum(f"{own}{j}{d},{lead}{i}{j}->{lead}{i}{d}", v, scores.softmax(-1))

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
        return z.mean(dim=(1, 2)).mean(-1, keepdim=True)


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
