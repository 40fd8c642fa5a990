"""A page as written has no problems; each way to spoil it is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import ReportError
from workbench.report import Report, check


@pytest.fixture(scope="module")
def page(make_capture: Any) -> str:
    tokens = ["https://example.org/x.js", "<script src=//x>", "onclick=", "url(http://x)"]
    return Report("t").add(make_capture(tokens), text="see https://example.org").to_html()


def test_a_page_with_addresses_in_its_text_is_fine(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    assert check(path) == []


SPOILED: list[tuple[str, Callable[[str], str], str]] = [
    ("script", lambda p: p.replace("const TABLE", "const TABLE2", 1), "not the one that the policy names"),
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
        lambda p: p.replace("default-src 'none';", "default-src 'none'; img-src https:;"),
        "allows https:",
    ),
    ("unsafe policy", lambda p: p.replace("style-src '", "style-src 'unsafe-inline' '", 1), "allows 'unsafe-inline'"),
    ("data", lambda p: p.replace('"heads":3', '"heads":4', 1), "data block data was changed"),
    ("broken data", lambda p: p.replace('{"sections"', '{sections"', 1), "is not JSON"),
    ("cut short", lambda p: p[: len(p) // 2], "cut short"),
    ("another page", lambda p: "<!doctype html><html><p>Hello</html>", "holds no data"),
]


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in SPOILED], ids=[case[0] for case in SPOILED])
def test_what_is_spoiled_is_found(page: str, tmp_path: Path, spoil: Callable[[str], str], said: str) -> None:
    spoiled = spoil(page)
    assert spoiled != page
    path = tmp_path / "page.html"
    path.write_text(spoiled, encoding="utf-8")
    problems = check(path)
    assert any(said in problem for problem in problems), problems


def test_size_and_encoding(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    assert check(path, limit_bytes=1000) == [f"the file has {path.stat().st_size:,} bytes, the limit is 1,000"]
    path.write_bytes(b"\xff\xfe\x00")
    assert check(path) == ["the file is not UTF-8: byte 0"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no file"):
        check(tmp_path / "none.html")
