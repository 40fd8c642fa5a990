"""Sparse query attention against multi-head attention with heads taken away."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Place

PLACE = Place(32, 8, 12)
SQA = mechanisms.get("sqa")


def _heads(variant: str) -> tuple[int, int]:
    layer = SQA.build(PLACE, variant)
    return layer.n_heads, layer.n_kv_heads


def test_variants_have_the_paper_s_heads() -> None:
    found = {name: _heads(name) for name in SQA.variants}
    assert found == {
        "mha": (8, 8), "gqa": (8, 2), "mqa": (8, 1), "sqa": (4, 2), "ssqa": (4, 4), "xsqa": (2, 2), "xsmqa": (2, 1),
    }  # fmt: skip


@torch.no_grad()
def test_all_heads_are_multi_head_attention() -> None:
    torch.manual_seed(0)
    layer, judge = SQA.build(PLACE, "mha"), torch.nn.MultiheadAttention(32, 8, batch_first=True)
    judge.in_proj_weight.copy_(torch.cat([each.weight for each in (layer.q, layer.k, layer.v)]))
    judge.in_proj_bias.copy_(torch.cat([each.bias for each in (layer.q, layer.k, layer.v)]))
    judge.out_proj.weight.copy_(layer.out.weight)
    judge.out_proj.bias.zero_()
    x = torch.randn(2, 12, 32)
    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(x), judge(x, x, x, attn_mask=hidden)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fewer_heads_are_attention_whose_other_heads_are_not_projected() -> None:
    torch.manual_seed(0)
    sparse, full = SQA.build(PLACE, "ssqa"), SQA.build(PLACE, "mha")
    x = torch.randn(2, 12, 32)
    for name in "qkv":
        kept, whole = getattr(sparse, name), getattr(full, name)
        kept.weight.copy_(whole.weight[:16])
        kept.bias.copy_(whole.bias[:16])
    sparse.out.weight.copy_(full.out.weight[:, :16])
    full.out.weight[:, 16:] = 0
    torch.testing.assert_close(sparse(x), full(x))


@pytest.mark.parametrize(("variant", "share"), [("sqa", 2), ("gqa", 4), ("mqa", 8)])
@torch.no_grad()
def test_neighbouring_queries_share_keys(variant: str, share: int) -> None:
    torch.manual_seed(0)
    layer = SQA.build(PLACE, variant)
    q, k, v = layer.heads(torch.randn(2, 12, 32))
    z = layer.mix(q, k, v, q)
    for head in range(layer.n_heads):
        one = F.scaled_dot_product_attention(q[:, head], k[:, head // share], v[:, head // share], is_causal=True)
        torch.testing.assert_close(z[:, head], one)


def test_scores_and_values_cost_the_share_of_query_heads() -> None:
    def count(variant: str) -> int:
        layer = SQA.build(Place(32, 8, 12, causal=False), variant)
        q, k, v = layer.heads(torch.randn(1, 12, 32))
        k, v = (t.repeat_interleave(layer.n_heads // layer.n_kv_heads, dim=1) for t in (k, v))
        with FlopCounterMode(display=False) as counter:
            (q @ k.mT).softmax(-1) @ v
        return counter.get_total_flops()

    for variant in SQA.variants:
        layer = SQA.build(PLACE, variant)
        assert count(variant) / count("mha") == layer.cost_share() == layer.n_heads / 8


def test_shares_that_are_none_are_named() -> None:
    with pytest.raises(WorkbenchError, match=r"heads=0 is no share of the 8 heads"):
        SQA.build(PLACE, heads=0)
    with pytest.raises(WorkbenchError, match=r"kv_heads=1.5 is no share"):
        SQA.build(PLACE, kv_heads=1.5)
    with pytest.raises(WorkbenchError, match=r"kv_heads=0\.375 of 8 heads are 3, which do not divide 4 query heads"):
        SQA.build(PLACE, kv_heads=3 / 8)
