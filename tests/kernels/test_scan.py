"""Scan attention: prefixes by scan against a softmax per prefix, its operator, its stream and its pattern."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import families
from workbench.kernels.scan import (
    ScanPattern,
    ScanState,
    Sums,
    combine,
    leaves,
    naive_pattern,
    naive_scan,
    scan_attention,
    tree_scan,
)
from workbench.kernels.scan.operator import identity_like
from workbench.kernels.statistics import dense

SIZES = [1, 17, 63, 100]
TIGHT = {"atol": 1e-10, "rtol": 1e-10}


def inputs(n: int, *, b: int = 2, h: int = 3, d: int = 8, width: int = 5, seed: int = 0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    shapes = (1, h, 1, d), (b, h, n, d), (b, h, n, width)
    return tuple(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes)


def random_sums(seed: int, n: int = 4, spread: float = 3.0) -> Sums:
    gen = torch.Generator().manual_seed(seed)
    top, size = torch.randn(n, generator=gen).double() * spread, torch.rand(n, generator=gen).double() + 0.1
    return Sums(top, size, torch.randn(n, 3, generator=gen).double())


def assert_sums(a: Sums, b: Sums) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("block", [1, 16, 1000])
def test_every_prefix(n: int, block: int):
    q, k, v = inputs(n)
    torch.testing.assert_close(scan_attention(q, k, v, block=block), naive_scan(q, k, v), **TIGHT)
    torch.testing.assert_close(scan_attention(q, k, v, 3.0, block=block), naive_scan(q, k, v, 3.0), **TIGHT)


@pytest.mark.parametrize("n", SIZES)
def test_gradients_are_those_of_the_definition(n: int):
    tensors = [t.requires_grad_() for t in inputs(n)]
    out = scan_attention(*tensors, 2.0, block=16)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, tensors, weight)
    want = torch.autograd.grad(naive_scan(*tensors, 2.0), tensors, weight)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **TIGHT)


@pytest.mark.parametrize("n", [1, 7])
def test_gradcheck(n: int):
    tensors = [t.requires_grad_() for t in inputs(n, h=2, d=3, width=2)]
    assert torch.autograd.gradcheck(lambda q, k, v: scan_attention(q, k, v, block=3), tensors)


@given(st.integers(0, 10_000), st.floats(0.0, 300.0))
@settings(max_examples=50, deadline=None)
def test_operator_is_associative_and_has_an_identity(seed: int, spread: float):
    a, b, c = (random_sums(seed + i, spread=spread) for i in range(3))
    assert_sums(combine(combine(a, b), c), combine(a, combine(b, c)))
    none = identity_like(a)
    assert_sums(combine(none, a), a)
    assert_sums(combine(a, none), a)
    empty = combine(none, none)
    assert bool((empty.top == -math.inf).all())
    assert not empty.size.any()
    assert not empty.total.any()


@pytest.mark.parametrize("n", SIZES)
def test_tree_block_and_sequential_scans_agree(n: int):
    q, k, v = inputs(n)
    scores = ((q @ k.mT) * q.shape[-1] ** -0.5).squeeze(2)
    tree = tree_scan(leaves(scores, v))
    now, outputs = identity_like(leaves(scores[..., 0], v[..., 0, :])), []
    for t in range(n):
        now = combine(now, leaves(scores[..., t], v[..., t, :]))
        outputs.append(now.output)
    torch.testing.assert_close(tree.output, torch.stack(outputs, dim=2), **TIGHT)
    torch.testing.assert_close(tree.output, scan_attention(q, k, v, block=16), **TIGHT)
    torch.testing.assert_close(tree.lse, torch.logcumsumexp(scores, dim=-1), **TIGHT)


def test_last_output_is_ordinary_attention():
    q, k, v = inputs(63)
    want = torch.nn.functional.scaled_dot_product_attention(q.expand(2, -1, -1, -1), k, v)
    torch.testing.assert_close(scan_attention(q, k, v)[:, :, -1:], want, **TIGHT)


def test_equals_causal_attention_with_equal_queries():
    q, k, v = inputs(63)
    rows = q.expand(2, -1, 63, -1)
    want = torch.nn.functional.scaled_dot_product_attention(rows, k, v, is_causal=True)
    torch.testing.assert_close(scan_attention(q, k, v), want, **TIGHT)


def test_a_shift_of_all_scores_changes_nothing():
    q, k, v = inputs(63)
    shifted = k + 40 * q / q.square().sum(-1, keepdim=True)
    torch.testing.assert_close(scan_attention(q, shifted, v), scan_attention(q, k, v), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_huge_scores(dtype: torch.dtype, order: str):
    n = 100
    scores = torch.linspace(-1e4, 1e4, n, dtype=torch.float64)
    scores = {"rising": scores, "falling": scores.flip(0), "mixed": scores[torch.arange(n) * 37 % n]}[order].to(dtype)
    q, k = torch.ones(1, 1, 1, 1, dtype=dtype), scores.view(1, 1, n, 1)
    v = torch.randn(1, 1, n, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    out = scan_attention(*tensors, 1.0, block=16)
    want = naive_scan(*(t.detach().double() for t in tensors), 1.0)
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-6)
    out.sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in tensors)
    pattern = ScanPattern(q, k, 1.0)
    torch.testing.assert_close(pattern.dense().sum(-1), torch.ones(1, 1, n, dtype=dtype))
    for found in (pattern.entropy(), pattern.received(), pattern.lse):
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype):
    tensors = [t.requires_grad_() for t in inputs(100, dtype=dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scan_attention(*tensors)
    assert out.dtype == dtype
    want = naive_scan(*(t.detach().double() for t in tensors))
    torch.testing.assert_close(out.double(), want, atol=torch.finfo(dtype).eps * float(want.abs().max()), rtol=0)
    out.float().sum().backward()
    assert [t.grad.dtype for t in tensors] == [dtype] * 3


def test_fewer_kv_heads():
    q, k, v = inputs(17, h=4)
    k, v = k[:, :2], v[:, :2]
    wide = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    torch.testing.assert_close(scan_attention(q, k, v), naive_scan(q, *wide), **TIGHT)
    torch.testing.assert_close(ScanPattern(q, k).dense(), naive_pattern(q, wide[0]), **TIGHT)


@given(st.integers(1, 60), st.data(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_stream_in_blocks_gives_the_same(n: int, data: st.DataObject, seed: int):
    q, k, v = inputs(n, seed=seed)
    state, got, at = ScanState(q, block=8), [], 0
    while at < n:
        step = data.draw(st.integers(1, n - at))
        got.append(state.update(k[:, :, at : at + step], v[:, :, at : at + step]))
        at += step
    torch.testing.assert_close(torch.cat(got, dim=2), naive_scan(q, k, v), **TIGHT)
    assert state.n_tokens == n


def test_a_stream_of_tokens_keeps_width_plus_two_numbers():
    q, k, v = inputs(40)
    state, want = ScanState(q), scan_attention(q, k, v)
    for t in range(40):
        torch.testing.assert_close(state.update(k[:, :, t], v[:, :, t]), want[:, :, t], **TIGHT)
        assert sum(part.untyped_storage().nbytes() for part in state.sums) == 2 * 3 * (5 + 2) * 8
    with pytest.raises(CaptureError, match="values of width 5"):
        state.update(k[:, :, :1], v[:, :, :1, :4])


@pytest.mark.parametrize("n", SIZES)
def test_pattern_is_the_map_that_the_kernel_applies(n: int):
    q, k, v = inputs(n)
    pattern = ScanPattern(q, k, values=v)
    assert pattern.shape == (2, 3, n, n)
    torch.testing.assert_close(pattern.dense(), naive_pattern(q, k), **TIGHT)
    torch.testing.assert_close(pattern.dense() @ v, scan_attention(q, k, v), **TIGHT)
    torch.testing.assert_close(pattern.apply(v), scan_attention(q, k, v), **TIGHT)
    assert pattern.grade == "exact"
    assert pattern.normalised
    assert not pattern.by_magnitude


def test_how_two_keys_compare_does_not_depend_on_the_row():
    q, k, _ = inputs(63)
    p = ScanPattern(q, k).dense()
    ratio = p[..., 20:, 7] / p[..., 20:, 19]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), **TIGHT)


@pytest.mark.parametrize("n", [*SIZES, 200])
def test_statistics_in_linear_time_are_the_streamed_ones(n: int):
    q, k, v = inputs(n)
    pattern = ScanPattern(q, k, 4.0, values=v)
    names = ["lse", "entropy", "peak", "effective_keys", "distance", "sink", "current", "received", "pooled_mean"]
    got = pattern.statistics([*names, "value_weighted_received"])
    truth = naive_pattern(q, k, 4.0)
    want = dense(truth, names, pattern.mask, lse=torch.logcumsumexp(4.0 * (q @ k.mT).squeeze(2), dim=-1))
    want["value_weighted_received"] = dense(
        truth * v.norm(dim=-1)[:, :, None], ["received"], pattern.mask, by_magnitude=True
    )["received"]
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **TIGHT, equal_nan=True, msg=f"{name} differs")
    torch.testing.assert_close(pattern.received(), got["received"], **TIGHT)
    torch.testing.assert_close(pattern.entropy(), got["entropy"], **TIGHT)


def test_statistics_by_the_engines_of_softmaxes() -> None:
    """As on a GPU, where a scan's scores are a softmax's biases."""
    gen = torch.Generator().manual_seed(3)
    q, k = torch.randn(1, 4, 1, 8, generator=gen) * 3, torch.randn(2, 2, 70, 8, generator=gen)
    pattern, names = ScanPattern(q, k), ["entropy", "received", "distance", "peak", "sink"]
    got = pattern.as_softmax.statistics(names)
    for name, value in pattern.statistics(names).items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4)


def test_statistics_of_huge_scores_do_not_cancel():
    q, k, _ = inputs(100, dtype=torch.float32)
    for pattern in (ScanPattern(q, k, 1.0), ScanPattern(q, k + 1e3 * q / q.square().sum(-1, keepdim=True), 1.0)):
        streamed = pattern.statistics(["entropy", "received"])
        torch.testing.assert_close(pattern.entropy(), streamed["entropy"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pattern.received(), streamed["received"], atol=1e-4, rtol=1e-5)


@given(st.integers(1, 40), st.data())
@settings(max_examples=30, deadline=None)
def test_any_tile_is_a_part_of_the_whole(n: int, data: st.DataObject):
    q, k, _ = inputs(n)
    pattern = ScanPattern(q, k)

    def piece() -> slice:
        start = data.draw(st.integers(0, n - 1))
        return slice(start, data.draw(st.integers(start + 1, n)))

    queries, keys = piece(), piece()
    heads = data.draw(st.none() | st.lists(st.integers(0, 2), max_size=3))
    whole = naive_pattern(q, k)[:, :, queries, keys]
    torch.testing.assert_close(pattern.tile(queries, keys, heads), whole if heads is None else whole[:, heads], **TIGHT)


def test_parts_and_back():
    q, k, v = inputs(17)
    pattern = ScanPattern(q, k, 0.3, values=v)
    again = families.rebuild("ScanPattern", *pattern.state())
    torch.testing.assert_close(again.dense(), pattern.dense(), atol=0, rtol=0)
    torch.testing.assert_close(again.values, v, atol=0, rtol=0)
    assert ScanPattern(q, k).kept(lambda name, tensor: tensor.clone()).values is None


def test_a_call_tells_its_pattern():
    q, k, v = inputs(17)
    assert scan_attention.attention_kernel == "scan"
    for args, options in (((q, k, v, 0.3), {}), ((q, k, v), {"scale": 0.3, "block": 4})):
        pattern = scan_attention.pattern_of(*args, **options)
        assert isinstance(pattern, ScanPattern)
        torch.testing.assert_close(pattern.apply(pattern.values), scan_attention(*args, **options), **TIGHT)


def bad(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t[1, 2, 3, 4] = value
    return t


def test_bad_input_is_named():
    q, k, v = inputs(9)
    rows = q.expand(-1, -1, 4, -1)
    cases = [
        ("one query per head, and q has 4 rows", (rows, k, v), {}),
        ("one query per head, and q has 0 rows", (rows[:, :, :0], k, v), {}),
        ("there are no keys", (q, k[:, :, :0], v[:, :, :0]), {}),
        ("v is torch.float32", (q, k, v.float()), {}),
        (r"k holds nan at \[1, 2, 3, 4\]", (q, bad(k, math.nan), v), {}),
        (r"v holds -inf at \[1, 2, 3, 4\]", (q, k, bad(v, -math.inf)), {}),
        ("do not fit", (q.repeat(3, 1, 1, 1), k, v), {}),
        ("do not fit", (q[..., :4], k, v), {}),
        ("block is 0", (q, k, v), {"block": 0}),
    ]
    for message, args, options in cases:
        with pytest.raises(CaptureError, match=message) as caught:
            scan_attention(*args, **options)
        assert caught.value.hint
    with pytest.raises(CaptureError, match="q has 4 rows"):
        ScanPattern(rows, k)
    with pytest.raises(CaptureError, match="block is 0"):
        ScanState(q, block=0)
    with pytest.raises(CaptureError, match="k must be"):
        ScanState(q).update(k[0, 0], v)
