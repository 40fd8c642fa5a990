"""RCMHA: the parts of its scores, its filters, its memory, and the forms that it contains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.kernels.relative import relative_attention
from workbench.mechanisms import Place

PLACE = Place(24, 4, 13)
torch.manual_seed(0)
X = torch.randn(2, 13, 24, dtype=torch.float64)
PARTS = ("content", "likes", "distance by content", "distance")


def _layer(**options: Any) -> Any:
    torch.manual_seed(1)
    layer = mechanisms.get("rcmha").build(PLACE, **options).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def _scores(layer: Any, q: Tensor, k: Tensor) -> Tensor:
    """Each score by itself."""
    found = q.new_full((*q.shape[:3], k.shape[2]), -torch.inf)
    before = k.shape[2] - q.shape[2]
    for i in range(q.shape[2]):
        for j in range(i + before + 1):
            back = i + before - j
            parts = (q[:, :, i] + layer.likes) * k[:, :, j] + q[:, :, i] * layer.table[:, back]
            found[:, :, i, j] = (parts.sum(-1) + layer.bias[:, back]) * layer.d_head**-0.5
    return found


@torch.no_grad()
def test_the_map_is_the_softmax_of_each_score_and_the_parts_add_up_to_it() -> None:
    layer = _layer()
    q, k, v = layer.heads(X)
    scores = _scores(layer, q, k)
    with workbench.attach(layer) as wb, wb.capture([]) as cap:
        y = layer(X)
    torch.testing.assert_close(cap[0].pattern.dense(), scores.softmax(-1))
    torch.testing.assert_close(y, layer.finish(scores.softmax(-1) @ v, v, X))
    parts = [cap[0].patterns[name].dense() for name in PARTS]
    seen = ~scores.isinf()
    torch.testing.assert_close(sum(parts)[seen], scores[seen])
    assert not any(part[~seen].any() for part in parts)
    likes = parts[1]
    torch.testing.assert_close(likes[:, :, -1:].expand_as(likes)[seen], likes[seen])  # the same for every query


@torch.no_grad()
def test_bare_it_is_relative_attention_and_barer_plain_attention() -> None:
    layer, bare = _layer(), _layer(taps=0)
    for each in layer.filters.values():
        each.weight.zero_()
        each.weight[:, 0, -1] = 1.0  # the token itself
        each.bias.zero_()
    bare.load_state_dict({name: t for name, t in layer.state_dict().items() if "filters" not in name})
    torch.testing.assert_close(layer(X), bare(X))
    for each in (bare.likes, bare.table, bare.bias):
        each.zero_()
    q, k, v = bare.heads(X)
    torch.testing.assert_close(bare(X), bare.finish(F.scaled_dot_product_attention(q, k, v, is_causal=True), v, X))


@torch.no_grad()
def test_distances_alone_make_lines_and_nothing_at_all_the_mean() -> None:
    layer = _layer()
    q, k, v = (torch.zeros_like(t) for t in layer.heads(X))
    tables = (layer.likes, layer.table, layer.bias)
    weights = relative_attention.pattern_of(q, k, v, *tables).dense().log()
    for back in range(1, 12):
        step = weights.diagonal(-back, 2, 3) - weights.diagonal(0, 2, 3)[..., back:]
        torch.testing.assert_close(step, step[..., :1].expand_as(step))
    even = relative_attention.pattern_of(q, k, v, *(torch.zeros_like(t) for t in tables)).dense()
    torch.testing.assert_close(even[0, 0], torch.ones(13, 13).double().tril() / torch.arange(1, 14)[:, None])


@torch.no_grad()
def test_a_memory_is_as_one_long_sequence_but_for_the_first_queries() -> None:
    layer = _layer()
    whole, part = layer(X), layer(X[:, 5:], X[:, :5])
    off = (whole[:, 5:] - part).abs().amax((0, 2))
    assert bool((off[:2] > 1e-6).all())  # their filters see no queries before them
    assert bool((off[2:] < 1e-12).all())
    torch.testing.assert_close(layer(X, X[:, :0]), whole)
    with workbench.attach(layer) as wb, wb.capture(["entropy"]) as cap:
        layer(X[:, 5:], X[:, :5])
    assert cap[0].pattern.shape == (2, 4, 8, 13)
    with pytest.raises(WorkbenchError, match="1 to 13 tokens"):
        layer(X, X[:, :1])


@torch.no_grad()
def test_the_map_on_values_before_the_filter() -> None:
    layer = _layer()
    q, k, v = layer.heads(X)
    weights = relative_attention.pattern_of(q, k, v, layer.likes, layer.table, layer.bias).dense()
    raw = layer.split(layer.v(X))
    on_tokens = layer.on_tokens(weights)
    found = torch.einsum("bhijc,bhjc->bhic", on_tokens, raw) + layer.filters["v"].bias
    torch.testing.assert_close(found, weights @ v)
    rows = on_tokens.sum(3) + weights[..., 0, None] * layer.filters["v"].weight[:, 0, :2].sum(1)
    rows += weights[..., 1, None] * layer.filters["v"].weight[:, 0, 0]  # the first two have fewer before them
    torch.testing.assert_close(rows, layer.filters["v"].weight.sum((1, 2)).expand_as(rows))
    assert layer.on_tokens(weights).shape == _layer(taps=0).on_tokens(weights).shape


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(WorkbenchError, match="taps=-1"):
        _layer(taps=-1)
    q, likes, table, bias = torch.ones(1, 2, 3, 4), torch.ones(2, 4), torch.ones(2, 3, 4), torch.ones(2, 3)
    for wrong, said in (
        ((likes[:1], table, bias), r"likes must be \[head, d\] = \[2, 4\]"),
        ((likes, table[:, :2], bias), "table must be .* 2 heads and 3 distances or more"),
        ((likes, table[..., :3], bias), "table must be"),
        ((likes, table, bias[:1]), "bias must be"),
    ):
        with pytest.raises(workbench.CaptureError, match=said):
            relative_attention(q, q, q, *wrong)
