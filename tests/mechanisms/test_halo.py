"""Blocks with a halo against two packages, against neighborhood attention inside the image, and at its limits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import workbench
from support.judges import judges, missing
from support.unavailable import unavailable
from support.vision import timm
from workbench import WorkbenchError, mechanisms
from workbench.errors import CaptureError
from workbench.kernels.grouped import halo_attention, halo_groups, local_attention, shifted_attention
from workbench.kernels.neighborhood import NeighborhoodLayout, neighborhood_attention
from workbench.mechanisms import Place

GRID = (6, 9)


def _halonet() -> Any:
    try:
        with judges():
            from halonet_pytorch import HaloAttention
    except ImportError as error:
        missing(error)
    torch.manual_seed(0)
    return HaloAttention(dim=24, block_size=3, halo_size=2, dim_head=6, heads=4).eval()


def _timm(**options: Any) -> Any:
    try:
        made = timm().layers.get_attn("halo")
    except ModuleNotFoundError as error:
        unavailable(str(error))
    torch.manual_seed(0)
    layer = made(24, num_heads=4, block_size=3, halo_size=2, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def _random(n: int = 54, width: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(3, 2, 4, n, width, dtype=torch.float64).unbind()


@torch.no_grad()
def test_our_layer_is_halonet_pytorch_s() -> None:
    judge = _halonet()
    ours = mechanisms.get("halo").build(Place(24, 4, 54, causal=False, grid=GRID), block=3, halo=2)
    key, value = judge.to_kv.weight.chunk(2)
    for mine, theirs in ((ours.q, judge.to_q.weight), (ours.k, key), (ours.v, value)):
        mine.weight.copy_(theirs)
        mine.bias.zero_()
    ours.out.weight.copy_(judge.to_out.weight)
    ours.rel_height.copy_(judge.rel_pos_emb.rel_height)
    ours.rel_width.copy_(judge.rel_pos_emb.rel_width)
    x = torch.randn(2, 24, *GRID)
    want = judge(x).flatten(2).transpose(1, 2) - judge.to_out.bias
    torch.testing.assert_close(ours(x.flatten(2).transpose(1, 2)), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [_halonet, _timm, lambda: _timm(qkv_bias=True, scale_pos_embed=True)])
@torch.no_grad()
def test_other_people_s_layers_are_read(make: Any) -> None:
    judge, x = make(), torch.randn(2, 24, *GRID)
    model = torch.nn.Sequential(judge)
    with workbench.attach(model) as wb:
        report = wb.verify(input=x)
        assert report.ok, report.table
        with wb.capture(["entropy"], values=True) as cap:
            bare = model(x)
        assert [site.kind for site in wb.sites] == ["self"]
        with wb.ablate((0, 2)):
            assert not torch.allclose(model(x), bare)
    pattern = cap[0].pattern
    assert pattern.shape == (2, 4, 54, 54)
    sums = pattern.dense().sum(-1)
    if type(judge).__name__ == "HaloAttn":
        assert bool((sums <= 1 + 1e-6).all())
        assert sums.min() < 0.9  # every window of 7 reaches over an edge of 6 rows
        assert not pattern.normalised
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums))


@torch.no_grad()
def test_inside_the_image_it_is_neighborhood_attention_with_a_stride() -> None:
    block, halo, grid = 4, 2, (16, 16)
    q, k, v = _random(256)
    ours = halo_attention.pattern_of(q, k, v, grid=grid, block=block, halo=halo).dense() > 0
    layout = NeighborhoodLayout(grid, block + 2 * halo, stride=block)
    theirs = layout.visible(slice(0, 256), slice(0, 256), torch.tensor([0]))[0]
    rows = torch.arange(256) // 16
    columns = torch.arange(256) % 16
    inner = (rows >= 4) & (rows < 12) & (columns >= 4) & (columns < 12)
    assert torch.equal(ours[0, 0][inner], theirs[inner])
    assert not torch.equal(ours[0, 0], theirs)


@torch.no_grad()
def test_blocks_of_one_pixel_are_neighborhoods_but_at_the_border() -> None:
    """A neighborhood at the border is moved inwards and keeps its nine keys, a window with a halo is cut off there."""
    q, k, v = _random()
    ours = halo_attention.pattern_of(q, k, v, grid=GRID, block=1, halo=1).dense()
    theirs = neighborhood_attention.pattern_of(q, k, v, shape=GRID, window=3).dense()  # type: ignore[attr-defined]
    y, x = torch.arange(54) // 9, torch.arange(54) % 9
    inner = (y > 0) & (y < 5) & (x > 0) & (x < 8)
    torch.testing.assert_close(ours[:, :, inner], theirs[:, :, inner])
    assert bool(((ours > 0) != (theirs > 0)).any(-1)[:, :, ~inner].all())
    for each in (ours, theirs):
        torch.testing.assert_close(each.sum(-1), torch.ones(2, 4, 54, dtype=torch.float64))


@torch.no_grad()
def test_what_timm_s_rows_lack_is_the_weight_of_the_zeros_around_the_image() -> None:
    """They have values of zero: with ones elsewhere it gives what is left, and where scores are even, what is seen."""
    judge, x = _timm(qkv_bias=True), torch.randn(2, 24, *GRID)
    values = torch.arange(48).view(4, 12)[:, 6:].flatten()  # behind the keys of each head
    judge.kv.weight[values], judge.kv.bias[values] = 0.0, 1.0
    seen = F.avg_pool2d(F.pad(torch.ones(1, *GRID), (2, 2, 2, 2)), 7, stride=3)  # of each block's window
    for even in (False, True):
        if even:
            judge.q.weight.zero_(), judge.q.bias.zero_()
        with workbench.attach(torch.nn.Sequential(judge)) as wb, wb.capture(["entropy"]) as cap:
            given = wb.model(x).unflatten(1, (4, 6))
        rows = cap[0].pattern.dense().sum(-1).unflatten(-1, GRID)
        torch.testing.assert_close(rows[:, :, None].expand_as(given), given)
    torch.testing.assert_close(rows, seen.repeat_interleave(3, 1).repeat_interleave(3, 2).expand_as(rows))


@torch.no_grad()
def test_its_limits_are_windows_single_pixels_and_all_of_the_image() -> None:
    q, k, v = _random()
    whole = halo_attention(q, k, v, grid=GRID, block=3, halo=9)
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(q, k, v))
    y, x = torch.arange(54) // 9, torch.arange(54) % 9
    windows = (y[:, None] // 3 == y // 3) & (x[:, None] // 3 == x // 3)
    near = ((y[:, None] - y).abs() <= 2) & ((x[:, None] - x).abs() <= 2)
    for options, mask in (({"block": 3, "halo": 0}, windows), ({"block": 1, "halo": 2}, near)):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(halo_attention(q, k, v, grid=GRID, **options), want, atol=1e-12, rtol=1e-10)
        pattern = halo_attention.pattern_of(q, k, v, grid=GRID, **options)
        assert torch.equal(pattern.seen.queries_per_key.expand(1, 4, -1)[0, 0], mask.sum(0))


def test_gradients_come_after_a_call_that_had_none() -> None:
    halo_groups.cache_clear()
    tables = dict(zip(("rel_height", "rel_width"), torch.randn(2, 13, 6, dtype=torch.float64), strict=True))
    q, k, v = _random()
    with torch.inference_mode():
        halo_attention(q, k, v, grid=GRID, block=3, halo=2, **tables)
    q.requires_grad_()
    halo_attention(q, k, v, grid=GRID, block=3, halo=2, **tables).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_large_scores_of_halves_are_those_of_float64(dtype: torch.dtype) -> None:
    q, k, v = ((8 * t).to(dtype) for t in _random(width=64))
    v = v / 8
    tables = dict(zip(("rel_height", "rel_width"), torch.randn(2, 13, 64).to(dtype), strict=True))
    wide = {name: table.double() for name, table in tables.items()}
    z = halo_attention(q, k, v, grid=GRID, block=3, halo=2, **tables)
    want = halo_attention(q.double(), k.double(), v.double(), grid=GRID, block=3, halo=2, **wide)
    torch.testing.assert_close(z.double(), want, atol=1e-3, rtol=torch.finfo(dtype).eps)
    assert halo_attention(q * 50, k * 50, v, grid=GRID, block=3, halo=2).isfinite().all()


@pytest.mark.parametrize("attend", [
    partial(halo_attention, grid=GRID, block=3, halo=2), partial(local_attention, block=4),
    partial(shifted_attention, group=6),
])  # fmt: skip
def test_queries_and_keys_are_of_one_sequence(attend: Any) -> None:
    q, k, v = _random()
    more = torch.cat((k, k[:, :, :3]), dim=2)
    pattern_of = partial(attend.func.pattern_of, **attend.keywords)
    with pytest.raises(CaptureError, match="one sequence, not of 54 queries and 57 keys"):
        attend(q, more, more)
    with pytest.raises(CaptureError, match="one sequence, not of 54 queries and 57 keys"):
        pattern_of(q, more, more)
    if attend.func is not shifted_attention:
        with pytest.raises(CaptureError, match="groups of 4 heads take as many of keys, not 2"):
            attend(q, k[:, :2], v[:, :2])


@pytest.mark.parametrize(("grid", "block", "halo"), [(GRID, 3, 2), ((5, 5), 5, 0)], ids=["blocks", "all of the image"])
@torch.no_grad()
def test_relative_positions_are_those_of_an_explicit_table(grid: tuple[int, int], block: int, halo: int) -> None:
    n, edge = grid[0] * grid[1], block + 2 * halo
    q, k, v = _random(n)
    height, width = torch.randn(2, 2 * edge - 1, 6, dtype=torch.float64).unbind()
    tables = {"rel_height": height, "rel_width": width}
    pattern = halo_attention.pattern_of(q, k, v, grid=grid, block=block, halo=halo, **tables)
    scores = q @ k.mT / 6**0.5
    for i in range(n):
        for j in range(n):
            (y, x), (ky, kx) = divmod(i, grid[1]), divmod(j, grid[1])
            row, column = (
                at - (of // block * block - halo) for at, of in ((ky, y), (kx, x))
            )  # of the key in the window
            if 0 <= row < edge and 0 <= column < edge:
                at = height[edge - 1 + row - y % block] + width[edge - 1 + column - x % block]
                scores[:, :, i, j] += q[:, :, i] @ at
            else:
                scores[:, :, i, j] = -torch.inf
    torch.testing.assert_close(pattern.dense(), scores.softmax(-1), atol=1e-12, rtol=1e-10)
    z = halo_attention(q, k, v, grid=grid, block=block, halo=halo, **tables)
    torch.testing.assert_close(z, scores.softmax(-1) @ v, atol=1e-12, rtol=1e-10)


def test_grids_that_blocks_do_not_divide_are_named() -> None:
    halo = mechanisms.get("halo")
    with pytest.raises(WorkbenchError, match="blocks of 4 do not divide a grid of 6 × 9") as caught:
        halo.build(Place(24, 4, 54, causal=False, grid=GRID), block=4)
    assert "one of 1, 3" in str(caught.value.hint)
    with pytest.raises(WorkbenchError, match="halo=-1"):
        halo.build(Place(24, 4, 54, causal=False, grid=GRID), halo=-1)
    q, k, v = _random()
    with pytest.raises(CaptureError, match="54 positions are no grid of 6 × 8"):
        halo_attention(q, k, v, grid=(6, 8), block=2, halo=1)
    with pytest.raises(CaptureError, match="both or none"):
        halo_attention(q, k, v, grid=GRID, block=3, halo=1, rel_height=torch.ones(9, 6))
    with pytest.raises(CaptureError, match=r"rel_height must be \[9, 6\]"):
        halo_attention(q, k, v, grid=GRID, block=3, halo=1, rel_height=torch.ones(8, 6), rel_width=torch.ones(9, 6))


@torch.no_grad()
def test_moving_the_image_by_a_block_moves_what_is_inside() -> None:
    grid, options = (12, 12), {"block": 3, "halo": 2}
    q, k, v = (t.unflatten(2, grid) for t in _random(144))
    tables = dict(zip(("rel_height", "rel_width"), torch.randn(2, 13, 6, dtype=torch.float64), strict=True))

    def attend(move: int) -> torch.Tensor:
        moved = (t.roll(move, dims=3).flatten(2, 3) for t in (q, k, v))
        return halo_attention(*moved, grid=grid, **options, **tables).unflatten(2, grid)

    torch.testing.assert_close(attend(3)[:, :, 3:9, 6:9], attend(0)[:, :, 3:9, 3:6])
    assert not torch.allclose(attend(1)[:, :, 3:9, 4:7], attend(0)[:, :, 3:9, 3:6])
