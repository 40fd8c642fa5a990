"""The pictures that a notebook keeps of views: few colours that are right, and one for each theme."""

from __future__ import annotations

import runpy
from base64 import b64decode, b64encode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.views import Selection, View, attention_pattern, token_strip, what_if
from workbench.views.base import drawing, scales
from workbench.views.base.few_colours import few_colours
from workbench.views.base.stills import Stills

MAKER = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_notebooks.py"))


def pixels(png: bytes) -> np.ndarray:
    """[height, width, 3]."""
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def sparse(theme: str) -> tuple[bytes, tuple[int, ...], tuple[int, ...]]:
    """The picture of a map with many weights between 0 and 1, and the colours of 0 and of 1."""
    weights = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril()
    weights[0, 0, torch.arange(24), torch.arange(24)] = 0.0
    weights[0, 0, 5, 2] = 1.0
    view = attention_pattern(weights / weights.sum(-1, keepdim=True).clamp(min=1e-9), heads=[0])
    low, high = (tuple(int(255 * part + 0.5) for part in scales.sequential(theme)(at)[:3]) for at in (0.0, 1.0))
    png = view.to_png(theme=theme)
    assert isinstance(png, bytes)
    return png, low, high


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("most", [96, 128, 200])
def test_nothing_and_the_end_of_a_scale_stay_what_they_are(theme: str, most: int) -> None:
    png, nothing, most_of_all = sparse(theme)
    few = few_colours(Image.open(BytesIO(png)), most)
    before, after = pixels(png), np.asarray(few.convert("RGB"))
    zero = (before == nothing).all(-1)
    assert zero.sum() > 200
    assert (after[zero] == nothing).all()
    end = (before == most_of_all).all(-1)
    assert end.any()
    assert (after[end] == most_of_all).all()
    assert len(np.unique(after.reshape(-1, 3), axis=0)) <= most
    assert np.abs(after.astype(int) - before).max() < 48  # of 255: no colour is far from its own


@pytest.mark.parametrize(("theme", "paper"), [("light", 255), ("dark", 23)])
def test_zero_is_close_to_the_paper(theme: str, paper: int) -> None:
    nothing = np.array(scales.sequential(theme)(0.0)[:3]) * 255
    assert np.abs(nothing - paper).max() <= 18


def test_few_enough_colours_are_kept_as_they_are() -> None:
    image = Image.effect_noise((20, 20), 60).convert("RGB")
    kept = few_colours(image, 256)
    assert kept.mode == "P"
    assert np.array_equal(np.asarray(kept.convert("RGB")), np.asarray(image))


def test_what_a_notebook_of_ours_keeps_has_the_colours_of_the_view() -> None:
    png, nothing, _ = sparse("light")
    kept = pixels(b64decode(MAKER["small"](b64encode(png).decode())))
    assert (kept == nothing).all(-1).sum() > 100
    assert (kept[0] == 255).all()
    warm = kept.astype(int)[..., 0] - kept.astype(int)[..., 2] > 6  # the scale has no such light colours
    assert not (warm & (kept.min(-1) > 200)).any()


def test_the_places_of_another_theme_are_those_that_a_picture_finds_alone() -> None:
    """With a colour bar, whose place is set otherwise than that of axes, an aspect, and texts around."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        figure.colorbar(left.imshow([[0, 1], [2, 3]]), ax=left, label="how much", location="bottom", shrink=0.7)
        right.plot([0, 1], [1000, 2000], label="a line")
        figure.legend(loc="outside upper left")
        figure.suptitle("above")
        figure.supxlabel("below")
        figure.supylabel("beside")

    def png(what: Callable[[Any], None], theme: str, places: drawing.Places | None = None) -> bytes:
        return drawing.png(what, (4, 2), theme=theme, dpi=50, colours=64, places=places)

    places = drawing.Places()
    assert png(draw, "light", places) == png(draw, "light")
    assert png(draw, "dark", places) == png(draw, "dark")

    def other(figure: Any) -> None:
        figure.subplots().set_ylabel("one alone")

    assert png(other, "dark", places) == png(other, "dark")


@pytest.mark.parametrize(
    ("view", "follows"), [(what_if(), False), (token_strip(["a"], [1.0]), True)], ids=["no", "yes"]
)
def test_a_picture_is_drawn_anew_only_where_it_shows_what_is_selected(view: View, follows: bool) -> None:
    shell = SimpleNamespace(events=SimpleNamespace(register=lambda *_: None))
    view._stills = Stills(shell, view._bundle)
    view._bundle("one")
    view._followed(Selection(token=0))
    assert view._stills._outdated == follows
