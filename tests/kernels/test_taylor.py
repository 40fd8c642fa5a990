"""The exponential cut off after the square: chunks against the definition, forward and backward."""

import pytest
import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.taylor import TaylorPattern, taylor_attention


def _qkv(n: int, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 4, n, 6), (2, kv_heads, n, 6), (2, kv_heads, n, 5))
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("n", [1, 17, 63, 64, 65, 150])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_the_series_is_its_definition_at_every_length(n: int, causal: bool) -> None:
    q, k, v = _qkv(n, kv_heads=2)
    x = q @ k.repeat_interleave(2, 1).mT / 6**0.5
    weights = 1 + x + x**2 / 2
    weights = weights.tril() if causal else weights
    weights = weights / weights.sum(-1, keepdim=True)
    pattern = TaylorPattern(q, k, causal=causal)
    torch.testing.assert_close(pattern.dense(), weights, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(
        taylor_attention(q, k, v, causal=causal), weights @ v.repeat_interleave(2, 1), atol=1e-12, rtol=1e-9
    )
    seen = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
    assert torch.equal(pattern.dense() > 0, seen.expand(2, 4, n, n))


@torch.no_grad()
def test_the_series_nears_softmax_with_the_third_power_and_is_even_without_queries() -> None:
    q, k, _ = _qkv(20)
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)

    def off(size: float) -> float:
        exact = (size * q @ k.mT / 6**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return float((TaylorPattern(size * q, k).dense() - exact).abs().max())

    errors = [off(size) for size in (0.04, 0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.3)
    even = TaylorPattern(0 * q, k).dense()
    torch.testing.assert_close(even[0, 0, -1], torch.full((20,), 0.05, dtype=torch.float64))


def test_gradients_of_chunks_are_those_of_the_definition() -> None:
    tensors = [t.requires_grad_() for t in _qkv(70)]
    q, k, v = tensors
    x = q @ k.mT / 6**0.5
    weights = (1 + x + x**2 / 2).tril()
    want = torch.autograd.grad((weights @ v / weights.sum(-1, keepdim=True)).square().sum(), tensors)
    for got, known in zip(torch.autograd.grad(taylor_attention(q, k, v).square().sum(), tensors), want, strict=True):
        torch.testing.assert_close(got, known, atol=1e-10, rtol=1e-8)


def test_lengths_that_differ_are_named() -> None:
    q, k, _ = _qkv(5)
    with pytest.raises(CaptureError, match="5 queries and 4 keys"):
        TaylorPattern(q, k[:, :, :4])
