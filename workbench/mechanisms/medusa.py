"""MEDUSA: one body sees the whole image, and light heads make gates of it at several scales of a backbone."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.mechanisms.frame import Card, Claim, Gate, Mechanism, Place, register

Mode = Literal["mul", "residual"]


class Body(nn.Module):
    """An encoder and decoder of one level: images [batch, channel, row, column] to [batch, width, row, column]."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(d_model, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.leave = nn.Conv2d(3 * width, width, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """What the body makes of an image."""
        near = F.relu(self.enter(image))
        far = F.relu(self.deep(F.relu(self.down(near))))
        far = F.interpolate(far, size=near.shape[2:], mode="bilinear", align_corners=False)
        made: Tensor = self.leave(torch.cat((near, far), dim=1))
        return made


class ScaleGate(Gate):
    """σ(h(resized body)) at one scale: a factor for each patch, or for each channel of it; 1 + σ if "residual"."""

    def __init__(self, place: Place, width: int, mode: Mode, per_channel: bool) -> None:
        super().__init__(place)
        self.mode = mode
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, place.d_model if per_channel else 1, 1)
        )

    def parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """The features of this scale, and the factor, of the body [batch, width, row, column]."""
        assert self.place.grid is not None
        resized = F.interpolate(source, size=self.place.grid, mode="bilinear", align_corners=False)
        g = self.head(resized).flatten(2).transpose(1, 2).sigmoid()
        return x, 1 + g if self.mode == "residual" else g


class Medusa(nn.Module):
    """Gates of one shared body at each scale of a small backbone, whose scales are added up again.

    F₀ is the image, F_s a strided convolution of the gated scale before; y = Σ_s up(W_s (F_s · M_s)).

    Args:
        place: a grid.
        scales: how often the image is seen, each half as large as the one before.
        width: channels of the body; a quarter of d_model, at least 4, if None.
        mode: "mul", F · M, or "residual", F · (1 + M).
        per_channel: a factor for each channel.

    Raises:
        WorkbenchError: scales that leave no patch to halve, a width below 1, or a mode that is not known.
    """

    def __init__(
        self, place: Place, scales: int = 3, width: int | None = None, mode: Mode = "mul", per_channel: bool = False
    ) -> None:
        super().__init__()
        assert place.grid is not None
        most = max(place.grid).bit_length() if max(place.grid) > 1 else 1
        if not 1 <= scales <= most:
            raise WorkbenchError(
                f"scales={scales} of a grid of {place.grid[0]} × {place.grid[1]}", hint=f"1 to {most} of them"
            )
        if mode not in ("mul", "residual"):
            raise WorkbenchError(f'mode="{mode}" is not known', hint='"mul" or "residual"')
        width = max(4, place.d_model // 4) if width is None else width
        if width < 1:
            raise WorkbenchError(f"width={width} is no width", hint="at least 1")
        d, self.place, grids = place.d_model, place, [place.grid]
        for _ in range(scales - 1):
            grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
        places = [Place(d, 1, rows * columns, causal=False, grid=(rows, columns)) for rows, columns in grids]
        self.body = Body(d, width)
        self.stages = nn.ModuleList(nn.Conv2d(d, d, 3, stride=2, padding=1) for _ in range(scales - 1))
        self.gates = nn.ModuleList(ScaleGate(each, width, mode, per_channel) for each in places)
        self.joins = nn.ModuleList(nn.Linear(d, d) for _ in range(scales))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, token, d_model] to the same shape."""
        self.place.check(x)
        made, image = self.body(_image(x, self.place)), x
        y = torch.zeros_like(x)
        for s, (gate, join) in enumerate(zip(self.gates, self.joins, strict=True)):
            here: Any = gate
            if s:
                before: Any = self.gates[s - 1]
                image = F.relu(self.stages[s - 1](_image(image, before.place))).flatten(2).transpose(1, 2)
            image = gate(image, made)
            back = F.interpolate(_image(join(image), here.place), size=self.place.grid, mode="nearest")
            y = y + back.flatten(2).transpose(1, 2)
        return y


def _image(x: Tensor, place: Place) -> Tensor:
    """[batch, token, channel] to [batch, channel, row, column]."""
    assert place.grid is not None
    return x.transpose(1, 2).unflatten(2, place.grid)


def gate_pyramid(module: Medusa, gates: list[Tensor]) -> Tensor:
    """[batch, scale, row, column]: the gates of all scales over the image, means over channels, as fine as the finest.

    Args:
        gates: [batch, head, patch] of each scale, as `cap[site].pattern.gates` and `cap[site].row_sum` have them.

    Raises:
        WorkbenchError: not one for each scale.
    """
    if len(gates) != len(module.gates):
        raise WorkbenchError(f"there are {len(module.gates)} scales, and {len(gates)} gates")
    drawn = []
    for gate, values in zip(module.gates, gates, strict=True):
        here: Any = gate
        small = values.mean(1, keepdim=True).unflatten(2, here.place.grid)
        drawn.append(F.interpolate(small, size=module.place.grid, mode="nearest"))
    return torch.cat(drawn, dim=1)


def agreement(pyramid: Tensor) -> Tensor:
    """[scale, scale]: how alike the gates of two scales are, the correlation over patches, a mean over examples.

    NaN where a gate is the same everywhere.

    >>> agreement(torch.tensor([[[[0.0, 1.0]], [[0.2, 0.4]], [[1.0, 0.0]]]])).round(decimals=3).tolist()
    [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    """
    flat = pyramid.flatten(2).double()
    away = flat - flat.mean(-1, keepdim=True)
    size = away.norm(dim=-1)
    return ((away @ away.mT) / (size[:, :, None] * size[:, None])).mean(0)


MEDUSA = register(
    Mechanism(
        "medusa",
        Card(
            title="MEDUSA: multi-scale encoder-decoder self-attention",
            arxiv="2110.06063",
            equation="y = Σ_s up(W_s (F_s · σ(h_s(G(x))))), one body G for the gates of all scales s",
            map="A gate at each scale, whose patches are those of that scale. Equations are our definition: of the "
            "paper only the idea is known.",
            kind="gate",
            grade="exact",
            cost="O(n·d_model²)",
            causal="never",
            grid=True,
            beside="The convolutions of the body, which make the gates, and those of the backbone from scale to scale.",
            code="No official code was found.",
            claims=(
                Claim("One shared body is better than a module of its own at each scale."),
                Claim("The gates find the lesion at every scale."),
            ),
        ),
        Medusa,
        variants={"residual": {"mode": "residual"}, "one scale": {"scales": 1}, "per channel": {"per_channel": True}},
    )
)
