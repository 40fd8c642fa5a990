"""Colour scales of the pictures, the same as those of `shared/colour.js`."""

from __future__ import annotations

from typing import Any

import numpy as np


def sequential(theme: str | None = None) -> Any:
    """The map for values from 0 on; 0 is close to the background of the theme, by default that of the picture."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("workbench", _SEQUENTIAL[theme or ("dark" if _is_dark() else "light")])


def sequential_name(theme: str) -> str:
    """The name under which matplotlib knows it: settings take no map itself."""
    import matplotlib as mpl

    name = f"workbench-{theme}"
    if name not in mpl.colormaps:
        mpl.colormaps.register(sequential(theme), name=name)
    return name


def diverging() -> Any:
    """The map for signed values; its middle is the background of the theme."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("workbench", _DIVERGING["dark" if _is_dark() else "light"])


_RISING = {
    "light": "f7f7f4 e3eef0 c4e2e4 9bd1d4 6fbcc6 4aa3bb 3587ad 2f6a9e 324c8a 352f6d 2a1548 1a0a2e",
    "dark": "1c2029 29285a 38468a 33638d 2c728e 26828e 21918c 1f9f88 27ad81 3dbc74 5cc863 81d34d aadc32 d5e21a fde725",
}
_SEQUENTIAL = {theme: [f"#{stop}" for stop in stops.split()] for theme, stops in _RISING.items()}
_STOPS = {
    "light": "1b2f63 24509b 3b7cbf 7fb0d9 c2dcec f4f4f2 f6d0b4 e69b72 cc5f45 a12b33 681221",
    "dark": "a6d4ff 6fb0ea 3f86c6 275a8f 1d3856 24262b 52261f 8c3b2b c25c3d ec9165 ffcba4",
}
_DIVERGING = {theme: [f"#{stop}" for stop in stops.split()] for theme, stops in _STOPS.items()}


def unseen_colour() -> str:
    """The colour of cells that stand for nothing: masked, or not known. For use inside `picture`."""
    return "#2a2f36" if _is_dark() else "#e6e9ed"


def accent() -> str:
    """The colour of what is chosen. For use inside `picture`."""
    return "#ff9a7d" if _is_dark() else "#b5321c"


def frame_of(x: float, y: float, width: float = 1.0, height: float = 1.0) -> Any:
    """A frame around a chosen cell, to add to axes. For use inside `picture`."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fill=False, edgecolor=accent(), linewidth=2, zorder=3)


def _is_dark() -> bool:
    import matplotlib as mpl

    return bool(np.mean(mpl.colors.to_rgb(mpl.rcParams["figure.facecolor"])) < 0.5)


def norm(low: float, high: float, *, roots: bool) -> Any:
    """Places of values between two ends, or of the square roots of their sizes."""
    from matplotlib.colors import FuncNorm, Normalize

    if not roots:
        return Normalize(low, high)
    there, back = (lambda v: np.sign(v) * np.sqrt(np.abs(v))), (lambda v: np.sign(v) * np.square(v))
    return FuncNorm((there, back), low, high)


def ticks(low: float, high: float) -> list[float]:
    """The ends of a scale and what lies between them."""
    return [low, low / 2, 0.0, high / 2, high] if low < 0 else [low, (low + high) / 4, (low + high) / 2, high]


def limits(values: Any, *, signed: bool) -> tuple[float, float]:
    """The ends of a colour scale: 0 to a round top, or symmetric around 0; what is not finite lies beyond them."""
    known = np.abs(np.asarray(values, dtype=float))
    top = ceiling(float(known[np.isfinite(known)].max(initial=0.0)))
    return (-top, top) if signed else (0.0, top)


def ceiling(value: float) -> float:
    """The least round number that is not below the value.

    >>> ceiling(0.137), ceiling(42), ceiling(0)
    (0.15, 50.0, 1.0)
    """
    if not value > 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return float(round(next(step for step in steps if step * power >= value * 0.9999) * power, 12))


def colours(values: Any, *, signed: bool) -> list[str]:
    """A hex colour per value; what is not known is grey."""
    import matplotlib as mpl

    low, high = limits(values, signed=signed)
    scale = diverging() if signed else sequential()
    places = (np.asarray(values, dtype=float) - low) / (high - low)
    return [unseen_colour() if np.isnan(at) else mpl.colors.to_hex(scale(float(at))) for at in places]


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour (WCAG's relative luminance).

    >>> ink_on("#440154"), ink_on("#fde725")
    ('#fff', '#000')
    """
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return "#000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#fff"
