"""Check an exported page: it loads nothing, runs only scripts of this package, and is as it was written."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from workbench import __version__
from workbench.errors import ReportError
from workbench.storage.json_text import digest
from workbench.views import page

LIMIT_BYTES = 50_000_000
_OURS = "attention-workbench"

_LOADS = {"src", "srcset", "href", "data", "poster", "background", "action", "formaction", "manifest", "xlink:href"}
_HARMLESS = re.compile(r"\s*(#|data:|blob:|about:blank|$)", re.IGNORECASE)
_RUNS = {"", "module", "text/javascript", "application/javascript"}
_FETCHES_IN_CSS = re.compile(r"@import|url\(\s*['\"]?(?!\s*(?:data:|blob:|#))", re.IGNORECASE)
_FETCHES_IN_SCRIPT = re.compile(
    r"\b(fetch|importScripts|XMLHttpRequest|WebSocket|EventSource|sendBeacon)\b|\bimport\s*\("
)
_HASH = re.compile(r"'sha256-[\w+/]+=*'")
_FORBIDDEN_TAGS = {"iframe", "frame", "object", "embed", "base", "applet", "portal"}


@dataclass
class _Block:
    """One script or style element: its tag, its attributes, its text, and the policy that stood before it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class _Page(HTMLParser):
    """What matters of a page, gathered in one pass. `views` are the blocks that its views name, `named` its metas."""

    problems: list[str] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)
    views: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
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
        if "data-view" in attributes:
            self.views.append(attributes["data-view"])
        if tag in ("script", "style"):
            self._open = _Block(tag, attributes)
            self.blocks.append(self._open)

    def _meta(self, attributes: dict[str, str], where: str) -> None:
        kind = attributes.get("http-equiv", "").lower()
        if kind == "content-security-policy":
            if any(block.tag == "script" for block in self.blocks):
                self.problems.append(f"{where}: the policy comes after a script")
            self.policies.append(attributes.get("content", ""))
        elif "name" in attributes:
            self.named[attributes["name"].lower()] = attributes.get("content", "")
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

    Looks for loads from outside, inline handlers and styles, a policy that does not fit the scripts and styles, scripts
    that are not this package's, data that do not parse, any change since the page was written, a page cut short, and a
    file above `limit_bytes`.

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
    found = _Page()
    found.feed(text)
    found.close()
    problems += found.problems
    if not found.ended:
        problems.append("the page is cut short: </html> is missing")
    problems += _data_problems(found)
    problems += _script_problems(found)
    problems += _policy_problems(found)
    problems += _seal_problems(found, text)
    return problems


def _seal_problems(found: _Page, text: str) -> list[str]:
    """The digest of the whole page: finds a change of words and numbers outside the data too."""
    said = found.named.get("digest", "")
    if not said:
        return ["the page carries no digest of itself"]
    if page.seal(text.replace(said, "", 1)) != said:
        return ["the page was changed after it was written"]
    return []


def _is_data(block: _Block) -> bool:
    return block.tag == "script" and block.attributes.get("type", "").lower() == "application/json"


def _scripts(found: _Page) -> list[_Block]:
    return [block for block in found.blocks if block.tag == "script" and not _is_data(block)]


def _data_problems(found: _Page) -> list[str]:
    problems = []
    data = {block.attributes.get("id", "without a name"): block for block in found.blocks if _is_data(block)}
    if "provenance" not in data or len(data) != sum(map(_is_data, found.blocks)):
        problems.append("the page holds no data: it was not written by this package")
    for name, block in data.items():
        if block.attributes.get("data-digest") != digest(block.text):
            problems.append(f"the data block {name} was changed after the page was written")
        try:
            json.loads(block.text)
        except ValueError as error:
            problems.append(f"the data block {name} is not JSON: {error}")
    shown = {name for name in data if name.startswith("view-")}
    if shown != set(found.views):
        problems.append(f"the views and their data do not fit: {', '.join(sorted(shown ^ set(found.views)))}")
    return problems


def _kinds(found: _Page) -> list[str]:
    """The kinds of views that the data blocks are for, in order."""
    kinds = []
    for block in found.blocks:
        if _is_data(block) and block.attributes.get("id", "").startswith("view-"):
            try:
                kinds.append(str(json.loads(block.text)["kind"]))
            except (ValueError, KeyError, TypeError):
                continue  # said already
    return kinds


def _known_scripts(found: _Page) -> set[str]:
    """The digests of the scripts that this version of the package puts on such a page."""
    try:
        return {digest(script) for script in page.known_scripts(_kinds(found))}
    except ReportError:  # a kind of view that this version does not know
        return set()


def _script_problems(found: _Page) -> list[str]:
    problems = []
    known = _known_scripts(found)
    same_version = found.named.get("generator") == f"{_OURS} {__version__}"
    for block in _scripts(found):
        if digest(block.text) in known:
            continue
        if same_version:
            problems.append(f"a script is not one of this package: {block.text[:60]!r}")
        if match := _FETCHES_IN_SCRIPT.search(block.text):
            problems.append(f"a script can ask the network: {match.group()}")
    for block in found.blocks:
        if block.tag == "style" and _FETCHES_IN_CSS.search(block.text):
            problems.append("a style loads something from outside")
    return problems


def _policy_problems(found: _Page) -> list[str]:
    if not found.policies:
        return ["there is no Content-Security-Policy"]
    directives: dict[str, list[str]] = {}
    for part in found.policies[0].split(";"):
        name, *values = part.split() or [""]
        directives.setdefault(name.lower(), values)
    problems = [
        f"the policy does not say {name} 'none'"
        for name in ("default-src", "base-uri", "form-action")
        if directives.get(name) != ["'none'"]
    ]
    plotly = page.needs_plotly(_kinds(found))
    for name, values in directives.items():
        for value in values:
            if not _allowed(name, value, styles_of_plotly=plotly):
                problems.append(f"the policy allows {value} in {name}")
    for block in found.blocks:
        if block.tag == "script" and block.attributes.get("type", "").lower() not in _RUNS:
            continue
        named = directives.get(f"{block.tag}-src", [])
        if block.tag == "style" and plotly and named == ["'unsafe-inline'"]:
            continue
        if f"'{digest(block.text)}'" not in named:
            problems.append(f"an inline {block.tag} is not the one that the policy names: {block.text[:60]!r}")
    return problems


def _allowed(name: str, value: str, *, styles_of_plotly: bool) -> bool:
    if value == "'none'":
        return True
    if name == "script-src":
        return bool(_HASH.fullmatch(value))
    if name == "style-src":
        return bool(_HASH.fullmatch(value)) or (styles_of_plotly and value == "'unsafe-inline'")
    return name in ("img-src", "media-src", "font-src") and value in ("data:", "blob:")
