"""`gate_profile`: its numbers are those of all factors, its variances add up, and its maps lie over the image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import workbench
from workbench import CaptureError, FormatError, GateProfile
from workbench.capture.capture import Capture
from workbench.mechanisms import Place, get

GRID = (5, 7)


def _capture(room: str, x: Tensor, **options: object) -> Capture:
    torch.manual_seed(0)
    place = Place(8, 2, 35, causal=False, grid=GRID)
    module = get(room).build(place, **options).double().eval()
    with torch.no_grad(), workbench.attach(module) as wb, wb.capture() as cap:
        for part in x.split(2):
            module(part)
    return cap


X = torch.randn(5, 35, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_numbers_are_those_of_all_factors_and_variances_add_up() -> None:
    cap = _capture("van", X)
    found = workbench.gate_profile(cap, GRID)
    g = torch.cat([call[0].row_sum for call in cap.calls])  # [example, head, position]
    assert found.n_examples == 5
    assert found.heads == tuple(range(8))
    torch.testing.assert_close(found.mean, g.mean((0, 2)))
    torch.testing.assert_close(found.low, g.amin((0, 2)))
    torch.testing.assert_close(found.high, g.amax((0, 2)))
    torch.testing.assert_close(found.negative, (g < 0).double().mean((0, 2)))
    torch.testing.assert_close(found.by_input.square() + found.by_position.square(), g.var((0, 2), correction=0))
    torch.testing.assert_close(found.maps[cap.sites[0].name], g.mean((0, 1)))
    assert found.grids == {cap.sites[0].name: GRID}
    assert found.table.shape == (8, 9)


def test_what_the_input_decides_is_told_from_what_it_does_not() -> None:
    same = workbench.gate_profile(_capture("van", X[:1].expand(4, -1, -1)))
    assert float(same.by_input.max()) < 1e-12
    assert float(same.by_position.min()) > 1e-3
    flat = workbench.gate_profile(_capture("csa", X))
    channel = torch.tensor([site == "channel" for site in flat.sites])
    assert float(flat.by_position[channel].max()) < 1e-12
    assert float(flat.by_position[~channel].min()) > 1e-4
    assert flat.grids["time"] == (1, 35)


def test_scales_have_grids_of_their_own() -> None:
    found = workbench.gate_profile(_capture("medusa", X), GRID)
    assert list(found.grids.values()) == [(5, 7), (3, 4), (2, 2)]
    assert [len(found.maps[name]) for name in found.gates] == [35, 12, 4]


def test_attention_that_weighs_its_heads_is_profiled_too() -> None:
    torch.manual_seed(0)
    layer = get("moh").build(Place(16, 4, 7)).eval()
    with torch.no_grad(), workbench.attach(layer) as wb, wb.capture([]) as cap:
        layer(torch.randn(2, 7, 16))
    torch.testing.assert_close(workbench.gate_profile(cap).mean, cap[0].pattern.gates.double().mean((0, 2)))
    with torch.no_grad(), workbench.attach(layer) as wb, wb.capture(["entropy"], queries_keys=False) as cap:
        layer(torch.randn(2, 7, 16))
    with pytest.raises(CaptureError, match="no gate was captured"):
        workbench.gate_profile(cap)


def test_forwards_of_other_lengths_are_named() -> None:
    torch.manual_seed(0)
    gate = get("control_aided").build(Place(8, 2, 9)).eval()
    with torch.no_grad(), workbench.attach(gate) as wb, wb.capture() as cap:
        gate(torch.randn(1, 9, 8))
        gate(torch.randn(1, 7, 8))
    with pytest.raises(CaptureError, match="the forwards have 7, 9 positions"):
        workbench.gate_profile(cap)


def test_files_pages_and_pictures(tmp_path: Path) -> None:
    found = workbench.gate_profile(_capture("medusa", X), GRID)
    again = GateProfile.load(found.save(tmp_path / "gates.safetensors"))
    assert again.table.equals(found.table)
    assert again.grids == found.grids
    assert repr(again) == "GateProfile(3 heads of 3 gates, 5 examples)"
    views = workbench.views.all_of(found)
    assert [view.spec.kind for view in views] == ["head_atlas", "figure"]
    assert [group["label"] for group in views[0].spec.facts["groups"]] == ["Gates"]
    views += workbench.views.all_of(workbench.gate_profile(_capture("csa", X), GRID))  # the same at all positions
    for i, view in enumerate(views):
        assert view.to_png(tmp_path / f"{i}.png").stat().st_size > 1000
    assert "Gates over positions" in found.to_html()
    broken = GateProfile(**{**found.__dict__, "grids": dict.fromkeys(found.gates, (1, 2))})
    with pytest.raises(FormatError, match="no grid of 1 × 2"):
        GateProfile.load(broken.save(tmp_path / "broken.safetensors"))
