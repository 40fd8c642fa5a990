"""The reduced transformer: its forms are equal to what they collapse, and have as many parameters as they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Place
from workbench.mechanisms.reduced import Reduced, chain, collapse
from workbench.mechanisms.training import ByteLM

N, H = 24, 4
PLACE = Place(N, H, 13)
torch.manual_seed(0)
X = torch.randn(2, 13, N, dtype=torch.float64)


def _layer(variant: str | None = None, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    return mechanisms.get("reduced").build(PLACE, variant, **options).double().eval()


def _map(layer: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad(), workbench.attach(layer) as wb, wb.capture([]) as cap:
        layer(x)
    return cap[0].pattern.dense()


@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("variant", ["original", "shared"])
def test_collapsed_it_is_the_same_layer_with_the_same_maps(variant: str, heads: int) -> None:
    layer = _layer(variant, heads=heads)
    small = collapse(layer)
    with torch.no_grad():
        torch.testing.assert_close(small(X), layer(X), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(_map(small), _map(layer), atol=1e-10, rtol=1e-10)
    assert small.n_heads == heads


@torch.no_grad()
def test_layers_with_nothing_between_them_need_one_matrix_of_values() -> None:
    layers = [_layer("original", seed, heads=1) for seed in range(3)]
    small, last = chain(layers)
    x = y = X
    for layer, each in zip(layers, small, strict=True):
        torch.testing.assert_close(_map(each, y), _map(layer, x), atol=1e-9, rtol=1e-9)
        x, y = layer(x), each(y)
    torch.testing.assert_close(y @ last, x, atol=1e-10, rtol=1e-9)
    held = sum(p.numel() for each in small for p in each.parameters()) + last.numel()
    assert held == (len(layers) + 1) * N**2
    assert sum(p.numel() for each in layers for p in each.parameters()) == len(layers) * 4 * N**2
    with pytest.raises(WorkbenchError, match="4 heads add up"):
        chain([_layer("original")])


def test_parameters_are_those_of_the_laws() -> None:
    triangle = N * (N + 1) // 2
    laws = {
        "original": 4 * N**2, "shared": 3 * N**2, None: 2 * N**2, "symmetric": triangle + N**2,
        "positive": triangle + N**2, "minimal": N**2,
    }  # fmt: skip
    assert {variant: sum(p.numel() for p in _layer(variant).parameters()) for variant in laws} == laws
    assert set(laws) - {None} == set(mechanisms.get("reduced").variants)
    with_heads = Reduced(PLACE, "collapsed", "two", heads=H)
    assert sum(p.numel() for p in with_heads.parameters()) == H * N**2 + 2 * N**2  # more than the 2N² of W^Q and W^K


@torch.no_grad()
def test_without_values_every_output_lies_among_what_is_seen() -> None:
    layer = _layer("minimal")
    y = layer(X)
    seen = X.cummax(1).values, X.cummin(1).values
    assert bool((y <= seen[0] + 1e-12).all())
    assert bool((y >= seen[1] - 1e-12).all())
    still = X[:, :1].expand_as(X)
    torch.testing.assert_close(layer(still), still)


@torch.no_grad()
def test_symmetric_similarity_is_its_own_transpose_and_positive_is_never_below_zero() -> None:
    for variant in ("shared", "symmetric", "positive"):
        layer = _layer(variant)
        q, k, _ = layer.heads(X)
        scores = q @ k.mT
        torch.testing.assert_close(scores, scores.mT)
        torch.testing.assert_close(layer.matrices()[0], layer.matrices()[0].mT)
        lowest = float(scores.diagonal(dim1=2, dim2=3).min())
        assert lowest >= 0 or variant == "symmetric"
    q, k, _ = _layer("symmetric").heads(X)
    assert bool((q @ k.mT).diagonal(dim1=2, dim2=3).lt(0).any())
    q, k, _ = _layer().heads(X)
    assert not torch.allclose(q @ k.mT, (q @ k.mT).mT)


def test_a_model_of_them_needs_no_mlp() -> None:
    with_mlp, without = (ByteLM(PLACE, ["reduced:minimal"] * 2, hidden=hidden) for hidden in (3 * N, 0))
    names = [name for name, _ in without.named_parameters()]
    assert not [name for name in names if "up" in name or "down" in name or "norm2" in name]
    more = sum(p.numel() for p in with_mlp.parameters()) - sum(p.numel() for p in without.parameters())
    assert more == 2 * (2 * 3 * N * N + N)
    assert without(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 128)


def test_forms_that_cannot_be_are_named() -> None:
    with pytest.raises(WorkbenchError, match='similarity="three" is not known'):
        _layer(similarity="three")
    with pytest.raises(WorkbenchError, match='values="one" is not known'):
        _layer(values="one")
    with pytest.raises(WorkbenchError, match="5 heads do not divide"):
        _layer(heads=5)
    with pytest.raises(WorkbenchError, match="2 heads would each give all of x"):
        _layer("minimal", heads=2)
