"""A2Mamba's layer: its exact map against its output, its limits, and neighborhoods with scores by offset."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from support.judges import judges, missing
from workbench import WorkbenchError, mechanisms
from workbench.errors import CaptureError
from workbench.kernels.neighborhood import NeighborhoodLayout, neighborhood_attention, neighborhood_naive
from workbench.kernels.neighborhood.naive import window_of
from workbench.mechanisms import Place
from workbench.mechanisms.a2mamba import AugmentedScan, MassAttention

GRID = (5, 9)
PLACE = Place(16, 4, 45, causal=False, grid=GRID)


def _layer(place: Place = PLACE, **options: Any) -> MassAttention:
    torch.manual_seed(0)
    made = mechanisms.get("a2mamba").build(place, **options).double().eval()
    assert isinstance(made, MassAttention)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def _random(place: Place = PLACE, batch: int = 2) -> Tensor:
    return torch.randn(
        batch, place.length, place.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def _inside(layer: MassAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the scan is given."""
    q, k, v = layer.heads(x)
    return layer.attended(q, k, v), q, k, layer.bias


def _dense_near(layer: MassAttention, q: Tensor, k: Tensor) -> Tensor:
    """[batch, head, patch, patch] of both halves, pair by pair from their definition."""
    half, found = q.shape[1] // 2, q.new_full((*q.shape[:3], q.shape[2]), -torch.inf)
    for first, layout in ((0, layer.local.layout), (half, layer.dilated.layout)):
        (w, _), dilation = layout.window, layout.dilation
        for i, place in enumerate(itertools.product(*map(range, GRID))):
            seen = [window_of(p, n, w, 1, d, False) for p, n, d in zip(place, GRID, dilation, strict=True)]
            for y, x in itertools.product(*seen):
                j = y * GRID[1] + x
                offset = [(b - a) // d + w - 1 for a, b, d in zip(place, (y, x), dilation, strict=True)]
                for h in range(half):
                    score = (q[:, first + h, i] * k[:, first + h, j]).sum(-1) / q.shape[-1] ** 0.5
                    found[:, first + h, i, j] = score + layer.bias[h, offset[0], offset[1]]
    return found.softmax(-1)


@torch.no_grad()
def test_the_maps_are_those_of_windows_and_the_states_use_them_again() -> None:
    layer, x = _layer(), _random()
    assert layer.dilated.layout.dilation == (1, 3)
    with workbench.attach(layer) as wb, wb.capture([]) as cap:
        layer(x)
    assert [(site.name, site.kind) for site in wb.sites] == [
        ("local", "self"),
        ("dilated", "self"),
        ("scan", "state"),
        ("gate", "gate"),
    ]
    near = torch.cat([cap[name].pattern.dense() for name in ("local", "dilated")], dim=1)
    q, k, v = layer.heads(x)
    torch.testing.assert_close(near, _dense_near(layer, q, k), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(near.sum(-1), torch.ones_like(near[..., 0]))
    assert bool(((near > 0).sum(-1) == 9).all())
    factor = torch.nn.functional.silu(layer.gate.norm(layer.gate.project(x).mT))
    torch.testing.assert_close(cap["gate"].pattern.gates, factor)
    again = cap["scan"].patterns["attention"].dense()
    assert torch.equal(again, near.repeat_interleave(4, dim=1))
    rows, columns = (torch.arange(45) // 9, torch.arange(45) % 9)
    apart = (columns[:, None] - columns) % 3 != 0
    assert not near[:, 2:, apart].any()
    assert not near[:, :2, (rows[:, None] - rows).abs() > 2].any()
    first = near[:, :2] @ v[:, :2]
    second = near[:, 2:] @ (v[:, 2:] + first)
    want = torch.cat((first, second), dim=1).mT.flatten(1, 2).unflatten(2, GRID)
    u = torch.nn.functional.silu(layer.before(want)).flatten(2).mT
    torch.testing.assert_close(layer.attended(q, k, v), u, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"scan": False}], ids=["both", "scan alone", "attention alone"])
@torch.no_grad()
def test_the_exact_map_of_all_heads_is_the_output(options: dict[str, Any]) -> None:
    layer, x = _layer(**options), _random()
    u, q, k, bias = _inside(layer, x)
    y = layer.scan(u, q, k, bias)
    for channel in (0, 6, 15):
        into, slot = divmod(channel, 4)
        found = layer.scan.to_read(u)[..., 0] * layer.scan.fuse.bias[into]
        for head in range(4):
            E = layer.scan.exact_map(u, q, k, bias, channel=channel, head=head)
            found = found + (E @ u[:, :, head * 4 + slot, None])[..., 0]
        torch.testing.assert_close(found, y[..., channel], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_without_attention_it_is_a_scan_and_without_a_scan_attention() -> None:
    layer, x = _layer(window=1), _random()
    scan = layer.scan
    scan.fuse.weight.copy_(torch.eye(4)), scan.fuse.bias.zero_()
    u, q, k, bias = _inside(layer, x)
    delta, rate, write = scan.steps(u)
    state, rows = torch.zeros(2, 16, dtype=torch.float64), []
    for t in range(45):
        state = (delta[..., t] * rate).exp() * state + delta[..., t] * write[:, t, None] * u[:, t]
        rows.append(scan.to_read(u)[:, t] * state + scan.skip * u[:, t])
    torch.testing.assert_close(scan(u, q, k, bias), torch.stack(rows, 1), atol=1e-12, rtol=1e-10)
    # A scan that forgets at once, and is read and written by ones, leaves heads mixed by F and nothing else.
    layer = _layer(scan=False)
    scan = layer.scan
    scan.skip.zero_(), scan.fuse.bias.zero_()
    u, q, k, bias = _inside(layer, x)
    z = _dense_near(layer, q, k) @ u.unflatten(2, (4, 4)).transpose(1, 2)
    mixed = torch.einsum("mn,bnid->bimd", scan.fuse.weight, z).flatten(2)
    torch.testing.assert_close(scan(u, q, k, bias), scan.to_read(u) * mixed, atol=1e-12, rtol=1e-10)
    # So does one with states, whose steps are so long that nothing is left of them, and write what they are given.
    long = _layer().scan
    long.load_state_dict({**long.state_dict(), **scan.state_dict()})
    long.steps = lambda u: (u.new_full(u.mT.shape, 1e3), u.new_full(u.shape[2:], -1.0), u.new_full(u.shape[:2], 1e-3))
    torch.testing.assert_close(long(u, q, k, bias), scan.to_read(u) * mixed, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_heads_that_are_not_mixed_read_themselves_and_attention_looks_ahead() -> None:
    layer, x = _layer(), _random()
    layer.scan.fuse.weight.copy_(torch.eye(4)), layer.scan.fuse.bias.zero_()
    u, q, k, bias = _inside(layer, x)
    own, other = (layer.scan.exact_map(u, q, k, bias, channel=5, head=head) for head in (1, 2))
    assert not other.any()
    assert own.triu(1).any()  # it reads states of later patches
    alone = _layer(window=1)
    u, q, k, bias = _inside(alone, x)
    assert not alone.scan.exact_map(u, q, k, bias, channel=5, head=1).triu(1).any()


@torch.no_grad()
def test_in_the_last_stage_all_patches_are_attended_to_with_the_same_queries_and_keys() -> None:
    layer, x = _layer(whole=True), _random()
    q, k, v = layer.heads(x)
    u = layer.read(q, k, v)
    assert torch.equal(u[:, :2], layer.local(q[:, :2], k[:, :2], v[:, :2], layer.bias))
    weights = (q @ k.mT / 2 + layer.whole.bias).softmax(-1)  # heads are four wide
    y = (weights @ u).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.mixed(q, k, v), y, atol=1e-12, rtol=1e-10)
    with workbench.attach(layer) as wb, wb.capture([]) as cap:
        layer(x)
    kinds = {site.name: site.kind for site in cap.sites}
    assert kinds == {"local": "self", "dilated": "self", "whole": "self", "gate": "gate"}
    torch.testing.assert_close(cap["whole"].pattern.dense(), weights, atol=1e-12, rtol=1e-10)


def test_the_scan_reaches_farther_than_its_windows() -> None:
    place = Place(8, 2, 63, causal=False, grid=(7, 9))
    x = _random(place, batch=1).requires_grad_()

    def reached(scan: bool) -> Tensor:
        layer = _layer(place, scan=scan)
        layer.before.weight.data.zero_()[:, :, 2, 2] = 1  # no neighbors but those of the windows
        u, q, k, bias = _inside(layer, x)
        held = [t.detach() for t in (u, q, k, bias)]
        held[0].requires_grad_()
        y = layer.scan(*held)[0, 31, :4].sum()  # of the head that sees near
        (gradient,) = torch.autograd.grad(y, held[0])
        return gradient[0, :, :4].abs().sum(-1) > 0

    near, far = reached(False), reached(True)
    assert int(near.sum()) < int(far.sum())
    assert bool(far[near].all())
    assert bool(far[:20].all())  # all that came before


def test_receptive_fields_grow_with_the_dilation_and_with_the_scan() -> None:
    place = Place(8, 2, 81, causal=False, grid=(9, 9))
    x = _random(place, batch=1)
    areas = {}
    for name, options in (("both", {}), ("attention", {"scan": False}), ("scan", {"window": 1})):
        layer = _layer(place, **options)
        for conv in (layer.before, layer.beside):
            conv.weight.data.zero_()[:, :, 2, 2] = 1
        field = mechanisms.receptive_field(layer, x, 40)
        areas[name] = [int(mechanisms.field_area(field, share)) for share in (0.2, 0.5, 0.99)]
        assert areas[name] == sorted(areas[name])
        if name == "attention":  # thrice around: on the values near, then dilated, and dilated once more on the states
            assert 0 < int((field > 0).sum()) <= 81
    assert areas["attention"][2] < areas["both"][2]
    layer = _layer(place)
    head = mechanisms.receptive_field(
        lambda t: layer.dilated(*_three(layer, t), layer.bias).transpose(1, 2).flatten(2), x, 40
    )
    reached = head[0].unflatten(0, (9, 9)).nonzero() - 4
    assert {tuple(step) for step in reached.tolist()} == set(itertools.product((-3, 0, 3), repeat=2))
    with pytest.raises(WorkbenchError, match="no token 81"):
        mechanisms.receptive_field(layer, x, 81)
    with pytest.raises(WorkbenchError, match="share=0"):
        mechanisms.field_area(head, 0)


def _three(layer: MassAttention, x: Tensor) -> list[Tensor]:
    return [t[:, 1:] for t in layer.heads(x)]


@torch.no_grad()
def test_a_window_of_the_whole_grid_is_attention_over_all_of_it() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 25, 4, dtype=torch.float64).unbind()
    bias = torch.randn(3, 9, 9, dtype=torch.float64)
    places = torch.stack((torch.arange(25) // 5, torch.arange(25) % 5))
    offset = places[:, None, :] - places[:, :, None] + 4
    scores = q @ k.mT / 2 + bias[:, offset[0], offset[1]]
    z = neighborhood_attention(q, k, v, shape=(5, 5), window=5, bias=bias)
    torch.testing.assert_close(z, scores.softmax(-1) @ v, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_scores_by_offset_that_are_zero_are_none(dilation: Any) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 63, 4, dtype=torch.float64).unbind()
    shape, window = (7, 9), 3
    bias = torch.zeros(2, 5, 5, dtype=torch.float64, requires_grad=True)
    z = neighborhood_attention(q, k, v, shape=shape, window=window, dilation=dilation, bias=bias)
    steps = (dilation,) * 2 if isinstance(dilation, int) else dilation
    want, weights, _ = neighborhood_naive(
        q, k, v, shape=shape, window=(3, 3), stride=(1, 1), dilation=steps, causal=(False, False)
    )
    torch.testing.assert_close(z, want, atol=1e-12, rtol=1e-10)
    pattern = neighborhood_attention.pattern_of(  # type: ignore[attr-defined]
        q, k, v, shape=shape, window=window, dilation=dilation, bias=bias
    )
    torch.testing.assert_close(pattern.dense(), weights, atol=1e-12, rtol=1e-10)
    z.square().sum().backward()
    assert bias.grad is not None
    assert int((bias.grad != 0).sum()) == 2 * 25


def _natten() -> Any:
    try:
        with judges():
            import natten
    except ImportError as error:
        missing(error)
    return natten


@pytest.mark.filterwarnings("ignore")  # of PyTorch, that what natten calls is not compiled
@torch.no_grad()
def test_neighborhoods_are_natten_s_and_its_layers_are_read() -> None:
    natten = _natten()
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 9, 12, 2, 16).unbind()
    ours = [t.permute(0, 3, 1, 2, 4).flatten(2, 3) for t in (q, k, v)]
    for dilation in ((1, 1), (2, 3)):
        want = natten.na2d(q, k, v, kernel_size=(3, 3), dilation=dilation).permute(0, 3, 1, 2, 4).flatten(2, 3)
        z = neighborhood_attention(*ours, shape=(9, 12), window=3, dilation=dilation, bias=torch.zeros(2, 5, 5))
        torch.testing.assert_close(z, want, atol=1e-5, rtol=1e-5)
    layer = natten.NeighborhoodAttention2D(embed_dim=32, num_heads=2, kernel_size=3, dilation=2).eval()
    model, x = torch.nn.Sequential(layer), torch.randn(2, 9, 12, 32)
    bare = model(x)
    with workbench.attach(model) as wb:
        report = wb.verify(x)
        assert report.ok, report.table
        assert [(site.kind, site.n_heads) for site in wb.sites] == [("self", 2)]
        assert not wb.sites.unread
        with wb.capture(["entropy"]) as cap:
            assert torch.equal(model(x), bare)
        with wb.ablate((0, 1)):
            assert not torch.allclose(model(x), bare)
    dense = cap[0].pattern.dense()
    assert dense.shape == (2, 2, 108, 108)
    assert bool(((dense > 0).sum(-1) == 9).all())


def test_options_that_it_cannot_take_are_named() -> None:
    with pytest.raises(WorkbenchError, match="3 heads have no halves"):
        _layer(Place(12, 3, 45, causal=False, grid=GRID))
    with pytest.raises(WorkbenchError, match="width 6 cannot be turned by rows and columns"):
        _layer(Place(12, 2, 45, causal=False, grid=GRID))
    with pytest.raises(WorkbenchError, match="window=7 is not one of 1 to 5"):
        _layer(window=7)
    with pytest.raises(WorkbenchError, match="window=2 has no middle"):
        _layer(window=2)
    with pytest.raises(WorkbenchError, match=r"x must be \[batch, 45 tokens, 16\]"):
        _layer()(torch.zeros(2, 44, 16))
    layer = _layer()
    inside = _inside(layer, _random())
    assert isinstance(layer.scan, AugmentedScan)
    with pytest.raises(WorkbenchError, match="there are 16 of them, and no channel 16"):
        layer.scan.exact_map(*inside, channel=16, head=0)
    q = torch.zeros(1, 2, 45, 4)
    for options, said in (
        ({"bias": torch.zeros(2, 3, 5)}, r"bias must be \[2, 5, 5\]"),
        ({"bias": torch.zeros(2, 5, 5), "stride": 2}, "windows that slide by one"),
        ({"bias": torch.zeros(2, 5, 5), "return_lse": True}, "no log-sum-exp"),
    ):
        with pytest.raises(CaptureError, match=said):
            neighborhood_attention(q, q, q, shape=GRID, window=3, **options)
    assert NeighborhoodLayout(GRID, 3).n_tokens == 45
