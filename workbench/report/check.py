"""Check an exported page: it loads nothing, runs only what its policy names, and its data are as they were written."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from workbench.errors import ReportError
from workbench.json_text import digest

LIMIT_BYTES = 6_000_000

_LOADS = {"src", "srcset", "href", "data", "poster", "background", "action", "formaction", "manifest", "xlink:href"}
_HARMLESS = re.compile(r"\s*(#|data:|blob:|about:blank|$)", re.IGNORECASE)
_RUNS = {"", "module", "text/javascript", "application/javascript"}
_FETCHES_IN_CSS = re.compile(r"@import|url\(\s*['\"]?(?!\s*(?:data:|blob:|#))", re.IGNORECASE)
_FETCHES_IN_SCRIPT = re.compile(
    r"\b(fetch|importScripts|XMLHttpRequest|WebSocket|EventSource|sendBeacon)\b|\bimport\s*\("
)
_FORBIDDEN_TAGS = {"iframe", "frame", "object", "embed", "base", "applet", "portal"}


@dataclass
class _Block:
    """One script or style element: its tag, its attributes, its text, and the policy that stood before it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class _Page(HTMLParser):
    """What matters of a page, gathered in one pass."""

    problems: list[str] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)
    ended: bool = False
    _open: _Block | None = None

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name.lower(): value or "" for name, value in attrs}
        where = f"<{tag}> at line {self.getpos()[0]}"
        if tag in _FORBIDDEN_TAGS:
            self.problems.append(f"{where} has no place in a self-contained page")
        for name, value in attributes.items():
            if name.startswith("on"):
                self.problems.append(f"{where} has the inline handler {name}")
            elif name == "style":
                self.problems.append(f"{where} has an inline style, which the policy blocks")
            elif name in _LOADS and tag != "a" and not _HARMLESS.match(value):
                self.problems.append(f"{where} loads {value[:120]!r}")
            elif value.strip().lower().startswith(("javascript:", "vbscript:")):
                self.problems.append(f"{where} runs {value[:120]!r}")
        if tag == "meta":
            self._meta(attributes, where)
        if tag in ("script", "style"):
            self._open = _Block(tag, attributes)
            self.blocks.append(self._open)

    def _meta(self, attributes: dict[str, str], where: str) -> None:
        kind = attributes.get("http-equiv", "").lower()
        if kind == "content-security-policy":
            if any(block.tag == "script" for block in self.blocks):
                self.problems.append(f"{where}: the policy comes after a script")
            self.policies.append(attributes.get("content", ""))
        elif kind == "refresh":
            self.problems.append(f"{where} leads away from the page")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._open = None
        self.ended = self.ended or tag == "html"

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open.text += data


def check(path: str | Path, *, limit_bytes: int = LIMIT_BYTES) -> list[str]:
    """What is wrong with an exported page, one sentence each; empty when it is as it should be.

    Looks for loads from outside, inline handlers and styles, a policy that does not fit the scripts and styles, data
    that does not parse or was changed, a page cut short, and a file above `limit_bytes`.

    Raises `ReportError` when there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise ReportError(f"there is no file {file}", hint="pass a page written by Report(...).write(path)")
    content = file.read_bytes()
    problems = []
    if len(content) > limit_bytes:
        problems.append(f"the file has {len(content):,} bytes, the limit is {limit_bytes:,}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return [*problems, f"the file is not UTF-8: byte {error.start}"]
    page = _Page()
    page.feed(text)
    page.close()
    problems += page.problems
    if not page.ended:
        problems.append("the page is cut short: </html> is missing")
    problems += _policy_problems(page)
    problems += _block_problems(page.blocks)
    return problems


def _policy_problems(page: _Page) -> list[str]:
    if not page.policies:
        return ["there is no Content-Security-Policy"]
    directives: dict[str, list[str]] = {}
    for part in page.policies[0].split(";"):
        name, *values = part.split() or [""]
        directives.setdefault(name.lower(), values)
    problems = []
    if directives.get("default-src") != ["'none'"]:
        problems.append("the policy does not say default-src 'none'")
    if directives.get("base-uri") != ["'none'"]:
        problems.append("the policy does not say base-uri 'none'")
    for name, values in directives.items():
        loose = [
            value
            for value in values
            if value != "'none'"
            and not re.fullmatch(r"'sha256-[\w+/]+=*'|data:", value)
            and not (value == "blob:" and name in ("img-src", "media-src"))
        ]
        problems += [f"the policy allows {value} in {name}" for value in loose]
    for block in page.blocks:
        if block.tag == "script" and block.attributes.get("type", "").lower() not in _RUNS:
            continue
        if f"'{digest(block.text)}'" not in directives.get(f"{block.tag}-src", []):
            problems.append(f"an inline {block.tag} is not the one that the policy names: {block.text[:60]!r}")
    return problems


def _block_problems(blocks: list[_Block]) -> list[str]:
    problems = []
    data = [block for block in blocks if block.attributes.get("type", "").lower() == "application/json"]
    if not any(block.attributes.get("id") == "provenance" for block in data):
        problems.append("the page holds no data: it was not written by Report")
    for block in data:
        name = block.attributes.get("id", "without a name")
        try:
            json.loads(block.text)
        except ValueError as error:
            problems.append(f"the data block {name} is not JSON: {error}")
        if block.attributes.get("data-digest") != digest(block.text):
            problems.append(f"the data block {name} was changed after the page was written")
    for block in blocks:
        if block.tag == "style" and _FETCHES_IN_CSS.search(block.text):
            problems.append("a style loads something from outside")
        if block.tag == "script" and block not in data and (found := _FETCHES_IN_SCRIPT.search(block.text)):
            problems.append(f"a script can ask the network: {found.group()}")
    return problems
