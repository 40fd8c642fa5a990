"""Sites whose map comes from several calls: one map with positions as they are, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import workbench
from workbench import CaptureError, InterventionError

B, N, D, H = 2, 10, 24, 4
W = D // H
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def split(t: Tensor) -> Tensor:
    return t.unflatten(-1, (H, W)).transpose(1, 2)


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / W**0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(3, 2)], 2)


def queries_backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([written_out(part, k, v) for part in reversed(q.split(5, 2))][::-1], 2)


def causal_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(q.split(4, 2), k.split(4, 2), v.split(4, 2), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], 2)


def written_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(q.split(4, 2), k.split(4, 2), v.split(4, 2), strict=True)
    return torch.cat([written_out(*part) for part in parts], 2)


def window_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each block of four queries sees its own keys and up to three before, by a bias."""
    out = []
    for start in range(0, q.shape[2], 4):
        first, stop = max(0, start - 3), min(start + 4, q.shape[2])
        i, j = torch.arange(start, stop)[:, None], torch.arange(first, stop)[None]
        bias = torch.where((i >= j) & (i - j <= 3), -0.1 * (i - j), -torch.inf)
        out.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], attn_mask=bias
            )
        )
    return torch.cat(out, 2)


def by_hand(module: Blocked, x: Tensor, sees: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    q, k, _ = (split(t).double() for t in module.qkv(x).chunk(3, -1))
    i = torch.arange(x.shape[1])
    scores = q @ k.transpose(-1, -2) / W**0.5 + sees(i[:, None], i[None])
    return scores.softmax(-1)


def everything(i: Tensor, j: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def chunk(causal: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda i, j: torch.where((i // 4 == j // 4) & ((i >= j) | (not causal)), 0.0, -torch.inf).double()


def before(i: Tensor, j: Tensor) -> Tensor:
    return torch.where((i >= j) & (i - j <= 3), -0.1 * (i - j), -torch.inf).double()


class Blocked(nn.Module):
    """Attention in several calls, with positions second or first."""

    def __init__(self, attend: Attend, *, positions_first: bool = False) -> None:
        super().__init__()
        self.num_heads, self.attend, self.positions_first = H, attend, positions_first
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        merged = self.attend(*map(split, self.qkv(x).chunk(3, -1))).transpose(1, 2).flatten(2)
        return self.o(merged.transpose(0, 1)).transpose(0, 1) if self.positions_first else self.o(merged)


KINDS = [
    (queries, everything),
    (queries_backwards, everything),
    (causal_chunks, chunk(True)),
    (written_chunks, chunk(False)),
    (window_before, before),
]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("positions_first", [False, True])
@pytest.mark.parametrize(("attend", "sees"), KINDS, ids=[attend.__name__ for attend, _ in KINDS])
def test_blocks_make_one_map(attend: Attend, sees: Any, positions_first: bool, tmp_path: Path) -> None:
    module = Blocked(attend, positions_first=positions_first).eval()
    with workbench.attach(nn.Sequential(module), check=False) as wb:
        for n in (N, 17, 9):  # longer inputs have more blocks
            x = torch.randn(B, n, D)
            with wb.capture(("entropy", "received"), z=True) as cap:
                y = wb.model(x)
            want = by_hand(module, x, sees)
            assert torch.equal(y, module(x))
            assert [one.shape for one in cap] == [(B, H, n, n)]
            torch.testing.assert_close(cap[0].pattern.dense().double(), want, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(cap[0].received.double(), want.sum(2), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(cap[0].result().sum(2) + module.o.bias, y, atol=1e-5, rtol=1e-4)
        again = workbench.load_capture(cap.save(tmp_path / "run.safetensors", pattern=True))
        torch.testing.assert_close(again[0].pattern.dense(), cap[0].pattern.dense())
        found = wb.verify(x)
        assert found.ok, found.table
        assert found.complete
        assert cap.ledger == {"0": 1}


def test_a_block_is_never_edited_as_if_it_were_the_head() -> None:
    x = torch.randn(B, N, D)
    with workbench.attach(nn.Sequential(Blocked(queries)).eval(), check=False) as wb:
        for _ in range(2):  # before and after a capture
            with pytest.raises(InterventionError, match="rows come from 4 calls; a part of a head"), wb.ablate((0, 1)):
                wb.model(x)
            with wb.capture() as cap:
                wb.model(x)
            assert cap[0].shape == (B, H, N, N)


def test_gradients_of_blocks_are_refused() -> None:
    x = torch.randn(B, N, D)
    with (
        workbench.attach(nn.Sequential(Blocked(queries)).eval(), check=False) as wb,
        torch.enable_grad(),
        pytest.raises(CaptureError, match="comes from 4 calls"),
        wb.capture(gradients=True),
    ):
        wb.model(x).sum().backward()


def test_where_keys_lie_must_be_shown() -> None:
    def of_other_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return written_chunks(q, k, v * 2)  # no linear function gave these

    with workbench.attach(nn.Sequential(Blocked(of_other_values)).eval(), check=False) as wb:
        with pytest.raises(CaptureError, match="cannot be shown where their keys lie"), wb.capture():
            wb.model(torch.randn(B, N, D))
        assert [one.name for one in wb.sites.unread] == ["0"]


def test_an_input_of_one_block_does_not_hide_the_blocks_of_a_longer_one() -> None:
    module = Blocked(written_chunks).eval()
    with workbench.attach(nn.Sequential(module), check=False) as wb:
        with wb.capture([]) as cap:
            wb.model(torch.randn(B, 4, D))
        assert cap[0].shape == (B, H, 4, 4)
        x = torch.randn(B, 12, D)
        with pytest.raises(CaptureError, match="16 of 24 rows"), wb.capture([]):
            wb.model(x)  # the first block had been taken for all that there is
        with wb.capture([]) as cap:
            wb.model(x)
        want = by_hand(module, x, chunk(False))
        torch.testing.assert_close(cap[0].pattern.dense().double(), want, atol=1e-5, rtol=1e-4)


class Averaged(Blocked):
    """What its heads give enters no linear function, so that only sizes place its calls."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        return self.attend(q, k, v * 2).mean(1)


def grouped_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, ::2], v[:, ::2]
    return torch.cat([F.scaled_dot_product_attention(part, k, v, enable_gqa=True) for part in q.split(3, 2)], 2)


@pytest.mark.parametrize("attend", [queries, grouped_queries])
@pytest.mark.parametrize("short", [0, 1, 4])
def test_blocks_that_nothing_places_are_refused_also_after_inputs_of_one_block(attend: Attend, short: int) -> None:
    with workbench.attach(nn.Sequential(Averaged(attend)).eval(), check=False) as wb:
        for _ in range(short):
            with wb.capture([]) as cap:
                wb.model(torch.randn(B, 3, D))
            assert [one.shape for one in cap] == [(B, H, 3, 3)]
        for _ in range(3):
            with pytest.raises(CaptureError, match=r"rows come from .* calls") as caught, wb.capture([]):
                wb.model(torch.randn(B, 6, D))  # two blocks, the first of which is known from the short inputs
            assert "layout=" in str(caught.value.hint)
        assert [one.name for one in wb.sites.unread] == ["0"]


@pytest.mark.parametrize("batch", [4, 3])
def test_a_gate_behind_as_many_heads_as_examples(batch: int) -> None:
    """Sizes cannot tell the two apart, the values' own projection can: heads are among its features."""

    class Gated(Blocked):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = map(split, self.qkv(x).chunk(3, -1))
            z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.o(z * torch.sigmoid(x))

    module, x = Gated(queries).eval(), torch.randn(batch, N, D)
    with workbench.attach(nn.Sequential(module)) as wb:
        with wb.capture([]) as cap:
            wb.model(x)
        want = by_hand(module, x, everything)
        torch.testing.assert_close(cap[0].pattern.dense().double(), want, atol=1e-5, rtol=1e-4)
        assert wb.verify(x).ok
