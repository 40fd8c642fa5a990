"""Where queries stand among keys: shown, or positions are not compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import workbench
from workbench import CaptureError

B, N, D, H = 2, 7, 16, 2
POSITIONAL = ("distance", "current", "previous")


def split(t: Tensor) -> Tensor:
    return t.unflatten(-1, (H, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Attention of some positions on others, with a cache and learned keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.learned = nn.Parameter(torch.randn(2, 1, H, 3, D // H))
        self.cached: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, how: str = "plain") -> Tensor:
        asking = {"class token": x[:, :1], "one in two": x[:, ::2]}.get(how, x)
        read = x.flip(1) if how == "turned" else x
        q, k, v = split(self.q(asking)), split(self.k(read)), split(self.v(read))
        mask = None
        if how in ("first", "last"):
            parts = zip(self.learned.expand(-1, B, -1, -1, -1), (k, v), strict=True)
            k, v = (torch.cat([own, t] if how == "first" else [t, own], 2) for own, t in parts)
        if how == "cache":
            if self.cached is not None:
                k, v = (torch.cat([old, new], 2) for old, new in zip(self.cached, (k, v), strict=True))
            self.cached = k, v
        if how.startswith("room"):
            start = int(how.removeprefix("room"))
            kept = (torch.zeros(B, H, 9, D // H),) * 2 if self.cached is None else self.cached
            self.cached = k, v = tuple(
                torch.cat([old[:, :, :start], new, old[:, :, start + new.shape[2] :]], 2)
                for old, new in zip(kept, (k, v), strict=True)
            )
            mask = torch.arange(9) <= start + torch.arange(q.shape[2])[:, None]
        if how == "turned after":
            k, v = k.flip(2), v.flip(2)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(z.transpose(1, 2).flatten(2))


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(B, N, D)


def by_hand(weights: Tensor, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """Of weights [batch, head, query, key] of queries and keys at these positions."""
    apart = queries[:, None] - keys
    found = {"distance": apart.abs(), "current": apart == 0, "previous": apart == 1}
    return {name: (weights.double() * factor).sum(-1) for name, factor in found.items()}


def check(cap: Any, queries: Tensor, keys: Tensor) -> None:
    for name, wanted in by_hand(cap[0].pattern.dense(), queries, keys).items():
        got = getattr(cap[0], name).double()
        real = ~got.isnan()  # the first position has none before it
        assert torch.allclose(got[real], wanted[real], atol=1e-5), name


@pytest.mark.parametrize("how", ["class token", "one in two", "last", "turned", "turned after"])
def test_what_nothing_shows_is_not_compared(x: Tensor, how: str) -> None:
    with workbench.attach(Attention()) as wb, torch.no_grad(), wb.capture(["entropy", *POSITIONAL]) as cap:
        wb.model(x, how)
    assert cap[0].site.kind == "halo"
    assert cap[0].entropy.isfinite().all()
    for name in POSITIONAL:
        with pytest.raises(CaptureError, match="compares positions"):
            getattr(cap[0], name)


def test_learned_keys_before_the_first_position(x: Tensor) -> None:
    with workbench.attach(Attention()) as wb, torch.no_grad(), wb.capture(POSITIONAL) as cap:
        wb.model(x, "first")
    check(cap, torch.arange(N), torch.arange(N + 3) - 3)


@pytest.mark.parametrize("begins", ["before", "after"])
def test_a_cache_that_grows(x: Tensor, begins: str) -> None:
    with workbench.attach(Attention()) as wb, torch.no_grad():
        for part in (x[:, :4], x[:, 4:]) if begins == "after" else ():
            wb.model(part, "cache")
        for n in (4, 1, 2):
            with wb.capture(POSITIONAL) as cap:
                wb.model(x[:, :n], "cache")
            n_keys = cap[0].shape[-1]
            assert cap[0].site.kind == "self"
            check(cap, torch.arange(n) + n_keys - n, torch.arange(n_keys))


def test_a_cache_with_room_left(x: Tensor) -> None:
    with workbench.attach(Attention()) as wb, torch.no_grad():
        for start, n in ((0, 4), (4, 1), (5, 2)):
            with wb.capture(POSITIONAL) as cap:
                wb.model(x[:, :n], f"room{start}")
            check(cap, torch.arange(n) + start, torch.arange(9))


def test_a_look_tells_of_another_order(x: Tensor) -> None:
    with workbench.attach(Attention()) as wb, torch.no_grad():
        assert [site.kind for site in wb.look(x)] == ["self"]
        assert [site.kind for site in wb.look(x, "turned")] == ["halo"]


def test_a_look_at_inputs_that_are_all_alike() -> None:
    with workbench.attach(Attention()) as wb, torch.no_grad():
        for x in (torch.ones(B, N, D), torch.zeros(B, N, D)):
            assert [site.kind for site in wb.look(x)] == ["self"]


@torch.no_grad()
def test_rows_that_are_alike_stand_where_they_are() -> None:
    with workbench.attach(Attention()) as wb, wb.capture(POSITIONAL) as cap:
        wb.model(torch.randn(B, 1, D).expand(B, N, D).contiguous())
    check(cap, torch.arange(N), torch.arange(N))


def test_a_look_tells_of_another_sequence(x: Tensor) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.other = nn.MultiheadAttention(D, H, batch_first=True), nn.Linear(D, D)

        def forward(self, x: Tensor, other: bool) -> Tensor:
            read = self.other(x) if other else x + 0
            return self.attn(x, read, read, need_weights=False)[0]

    for other, kind in ((False, "self"), (True, "cross")):
        with workbench.attach(Two().eval()) as wb:
            assert [site.kind for site in wb.look(x, other)] == [kind]


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_torch_appends(x: Tensor, option: str) -> None:
    attention = nn.MultiheadAttention(D, H, batch_first=True, **{option: True}).eval()
    with workbench.attach(attention) as wb, wb.capture(["entropy", "current"]) as cap:
        attention(x, x, x)
    assert cap[0].shape == (B, H, N, N + 1)
    assert not cap[0].site.has("current")


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of keys and values, the query heads merged with the positions."""
    z = F.scaled_dot_product_attention(q.transpose(1, 2).flatten(1, 2), k[:, 0], v[:, 0])
    return z.unflatten(1, (-1, 4)).transpose(1, 2)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of keys and values, with two query heads of each along the positions."""
    rows = q.unflatten(1, (2, 2)).transpose(2, 3).flatten(2, 3)
    z = F.scaled_dot_product_attention(rows, k, v)
    return z.unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)


def stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `grouped`, written out, one head after the other."""
    weights = (q.reshape(B, 2, -1, 4) @ k.transpose(-1, -2) / 2).softmax(-1)
    return (weights @ v).reshape(q.shape)


@pytest.mark.parametrize(("attend", "kv_heads"), [(shared, 1), (grouped, 2), (stacked, 2)])
def test_heads_that_are_merged_with_the_positions(x: Tensor, attend: Attend, kv_heads: int) -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.o = nn.Linear(D, D), nn.Linear(D, 2 * kv_heads * 4), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
            k, v = (t.unflatten(-1, (kv_heads, 4)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
            self.by_hand = (q.double() @ k.repeat_interleave(4 // kv_heads, 1).double().transpose(-1, -2) / 2).softmax(
                -1
            )
            return self.o(attend(q, k, v).transpose(1, 2).flatten(2))

    model = nn.Sequential(Merged())
    with workbench.attach(model) as wb, torch.no_grad():
        if attend is shared:
            with pytest.raises(CaptureError, match="run a longer input"), wb.capture():
                model(x[:, :1])
        with wb.capture(["distance"]) as cap:
            model(x)
        assert torch.allclose(cap[0].pattern.dense().double(), model[0].by_hand, atol=1e-6)
        wanted = by_hand(model[0].by_hand, torch.arange(N), torch.arange(N))["distance"]
        assert torch.allclose(cap[0].distance.double(), wanted, atol=1e-5)
