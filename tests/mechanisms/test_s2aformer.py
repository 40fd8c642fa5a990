"""Strips against attention with and without fewer keys, their single order of the keys, and tokens behind squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Place
from workbench.mechanisms.s2aformer import HybridPerception, StripAttention

PLACE = Place(24, 4, 40, causal=False, grid=(4, 10))


def _layer(place: Place = PLACE, **options: Any) -> StripAttention:
    torch.manual_seed(0)
    made = mechanisms.get("s2aformer").build(place, **options).double().eval()
    assert isinstance(made, StripAttention)
    if made.norm is not None:
        with torch.no_grad():
            made.norm.running_mean.normal_(), made.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return made


def _random(batch: int = 2) -> Tensor:
    return torch.randn(batch, 40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_with_all_tokens_and_all_of_a_head_it_is_attention() -> None:
    layer, x = _layer(reduction=1, width=6), _random()
    plain = mechanisms.get("sqa").build(Place(24, 4, 40, causal=False), "mha").double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_with_fewer_keys_it_is_attention_over_a_smaller_image() -> None:
    layer, x = _layer(width=6), _random()
    assert layer.squares is not None
    assert layer.norm is not None
    less = layer.norm(layer.squares(x.mT.unflatten(2, (4, 10))).flatten(2)).mT
    assert less.shape == (2, 10, 24)
    q, k, v = (t.unflatten(-1, (4, 6)).transpose(1, 2) for t in (layer.q(x), layer.k(less), layer.v(less)))
    want = layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), want, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_all_queries_of_a_strip_sort_the_keys_alike() -> None:
    layer, x = _layer(), _random()
    layer.q.weight[2].zero_(), layer.q.bias[2].zero_()  # type: ignore[union-attr, operator]
    q, k, _ = layer.heads(x)
    assert torch.linalg.matrix_rank((q @ k.mT)[:, [0, 1, 3]]).eq(1).all()
    strip = layer.strip(x)
    with workbench.attach(layer) as wb, wb.capture(["entropy"]) as cap:
        layer(x)
    assert cap[0].site.kind == "pooled"
    weights = cap[0].pattern.dense()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 40, dtype=torch.float64))
    torch.testing.assert_close(weights[:, 2], torch.full((2, 40, 10), 0.1, dtype=torch.float64))
    ordered = weights.gather(-1, strip.order[:, :, None].expand(-1, -1, 40, -1))
    falls = ordered.diff(dim=-1)
    for head in (0, 1, 3):
        turned = strip.turned[:, head]
        assert 0 < int(turned.sum()) < turned.numel()
        assert bool((falls[:, head][~turned] <= 0).all())
        assert bool((falls[:, head][turned] >= 0).all())
        ratio = (weights[:, head, :, 0].log() - weights[:, head, :, 1].log()).abs()
        keys = (strip.keys[:, head, 0] - strip.keys[:, head, 1]).abs()
        torch.testing.assert_close(ratio, strip.sharpness[:, head] * keys[:, None], atol=1e-10, rtol=1e-8)
    with pytest.raises(WorkbenchError, match="do not lie on a line"):
        _layer(width=2).strip(x)


@torch.no_grad()
def test_an_even_image_is_seen_evenly() -> None:
    layer = _layer()
    with workbench.attach(layer) as wb, wb.capture([]) as cap:
        layer(_random()[:, :1].expand(-1, 40, -1))
    torch.testing.assert_close(cap[0].pattern.dense(), torch.full((2, 4, 40, 10), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"reduction": 1}], ids=["squares", "all tokens"])
@torch.no_grad()
def test_squares_are_followed_to_their_tokens(options: dict[str, Any]) -> None:
    layer, x = _layer(**options), _random()
    q, k, v = layer.heads(x)
    z = layer.mix(q, k, v, x)
    read = torch.stack([(layer.token_map(x, c) @ x[:, None, :, c, None])[..., 0] for c in range(24)], dim=-1)
    weight = layer.v.weight.unflatten(0, (4, 6))  # type: ignore[union-attr, operator]
    constant = layer.v(layer.reduced(torch.zeros_like(x))).unflatten(-1, (4, 6)).transpose(1, 2)[:, :, :1]
    torch.testing.assert_close(torch.einsum("bhic,hdc->bhid", read, weight) + constant, z, atol=1e-10, rtol=1e-10)
    if layer.squares is not None:
        layer.squares.weight.fill_(1 / 4)
        layer.norm.running_var.fill_(1 - layer.norm.eps)  # type: ignore[union-attr]
        even = layer.token_map(x, 5)
        torch.testing.assert_close(even.sum(-1), torch.ones(2, 4, 40, dtype=torch.float64))
        assert torch.equal(even[..., 0], even[..., 11])  # both of the first square


def test_products_are_counted() -> None:
    for reduction, width in ((1, 6), (2, 6), (2, 1)):
        layer, x = _layer(reduction=reduction, width=width), _random(1)
        with torch.no_grad():
            q, k, v = layer.heads(x)
            with FlopCounterMode(display=False) as counted:
                (q @ k.mT) @ v
        assert counted.get_total_flops() == 2 * StripAttention.products(PLACE, reduction, width)


@torch.no_grad()
def test_a_block_without_its_near_part_is_strips_and_an_mlp() -> None:
    torch.manual_seed(0)
    x = _random()
    block = HybridPerception(PLACE, local=False).double().eval()
    seen = block.strips(block.norm(x))
    torch.testing.assert_close(block(x), x + seen + block.mlp(x + seen))
    whole = HybridPerception(PLACE).double().eval()
    shares = whole.shares(x)
    assert all(share.shape == (2, 40) and bool((share > 0).all()) for share in shares)
    assert not block.shares(x).local.any()
    with workbench.attach(whole) as wb:
        report = wb.verify(x)
        assert report.ok, report.table
        assert [(site.name, site.kind) for site in wb.sites] == [("strips", "pooled")]


def test_options_that_it_cannot_take_are_named() -> None:
    with pytest.raises(WorkbenchError, match="squares of 4 do not divide a grid of 4 × 10"):
        _layer(reduction=4)
    with pytest.raises(WorkbenchError, match="width=7 is not one of 1 to 6"):
        _layer(width=7)
    with pytest.raises(WorkbenchError, match="reduction=5 is not one of 1 to 4"):
        _layer(reduction=5)
    with pytest.raises(WorkbenchError, match="channel=24 is not one of 0 to 23"):
        _layer().token_map(_random(), 24)
