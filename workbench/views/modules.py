"""The views' ES modules as text: joined into one module for a widget, or into one script for a page."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from workbench.views.squeeze import squeeze

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class|let)\b)", re.MULTILINE)


@cache
def asset(name: str) -> str:
    """A file of `assets/`."""
    # The policy hashes the text between the tags, and a browser reads \r\n there as \n.
    return files("workbench.views").joinpath("assets", name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _needed(names: Iterable[str], known: dict[str, None]) -> dict[str, None]:
    """The files that these import, each after those that it imports itself, in `known`."""
    for name in names:
        for imported in _IMPORT.findall(asset(name)):
            if imported not in known:
                _needed([imported], known)
                known[imported] = None
    return known


@cache
def _inner(name: str) -> str:
    """A file without its imports and exports, comments and blanks: a widget sends it each time."""
    return squeeze(_EXPORT.sub("", _IMPORT.sub("", asset(name))))


@cache
def live(kind: str) -> str:
    """The module that a widget of this kind runs."""
    shared = [_inner(name) for name in _needed([f"{kind}.js"], {})]
    return "\n".join([*shared, _inner(f"{kind}.js"), "export default { render };"])


def static(kinds: Iterable[str]) -> str:
    """The script of a page: shared files once, each kind of view once, and `page.js`, which draws them all."""
    wanted = sorted(set(kinds))
    shared = [_inner(name) for name in _needed([*(f"{kind}.js" for kind in wanted), "page.js"], {})]
    views = [f"VIEWS.{kind} = (() => {{\n{_inner(f'{kind}.js')}\nreturn render;\n}})();" for kind in wanted]
    return "\n".join(["(() => {", *shared, "const VIEWS = {};", *views, _inner("page.js"), "})();"])


STYLE = "views.css"
"""The style sheet of all views."""
