"""DaViT against timm's and Florence-2's with their weights, and what the paper's two attentions promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import workbench
from support.unavailable import unavailable
from support.vision import timm
from workbench import WorkbenchError, mechanisms
from workbench.errors import CaptureError
from workbench.mechanisms import Place
from workbench.mechanisms.davit import ChannelAttention, WindowAttention, additive_scores

GRID = (5, 7)
PLACE = Place(24, 4, 35, causal=False, grid=GRID)


def _channels(place: Place = PLACE, **options: Any) -> ChannelAttention:
    torch.manual_seed(0)
    made = mechanisms.get("davit-channels").build(place, **options).double()
    assert isinstance(made, ChannelAttention)
    return made


def _windows(place: Place = PLACE, **options: Any) -> WindowAttention:
    torch.manual_seed(0)
    made = mechanisms.get("davit-windows").build(place, **options).double()
    assert isinstance(made, WindowAttention)
    return made


def _random(n: int = 35, width: int = 24) -> Tensor:
    return torch.randn(2, n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _timm(name: str, *args: Any, **options: Any) -> Any:
    try:
        made = getattr(timm().models.davit, name)
    except ModuleNotFoundError as error:
        unavailable(str(error))
    torch.manual_seed(0)
    return made(*args, **options).double().eval()


def _florence(name: str) -> Any:
    config = transformers.Florence2VisionConfig(
        embed_dim=[24], num_heads=[4], num_groups=[4], depths=[1], window_size=3, qkv_bias=True
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    made = getattr(transformers.models.florence2.modeling_florence2, name)
    return made(config, stage_idx=0).double().eval()


@torch.no_grad()
def _copied(ours: Any, theirs: Any, order: str = "qkv") -> Tensor:
    """Our layer takes the weights of theirs; the roles of its three projections are as `order` says."""
    for role, weight, bias in zip(
        order, theirs.qkv.weight.chunk(3), theirs.qkv.bias.chunk(3) if theirs.qkv.bias is not None else (0.0,) * 3,
        strict=True,
    ):  # fmt: skip
        projection = getattr(ours, role)
        projection.weight.copy_(weight)
        projection.bias.copy_(torch.as_tensor(bias))
    ours.out.weight.copy_(theirs.proj.weight)
    offset: Tensor = theirs.proj.bias.detach()  # our projections have none
    return offset


@torch.no_grad()
def test_our_channels_are_timm_s_and_florence_s() -> None:
    x = _random()
    # In the first release what is called q is read, k asks and v answers.
    for theirs, options, order in (
        (_timm("ChannelAttention", 24, num_heads=4, qkv_bias=True), {}, "vqk"),
        (_timm("ChannelAttentionV2", 24, num_heads=4), {"scale": "tokens"}, "qkv"),
        (_timm("ChannelAttentionV2", 24, num_heads=4, dynamic_scale=False), {}, "qkv"),
        (_florence("Florence2VisionChannelAttention"), {"scale": "tokens"}, "qkv"),
    ):
        ours = _channels(**options)
        offset = _copied(ours, theirs, order)
        torch.testing.assert_close(ours(x) + offset, theirs(x), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_our_windows_are_timm_s_and_florence_s_with_what_fills_them_up() -> None:
    x = _random()
    ours = _windows(window=3)
    theirs = _florence("Florence2VisionWindowAttention")
    offset = _copied(ours, theirs)
    torch.testing.assert_close(ours(x) + offset, theirs(x.unflatten(1, GRID)), atol=1e-10, rtol=1e-10)
    attention = _timm("WindowAttention", 24, (3, 3), num_heads=4)
    offset = _copied(ours, attention)
    davit = timm().models.davit
    image = nn.functional.pad(x.unflatten(1, GRID), (0, 0, 0, 2, 0, 1))
    parts = attention(davit.window_partition(image, (3, 3)).flatten(1, 2)).unflatten(1, (3, 3))
    want = davit.window_reverse(parts, (3, 3), 6, 9)[:, :5, :7].flatten(1, 2)
    torch.testing.assert_close(ours(x) + offset, want, atol=1e-10, rtol=1e-10)


def test_a_window_sees_nothing_of_the_next_and_channels_see_all() -> None:
    x = _random()[:1].requires_grad_()
    rows, columns = torch.arange(35) // 7, torch.arange(35) % 7
    for layer, reached in ((_windows(window=3), None), (_channels(), torch.ones(35, 35, dtype=torch.bool))):
        moved = torch.zeros(35, 35, dtype=torch.bool)
        y = layer(x)
        for i in range(35):
            (gradient,) = torch.autograd.grad(y[0, i].square().sum(), x, retain_graph=True)
            moved[i] = gradient[0].abs().sum(-1) > 0
        one = (rows[:, None] // 3 == rows // 3) & (columns[:, None] // 3 == columns // 3)
        assert torch.equal(moved, one if reached is None else reached)


@torch.no_grad()
def test_a_window_of_the_whole_image_is_attention_over_all_of_it() -> None:
    place = Place(24, 4, 36, causal=False, grid=(6, 6))
    layer, x = _windows(place, window=6), _random(36)
    plain = mechanisms.get("sqa").build(Place(24, 4, 36, causal=False), "mha").double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=1e-10)


@torch.no_grad()
def _map(layer: nn.Module, x: Tensor) -> Any:
    with workbench.attach(layer) as wb, wb.capture([]) as cap:
        layer(x)
    return cap[0].pattern


@torch.no_grad()
def test_the_channels_map_does_not_know_where_tokens_stand() -> None:
    layer, x = _channels(), _random()
    turned = torch.randperm(35, generator=torch.Generator().manual_seed(2))
    pattern = _map(layer, x)
    assert pattern.shape == (2, 4, 6, 6)
    torch.testing.assert_close(pattern.dense().sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(_map(layer, x[:, turned]).dense(), pattern.dense(), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(layer(x[:, turned]), layer(x)[:, turned], atol=1e-12, rtol=1e-10)
    with torch.no_grad():
        layer.q.weight.zero_(), layer.q.bias.zero_()
    even = _map(layer, x).dense()
    torch.testing.assert_close(even, torch.full_like(even, 1 / 6))
    alone = _channels(Place(6, 6, 35, causal=False))  # a channel of its own in each group
    assert bool((_map(alone, _random(width=6)).dense() == 1).all())
    torch.testing.assert_close(alone(_random(width=6)), alone.out(alone.v(_random(width=6))), atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_a_score_is_what_the_tokens_add_to_it() -> None:
    layer, x = _channels(), _random()
    pattern = _map(layer, x)
    q, k, _ = layer.heads(x)
    scores = q @ k.mT / 6**0.5
    for query, key in ((0, 3), (5, 5), (-1, 0)):
        parts = pattern.score_parts(query, key)
        assert parts.shape == (2, 4, 35)
        torch.testing.assert_close(parts.sum(-1), scores[:, :, query, key], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(parts[1, 2], (q * 6**-0.5)[1, 2, query] * k[1, 2, key], atol=1e-12, rtol=1e-10)
        assert torch.equal(pattern.score_parts(query, key, [2])[:, 0], parts[:, 2])
    added = additive_scores(pattern, head=2, key=3)
    assert added.shape == (2, 1, 6, 35)
    torch.testing.assert_close(added.total[:, 0], scores[:, 2, :, 3], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(added.dense()[:, 0, 5], pattern.score_parts(5, 3)[:, 2], atol=1e-12, rtol=1e-10)
    with pytest.raises(CaptureError, match="no head 4"):
        additive_scores(pattern, head=4, key=0)
    # Every token twice doubles the scores: the map depends on the resolution, unless scores are scaled by it.
    twice = torch.cat((x, x), dim=1)
    for scale, factor in (("width", 2.0), ("tokens", 2**0.5)):
        one, two = _channels(scale=scale), _channels(Place(24, 4, 70, causal=False), scale=scale)
        was, now = (_map(*each).score_parts(1, 2).sum(-1) for each in ((one, x), (two, twice)))
        torch.testing.assert_close(now, factor * was, atol=1e-12, rtol=1e-10)
    with pytest.raises(CaptureError, match="there are 6 of them, and no key 6"):
        pattern.score_parts(0, 6)


def test_what_goes_through_the_map_is_the_jacobian_without_the_values() -> None:
    place = Place(8, 2, 5, causal=False)
    layer, x = _channels(place), _random(5, 8)
    found = layer.through_map(x)
    assert found.shape == (2, 5, 5)
    one = x[:1].requires_grad_()
    held = layer.heads(one)[2].detach()
    q, k, _ = layer.heads(one)
    y = layer.finish(layer.mix(q, k, held, one), held, one)
    for p in range(5):
        rows = torch.stack([torch.autograd.grad(y[0, p, c], one, retain_graph=True)[0][0] for c in range(8)])
        torch.testing.assert_close(found[0, p], rows.square().sum((0, 2)).sqrt(), atol=1e-12, rtol=1e-10)
    assert bool((found > 0).all())


@pytest.mark.parametrize("size", [96, 64], ids=["whole", "filled up"])
@torch.no_grad()
def test_the_tower_of_florence_2_is_read_with_windows_and_channels(size: int) -> None:
    config = transformers.Florence2VisionConfig(
        embed_dim=[20, 40], num_heads=[2, 4], num_groups=[2, 4], depths=[1, 1], window_size=3, patch_size=[7, 3],
        patch_stride=[4, 2], patch_padding=[3, 1], patch_prenorm=[False, True],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.models.florence2.modeling_florence2.Florence2VisionBackbone(config).eval()
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with workbench.attach(model) as wb:
        report = wb.verify(pixels)
        assert report.ok, report.table
        side = size // 4
        windows = [(-(-n // 3)) ** 2 for n in (side, side // 2)]
        assert [(s.kind, s.windows, s.n_heads) for s in wb.sites] == [
            ("window", windows[0], 2), ("channel", 1, 2), ("window", windows[1], 4), ("channel", 1, 4),
        ]  # fmt: skip
        assert not [one for one in wb.sites.unread if not one.cls.startswith("Conv")], wb.sites
        with wb.capture(["entropy", "distance"], values=True) as cap:
            bare = model(pixels)
        found = cap[1]
        assert found.pattern.shape == (2, 2, 10, 10)
        assert cap[3].pattern.score_parts(0, 1).shape == (2, 4, (side // 2) ** 2)
        with pytest.raises(CaptureError, match='kind "channel"'):
            _ = found.distance
        with wb.ablate((cap[1].site, 0)):
            assert not torch.allclose(model(pixels)[0], bare[0])


@torch.no_grad()
def test_timm_s_davit_is_read_with_windows_and_channels() -> None:
    try:
        davit = timm().models.davit.DaVit
    except ModuleNotFoundError as error:
        unavailable(str(error))
    torch.manual_seed(0)
    model = davit(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=3, num_classes=5).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with workbench.attach(model) as wb:
        report = wb.verify(pixels)
        assert report.ok, report.table
        windows = [6**2, 3**2]  # of 16 and 8 patches a side, filled up
        assert [(s.kind, s.windows, s.n_heads) for s in wb.sites] == [
            ("window", windows[0], 2), ("channel", 1, 2), ("window", windows[1], 4), ("channel", 1, 4),
        ]  # fmt: skip
        with wb.capture(["entropy"], values=True) as cap:
            bare = model(pixels)
        assert [cap[s.name].pattern.shape for s in wb.sites] == [
            (72, 2, 9, 9), (2, 2, 8, 8), (18, 4, 9, 9), (2, 4, 8, 8),
        ]  # fmt: skip
        with wb.ablate((cap[1].site, 0)):
            assert not torch.allclose(model(pixels), bare)


@torch.no_grad()
def test_channels_as_wide_as_the_image_has_positions_are_told_by_their_values() -> None:
    torch.manual_seed(0)
    model = _florence("Florence2VisionChannelAttention")
    x = _random(6)  # groups have six channels, too
    whole = nn.Sequential(model)
    with workbench.attach(whole) as wb, wb.capture(["entropy"], z=True, values=True) as cap:
        whole(x)
    assert cap[0].site.kind == "channel"
    q, k, v = model.qkv(x).reshape(2, 6, 3, 4, 6).permute(2, 0, 3, 4, 1)
    want = (q @ k.mT / 6**0.5).softmax(-1)
    torch.testing.assert_close(cap[0].pattern.dense(), want)
    torch.testing.assert_close(cap[0].z.transpose(1, 2), want @ v)


def test_options_that_it_cannot_take_are_named() -> None:
    with pytest.raises(WorkbenchError, match="window=0 holds no patch"):
        _windows(window=0)
    with pytest.raises(WorkbenchError, match='scale="length" is not known'):
        _channels(scale="length")
