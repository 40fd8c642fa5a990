"""Reads the PDFs that pages make: size, texts as a reader would copy them, fonts and pictures."""

from __future__ import annotations

import io
import re
import zlib
from dataclasses import dataclass

from fontTools.ttLib import TTFont


@dataclass(frozen=True)
class Object:
    """One object of the file: what its dictionary says, and its stream as it was before it was made small."""

    words: str
    stream: bytes


@dataclass(frozen=True)
class Pdf:
    """A file of one page.

    Attributes:
        size: width and height in points.
        texts: each line of text, as its glyphs are mapped to characters.
        glyphs: how many different glyphs there are, and how many of them have no outline though they are no space.
        pictures: width and height of each in pixels.
    """

    title: str
    size: tuple[float, float]
    texts: list[str]
    glyphs: int
    bare: list[str]
    pictures: list[tuple[int, int]]
    content: str


def objects(data: bytes) -> dict[int, Object]:
    """All objects by their numbers, found where the file's table says that they are."""
    start = int(re.search(rb"startxref\n(\d+)\n%%EOF\n$", data)[1])  # type: ignore[index]
    assert data.startswith(b"%PDF-1.7\n")
    assert data[start : start + 5] == b"xref\n"
    places = [int(place) for place in re.findall(rb"(\d{10}) 00000 n \n", data[start:])]
    found = {}
    for number, place in enumerate(places, start=1):
        head = re.match(rb"(\d+) 0 obj\n(.*?)\n(stream\n|endobj\n)", data[place:], re.DOTALL)
        assert head is not None
        assert int(head[1]) == number
        stream = b""
        if head[3] == b"stream\n":
            length = int(re.search(rb"/Length (\d+)", head[2])[1])  # type: ignore[index]
            stream = data[place + head.end() : place + head.end() + length]
            assert data[place + head.end() + length :].startswith(b"\nendstream\nendobj\n")
            if b"/FlateDecode" in head[2]:
                stream = zlib.decompress(stream)
        found[number] = Object(head[2].decode("ascii"), stream)
    return found


def _number(words: str, name: str) -> int:
    found = re.search(rf"{re.escape(name)} ?(\d+) 0 R", words)
    assert found is not None, f"{words} has no {name}"
    return int(found[1])


def _characters(stream: bytes) -> dict[int, str]:
    """Glyph -> the text that it stands for."""
    pairs = re.findall(rb"<([0-9a-f]{4})> <([0-9a-f]*)>\n", stream.partition(b"endcodespacerange")[2])
    return {int(code, 16): bytes.fromhex(text.decode()).decode("utf-16-be") for code, text in pairs}


def read(data: bytes) -> Pdf:
    """The page of a file."""
    found = objects(data)
    page = next(each.words for each in found.values() if each.words.startswith("<< /Type /Page /"))
    about = next(each.words for each in found.values() if each.words.startswith("<< /Title"))
    title = bytes.fromhex(re.search(r"/Title <feff([0-9a-f]*)>", about)[1]).decode("utf-16-be")  # type: ignore[index]
    box = re.search(r"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", page)
    assert box is not None
    characters, glyphs, bare = {}, 0, []
    for name, number in re.findall(r"(/F\d+) (\d+) 0 R", page):
        outer = found[int(number)].words
        texts = _characters(found[_number(outer, "/ToUnicode")].stream)
        inner = found[_number(outer, "/DescendantFonts [")].words
        file = found[_number(found[_number(inner, "/FontDescriptor")].words, "/FontFile2")].stream
        font = TTFont(io.BytesIO(file))
        shapes = [font["glyf"][name] for name in font.getGlyphOrder()]
        assert len(shapes) == len(texts) + 1
        bare += [text for code, text in texts.items() if not shapes[code].numberOfContours and text.strip()]
        characters[name], glyphs = texts, glyphs + len(texts)
    content = found[_number(page, "/Contents")].stream.decode("ascii")
    lines = [
        "".join(characters[name][int(code, 16)] for code in re.findall(r"<([0-9a-f]{4})>", shown))
        for name, shown in re.findall(r"BT (/F\d+) .*? Tm \[(.*?)\] TJ ET", content)
    ]
    sizes = [re.search(r"/Subtype /Image /Width (\d+) /Height (\d+)", each.words) for each in found.values()]
    pictures = [(int(size[1]), int(size[2])) for size in sizes if size is not None]
    return Pdf(title, (float(box[1]), float(box[2])), lines, glyphs, bare, pictures, content)
