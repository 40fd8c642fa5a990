"""Figures for papers: SVG and PDF with their words around them, the same every time."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from support.every_view import VIEWS
from support.hostile import HOSTILE
from workbench.views import token_strip
from workbench.views.base.view import origin_line

SVG = "{http://www.w3.org/2000/svg}"


def sized(svg: bytes) -> tuple[float, float]:
    _, _, width, height = map(float, ET.fromstring(svg).attrib["viewBox"].split())
    return width, height


@pytest.mark.parametrize("kind", VIEWS)
def test_every_view_is_a_drawing_with_words_around_it(kind: str, tmp_path: Path) -> None:
    view = VIEWS[kind]()
    bare, worded = view.to_svg(words=False), view.to_svg()
    assert isinstance(bare, bytes)
    assert isinstance(worded, bytes)
    held = [view.to_svg(words=False) for _ in range(3)]  # at other places in memory
    assert held == [bare] * 3
    assert b"clip-path" not in bare or bare.count(b"url(#clip0)")
    assert b"<script" not in worded
    assert sized(worded)[1] > sized(bare)[1] + 20
    file = view.to_pdf(tmp_path / "figure.pdf")
    assert isinstance(file, Path)
    assert file.read_bytes().startswith(b"%PDF")


def test_the_background_can_be_left_out() -> None:
    from io import BytesIO

    from PIL import Image

    view = token_strip(["a", "b"], [0.0, 1.0])
    corners = [
        Image.open(BytesIO(view.to_png(words=True, transparent=clear))).convert("RGBA").getpixel((0, 0))
        for clear in (True, False)
    ]
    assert [corner[3] for corner in corners] == [0, 255]
    assert len(view.to_svg(transparent=True)) != len(view.to_svg())


def test_hostile_words_are_drawn_as_text() -> None:
    view = token_strip(["a"], [1.0], title=next(iter(HOSTILE)), caption=" ".join(HOSTILE))
    assert ET.fromstring(view.to_svg()).tag == f"{SVG}svg"


def test_the_origin_names_every_model_once() -> None:
    model = {"model_name": "gpt2", "weights_sha256": "0123456789abcdef"}
    assert origin_line({"a": model, "b": model}).startswith("gpt2, weights 0123456789ab; attention-workbench ")
    assert origin_line({}).startswith("attention-workbench ")
