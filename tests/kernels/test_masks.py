"""Masks: every question about a tile or a count agrees with the whole [query, key] table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import CaptureError
from workbench.kernels.layouts import Layout
from workbench.kernels.masks import Mask, as_four, padding

sizes = st.integers(1, 40)


def table(mask: Mask) -> torch.Tensor:
    """[batch, head, query, key] bool, straight from the definition."""
    i = torch.arange(mask.n_queries)[:, None] + mask.offset
    j = torch.arange(mask.n_keys)[None, :]
    seen = torch.ones(mask.n_queries, mask.n_keys, dtype=torch.bool)
    if mask.causal:
        seen &= j <= i
    if mask.window is not None:
        seen &= (i - j).abs() < mask.window
    return seen[None, None] if mask.tensor is None else seen & mask.tensor


@settings(deadline=None, max_examples=200)
@given(
    n_q=sizes, n_k=sizes, causal=st.booleans(), window=st.none() | st.integers(1, 20), offset=st.integers(-5, 40),
    tensor=st.sampled_from(["none", "full", "row"]), seed=st.integers(0, 100), data=st.data(),
)  # fmt: skip
def test_a_mask_is_its_table(n_q, n_k, causal, window, offset, tensor, seed, data) -> None:
    keep = torch.rand(2, 1, 1 if tensor == "row" else n_q, n_k, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = Mask(n_q, n_k, causal, offset, window, None if tensor == "none" else keep)
    whole = table(mask)
    summary = mask.summary(torch.device("cpu"))
    assert torch.equal(summary.keys_per_query.expand(whole.shape[:3]), whole.sum(-1))
    assert torch.equal(summary.queries_per_key.expand(*whole.shape[:2], n_k), whole.sum(-2))
    assert torch.equal(summary.first_key.expand(whole.shape[:3]), whole.to(torch.uint8).argmax(-1))
    q0, k0 = data.draw(st.integers(0, n_q - 1)), data.draw(st.integers(0, n_k - 1))
    q1, k1 = data.draw(st.integers(q0 + 1, n_q)), data.draw(st.integers(k0 + 1, n_k))
    seen = mask.visible(slice(q0, q1), slice(k0, k1), slice(0, 2), slice(0, 1))
    part = whole[:, :, q0:q1, k0:k1]
    assert part.all() if seen is None else torch.equal(seen.expand_as(part), part)
    first, last = mask.key_range(slice(q0, q1))
    assert not whole[:, :, q0:q1, :first].any()
    assert not whole[:, :, q0:q1, last:].any()


def test_masks_that_do_not_fit() -> None:
    with pytest.raises(CaptureError, match="does not fit a map of 3 queries and 4 keys"):
        Mask(3, 4, tensor=torch.ones(1, 1, 3, 5, dtype=torch.bool))
    with pytest.raises(CaptureError, match="four dimensions"):
        Mask(3, 4, tensor=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(CaptureError, match="boolean or floating"):
        Mask(3, 4, tensor=torch.ones(1, 1, 3, 4, dtype=torch.int))
    with pytest.raises(CaptureError, match="one to four"):
        as_four(torch.ones(1, 1, 1, 1, 1))
    with pytest.raises(CaptureError, match="middle"):
        padding([1], 3, side="middle")


class Checkers(Layout):
    """Every other block, exact; with a causal mask, whole but for the diagonal."""

    exact = True

    def __init__(self, n_queries: int, n_keys: int, block: int, n_layouts: int) -> None:
        self.n_queries, self.n_keys, self.block, self.n_layouts = n_queries, n_keys, block, n_layouts

    def blocks(self):
        i, j = torch.arange(-(-self.n_queries // self.block))[:, None], torch.arange(-(-self.n_keys // self.block))
        return torch.stack([(i + j + shift) % 2 == 0 for shift in range(self.n_layouts)])

    def visible(self, queries, keys, layouts):
        i, j = (torch.arange(s.start, s.stop) // self.block for s in (queries, keys))
        return self.blocks()[layouts][:, i][:, :, j]


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (63, 63), (100, 100), (40, 90)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_layouts", [1, 2])
def test_counts_of_an_exact_layout(n_q, n_k, causal, n_layouts):
    mask = Mask(n_q, n_k, causal, n_k - n_q, layout=Checkers(n_q, n_k, 16, n_layouts), n_heads=4)
    seen = mask.visible(slice(0, n_q), slice(0, n_k), slice(None), slice(0, 4))
    seen = seen.expand(1, 4, n_q, n_k) if n_layouts > 1 else seen[None]
    got = mask.summary(torch.device("cpu"))
    assert torch.equal(got.keys_per_query, seen.sum(-1))
    assert torch.equal(got.queries_per_key, seen.sum(-2))
    alive = seen.any(-1)
    assert torch.equal(got.first_key[alive], seen.to(torch.uint8).argmax(-1)[alive])
