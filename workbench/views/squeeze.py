"""Less text for the same ES module: without comments and blanks. Names, strings and line ends that matter stay."""

from __future__ import annotations

import re
from typing import cast

# A slash begins a regular expression where no value can stand before it.
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*[\s\S]*?\*/)
    |(?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    |(?P<blank>[ \t]+)
    |(?P<line>\n)
    |(?P<word>[\w$\#]+)
    |(?P<other>[\s\S])""",
    re.VERBOSE,
)
_EXPRESSION = re.compile(r"/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\[\n])+/[a-z]*")
_BEFORE_EXPRESSION = frozenset("(,=:[!&|?{};>\n")
_OPEN, _WORD = frozenset("{,;([\n"), re.compile(r"[\w$#]")


def squeeze(source: str) -> str:
    """The module without comments, indentation, and blanks between symbols.

    A line that ends a statement without a semicolon keeps its end. The text of templates stays as it is.

    >>> squeeze("const a = 1; // one\\nreturn a / 2 + `a ${ a } b`;")
    'const a=1;return a/2+`a ${a} b`;'
    """
    made: list[str] = []
    templates: list[int] = []  # depths of braces at which the text of a template goes on
    depth, at, blank = 0, 0, False
    while at < len(source):
        last = made[-1][-1] if made else "\n"
        if source[at] == "`" or (source[at] == "}" and templates and templates[-1] == depth):
            if source[at] == "}":
                templates.pop()
            end, goes_on = _text_of_template(source, at + 1)
            if goes_on:
                templates.append(depth)
            made.append((" " if blank and _WORD.match(last) and source[at] == "`" else "") + source[at:end])
            at, blank = end, False
            continue
        found = cast("re.Match[str]", _TOKEN.match(source, at))  # the last kind of token is anything
        if source[at] == "/" and last in _BEFORE_EXPRESSION and found.lastgroup == "other":
            found = _EXPRESSION.match(source, at) or found
        token, kind = found[0], found.lastgroup
        at = found.end()
        if kind in ("comment", "blank"):
            blank = True
            continue
        if kind == "line":
            if last not in _OPEN:
                made.append("\n")
            blank = False
            continue
        depth += (token == "{") - (token == "}")
        words = _WORD.match(last) and _WORD.match(token)
        if blank and (words or (last == token and token in ("+", "-", "/"))):
            made.append(" ")
        made.append(token)
        blank = False
    return "".join(made)


def _text_of_template(source: str, at: int) -> tuple[int, bool]:
    """Where the text of a template ends that begins here, and whether code follows."""
    while source[at] != "`" and not source.startswith("${", at):
        at += 2 if source[at] == "\\" else 1
    return (at + 1, False) if source[at] == "`" else (at + 2, True)
