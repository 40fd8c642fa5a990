"""Rooms as arms that can be timed: a layer in one place, without the linear projections that all of them have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Mechanism, Mixer, Place
from workbench.mechanisms.frame import named

HEADS, WIDTH = 12, 64
BASE = "sqa:mha"
"""Plain attention: `scaled_dot_product_attention` on all heads."""
BESIDE = (BASE, "sqa:gqa", "sqa:mqa", "sqa:xsqa", "deconstructed:keys", "s2aformer:fewer keys")
"""What is measured beside each room's own form."""


class Known(nn.Module):
    """A module whose output for inputs of a shape is made once."""

    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.made, self.known = made, dict[tuple[int, ...], Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        """What was made when the first input of this shape came."""
        shape = tuple(x.shape)
        if shape not in self.known:
            self.known[shape] = self.made(x)
        return self.known[shape]


def default_names() -> list[str]:
    """All rooms, and forms of them that claims are of."""
    return [*mechanisms.list().names, *BESIDE]


def room_of(name: str) -> tuple[Mechanism, str | None]:
    """The mechanism and the variant of "agent" or "sqa:mha"."""
    return named(name)


def place_of(room: Mechanism, length: int) -> Place:
    """A place of so many tokens, causal where the room can be; a grid as nearly square as can be."""
    grid = None
    if room.card.grid:
        height = next(h for h in range(math.isqrt(length), 0, -1) if length % h == 0)
        grid = (height, length // height)
    return Place(HEADS * WIDTH, HEADS, length, causal=room.card.causal != "never", grid=grid)


def layer(room: Mechanism, place: Place, variant: str | None, options: Mapping[str, Any]) -> Callable[[], Tensor]:
    """A call of the room's layer on one example, the projections of which are made beforehand."""
    torch.manual_seed(0)
    module = room.build(place, variant, **options).eval()
    if isinstance(module, Mixer):
        for name in ("q", "k", "v", "out"):
            if isinstance(projection := getattr(module, name), nn.Linear):
                setattr(module, name, Known(projection))
    inputs = {name: tensor[:1] for name, tensor in room.example(place).items()}

    def call() -> Tensor:
        with torch.no_grad():
            made: Tensor = module(**inputs)
        return made

    return call


def arm(name: str, length: int, **options: Any) -> Callable[[], Tensor]:
    """A call of a room's layer on so many tokens.

    Raises:
        WorkbenchError: the room cannot stand in a place of this length.
    """
    room, variant = room_of(name)
    return layer(room, place_of(room, length), variant, options)


def base(name: str, length: int) -> Callable[[], Tensor]:
    """Plain attention in the place of a room: causal where that is, on all tokens where it is not."""
    room, _ = room_of(name)
    plain, variant = room_of(BASE)
    causal = room.card.causal != "never"
    return layer(plain, Place(HEADS * WIDTH, HEADS, length, causal=causal), variant, {})


def stands(name: str, length: int) -> str:
    """Why a room cannot stand in a place of so many tokens; empty where it can."""
    try:
        room, variant = room_of(name)
        room.build(place_of(room, length), variant)
    except WorkbenchError as error:
        return error.message
    return ""
