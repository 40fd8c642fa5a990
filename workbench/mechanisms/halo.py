"""HaloNet: blocks of an image attend to a window around them, with relative positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.grouped import GroupedPattern, halo_attention
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, at_places, register

_SHOWN = 4  # blocks in the signature of a head


class HaloAttention(Mixer):
    """Softmax attention of the patches of each block over the block and a halo around it.

    Args:
        place: a grid whose sides the block divides.
        block: edge of the blocks; the largest up to 8 and half a side that divides both if None.
        halo: patches around a block that are seen.
        positions: learned relative positions are added to the scores.

    Raises:
        WorkbenchError: a block that does not divide the grid, or a halo that is negative or larger than it.
    """

    def __init__(self, place: Place, block: int | None = None, halo: int = 1, positions: bool = True) -> None:
        super().__init__(place)
        assert place.grid is not None
        divide = [b for b in range(1, min(place.grid) + 1) if not any(side % b for side in place.grid)]
        small = [b for b in divide if b <= max(1, min(8, min(place.grid) // 2))]
        self.block, self.halo = small[-1] if block is None else block, halo
        if self.block < 1 or any(side % self.block for side in place.grid):
            raise WorkbenchError(
                f"blocks of {block} do not divide a grid of {' × '.join(map(str, place.grid))}",
                hint=f"take one of {', '.join(map(str, divide))}",
            )
        if not 0 <= halo <= max(place.grid):
            raise WorkbenchError(
                f"halo={halo} is not one of 0 to {max(place.grid)}", hint="0 for windows without one, such as Swin's"
            )
        edge = 2 * (self.block + 2 * halo) - 1
        sizes = (edge, self.d_head)
        make = (lambda: nn.Parameter(torch.randn(sizes) * self.d_head**-0.5)) if positions else (lambda: None)
        self.rel_height, self.rel_width = make(), make()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Each block and its window."""
        assert self.place.grid is not None
        return halo_attention(
            q, k, v, grid=self.place.grid, block=self.block, halo=self.halo, rel_height=self.rel_height,
            rel_width=self.rel_width, scaled_positions=True,
        )  # fmt: skip


def _windows(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """What the queries of the first blocks read of their windows."""
    assert isinstance(module, HaloAttention)
    assert isinstance(pattern, GroupedPattern)
    weights, found = pattern.dense()[0], dict[str, Tensor]()
    for number, (rows, columns) in enumerate(zip(pattern.rows_of[0, 0], pattern.columns_of[0, 0], strict=True)):
        if number == _SHOWN:
            break
        outside = torch.ones(weights.shape[-1], dtype=torch.bool)
        outside[columns[columns >= 0]] = False
        found[f"block {number}"] = at_places(module.place, weights[:, rows].mean(1).masked_fill(outside, torch.nan))
    return found


HALO = register(
    Mechanism(
        "halo",
        Card(
            title="HaloNet: blocked local attention",
            arxiv="2103.12731",
            equation="A = softmax((q·k + q·(r_dy + r_dx))/√d) over the (b + 2h)² patches around each block of b²",
            map="A softmax over each block's window, zero elsewhere.",
            kind="self",
            grade="exact",
            cost="O(n·(b + 2h)²) time and memory",
            causal="never",
            grid=True,
            code="No official code. halonet-pytorch (MIT) and timm (Apache-2.0) are read, and agree.",
            claims=(
                Claim("A halo lets blocks pass information on, and is better than windows without one."),
                Claim("Blocks with a halo cost less than a window of its own for each pixel."),
            ),
        ),
        HaloAttention,
        variants={"window": {"halo": 0}, "per pixel": {"block": 1, "halo": 2}},
        signature=Signature(
            "The window of a block",
            f"Of the first {_SHOWN} blocks of patches what their queries read, a mean over them; what lies outside "
            "of the block and its halo is grey.",
            _windows,
        ),
    )
)
