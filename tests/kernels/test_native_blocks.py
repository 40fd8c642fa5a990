"""Attention over listed blocks in C++: against the definition, and beside plain torch.

Other sizes of registers: see `test_narrower_registers` of test_engines.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.kernels.blocked import attend
from workbench.kernels.native import blocks, build
from workbench.kernels.s2 import S2Layout, s2_attention, s2_naive
from workbench.kernels.s2.tiles import plan

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no C++ compiler")


def inputs(n, heads, kv, n_q=None, d=8, width=8, batch=2, tokens_first=False, seed=0):
    gen = torch.Generator().manual_seed(seed)
    sizes = ((heads, n if n_q is None else n_q, d), (kv, n, d), (kv, n, width))
    made = [torch.randn(batch, *size, generator=gen) for size in sizes]
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made] if tokens_first else made


def agrees(layout, tensors, bound=1e-5):
    options = {name: value for name, value in layout.facts().items() if not name.startswith(("n_q", "n_k", "n_h"))}
    expected, _, expected_lse = s2_naive(*(x.double() for x in tensors), **options)
    found = blocks.attend_blocks(*tensors, plan(layout).lists, tensors[0].shape[-1] ** -0.5)
    assert found is not None
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=bound)
    torch.testing.assert_close(found[1].double(), expected_lse, rtol=0, atol=bound)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(64, 150), st.sampled_from([16, 32, 64]), st.integers(1, 2), st.sampled_from([8, 21]),
    st.sampled_from([16, 5]), st.booleans(), st.data(),
)  # fmt: skip
def test_it_is_the_definition(n, block, shared, d, width, tokens_first, data):
    causal = data.draw(st.booleans())
    n_q = data.draw(st.sampled_from([1, n // 2, n])) if causal else n
    layout = S2Layout(n_q, n, 2 * shared, 2, block, data.draw(st.integers(1, 3)), 3, causal=causal)
    agrees(layout, inputs(n, 2 * shared, 2, n_q, d, width, tokens_first=tokens_first))


@pytest.mark.parametrize("threads", [1, 3])
def test_many_short_calls_give_the_same_bits(threads, monkeypatch):
    layout, tensors = S2Layout(200, 200, 2, 2, 32, 1, 3), inputs(200, 2, 2)
    whole = attend(*tensors, plan(layout))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(blocks, "_AT_ONCE", 1)
    for parallel in (blocks.gomp_parallel, lambda: None):  # threads of torch's, and of the library's own
        monkeypatch.setattr(blocks, "gomp_parallel", parallel)
        assert all(torch.equal(x, y) for x, y in zip(attend(*tensors, plan(layout)), whole, strict=True))


def test_large_scores_and_numbers_that_are_none():
    layout = S2Layout(96, 96, 1, 1, 32, 1, 2)
    q, k, v = inputs(96, 1, 1)
    agrees(layout, (60 * q, k, v), 1e-4)
    broken = k.clone()
    broken[0, 0, 40] = math.nan
    out, lse = attend(q, broken, v, plan(layout))
    sees = layout.visible(slice(0, 96), slice(40, 41), torch.zeros(1, dtype=torch.long))[0, :, 0]
    assert torch.equal(out[0, 0].isnan().any(-1), sees)
    assert torch.equal(lse[0, 0].isnan(), sees)
    assert bool(out[1].isfinite().all())


def test_gradients_beside_those_of_plain_torch(monkeypatch):
    layout = S2Layout(100, 100, 4, 2, 32, 1, 2)
    tensors = [x.requires_grad_() for x in inputs(100, 4, 2, tokens_first=True)]
    weight = torch.randn(2, 4, 100, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(2):
        out, lse = attend(*tensors, plan(layout))
        found.append((out, lse, *torch.autograd.grad((out * weight).sum() + lse.sin().sum(), tensors)))
        monkeypatch.setattr(blocks, "library", lambda: None)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_what_it_does_not_know_is_left_to_plain_torch():
    tensors = inputs(64, 2, 2)
    lists = plan(S2Layout(64, 64, 2, 2, 16, 1, 2)).lists
    assert blocks.attend_blocks(*(x.double() for x in tensors), lists, 1.0) is None
    out = s2_attention(*(x.bfloat16() for x in tensors), block=16, local_blocks=1, vert_stride=2)
    assert out.dtype == torch.bfloat16
