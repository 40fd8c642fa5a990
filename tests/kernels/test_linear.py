"""Linear attention over all positions: tiles against the definition, statistics, files, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import families
from workbench.kernels.linear import LinearPattern
from workbench.kernels.patterns import Pattern
from workbench.kernels.statistics import dense

TIGHT = {"atol": 1e-11, "rtol": 1e-10}


def made(n: int, m: int, *, kv_heads: int = 4, positive: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, size, d, dtype=torch.float64, generator=gen)
        for h, size, d in ((4, n, 3), (kv_heads, m, 3), (kv_heads, m, 5))
    )
    return (q.abs(), k.abs(), v) if positive else (q, k, v)


@pytest.mark.parametrize(("n", "m", "kv_heads"), [(1, 1, 4), (17, 17, 4), (300, 300, 2), (5, 63, 1)])
@pytest.mark.parametrize("positive", [True, False])
def test_tiles_and_linear_time_agree_with_the_definition(n: int, m: int, kv_heads: int, positive: bool) -> None:
    q, k, v = made(n, m, kv_heads=kv_heads, positive=positive)
    keys = k.repeat_interleave(4 // kv_heads, dim=1)
    eta = (q @ keys.mT).sum(-1) if positive else None
    want = q @ keys.mT if eta is None else (q @ keys.mT) / eta[..., None]
    pattern = LinearPattern(q, k, eta, values=v, normalised=positive)
    assert (pattern.grade, pattern.signed, pattern.normalised) == ("exact", not positive, positive)
    torch.testing.assert_close(pattern.dense(), want, **TIGHT)
    torch.testing.assert_close(pattern.dense(heads=[3, 1]), want[:, [3, 1]], **TIGHT)
    torch.testing.assert_close(pattern.tile(slice(0, 1), slice(m // 2, m), [2]), want[:, [2], :1, m // 2 :], **TIGHT)
    torch.testing.assert_close(pattern.apply(v), want @ v.repeat_interleave(4 // kv_heads, dim=1), **TIGHT)
    torch.testing.assert_close(Pattern.apply(pattern, v), pattern.apply(v), **TIGHT)
    names = ["entropy", "received", "signed_mass", "peak", "value_weighted_entropy"]
    truth = dense(want, names[:-1], pattern.mask, by_magnitude=pattern.by_magnitude)
    found = pattern.statistics(names)
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-8, equal_nan=True)
    again = families.rebuild("LinearPattern", *pattern.state())
    assert torch.equal(again.dense(), pattern.dense())


def test_efficient_attention_has_rows_that_sum_to_one() -> None:
    """Softmax over the features of queries and over the positions of keys, as in diffusion U-Nets."""
    q, k, v = made(40, 40, positive=False)
    pattern = LinearPattern(q.softmax(-1), k.softmax(-2), normalised=True)
    torch.testing.assert_close(pattern.dense().sum(-1), torch.ones(2, 4, 40).double(), **TIGHT)
    context = k.softmax(-2).mT @ v  # as the layer computes it
    torch.testing.assert_close(pattern.apply(v), q.softmax(-1) @ context, **TIGHT)


def test_bad_input_is_named() -> None:
    q, k, v = made(4, 4)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("eta must be", {"eta": torch.ones(2, 4, 3)}),
        ("eta is zero", {"eta": torch.zeros(2, 4, 4)}),
        ("values must be", {"values": v[:, :, :2]}),
    ]
    for message, options in cases:
        with pytest.raises(CaptureError, match=message):
            LinearPattern(q, k, **options)
