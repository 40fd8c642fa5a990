"""Check an exported page: it is byte for byte what this version of the package makes of the data inside it.

A page is not read as HTML. Browsers and parsers disagree on what a hostile file means, so that one that looks harmless
here may run there. Only the data blocks are taken out, the page is made of them anew, and the bytes are compared: what
the package would not write is not found sound, whatever it is.

What this shows: no byte of the page is anyone's but the package's and the data's, and the package's pages load nothing
and run no scripts but its own. What it does not show: that the data are true, or who made the page. Anyone can run the
package on data of his own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from workbench import __version__
from workbench.errors import ReportError
from workbench.report.form import FORM
from workbench.storage import disk
from workbench.storage.json_text import digest, json_for_html
from workbench.storage.parts import loads
from workbench.views.base import page
from workbench.views.base.spec import check_static

LIMIT_BYTES = 50_000_000
PROVES = (
    "to the byte, the page is what this version makes of the data in it; it loads nothing, and runs our scripts only"
)
PROVES_NOT = "that the data are true, or who made the page: anyone can run the package on data of their own"

_FORMS = {form.template: form for form in (page.PLAIN, FORM)}
_BLOCKS = '\n</main>\n<script type="application/json" id="'
_BLOCK = re.compile(
    r'<script type="application/json" id="([a-z0-9-]{1,40})" data-digest="([^"<>\n]{1,80})">([^<>&\n]*)</script>\n'
)
_HEAD = 20_000  # characters in which a page of ours names its version
_GENERATOR = re.compile(r'<meta name="generator" content="attention-workbench ([\w.+-]{1,40})">')
_DIGEST = re.compile(r'<meta name="digest" content="(sha256-[\w+/=]{1,60})">')
_SHOWN = 60
_STEP = 1 << 16


def check(path: str | Path, *, limit_bytes: int = LIMIT_BYTES) -> list[str]:
    """What is wrong with an exported page, one sentence each; empty when it is as this version made it.

    An empty list means that the page loads nothing, runs only this package's scripts, and says only what is in its
    data; not that the data are true. Pages of other versions are not found sound: only their own version can tell.

    Raises:
        ReportError: there is no such file, or it cannot be read.
    """
    file = disk.readable(path)
    if not file.is_file():
        what = f"{file} is a folder, and no page" if file.is_dir() else f"there is no file {file}"
        raise ReportError(what, hint="pass a page written by Report(...).write(path)")
    try:
        size = file.stat().st_size
        if size > limit_bytes:
            return [f"the file has {size:,} bytes, the limit is {limit_bytes:,}"]
        content = disk.content(file)
    except OSError as error:
        raise ReportError(f"{file} cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return [f"the file is not UTF-8: byte {error.start}"]
    by = _GENERATOR.search(text, 0, _HEAD)
    if by is not None and by[1] != __version__:
        return [
            f"attention-workbench {by[1]} wrote the page, as it says: check it with that version, not {__version__}"
        ]
    problems = [] if text.endswith("</html>") else ["the page is cut short: it does not end with </html>"]
    texts = _texts(text)
    if not {page.WORDS, page.PROVENANCE} <= texts.keys():
        return [*problems, "the page holds no data: it was not written by this package"]
    problems += _changed_blocks(text)
    made = _made_anew(texts, minified=True)
    if made != text and isinstance(made, str):
        made = _made_anew(texts, minified=False)  # by a checkout, where this is a release
    if isinstance(made, list):
        problems += made
    elif made != text:
        problems.append(_difference(text, made))
    if problems:
        problems += _seal(text)
    return problems


def _texts(text: str) -> dict[str, str]:
    """The data blocks by name, in order, where a page of ours has them; none if it has any name twice."""
    start = text.rfind(_BLOCKS)
    at = text.find("<script", start) if start >= 0 else len(text)
    found: dict[str, str] = {}
    while (block := _BLOCK.match(text, at)) is not None:
        if block[1] in found:
            return {}
        found[block[1]] = block[3]
        at = block.end()
    return found


def _changed_blocks(text: str) -> list[str]:
    return [
        f"the data block {name} was changed after the page was written"
        for name, said, inner in _BLOCK.findall(text, max(0, text.rfind(_BLOCKS)))
        if digest(inner) != said
    ]


def _made_anew(texts: dict[str, str], *, minified: bool) -> str | list[str]:
    """The page that this version makes of these data, or what keeps it from making one."""
    values: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            values[name] = loads(text)
        except ValueError as error:
            return [f"the data block {name} is not JSON: {error}"]
        if json_for_html(values[name]) != text:
            return [f"the data block {name} is not written as this package writes JSON"]
    views = [name for name in texts if name not in (page.WORDS, page.PROVENANCE)]
    if list(texts) != [*(f"view-{i}" for i in range(len(views))), page.WORDS, page.PROVENANCE]:
        return [f"the page has data of other views than its own, or in another order: {', '.join(texts)[:_SHOWN]}"]
    try:
        for name in views:
            check_static(values[name])
        return page.made_of(values, _FORMS[values[page.WORDS]["form"]], texts, minified=minified)
    except ReportError as error:
        return [f"the data are not those of a page: {error.message}"]
    except Exception as error:  # values of any kind, where the makers of pages expect their own
        return [f"the data are not those of a page: {type(error).__name__} {str(error)[:_SHOWN]}"]


def _difference(text: str, made: str) -> str:
    end = min(len(text), len(made))
    start = next((i for i in range(0, end, _STEP) if text[i : i + _STEP] != made[i : i + _STEP]), end)
    at = next((i for i in range(start, min(start + _STEP, end)) if text[i] != made[i]), end)
    line = text.count("\n", 0, at) + 1
    return (
        f"line {line} is not what this version makes of the data: {_around(text, at)} stands where "
        f"{_around(made, at)} should"
    )


def _around(text: str, at: int) -> str:
    return ascii(text[max(0, at - 10) : at + _SHOWN]) if at < len(text) else "nothing"


def _seal(text: str) -> list[str]:
    """Whether the page was damaged or changed after it was written, or made so; a page that is sound needs no seal."""
    said = _DIGEST.search(text, 0, _HEAD)
    if said is None:
        return ["the page carries no digest of itself"]
    if page.seal(text[: said.start(1)] + text[said.end(1) :]) != said[1]:
        return ["the page was changed after it was written"]
    return ["the page carries a digest that fits it: it was made so, by something else than this version"]
