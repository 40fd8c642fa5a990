"""The room of S2-Attention: shards that a user makes, dense heads, and the cache that it can drop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Place

S2 = mechanisms.get("s2")
PLACE = Place(32, 4, 100)


@torch.no_grad()
def test_heads_see_their_shards_and_dense_ones_everything() -> None:
    torch.manual_seed(0)
    layer = S2.build(PLACE, shards=[[0, 3], [], None, [1, 2, 4, 5]]).double().eval()
    x = torch.randn(2, 100, 32, dtype=torch.float64)
    with workbench.attach(layer) as wb:
        assert wb.verify(x=x).ok
        with wb.capture([]) as cap:
            layer(x)
    i, j = torch.arange(100)[:, None], torch.arange(100)
    near = i // 16 == j // 16
    sees = torch.stack(
        [near | torch.isin(j // 16, torch.tensor(shard)) for shard in ([0, 3], [], range(7), [1, 2, 4, 5])]
    )
    sees = sees & (j <= i)
    q, k, v = layer.heads(x)
    weights = (q @ k.mT * 8**-0.5).masked_fill(~sees, -torch.inf).softmax(-1)
    torch.testing.assert_close(cap[0].pattern.dense(), weights, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(layer.mix(q, k, v, x), weights @ v, atol=1e-12, rtol=1e-10)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 2]
    torch.testing.assert_close(layer.mix(q, k, v, x)[:, 2], dense, atol=1e-12, rtol=1e-10)


def test_the_cache_keeps_what_later_queries_may_see() -> None:
    layer = S2.build(PLACE, shards=[[0, 3], [], None, [1, 2, 4, 5]])
    assert layer.kept(100) == (36, 4, 100, 68)  # the last block has 4 tokens
    assert layer.kept(32) == (32, 16, 32, 16)
    strided = S2.build(Place(32, 4, 512))
    local, share = strided.layout["block"], 512 // 4
    assert all(share - local <= kept <= share + local for kept in strided.kept(512))
    assert S2.build(Place(32, 4, 512), "one dense head").kept(512)[-1] == 512


def test_shards_that_the_place_has_not_are_named() -> None:
    with pytest.raises(WorkbenchError, match="shard of head 1 names block 7, and 100 tokens have 0 to 6"):
        S2.build(PLACE, shards=[[0], [2, 7], [], None])
    with pytest.raises(WorkbenchError, match="one entry for each of 4 kv heads"):
        S2.build(PLACE, shards=[[0], [1]])
    with pytest.raises(WorkbenchError, match="vert_stride=3 is of verticals"):
        S2.build(PLACE, shards=[[0], [1], [], None], vert_stride=3)
    with pytest.raises(WorkbenchError, match='shards=5 of "s2" is not a list or None'):
        S2.build(PLACE, shards=5)
    with pytest.raises(WorkbenchError, match="n_dense_heads=5 is not one of 0 to 4"):
        S2.build(PLACE, n_dense_heads=5)
    with pytest.raises(WorkbenchError, match="length=101 is not one of 1 to 100"):
        S2.build(PLACE).kept(101)
