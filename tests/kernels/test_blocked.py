"""Blocked attention over hand-made plans: padding, rows that see nothing, merging by log-sum-exp."""

import math

import pytest
import torch

from workbench.kernels.blocked import Group, Plan, attend, merge


def dense(q, k, v, seen, scale):
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp() @ v, lse


def inputs(n_q, n_k, heads=2, kv=2, width=8, dtype=torch.float64, batch=2, seed=0):
    gen = torch.Generator().manual_seed(seed)
    sizes = ((heads, n_q, 8), (kv, n_k, 8), (kv, n_k, width))
    return [torch.randn(batch, *size, generator=gen, dtype=torch.float64).to(dtype) for size in sizes]


def whole_plan(n_q, n_k, mask, run=1):
    queries, keys = torch.arange(n_q // run)[None], torch.arange(n_k // run)[None]
    return Plan(1, run, n_q // run, n_k // run, (Group(torch.zeros(1, dtype=torch.long), queries, keys, mask),))


@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize(("heads", "kv"), [(1, 1), (4, 2), (3, 1)])
def test_rows_that_see_nothing_are_zero_with_lse_minus_infinity(heads, kv, width):
    seen = torch.rand(17, 17, generator=torch.Generator().manual_seed(1)) < 0.3
    seen[[0, 5, 16]] = False
    tensors = [x.requires_grad_() for x in inputs(17, 17, heads, kv, width)]
    out, lse = attend(*tensors, whole_plan(17, 17, seen[None]), 0.3)
    expected, expected_lse = dense(*tensors, seen, 0.3)
    assert torch.equal(lse[:, :, 5], torch.full_like(lse[:, :, 5], -math.inf))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-10)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alive = seen.any(-1)
    d_lse = torch.rand(2, heads, int(alive.sum()), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad((out * d_out).sum() + (lse[..., alive] * d_lse).sum(), tensors)
    wanted_lse = expected_lse[..., alive]
    expected = dense(*tensors, seen, 0.3)[0][..., alive, :]
    wanted = torch.autograd.grad((expected * d_out[..., alive, :]).sum() + (wanted_lse * d_lse).sum(), tensors)
    for x, y in zip(found, wanted, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y.nan_to_num(0.0), rtol=0, atol=1e-10)


def test_queries_in_no_tile_see_nothing():
    q, k, v = inputs(8, 8)
    plan = Plan(1, 4, 2, 2, (Group(torch.tensor([0]), torch.tensor([[1]]), torch.tensor([[0]])),))
    out, lse = attend(q, k, v, plan)
    assert not out[:, :, :4].any()
    assert lse[:, :, :4].isneginf().all()
    torch.testing.assert_close(
        out[:, :, 4:], dense(q[:, :, 4:], k[:, :, :4], v[:, :, :4], torch.ones(4, 4).bool(), 8**-0.5)[0]
    )


def test_a_layout_for_each_kv_head():
    q, k, v = inputs(8, 8, 4, 2)
    groups = (
        Group(torch.tensor([0, 0]), torch.tensor([[0], [1]]), torch.tensor([[0], [0]])),
        Group(torch.tensor([1]), torch.tensor([[0, 1]]), torch.tensor([[0, 1]])),
    )
    out, _ = attend(q, k, v, Plan(2, 4, 2, 2, groups))
    seen = torch.ones(4, 8, 8, dtype=torch.bool)
    seen[:2, :, 4:] = False
    torch.testing.assert_close(out, dense(q, k, v, seen, 8**-0.5)[0])


def test_many_small_chunks_give_the_same(monkeypatch):
    seen = torch.ones(16, 16).tril().bool()
    tensors = inputs(16, 16, 4, 2)
    whole = attend(*tensors, whole_plan(16, 16, seen[None], run=2))
    monkeypatch.setattr("workbench.kernels.blocked._KEYS_AT_ONCE", 1)
    for x, y in zip(attend(*tensors, whole_plan(16, 16, seen[None], run=2)), whole, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 5])
def test_low_precision(dtype, width):
    tensors = [x.requires_grad_() for x in inputs(17, 17, 4, 2, width, dtype)]
    seen = torch.ones(17, 17).tril().bool()
    out, lse = attend(*tensors, whole_plan(17, 17, seen[None]))
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected, expected_lse = dense(*exact, seen, 8**-0.5)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=bound, atol=bound)
    found, wanted = torch.autograd.grad(out.float().sum(), tensors), torch.autograd.grad(expected.sum(), exact)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=4 * bound, atol=4 * bound)


def test_merged_parts_equal_one_pass():
    q, k, v = inputs(17, 20)
    seen = torch.rand(17, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[3, :10] = False
    seen[4] = False  # sees nothing in either part
    parts = [
        attend(q, k[:, :, s], v[:, :, s], whole_plan(17, 10, seen[None, :, s])) for s in (slice(0, 10), slice(10, 20))
    ]
    out, lse = merge([o for o, _ in parts], [x for _, x in parts])
    expected, expected_lse = dense(q, k, v, seen, 8**-0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
