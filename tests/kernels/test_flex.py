"""What FlexAttention is handed on CUDA: orders of tokens, lists of blocks, and one compiled kernel for all layouts."""

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from support.backends import untraced_flex
from workbench.kernels import flex
from workbench.kernels.flex import BLOCK, FlexPlan, block_mask, flex_attend
from workbench.kernels.layouts import Layout
from workbench.kernels.neighborhood import NeighborhoodLayout, fewest_blocks, packing, token_permutation
from workbench.kernels.neighborhood.boxes import arrange
from workbench.kernels.neighborhood.flex import flex_plan as neighborhood_plan
from workbench.kernels.neighborhood.packing import packed
from workbench.kernels.s2 import S2Layout
from workbench.kernels.s2.flex import flex_plan as s2_plan

CPU = torch.device("cpu")


def by_place(plan: FlexPlan, n_heads: int) -> Tensor:
    """[head, query place, key place] bool, from the function that FlexAttention calls."""
    q, k = (torch.arange(n) for n in plan.mask.seq_lengths)
    head = torch.arange(n_heads)[:, None, None]
    return plan.mask.mask_mod(torch.tensor(0), head, q[:, None], k).expand(n_heads, len(q), len(k))


def listed(plan: FlexPlan, kind: str, like: Tensor) -> Tensor:
    """The blocks of a list, as bool of the shape of `like`."""
    counts, indices = (getattr(plan.mask, f"{kind}_{name}")[0] for name in ("num_blocks", "indices"))
    chosen = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(like, dtype=torch.int32).scatter_add_(-1, indices.long(), chosen.int()).bool()


def check(plan: FlexPlan, layout: Layout, n_heads: int, n_queries: int, n_keys: int) -> None:
    """The function is the layout's rule; the lists hold each block that needs it, and whole ones apart."""
    seen = by_place(plan, n_heads)
    queries = torch.arange(n_queries) if plan.queries is None else plan.queries
    keys = torch.arange(n_keys)[None] if plan.keys is None else plan.keys
    keys = keys.repeat_interleave(n_heads // len(keys), dim=0)
    found = torch.zeros(n_heads, n_queries, n_keys, dtype=torch.bool)
    for head in range(n_heads):
        real = keys[head] >= 0
        assert not seen[head][:, ~real].any()
        assert sorted(keys[head][real].tolist()) == list(range(n_keys))
        rows = seen[head][queries >= 0][:, real]
        found[head][queries[queries >= 0, None], keys[head][real]] = rows
    whole = slice(0, n_queries), slice(0, n_keys)
    assert torch.equal(found, layout.visible(*whole, layout.for_heads(slice(None), n_heads)).expand_as(found))
    if plan.places is not None:
        assert torch.equal(queries[plan.places], torch.arange(n_queries))
    rows = F.pad(queries >= 0, (0, -len(queries) % BLOCK)).view(-1, BLOCK)
    size = plan.key_block
    blocks = F.pad(seen, (0, -seen.shape[2] % size, 0, -seen.shape[1] % BLOCK))
    blocks = blocks.unflatten(2, (-1, size)).unflatten(1, (-1, BLOCK))
    some = (blocks & rows[:, :, None, None]).any(-1).any(2)
    every = (blocks | ~rows[:, :, None, None]).all(-1).all(2) & some
    assert torch.equal(listed(plan, "full_kv", some), every)
    assert torch.equal(listed(plan, "kv", some), some & ~every)
    assert plan.n_visited == int(some.sum())


@st.composite
def s2_layouts(draw: Any) -> S2Layout:
    block, causal = draw(st.sampled_from([16, 32, 64, 128, 256])), draw(st.booleans())
    n_keys = draw(st.integers(block, 600))
    kv = draw(st.sampled_from([1, 2, 3]))
    return S2Layout(
        draw(st.integers(1, n_keys)) if causal else n_keys, n_keys, kv * draw(st.integers(1, 2)), kv, block,
        draw(st.integers(1, 4)), draw(st.integers(1, 8)), n_dense_heads=draw(st.integers(0, 1)),
        head_offset=draw(st.integers(0, 3)), homogeneous=draw(st.booleans()), causal=causal,
    )  # fmt: skip


@st.composite
def neighborhoods(draw: Any) -> NeighborhoodLayout:
    longest = draw(st.sampled_from([(500,), (24, 24), (8, 8, 9)]))
    each: list[tuple[Any, ...]] = []
    for most in longest:
        length = draw(st.integers(1, most))
        window = draw(st.integers(1, length))
        dilation = draw(st.integers(1, length // window))
        each.append((length, window, draw(st.integers(1, window)), dilation, draw(st.booleans())))
    return NeighborhoodLayout(*zip(*each, strict=True), extra_keys=draw(st.sampled_from([0, 3, 128, 300])))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(s2_layouts())
def test_s2_lists_what_is_needed(layout: S2Layout) -> None:
    check(s2_plan(layout, CPU), layout, layout.n_heads, layout.n_queries, layout.n_keys)


@settings(max_examples=40, deadline=None)
@given(neighborhoods())
def test_neighborhoods_list_what_is_needed(layout: NeighborhoodLayout) -> None:
    check(neighborhood_plan(layout, 2, CPU), layout, 2, layout.n_tokens, layout.n_keys)


@pytest.mark.filterwarnings("ignore:flex_attention called")
@settings(max_examples=15, deadline=None)
@given(s2_layouts())
def test_s2_keys_in_another_order_give_the_same(layout: S2Layout) -> None:
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, layout.n_heads, layout.n_queries, 8, generator=gen)
    k, v = torch.randn(2, 2, layout.n_kv_heads, layout.n_keys, 8, generator=gen)
    with untraced_flex():
        out, lse = flex_attend(q, k, v, s2_plan(layout, CPU), compiled=False)
    k, v = (x.repeat_interleave(layout.n_heads // layout.n_kv_heads, 1) for x in (k, v))
    seen = layout.visible(
        slice(0, layout.n_queries), slice(0, layout.n_keys), layout.for_heads(slice(None), layout.n_heads)
    )
    scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("block", "local_blocks", "vert_stride"), [(64, 16, 8), (64, 16, 16), (32, 8, 8), (64, 4, 8)])
def test_s2_visits_little_more_than_it_needs(block: int, local_blocks: int, vert_stride: int) -> None:
    n, heads = 16384, max(8, vert_stride)
    layout = S2Layout(n, n, heads, heads, block=block, local_blocks=local_blocks, vert_stride=vert_stride)
    needed = int(layout.blocks().sum()) * block**2 / BLOCK**2
    plan = s2_plan(layout, CPU)
    assert plan.n_visited <= 1.2 * needed
    assert int(plan.mask.full_kv_num_blocks.sum()) >= 0.5 * plan.n_visited


def test_s2_with_windows_smaller_than_a_block() -> None:
    """64 local tokens cost two blocks of 128 to each tile of queries; the verticals cost what they need."""
    n = 16384
    layout = S2Layout(n, n, 8, 8, block=16, local_blocks=4, vert_stride=8)
    rows, columns = torch.arange(n // 16)[:, None], torch.arange(n // 16)
    vertical = layout.sees(torch.arange(8)[:, None, None], rows + n, columns) & (rows >= columns)
    verticals = int(vertical.sum()) * 16**2 / BLOCK**2
    assert s2_plan(layout, CPU).n_visited <= 1.2 * (verticals + 2 * 8 * n // BLOCK)


@pytest.mark.parametrize(("layout", "most"), [
    (((30, 48, 80), (18, 24, 24), (16, 8, 8)), 1),
    (((256, 256), (80, 80), (16, 16)), 1),
    (((16, 44, 80), (16, 32, 48), (1, 8, 16)), 1),
    (((65536,), 512, 64), 1.01),
    (((64, 64), (20, 20), (4, 4)), 1.2),
    (((60, 60), (20, 20), (4, 4)), 1.25),
    (((14, 14), 7), 1),
    (((28, 28), 7, 1, 4), 1.15),
    (((1000,), 100), 1.1),
    (((1000,), 100, 1, 1, True), 1.1),
])  # fmt: skip
def test_neighborhoods_visit_little_more_than_any_order_must(layout: tuple[Any, ...], most: float) -> None:
    plan = neighborhood_plan(NeighborhoodLayout(*layout), 1, CPU)
    assert plan.fewest is not None
    assert plan.fewest <= plan.n_visited <= most * plan.fewest
    visited, fewest = f"{plan.n_visited:,}", f"{plan.fewest:,}"
    size = "128" if plan.key_block == BLOCK else "128 queries and 64 keys"
    assert repr(plan) == (
        f"FlexPlan({visited} pairs of blocks of {size} visited; no order of tokens needs fewer than {fewest})"
    )


@pytest.mark.parametrize(("layout", "most"), [
    (((60, 60), (20, 20), (4, 4)), 1.2),
    (((8, 32, 32), (4, 12, 12), (2, 4, 4)), 1.2),
    (((50, 50), 13), 1.2),
    (((50, 50), 13, 1, 1, True), 1.2),
    (((8, 20, 20), (3, 7, 7)), 1.2),
    (((1000,), 64, 16, 3), 1.2),
    (((56, 56), 7), 1.2),
    (((8, 20, 20), (3, 7, 7), 1, 1, (True, False, False)), 1.2),
    (((10, 30, 30), (4, 12, 12), (2, 4, 4)), 1.2),
])  # fmt: skip
def test_neighborhoods_visit_what_their_queries_see_in_whole_blocks(layout: tuple[Any, ...], most: float) -> None:
    made = NeighborhoodLayout(*layout)
    found = arrange(made)
    needed = 0
    for block in found.queries:
        places = made.coordinates(block[block >= 0])
        seen = [axis.table(x) for axis, x in zip(made.axes, places, strict=True)]
        several = functools.reduce(lambda a, b: (a[:, :, None] & b[:, None]).flatten(1), seen)
        needed += math.ceil(int(several.any(0).sum()) / BLOCK)
    assert int(found.seen.sum()) * found.keys.shape[1] <= most * needed * BLOCK


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=60), st.integers(1, 9))
def test_keys_are_packed_alike_ones_first(seers: list[int], block: int) -> None:
    """Blocks hold what they can; keys that the same queries see fill blocks of their own as far as they go."""
    seen = torch.tensor(seers)[:, None] >> torch.arange(4) & 1 > 0
    group = packed(seen, block)
    assert group is not None
    assert int(group.bincount().max()) <= block
    assert sorted(set(group.tolist())) == list(range(int(group.max()) + 1))
    alone = sum(len(set(kinds)) == 1 and len(kinds) == block for kinds in of_groups(seers, group))
    assert alone >= sum(seers.count(kind) // block for kind in set(seers))
    for kinds in of_groups(seers, group):  # nothing is joined that no block of queries sees both of
        first, *others = dict.fromkeys(kinds)
        for _ in others:
            together = [kind for kind in others if kind & first]
            first = functools.reduce(lambda a, b: a | b, together, first)
        assert all(kind & first for kind in others)


def of_groups(seers: list[int], group: Tensor) -> list[list[int]]:
    return [[seers[i] for i in (group == n).nonzero()[:, 0].tolist()] for n in range(int(group.max()) + 1)]


def test_too_many_sets_of_keys_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST", 3)
    assert packed(torch.eye(4).bool(), 2) is None
    assert packed(torch.eye(4).bool().repeat(2, 1), 2) is not None  # each fills a block


@settings(max_examples=40, deadline=None)
@given(neighborhoods(), st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_no_order_visits_fewer_blocks_than_the_bound(
    layout: NeighborhoodLayout, block: int, key_block: int, tile: list[int]
) -> None:
    """Boxes come close to it; and blocks of one token are the pairs that see each other."""
    order, _ = token_permutation(layout.shape, tuple(tile[: len(layout.shape)]), layout.dilation)
    sees = layout.visible(slice(0, layout.n_tokens), slice(0, layout.n_keys), torch.tensor([0]))[0]
    keys = torch.cat((order, torch.arange(layout.n_tokens, layout.n_keys)))
    sees = F.pad(sees[order][:, keys], (0, -layout.n_keys % key_block, 0, -layout.n_tokens % block))
    visited = sees.unflatten(1, (-1, key_block)).unflatten(0, (-1, block)).any(-1).any(1)
    assert 0 < fewest_blocks(layout, block, key_block) <= int(visited.sum())
    if block == key_block == 1 and not any(axis.causal for axis in layout.axes):
        assert fewest_blocks(layout, 1) == int(sees.sum())


def test_a_perfectly_block_sparse_layout_needs_no_mask() -> None:
    for shape, window, stride in (
        ((64, 64), 16, 16),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8)),
        ((512,), 128, 128),
    ):
        plan = neighborhood_plan(NeighborhoodLayout(shape, window, stride), 1, CPU)
        assert int(plan.mask.kv_num_blocks.sum()) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layouts_and_lengths_share_a_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for each layout, FlexAttention would give up at the ninth and build the whole map."""
    counter, compiles = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiles(function, backend=counter))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    flex._attend.cache_clear()
    try:
        q = torch.randn(1, 2, 256, 16)
        options = [(w, s, d, c) for w in (3, 5, 7) for s in (1, 2) for d in (1, 2) for c in (False, True)]
        for window, stride, dilation, causal in options:
            layout = NeighborhoodLayout((16, 16), window, stride, dilation, causal)
            flex_attend(q, q, q, neighborhood_plan(layout, 2, CPU))
        assert counter.frame_count <= 4  # twice for each size of key blocks
        for shape in ((20,), (300,), (17, 19), (30, 30), (4, 9, 9), (5, 10, 10), (40, 20), (13, 31)):
            layout = NeighborhoodLayout(shape, 3)
            x = torch.randn(2, 2, layout.n_tokens, 16)
            flex_attend(x, x, x, neighborhood_plan(layout, 2, CPU))
        assert counter.frame_count <= 5
        before = counter.frame_count
        for n in (200, 513, 900):
            for stride in (2, 3, 4):
                s2 = S2Layout(n, n, 4, 2, block=16, local_blocks=2, vert_stride=stride)
                q, k = torch.randn(1, 4, n, 16), torch.randn(1, 2, n, 16)
                flex_attend(q, k, k, s2_plan(s2, CPU))
        assert counter.frame_count <= before + 4
        before = counter.frame_count
        for scale in range(1, 10):
            flex_attend(q, k, k, s2_plan(s2, CPU), scale=scale / 7)
        assert counter.frame_count <= before + 9
    finally:
        flex._attend.cache_clear()


def test_blocks_are_listed_from_both_sides_as_pytorch_lists_them() -> None:
    gen = torch.Generator().manual_seed(0)
    seen = torch.rand(2, 5, 7, generator=gen) < 0.6
    whole = seen & (torch.rand(2, 5, 7, generator=gen) < 0.5)
    got = block_mask(seen, whole, noop_mask, (5 * BLOCK, 7 * BLOCK))

    def sorted_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None], order.int()[None]

    lists = (*sorted_lists(seen & ~whole), *sorted_lists(whole))
    want = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, seq_lengths=(5 * BLOCK, 7 * BLOCK))
    for side in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(got, f"{side}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(want, f"{side}_num_blocks"))
        assert counts.dtype == indices.dtype == torch.int32
        at = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(indices[at], getattr(want, f"{side}_indices")[at])
        assert 0 <= int(indices.min()) <= int(indices.max()) < indices.shape[-1]
