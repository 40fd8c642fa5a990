"""S2-Attention against its definition: masks, lists, union, eviction, values and gradients, patterns."""

import json
import math
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import CaptureError
from workbench.kernels import blocked, families, s2
from workbench.kernels.blocked import attend, merge
from workbench.kernels.flex import flex_attend
from workbench.kernels.runs import Runs
from workbench.kernels.s2 import (
    S2Cache,
    S2Layout,
    check_union,
    csr,
    kv_efficient,
    merged_csr,
    s2_attention,
    s2_naive,
    tiles,
)
from workbench.kernels.s2.flex import flex_plan
from workbench.kernels.s2.tiles import plan
from workbench.kernels.statistics import dense

QUIET = pytest.mark.filterwarnings("ignore:no head sees")
SMALL = {"block": 16, "local_blocks": 1, "vert_stride": 3}


def inputs(n, heads=4, kv=2, n_q=None, width=8, dtype=torch.float64, seed=0, batch=2, tokens_first=False):
    """Queries, keys and values; with `tokens_first` as linear layers leave them, a token's heads side by side."""
    gen = torch.Generator().manual_seed(seed)
    sizes = ((heads, n if n_q is None else n_q, 8), (kv, n, 8), (kv, n, width))
    made = [torch.randn(batch, *size, generator=gen, dtype=torch.float64).to(dtype) for size in sizes]
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made] if tokens_first else made


def whole(layout):
    rows, columns = slice(0, layout.n_queries), slice(0, layout.n_keys)
    return layout.visible(rows, columns, torch.arange(layout.n_layouts))


def brute_force(x: S2Layout) -> torch.Tensor:
    """The rule, pair by pair in Python."""
    left, right = x.local_blocks if isinstance(x.local_blocks, tuple) else (x.local_blocks, x.local_blocks)
    step = max(1, x.vert_stride // x.n_heads) if x.head_step is None else x.head_step
    found = torch.zeros(x.n_kv_heads, x.n_queries, x.n_keys, dtype=torch.bool)
    for h in range(x.n_kv_heads):
        for row in range(x.n_queries):
            for j in range(x.n_keys):
                i = row + x.n_keys - x.n_queries
                far = i // x.block - j // x.block
                shift = 0 if x.homogeneous else h * step
                if x.shards is not None:
                    shard = x.shards[h]
                    seen = shard is None or j // x.block in shard or (far < left and -far < right)
                elif x.causal:
                    seen = far < left or (j // x.block + shift + x.head_offset) % x.vert_stride == 0
                else:
                    seen = (max(0, far - left + 1) + max(0, -far - right + 1)) % x.vert_stride == 0
                seen = seen or h >= x.n_kv_heads - x.n_dense_heads
                found[h, row, j] = seen and (j <= i or not x.causal)
    return found


@st.composite
def layouts(draw):
    causal = draw(st.booleans())
    n = draw(st.sampled_from([16, 17, 63, 100]))
    kv = draw(st.integers(1, 3))
    local = st.integers(1, 4)
    shard = st.one_of(st.none(), st.sets(st.integers(0, 8), max_size=4).map(sorted))
    shards = draw(st.one_of(st.none(), st.tuples(*[shard] * kv)))
    of_verticals = {
        "vert_stride": draw(st.integers(1, 6)), "head_step": draw(st.one_of(st.none(), st.integers(0, 4))),
        "head_offset": draw(st.integers(-3, 6)), "n_dense_heads": draw(st.integers(0, kv)),
        "homogeneous": draw(st.booleans()),
    }  # fmt: skip
    return S2Layout(
        n_queries=draw(st.sampled_from([1, n // 2, n])) if causal else n,
        n_keys=n,
        n_heads=kv * draw(st.integers(1, 2)),
        n_kv_heads=kv,
        block=draw(st.sampled_from([16, 32])),
        local_blocks=draw(local) if causal else draw(st.tuples(local, local)),
        causal=causal,
        **({"shards": shards} if shards is not None else of_verticals),
    )


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_layout_is_the_rule_and_its_blocks_are_tight(layout):
    expected = brute_force(layout)
    per_layout = expected[:: layout.n_kv_heads // layout.n_layouts]
    assert torch.equal(per_layout.repeat_interleave(layout.n_kv_heads // layout.n_layouts, 0), expected)
    assert torch.equal(whole(layout), per_layout)
    rows = slice(layout.n_queries // 3, layout.n_queries)
    part = layout.visible(rows, slice(3, 11), torch.tensor([layout.n_layouts - 1]))
    assert torch.equal(part, per_layout[-1:, rows, 3:11])
    b = layout.block
    padded = F.pad(per_layout, (0, -layout.n_keys % b, 0, -layout.n_queries % b))
    assert torch.equal(layout.blocks(), padded.unflatten(-1, (-1, b)).unflatten(-3, (-1, b)).any(-1).any(-2))
    assert bool(expected.any(-1).all())  # no query sees nothing


@settings(max_examples=40, deadline=None)
@given(layouts(), st.sampled_from([8, 5]), st.sampled_from([1, 2]), st.booleans())
def test_values_and_gradients_are_those_of_the_definition(layout, width, batch, tokens_first):
    sizes = layout.n_keys, layout.n_heads, layout.n_kv_heads, layout.n_queries, width
    tensors = [x.requires_grad_() for x in inputs(*sizes, batch=batch, tokens_first=tokens_first)]
    options = {name: value for name, value in layout.facts().items() if not name.startswith(("n_q", "n_k", "n_h"))}
    out, lse = attend(*tensors, plan(layout))
    expected, weights, expected_lse = s2_naive(*tensors, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-10)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(lse))
    gen = torch.Generator().manual_seed(1)
    d_out, d_lse = (torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in (out, lse))
    found = torch.autograd.grad((out * d_out).sum() + (lse * d_lse).sum(), tensors)
    wanted = torch.autograd.grad((expected * d_out).sum() + (expected_lse * d_lse).sum(), tensors)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [(1,), (32, 48), (10**6,)])
@settings(max_examples=20, deadline=None)
@given(layouts())
def test_tiles_of_any_size_hold_every_block_once(rows, layout):
    """However large the tiles are that query blocks share, and where they are so small that there are none."""
    with mock.patch.object(tiles, "_ROWS", rows), mock.patch.object(tiles, "_GATHER", 1.0):
        made = plan.__wrapped__(layout)
    found = torch.zeros_like(layout.absolute_blocks(), dtype=torch.long)
    for group in made.groups:
        for at, rows, keys in zip(group.layouts, group.queries, group.keys, strict=True):
            found[at, rows[:, None], keys] += 1
    assert torch.equal(found, layout.absolute_blocks().long())
    q, k, v = inputs(layout.n_keys, layout.n_heads, layout.n_kv_heads, layout.n_queries)
    options = {name: value for name, value in layout.facts().items() if not name.startswith(("n_q", "n_k", "n_h"))}
    for x, y in zip(attend(q, k, v, made), s2_naive(q, k, v, **options)[::2], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_verticals_of_many_query_blocks_are_few_tiles():
    layout = S2Layout(2048, 2048, 4, 4, 16, 1, 4, head_step=1)
    made = plan(layout)
    assert [group.sliding for group in made.groups] == [True] + [False] * (len(made.groups) - 1)
    rows = [group.queries.shape[1] for group in made.groups]
    assert max(rows) >= 12
    pairs = [len(group.layouts) * group.queries.shape[1] * group.keys.shape[1] for group in made.groups]
    shared = sum(n for n, size in zip(pairs, rows, strict=True) if size >= 12)
    assert shared > 0.8 * sum(pairs[1:])


@pytest.mark.parametrize("local_blocks", [1, 3])
@pytest.mark.parametrize("kv", [2, 4])
def test_what_slides_is_read_where_it_lies(kv, local_blocks):
    layout = S2Layout(96, 96, 4, kv, 16, local_blocks, 3)
    q, k, v = inputs(96, 4, kv, batch=1, tokens_first=True)
    with mock.patch.object(blocked, "_slid", side_effect=blocked._slid) as slid:
        out, lse = attend(q, k, v, plan(layout))
    slid.assert_called_once()
    for x in (q, k, v, out):  # tables share their memory
        assert Runs.of(x, 16, 6).table.data_ptr() == x.data_ptr()
    seen = whole(layout).repeat_interleave(4 // layout.n_layouts, 0)
    k, v = (x.repeat_interleave(4 // kv, 1) for x in (k, v))
    scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-10)


def test_shards_of_each_head():
    shards = [[0, 4], [1, 5], None, []]
    q, k, v = inputs(100, 8, 4)
    with pytest.warns(
        UserWarning, match=r"no head sees the key blocks \[2, 3\] once .* None for the shard of one head"
    ):
        s2_attention(q, k, v, block=16, local_blocks=1, shards=[[0, 4], [1, 5], [], []])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = s2_attention(q, k, v, block=16, local_blocks=1, shards=shards)
    expected, weights, _ = s2_naive(q, k, v, block=16, local_blocks=1, shards=shards)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    far = weights[0, ::2, -1].unflatten(-1, (-1, 4)).ne(0).any(-1)  # of one query head of each kv head, runs of 4 keys
    assert far[2].all()
    assert far[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 16, 17, 18, 19, 24]
    assert far[3].nonzero()[:, 0].tolist() == [24]
    pattern = s2_attention.pattern_of(q, k, v, block=16, local_blocks=1, shards=shards)
    torch.testing.assert_close(pattern.dense(), weights, rtol=0, atol=1e-10)
    facts, tensors = pattern.state()
    again = families.rebuild("S2Pattern", json.loads(json.dumps(facts)), tensors)
    assert again.layout == pattern.layout
    assert check_union(pattern.layout) == ()
    assert kv_efficient(pattern.layout.blocks())
    cache = S2Cache(8, 4, block=16, local_blocks=1, shards=shards)
    for i in range(100):
        at = slice(i, i + 1)
        last = s2.decode(q[:, :, at], k[:, :, at], v[:, :, at], cache)
        torch.testing.assert_close(last, expected[:, :, at], rtol=0, atol=1e-10)
    assert cache.kept == (36, 36, 100, 4)  # the last block has 4 tokens


@pytest.mark.parametrize(("shards", "message"), [
    ([[0], [1]], "no list with one entry for each of 4 kv heads"),
    (3, "shards=3 is no list"),
    ("0123", "shards='0123' is no list"),
    ([[0], [1], 2, None], "the shard of kv head 2 is no list of blocks: 2"),
    ([[0], [1], "ab", None], "the shard of kv head 2 is no list of blocks: 'ab'"),
    ([[0], [-1], [], None], "block in the shard of kv head 1=-1 is not one of 0"),
    ([[0], [1.5], [], None], "block in the shard of kv head 1 is a whole number, not 1.5"),
    ([[0], [3, 1], [], None], r"kv head 1 names blocks twice or out of order: \[3, 1\]"),
    ([[0], [1, 1], [], None], r"kv head 1 names blocks twice or out of order: \[1, 1\]"),
])  # fmt: skip
def test_shards_that_cannot_be(shards, message):
    q, k, v = inputs(100, 8, 4)
    with pytest.raises(CaptureError, match=message):
        s2_attention(q, k, v, block=16, shards=shards)


def test_shards_take_no_options_of_verticals():
    q, k, v = inputs(100, 8, 4)
    for option in ({"n_dense_heads": 1}, {"head_step": 2}, {"vert_stride": 3}, {"homogeneous": True}):
        with pytest.raises(CaptureError, match=f"{next(iter(option))}=.* is of verticals"):
            s2_attention(q, k, v, block=16, shards=[[0], [1], [], None], **option)


@pytest.mark.parametrize("options", [{"vert_stride": 1, "local_blocks": 1}, {"vert_stride": 9, "local_blocks": 7}])
def test_dense_where_everything_is_listed(options):
    q, k, v = inputs(100, 4, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(s2_attention(q, k, v, block=16, **options), expected)


def test_a_stride_beyond_the_blocks_leaves_a_block_sliding_window():
    layout = S2Layout(100, 100, 1, 1, 16, 2, vert_stride=50, head_offset=20)
    i, j = torch.arange(100)[:, None] // 16, torch.arange(100) // 16
    assert torch.equal(whole(layout)[0], (i - j < 2) & torch.ones(100, 100).tril().bool())


def test_head_offset_names_the_head_that_sees_the_first_block():
    layout = S2Layout(160, 160, 4, 4, 16, 1, vert_stride=4, head_step=1, head_offset=1)
    assert layout.blocks()[:, -1, 0].tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("heads", "kv", "stride", "missing"),
    [(8, 8, 8, 0), (8, 8, 4, 0), (4, 4, 8, 4), (3, 3, 8, 5), (8, 8, 16, 8), (32, 8, 16, 8)],
)
def test_union(heads, kv, stride, missing):
    layout = S2Layout(16 * 40, 16 * 40, heads, kv, 16, 1, stride)
    holes = check_union(layout)
    assert len(holes) == missing
    union = layout.blocks().any(0)
    lost = {int(j) % stride for j in (~union & torch.ones_like(union).tril()).nonzero()[:, 1]}
    assert lost == set(holes)
    assert check_union(S2Layout(640, 640, heads, kv, 16, 1, stride, n_dense_heads=1)) == ()


def test_holes_warn_at_the_caller_only_where_they_hide_something():
    q, k, v = inputs(160)
    with pytest.warns(UserWarning, match="no head sees the key blocks") as caught:
        s2_attention(q, k, v, block=16, local_blocks=1, vert_stride=8)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s2_attention(q, k, v, block=16, local_blocks=1, vert_stride=8, n_dense_heads=1)
        s2_attention(q, k, v, block=16, local_blocks=10, vert_stride=8)
        s2_attention(q, k, v, block=16, local_blocks=1, vert_stride=2)
        s2.pattern(q, k, block=16, local_blocks=1, vert_stride=8)


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_lists(layout):
    blocks = layout.blocks()
    crow, col = csr(blocks)
    again = torch.zeros_like(blocks)
    for h, row in ((h, row) for h in range(len(blocks)) for row in range(blocks.shape[1])):
        again[h, row, col[h, crow[h, row] : crow[h, row + 1]]] = True
    assert torch.equal(again, blocks)
    assert all((col[h, int(crow[h, -1]) :] == -1).all() for h in range(len(blocks)))


@pytest.mark.parametrize("merged", [1, 2, 3])
@pytest.mark.parametrize("n", [17, 100, 160])
def test_merged_query_blocks_give_back_the_mask(n, merged):
    layout = S2Layout(n, n, 4, 2, 16, 2, 3, n_dense_heads=1)
    crow, col, value = merged_csr(layout, merged)
    tile = merged * layout.block
    found = torch.zeros(2, n, n, dtype=torch.bool)
    for h in range(2):
        for row in range(crow.shape[1] - 1):
            for at in range(int(crow[h, row]), int(crow[h, row + 1])):
                columns = slice(int(col[h, at]) * 16, int(col[h, at]) * 16 + 16)
                found[h, row * tile : row * tile + int(value[h, at]), columns] = True
    assert torch.equal(found.tril(), whole(layout))
    with pytest.raises(CaptureError, match="hidden"):
        merged_csr(S2Layout(100, 100, 1, 1, 16, 1, 2, causal=False), 2)


def test_only_absolute_verticals_can_be_evicted():
    i, j = torch.arange(12)[:, None], torch.arange(12)
    relative = (i >= j) & ((i - j < 2) | ((i - j) % 3 == 0))
    assert not kv_efficient(relative[None])
    assert kv_efficient(S2Layout(192, 192, 3, 3, 16, 2, 3, n_dense_heads=1).blocks())
    assert not kv_efficient(S2Layout(192, 192, 1, 1, 16, 1, 3, causal=False).blocks())


@QUIET
@pytest.mark.parametrize("options", [SMALL, SMALL | {"n_dense_heads": 1}, SMALL | {"homogeneous": True}])
def test_decoding_with_eviction_equals_prefill(options):
    q, k, v = inputs(100)
    expected = s2_naive(q, k, v, **options)[0]
    cache = S2Cache(4, 2, **options)
    cache.extend(k[:, :, :30], v[:, :, :30])
    torch.testing.assert_close(cache.attend(q[:, :, 29:30]), expected[:, :, 29:30], rtol=0, atol=1e-10)
    for i in range(30, 100):
        at = slice(i, i + 1)
        out = s2.decode(q[:, :, at], k[:, :, at], v[:, :, at], cache)
        torch.testing.assert_close(out, expected[:, :, at], rtol=0, atol=1e-10)
    last = brute_force(S2Layout(1, 100, 4, 2, **options))
    assert cache.kept == tuple(last.sum((-1, -2)).tolist())
    assert cache.length == 100
    for bad in (q[:, :, :2], q[:, :1, :1]):
        with pytest.raises(CaptureError, match="decoded query"):
            cache.attend(bad)
    with pytest.raises(CaptureError, match="empty"):
        S2Cache(4, 2, **options).attend(q[:, :, :1])


def test_two_segments_of_keys_merge_to_one_pass():
    q, k, v = inputs(100, 2, 2)
    out, lse = s2_attention(q, k, v, block=16, local_blocks=1, vert_stride=2, return_lse=True)
    _, weights, _ = s2_naive(q, k, v, block=16, local_blocks=1, vert_stride=2)
    parts = []
    for s in (slice(0, 37), slice(37, 100)):
        scores = (q @ k[:, :, s].mT * 8**-0.5).masked_fill(weights[..., s] == 0, -math.inf)
        parts.append((scores.softmax(-1).nan_to_num(0.0) @ v[:, :, s], scores.logsumexp(-1)))
    merged = merge([o for o, _ in parts], [x for _, x in parts])
    torch.testing.assert_close(merged[0], out, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged[1], lse, rtol=0, atol=1e-12)


@QUIET
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    q, k, v = inputs(63, dtype=dtype)
    out = s2_attention(q, k, v, **SMALL)
    expected = s2_naive(q.double(), k.double(), v.double(), **SMALL)[0]
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)


@pytest.mark.filterwarnings("ignore:flex_attention called")
@pytest.mark.parametrize("layout", [
    S2Layout(300, 300, 4, 2, 16, 2, 4, head_step=1),
    S2Layout(150, 300, 4, 2, 32, 1, 3, n_dense_heads=1),
    S2Layout(300, 300, 4, 2, 16, (1, 2), 3, causal=False),
    S2Layout(300, 300, 4, 2, 128, 1, 2, head_offset=1),
    S2Layout(300, 300, 4, 2, 32, 1, shards=((0, 1, 4), None)),
    S2Layout(300, 300, 4, 2, 16, (1, 2), shards=((0, 9), (2,)), causal=False),
])  # fmt: skip
def test_flex_attention_with_our_mask_mod(layout):
    q, k, v = inputs(300, n_q=layout.n_queries, dtype=torch.float32)
    found = flex_attend(q, k, v, flex_plan(layout, q.device), compiled=False)
    for x, y in zip(found, attend(q, k, v, plan(layout)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:no head sees")
@pytest.mark.parametrize(
    ("options", "n_q"),
    [(SMALL, 100), (SMALL, 63), ({"block": 32, "local_blocks": (1, 1), "vert_stride": 2, "causal": False}, 100)],
)
def test_pattern(options, n_q):
    q, k, v = inputs(100, n_q=n_q)
    pattern = s2_attention.pattern_of(q, k, v, **options, return_lse=True)
    _, weights, lse = s2_naive(q, k, v, **options)
    torch.testing.assert_close(pattern.dense(), weights, rtol=0, atol=1e-10)
    torch.testing.assert_close(pattern.apply(v), s2_attention(q, k, v, **options), rtol=0, atol=1e-10)
    assert pattern.grade == "exact"
    assert pattern.normalised
    names = ["lse", "entropy", "received", "received_mean", "sink", "pooled_mean"]
    found = pattern.statistics(names)
    for name, value in dense(weights, names, pattern.mask, lse=lse).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, equal_nan=True)
    facts, tensors = pattern.state()
    assert torch.equal(tensors["values"], v)
    again = families.rebuild("S2Pattern", json.loads(json.dumps(facts)), tensors)
    assert again.layout == pattern.layout
    torch.testing.assert_close(again.dense(), pattern.dense())


@pytest.mark.parametrize(("options", "message"), [
    ({"block": 24}, "block=24"),
    ({"block": 8}, "block=8"),
    ({"block": 128}, "100 keys are shorter than one block of 128"),
    ({"vert_stride": 0}, "vert_stride=0"),
    ({"local_blocks": 0}, "local_blocks=0"),
    ({"local_blocks": (1, 2)}, r"local_blocks=\[1, 2\]"),
    ({"local_blocks": (1, 0), "causal": False}, "local_blocks"),
    ({"head_step": -1}, "head_step=-1"),
    ({"n_dense_heads": 3}, "n_dense_heads=3"),
])  # fmt: skip
def test_bad_options(options, message):
    q, k, v = inputs(100)
    for call in (lambda: s2_attention(q, k, v, **options), lambda: s2.pattern(q, k, **options)):
        with pytest.raises(CaptureError, match=message):
            call()


def test_bad_tensors():
    q, k, v = inputs(100)
    bad = q.clone()
    bad[0, 1, 2, 3] = math.nan
    with pytest.raises(CaptureError, match="q holds nan"):
        s2_attention(bad, k, v)
    with pytest.raises(CaptureError, match="float32"):
        s2_attention(q, k.float(), v)
    with pytest.raises(CaptureError, match="no keys"):
        s2_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0])
    with pytest.raises(CaptureError, match="no queries"):
        s2_attention(q[:, :, :0], k, v)
    with pytest.raises(CaptureError, match="100 queries do not fit 90 keys"):
        s2_attention(q, k[:, :, :90], v[:, :, :90])
    with pytest.raises(CaptureError, match="only the causal form"):
        S2Cache(4, 2, causal=False)
