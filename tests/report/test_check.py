"""A page as written has no problems; each way to spoil it is found, also by one who knows how pages are made."""

import base64
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import parser_differences
from support.spoiled_pages import CASES, problems_of, sealed
from workbench import views
from workbench.errors import ReportError
from workbench.report import Report, check
from workbench.storage.json_text import digest, json_for_html


@pytest.fixture(scope="module")
def page(make_capture: Any) -> str:
    tokens = ["https://example.org/x.js", "<script src=//x>", "onclick=", "url(http://x)"]
    words = "See [this](https://example.org)."
    return Report("t").add(make_capture(tokens), text="see https://example.org").add(words).to_html()


def test_a_page_with_addresses_in_its_text_is_fine(page: str, tmp_path: Path) -> None:
    assert problems_of(page, tmp_path) == []
    assert sealed(page) == page


def test_a_page_of_one_view_is_fine(tmp_path: Path) -> None:
    view = views.token_strip([" a", "b"], [0.5, 1.0])
    assert check(view.to_html(tmp_path / "view.html")) == []


SPOILED = CASES | parser_differences.CASES


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_spoiled_is_found(page: str, tmp_path: Path, spoil: Callable[[str], str]) -> None:
    spoiled = spoil(page)
    assert spoiled != page
    assert problems_of(spoiled, tmp_path)
    if re.search(r'name="digest" content="([^"]+)"', spoiled):
        assert problems_of(sealed(spoiled), tmp_path)


def test_a_change_says_where_it_is(page: str, tmp_path: Path) -> None:
    spoiled = page.replace("<h1>", "<h1><img src=x>", 1)
    line = page[: page.index("<h1>")].count("\n") + 1
    first, second = problems_of(spoiled, tmp_path)
    assert f"line {line} is not what this version makes of the data" in first
    assert "<h1><img src=x>" in first
    assert second == "the page was changed after it was written"
    assert "made so" in problems_of(sealed(spoiled), tmp_path)[1]


def blocks_of(page: str) -> list[tuple[str, str]]:
    return re.findall(r'<script type="application/json" id="([\w-]+)"[^>]*>(.*?)</script>', page, re.DOTALL)


def with_block(page: str, name: str, text: str) -> str:
    """The page with another data block, its digest and the page's made to fit."""
    old = re.search(rf'id="{name}" data-digest="[^"]*">[^<]*<', page)
    assert old
    return sealed(page.replace(old[0], f'id="{name}" data-digest="{digest(text)}">{text}<', 1))


def test_a_change_in_any_block_is_found(page: str, tmp_path: Path) -> None:
    """Even by one who makes the digest of the page fit again; one of the block too is a page's own where nothing else
    says what the data do."""
    assert {name for name, _ in blocks_of(page)} >= {"view-0", "words", "provenance"}
    for name, text in blocks_of(page):
        at = max(i for i, letter in enumerate(text) if letter.isdigit())
        changed = text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :]
        spoiled = page.replace(text, changed, 1)
        assert f"the data block {name} was changed after the page was written" in problems_of(sealed(spoiled), tmp_path)
        assert "the page was changed after it was written" in problems_of(spoiled, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested"),
        ("9" * 5000, "not JSON"),
        ("[]", "not those of a page"),
        ("null", "not those of a page"),
        ('{"version": 1}', "not written as this package writes JSON"),
        ('{"version":1,"version":1}', "not JSON"),
        ("NaN", "not written as"),
        ("1e400", "not written as"),
        ('"\\ud800"', "not those of a page"),
        ("{}", "not those of a page"),
    ],
)
def test_data_of_any_kind_are_no_crash(page: str, tmp_path: Path, text: str, said: str) -> None:
    for name, _ in blocks_of(page):
        problems = problems_of(with_block(page, name, text), tmp_path)
        assert any(said in problem for problem in problems) or (name == "provenance" and problems), (name, problems)


def test_any_value_of_any_kind_in_the_data_is_no_crash(page: str, tmp_path: Path) -> None:
    """One value at a time; what is still a page of ours may pass, and then is what the package makes of it."""

    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [path, *(place for key, item in inner for place in places(item, (*path, key)))]

    nasty = [None, True, -1, 2**70, 1e300, "", "x<script>\u202e", [], {}, [[]], {"a": 1}]
    for name, text in blocks_of(page):
        value = json.loads(text)
        chosen = places(value)[1:]
        for i, place in enumerate(chosen[:: max(1, len(chosen) // 25)]):
            changed = json.loads(text)
            owner = changed
            for key in place[:-1]:
                owner = owner[key]
            owner[place[-1]] = nasty[i % len(nasty)]
            spoiled = with_block(page, name, json_for_html(changed))
            if problems_of(spoiled, tmp_path) == []:
                assert "<script>\u202e" not in spoiled


def test_what_is_deflated_is_not_inflated_beyond_what_is_shown(tmp_path: Path) -> None:
    page = str(views.token_strip([" a", "b"], [0.5, 1.0]).to_html())
    spec = json.loads(dict(blocks_of(page))["view-0"])
    (name,) = [name for name in spec["blocks"] if name.startswith("table:")][:1]
    bomb = base64.b64encode(zlib.compress(bytes(200_000_000), 9)).decode()
    spec["blocks"][name] = {"dtype": "f8", "shape": [25_000_000], "deflate": True, "base64": bomb}
    assert problems_of(with_block(page, "view-0", json_for_html(spec)), tmp_path)


@pytest.mark.parametrize(
    "text",
    ["<a " * 20_000, "<!--" * 20_000, "</" * 20_000, "&#" * 20_000, "<a x='" * 20_000, "<![CDATA[" * 20_000,
     '<script type="application/json" id="' * 20_000, "\n</main>\n" * 20_000, 'url("' + " " * 50_000],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_long_nonsense_is_read_once(text: str, tmp_path: Path) -> None:
    assert problems_of(f"<!doctype html><html><head>{text}", tmp_path)
    assert problems_of(f"<!doctype html>\n</main>\n{text}</html>", tmp_path)


def test_size_and_encoding(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    assert check(path, limit_bytes=1000) == [f"the file has {path.stat().st_size:,} bytes, the limit is 1,000"]
    head = page.encode()[:9]
    for wrong in (b"\xc0\xbcscript>", b"\xe0\x80\xbc", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80", b"\x83<"):
        path.write_bytes(head + wrong + page.encode())
        assert check(path) == ["the file is not UTF-8: byte 9"], wrong
    for coding in ("utf-16", "utf-32"):
        path.write_bytes(page.encode(coding))
        assert check(path) == ["the file is not UTF-8: byte 0"]
    for coding in ("utf-16-le", "utf-7", "cp037"):
        path.write_bytes(page.encode(coding, "replace"))
        assert check(path), coding


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no file"):
        check(tmp_path / "none.html")


def test_the_blocks_are_json(page: str) -> None:
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert [json.loads(text) for text in blocks]
