"""Markdown of users becomes harmless HTML."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.report.markdown import render


class _Seen(HTMLParser):
    """The tags and attributes of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


HARMFUL = [
    "<script>window.__pwn=1</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](data:text/html,<script>1</script>)",
    "[x](file:///etc/passwd)",
    "![x](https://example.org/a.png)",
    "![](//example.org/a.png)",
    "<https://example.org/<script>>",
    "[x]: javascript:alert(1)\n\n[x]",
    "```html\n<script>1</script>\n```",
    "| a |\n|:-:|\n| <b>x</b> |",
]


@pytest.mark.parametrize("text", HARMFUL)
def test_nothing_of_it_runs_or_loads(text: str) -> None:
    seen = _Seen(str(render(text)))
    assert not seen.tags & {"script", "img", "svg", "iframe", "style", "b"}
    for name, value in seen.attributes:
        assert name in ("href", "rel", "class"), name
        assert name != "href" or value.startswith(("http://", "https://", "mailto:", "#")), value


@given(st.text(st.sampled_from("<>[]()!`*_#-|:\"'&\n \\abjavascript:/x=")))
def test_no_text_makes_other_elements(text: str) -> None:
    allowed = "p|em|strong|code|pre|h[3-6]|ul|ol|li|blockquote|hr|br|a|table|thead|tbody|tr|th|td"
    for tag in re.findall(r"</?([a-z0-9]+)", str(render(text))):
        assert re.fullmatch(allowed, tag), (tag, text)


def test_what_is_kept() -> None:
    html = str(render("# Heads\n\n**two** of `five`, see [the paper](https://example.org/a?b=1&c=2)\n\n- one\n- two"))
    assert "<h3>Heads</h3>" in html
    assert "<strong>two</strong> of <code>five</code>" in html
    assert 'href="https://example.org/a?b=1&amp;c=2" rel="noopener noreferrer nofollow"' in html
    assert "<li>one</li>" in html
    assert "[picture: a head]" in str(render("![a head](https://example.org/head.png)"))
    assert "⟨U+202E⟩" in str(render("a\u202eb"))


def test_headings_stay_below_those_of_sections() -> None:
    html = str(render("# a\n\n###### b\n\nc\n==="))
    assert re.findall(r"<h(\d)>", html) == ["3", "6", "3"]
