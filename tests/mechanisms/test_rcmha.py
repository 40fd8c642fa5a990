"""Relative positions against a table read entry by entry, and at their limits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench import WorkbenchError, mechanisms
from workbench.errors import CaptureError
from workbench.kernels.relative import RelativePattern, relative_attention
from workbench.mechanisms import Place

PLACE = Place(24, 4, 11)


def _tensors(queries: int = 7, keys: int = 10, reach: int = 12) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 3, queries, 5), (2, 3, keys, 5), (2, 3, keys, 6), (3, 5), (3, 2 * reach - 1, 5), (3, 2 * reach - 1))
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(7, 10), (10, 10), (1, 12)])
def test_scores_are_those_of_the_tables_entry_by_entry(causal: bool, queries: int, keys: int) -> None:
    q, k, v, u, table, bias = _tensors(queries, keys)
    want = torch.full((2, 3, queries, keys), -torch.inf, dtype=torch.float64)
    for i in range(queries):
        for j in range(keys):
            apart = j - (keys - queries) - i
            if apart <= 0 or not causal:
                at = apart + 11
                score = (q[:, :, i] + u) * k[:, :, j] + q[:, :, i] * table[:, at]
                want[:, :, i, j] = (score.sum(-1) + bias[:, at]) / 5**0.5
    weights = want.softmax(-1)
    pattern = RelativePattern(q, k, u, table, bias, causal=causal)
    torch.testing.assert_close(pattern.dense(), weights)
    torch.testing.assert_close(pattern.lse, want.logsumexp(-1))
    torch.testing.assert_close(relative_attention(q, k, v, u, table, bias, causal=causal), weights @ v)
    torch.testing.assert_close(pattern.tile(slice(0, 1), slice(3, 9), [2]), weights[:, 2:, :1, 3:9])
    parts = pattern.logits()
    assert list(parts) == ["content", "content bias", "position", "position bias"]
    seen = want.isfinite()
    torch.testing.assert_close(sum(parts.values())[seen], want[seen])


@torch.no_grad()
def test_without_tables_and_with_filters_of_one_it_is_plain_attention() -> None:
    torch.manual_seed(0)
    layer, x = mechanisms.get("rcmha").build(PLACE), torch.randn(2, 11, 24)
    for each in layer.filters:
        each.weight.zero_()
        each.weight[..., -1] = 1  # of the token itself
        each.bias.zero_()
    q, k, v = (layer.split(each(x)) for each in (layer.q, layer.k, layer.v))
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), layer.out(z.transpose(1, 2).flatten(2)))
    bare = mechanisms.get("rcmha").build(PLACE, "without convolution")
    bare.load_state_dict({name: t for name, t in layer.state_dict().items() if not name.startswith("filters")})
    torch.testing.assert_close(bare(x), layer(x))


@torch.no_grad()
def test_distances_alone_give_the_same_weights_everywhere() -> None:
    q, k, _, u, table, bias = _tensors(10, 10)
    pattern = RelativePattern(torch.zeros_like(q), torch.zeros_like(k), u, table, bias)
    scores = pattern.dense().log()
    for apart in range(-9, 0):
        line = (scores - scores.diagonal(dim1=-2, dim2=-1)[..., None]).diagonal(apart, -2, -1)
        torch.testing.assert_close(line, line[..., :1].expand_as(line))
    even = RelativePattern(torch.zeros_like(q), k, 0 * u, 0 * table, 0 * bias).dense()
    torch.testing.assert_close(even.diagonal(dim1=-2, dim2=-1)[0, 0], 1 / torch.arange(1.0, 11).double())


@torch.no_grad()
def test_filters_see_the_past_alone_and_are_shared_by_the_heads() -> None:
    torch.manual_seed(0)
    layer, x = mechanisms.get("rcmha").build(PLACE), torch.randn(1, 11, 24)
    later = x.clone()
    later[:, 6:] += 1
    for a, b in zip(layer.heads(x), layer.heads(later), strict=True):
        torch.testing.assert_close(a[:, :, :6], b[:, :, :6])
        assert not torch.allclose(a[:, :, 6], b[:, :, 6])
    assert [each.weight.shape for each in layer.filters] == [(6, 1, 3)] * 3


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(WorkbenchError, match="width=12 is not one of 0 to 11"):
        mechanisms.get("rcmha").build(PLACE, width=12)
    q, k, v, u, table, bias = _tensors()
    with pytest.raises(CaptureError, match="tables of 17 distances do not reach over 10 keys"):
        relative_attention(q, k, v, u, table[:, :17], bias[:, :17])
    with pytest.raises(CaptureError, match=r"content_bias must be \[head, d\] = \[3, 5\]"):
        relative_attention(q, k, v, u[:2], table, bias)
    with pytest.raises(CaptureError, match="3 heads of queries and 1 of keys"):
        relative_attention(q, k[:, :1], v[:, :1], u, table, bias)
