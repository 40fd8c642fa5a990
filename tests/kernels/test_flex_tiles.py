"""Tiles that FlexAttention is given fit the shared memory of three devices, by an estimate that is never too low."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import flex_attention as module

from support.triton_builds import TARGETS
from workbench.kernels import flex, flex_tiles
from workbench.kernels.flex_tiles import (
    BACKWARD,
    FORWARD,
    Tile,
    backward_bytes,
    backward_tile,
    forward_bytes,
    forward_tile,
)
from workbench.kernels.neighborhood import NeighborhoodLayout
from workbench.kernels.neighborhood.flex import flex_plan

WIDTHS = (16, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
DTYPES = (torch.float32, torch.bfloat16)
KEPT = json.loads((Path(__file__).parent / "triton" / "figures.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_fit_at_every_width(target: str, dtype: torch.dtype) -> None:
    backend, _, limit = TARGETS[target]
    for d in WIDTHS:
        for width in (d, 64):
            how = d, width, dtype.itemsize
            amd = backend == "hip"
            for key_block in (flex.BLOCK, flex.HALF):
                ahead, back = (f(*how, limit, amd, key_block) for f in (forward_tile, backward_tile))
                assert forward_bytes(ahead, *how, amd) <= limit, (d, width)
                assert backward_bytes(back, *how, amd) <= limit, (d, width)
                # As FlexAttention demands; in the pass for queries the backward takes the two the other way round.
                assert flex.BLOCK % ahead.queries == key_block % ahead.keys == 0
                assert flex.BLOCK % back.queries == flex.BLOCK % back.keys == 0
                assert key_block % back.queries == key_block % back.keys == 0


def test_pytorchs_own_choice_for_other_widths_would_not_fit() -> None:
    """FlexConfig(64, 64, 3, 4), for a width that it has no entry for."""
    assert forward_bytes(Tile(64, 64, 4, 3), 160, 160, 4) > TARGETS["sm_90"][2]
    assert forward_bytes(Tile(64, 64, 4, 3), 160, 160, 2) > TARGETS["sm_80"][2]


@pytest.mark.parametrize("target", TARGETS)
def test_the_estimate_is_no_less_than_what_such_kernels_need(target: str) -> None:
    """That of our own kernel with the output, which has the same tiles in its loop, as Triton compiles it."""
    compared = 0
    for name, found in KEPT[target].items():
        kind, dtype, width, tiles, warps, _, stages, _, has = name.split()
        if (kind, has) != ("rows", "layout"):
            continue
        m, n = map(int, tiles.split("x"))
        estimate = forward_bytes(Tile(m, n, int(warps), int(stages)), int(width), int(width),
                                 4 if dtype == "fp32" else 2, TARGETS[target][0] == "hip")  # fmt: skip
        assert found["shared"] <= estimate, name
        compared += 1
    assert compared >= 6


def test_little_memory_takes_the_smallest_tiles() -> None:
    assert forward_tile(256, 256, 4, 1000) == FORWARD[-1]
    assert backward_tile(256, 256, 2, 1000) == BACKWARD[-1]


@pytest.mark.filterwarnings("ignore:flex_attention called")
def test_flex_attention_takes_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows them all, and is given them on a GPU."""
    known = set(module.FlexKernelOptions.__annotations__)
    options = flex_tiles._options(64, 64, 2, TARGETS["sm_80"][2], False)
    assert {name.removeprefix("fwd_").removeprefix("bwd_") for name in options} <= known
    given = []
    monkeypatch.setattr(module, "flex_attention", lambda q, *rest, **how: given.append(how) or (q, module.AuxOutput()))
    x = torch.randn(1, 2, 256, 16)
    plan = flex_plan(NeighborhoodLayout((16, 16), 3), 2, torch.device("cpu"))
    flex._attend.cache_clear()
    flex._attend(False, x.dtype, 16, 16, 128, False, None, False, tuple(options.items()))(x, x, x, plan.mask)
    flex._attend.cache_clear()
    assert given[0]["kernel_options"] == options
