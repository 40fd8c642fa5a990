"""Markdown of users as HTML that can do nothing: no raw HTML, no pictures, links that only a click follows."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from workbench.tokens import visible_text

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

_LINKS = re.compile(r"(?:https?://|mailto:|#)", re.IGNORECASE)
_LOWEST = 6


def render(text: str) -> Markup:
    """HTML of CommonMark with tables; characters that cannot be seen are spelled out.

    >>> print(render("*five* [heads](https://example.org)"), end="")
    <p><em>five</em> <a href="https://example.org" rel="noopener noreferrer nofollow">heads</a></p>
    >>> print(render("<b>x</b>"), end="")
    <p>&lt;b&gt;x&lt;/b&gt;</p>
    """
    return Markup(_parser().render(visible_text(text)))


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.validateLink = lambda url: bool(_LINKS.match(url))  # type: ignore[method-assign]
    parser.add_render_rule("image", _image)
    parser.add_render_rule("link_open", _link)
    parser.add_render_rule("heading_open", _heading)
    parser.add_render_rule("heading_close", _heading)
    # The policy of a page allows no style attributes, and columns are aligned by them.
    for cell in ("th_open", "td_open"):
        parser.add_render_rule(cell, _cell)
    return parser


def _image(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    from markdown_it.common.utils import escapeHtml

    return f"[picture: {escapeHtml(tokens[index].content or 'without a name')}]"


def _link(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    if not str(token.attrs.get("href", "")).startswith("#"):
        token.attrSet("rel", "noopener noreferrer nofollow")
    return str(self.renderToken(tokens, index, options, env))


def _heading(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    # The title of the page is its only <h1>, sections have <h2>.
    level = min(_LOWEST, int(tokens[index].tag[1]) + 2)
    return f"<{'/' if tokens[index].nesting < 0 else ''}h{level}>" + ("\n" if tokens[index].nesting < 0 else "")


def _cell(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    tokens[index].attrs.pop("style", None)
    return str(self.renderToken(tokens, index, options, env))
