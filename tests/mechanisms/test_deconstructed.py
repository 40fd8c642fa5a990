"""Weaker forms of attention against their definitions."""

import pytest
import torch
from torch import Tensor

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.errors import CaptureError
from workbench.kernels.taylor import TaylorPattern, taylor_attention
from workbench.mechanisms import Place

PLACE = Place(24, 4, 19)
ROOM = mechanisms.get("deconstructed")


def _qkv(n: int, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 4, n, 6), (2, kv_heads, n, 6), (2, kv_heads, n, 5))
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def _map(form: str, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = ROOM.build(PLACE, form).to(x)
    with torch.no_grad(), workbench.attach(layer) as wb, wb.capture([]) as cap:
        layer(x)
    return cap[0].pattern.dense()


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


def test_a_key_has_one_score_for_all_queries() -> None:
    whole = _map("keys", torch.randn(2, 19, 24, dtype=torch.float64))
    ratio = whole[..., 3:, 1] / whole[..., 3:, 3]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert torch.equal(whole[..., 0, :], torch.eye(19, dtype=torch.float64)[0].expand(2, 4, -1))


def test_a_random_map_is_the_same_for_every_input_and_others_are_not() -> None:
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    for form in ROOM.variants:
        same = torch.allclose(_map(form, x), _map(form, x.flip(0)))
        assert same == (form == "random")
    whole = _map("random", x)
    assert torch.equal(whole[0], whole[1])


def test_all_forms_have_the_parameters_of_plain_attention() -> None:
    plain = mechanisms.get("sqa").build(PLACE, "mha")
    wanted = sum(p.numel() for p in plain.parameters())
    assert {sum(p.numel() for p in ROOM.build(PLACE, form).parameters()) for form in ROOM.variants} == {wanted}


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(WorkbenchError, match='form="softmax" is not known'):
        ROOM.build(PLACE, form="softmax")
    q, k, _ = _qkv(5)
    with pytest.raises(CaptureError, match="5 queries and 4 keys"):
        TaylorPattern(q, k[:, :, :4])
