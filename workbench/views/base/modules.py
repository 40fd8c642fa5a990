"""The views' ES modules as text: joined into one module for a widget, or into one script for a page.

A checkout is used as it is: the imports of a module are followed, and each file is put, in order, into a function of
its own. What a module takes by `await import("./name.js")` is on a page with the rest; in a widget the kernel hands it
over when it is wanted (`later`). A release also has `release.json`, which esbuild made of the same functions (`make
release-assets`); the smaller form of a file there is taken while the file is still the one that it was made of.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from workbench.errors import ReportError
from workbench.views.base.kinds import Kind, kind_of, read

PREFIX = "workbench/"
"""Imports of the package's own modules begin so, in the package and outside: "workbench/shared/frame.js"."""

SHARED = "shared"
STYLES = ("views.css", "maps.css", "charts.css")
PLOTLY = "plotly-cartesian.min.js"
RELEASE = "release.json"

_VIEWS = files("workbench.views")
_IMPORT = re.compile(r'^import \{([^{}]*)\} from "([^"\n]+)";\n', re.MULTILINE)
_LATER = re.compile(r'\bawait import\("([^"\n]+)"\)')
_EXPORT = re.compile(r"^export (?=(?:(?:async )?function\*?|const|let|class) +([\w$]+))", re.MULTILINE)
_ANY_IMPORT = re.compile(r"^(?:import|export)\b[^\n]*", re.MULTILINE)
_ENDS_SCRIPT = re.compile(r"</script|<!--", re.IGNORECASE)
_RENAMED = re.compile(r"\s+as\s+")


@dataclass(frozen=True)
class _File:
    """One ES module: a name that is its own in a page, and where it lies."""

    name: str
    folder: Traversable

    @property
    def text(self) -> str:
        return read(self.folder, self.name.rpartition("/")[2])

    def imported(self, specifier: str) -> _File:
        """The file that an import of this one means."""
        path = specifier.removeprefix(PREFIX)
        parts = path.removeprefix("./").split("/")
        wrong = any(part in ("", ".", "..") for part in parts) or not path.endswith(".js")
        if specifier.startswith(PREFIX) and not wrong:
            found = _packaged(path)
        elif specifier.startswith("./") and len(parts) == 1 and not wrong:
            found = _File(f"{self.name.rpartition('/')[0]}/{parts[0]}", self.folder)
        else:
            raise ReportError(
                f'{self.name} imports "{specifier}"',
                hint=f'import "./a-neighbour.js" or "{PREFIX}shared/frame.js"; a page loads nothing from outside',
            )
        if not found.folder.joinpath(found.name.rpartition("/")[2]).is_file():
            raise ReportError(f'{self.name} imports "{specifier}", which is not there')
        return found


def _packaged(path: str) -> _File:
    folder, _, _ = path.rpartition("/")
    return _File(path, _VIEWS.joinpath(folder))


def _entry(kind: Kind) -> _File:
    own = str(kind.folder) == str(_VIEWS.joinpath(kind.name))
    return _File(f"{kind.name}/{kind.name}.js" if own else f"{kind.name}:/{kind.name}.js", kind.folder)


_PAGE, _KERNEL = _packaged(f"{SHARED}/page.js"), _packaged(f"{SHARED}/kernel.js")


def enclosed(name: str, text: str, imports: Mapping[str, str]) -> str:
    """A module as a statement that puts what it exports into `modules[name]`.

    Args:
        imports: for each specifier the name of the module that it means.

    >>> print(enclosed("b.js", 'import { a as c } from "./a.js";\\nexport const b = c + 1;\\n', {"./a.js": "a.js"}))
    ((modules) => {
    const { a: c } = modules["a.js"];
    const b = c + 1;
    modules["b.js"] = { b };
    })(modules);

    Raises:
        ReportError: the module imports or exports in a form that cannot be joined.
    """
    lines = []
    for names, specifier in _IMPORT.findall(text):
        taken = ", ".join(_RENAMED.sub(": ", name.strip()) for name in names.split(",") if name.strip())
        lines.append(f"const {{ {taken} }} = modules[{json.dumps(imports[specifier])}];")
    body = _IMPORT.sub("", text)
    exported = _EXPORT.findall(body)
    body = _EXPORT.sub("", body)
    body = _LATER.sub(lambda found: f"await modules.later({json.dumps(imports[found[1]])})", body)
    if odd := _ANY_IMPORT.search(body):
        raise ReportError(
            f"{name} has a line that cannot be joined: {odd[0][:80]!r}",
            hint='write `import { a } from "./b.js";` and `export function …`, `export const …` or `export class …`',
        )
    lines += [body.strip("\n"), f"modules[{json.dumps(name)}] = {{ {', '.join(exported)} }};"]
    return "\n".join(["((modules) => {", *lines, "})(modules);"])


def _specifiers(text: str) -> list[str]:
    """What must be there before the module runs."""
    return [specifier for _, specifier in _IMPORT.findall(text)]


@cache
def _chunk(file: _File, minified: bool) -> str:
    if minified and (short := _released().get(file.name)) is not None and short["source"] == _digest(file.text):
        return short["code"].rstrip("\n")
    text = file.text
    if found := _ENDS_SCRIPT.search(text):
        raise ReportError(f"{file.name} holds {found[0]!r}, which would end its script on a page")
    taken = [*_specifiers(text), *_LATER.findall(text)]
    return enclosed(file.name, text, {each: file.imported(each).name for each in taken})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _released() -> dict[str, dict[str, str]]:
    found = _VIEWS.joinpath(SHARED, RELEASE)
    held: dict[str, dict[str, str]] = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
    return held


def _in_order(entries: Iterable[_File]) -> list[_File]:
    """These and all that they import, each after those that it imports itself."""
    done: dict[_File, None] = {}

    def visit(file: _File, above: tuple[_File, ...]) -> None:
        if file in done:
            return
        if file in above:
            raise ReportError(f"modules import each other in a circle: {' → '.join(f.name for f in (*above, file))}")
        for specifier in _specifiers(file.text):
            visit(file.imported(specifier), (*above, file))
        done[file] = None

    for entry in entries:
        visit(entry, ())
    return list(done)


def _wanted_later(files: Iterable[_File]) -> list[_File]:
    """What these ask for when it is wanted, and what that asks for in turn."""
    found: dict[_File, None] = {}
    asking = list(files)
    for file in asking:
        for later in map(file.imported, _LATER.findall(file.text)):
            if later not in found:
                found[later] = None
                asking += _in_order([later])
    return list(found)


@cache
def live(kind: str, *, minified: bool = True) -> str:
    """The module that a widget of this kind runs."""
    entry = _entry(kind_of(kind))
    files = _in_order([entry])
    render = f"modules[{json.dumps(entry.name)}].render"
    if _wanted_later(files):
        files = _in_order([entry, _KERNEL])
        asks = f"modules.later ??= modules[{json.dumps(_KERNEL.name)}].laterFrom(given.model, modules);"
        render = f"(given) => {{ {asks} return {render}(given); }}"
    chunks = [_chunk(file, minified) for file in files]
    return "\n".join(["const modules = {};", *chunks, f"export default {{ render: {render} }};"])


@cache
def later(kind: str, name: str, *, minified: bool = True) -> str:
    """The module that adds a file to a widget of this kind, which asks for it when it is wanted.

    Raises:
        ReportError: no file of the widget asks for it.
    """
    own = _in_order([_entry(kind_of(kind)), _KERNEL])
    found = [file for file in _wanted_later(own) if file.name == name]
    if not found:
        raise ReportError(f"the view {kind!r} asks for no module {name!r}")
    missing = [file for file in _in_order(found) if file not in own]
    # What two of them share is there after the first.
    chunks = [f"if (!({json.dumps(file.name)} in modules)) {_chunk(file, minified)}" for file in missing]
    return "\n".join(["export default (modules) => {", *chunks, "};"])


def static(kinds: Iterable[str], *, minified: bool = True) -> str:
    """The script of a page: each file once, and at last the one that draws all views."""
    entries = {kind: _entry(kind_of(kind)) for kind in sorted(set(kinds))}
    files = _in_order([*entries.values(), _PAGE])
    files = _in_order([*files, *_wanted_later(files)])
    chunks = [_chunk(file, minified) for file in files]
    views = ", ".join(f"{kind}: modules[{json.dumps(entry.name)}].render" for kind, entry in entries.items())
    drawn = f"modules[{json.dumps(_PAGE.name)}].draw({{ {views} }});"
    return "\n".join(["(() => {", "const modules = { later: async (name) => modules[name] };", *chunks, drawn, "})();"])


def style(kinds: Iterable[str]) -> str:
    """The style sheet of views of these kinds."""
    own = dict.fromkeys(text for kind in sorted(set(kinds)) for text in kind_of(kind).styles)
    return "\n".join([*map(asset, STYLES), *own])


def asset(name: str) -> str:
    """A file of `shared/`."""
    return read(_VIEWS.joinpath(SHARED), name)


def plotly() -> str:
    """The script of plotly."""
    return read(_VIEWS.joinpath("figure"), PLOTLY)


def sources() -> dict[str, dict[str, str]]:
    """What a release is made of: for each module of the package the digest of its file, and its statement."""
    own = [
        _packaged(f"{folder.name}/{file.name}")
        for folder in sorted(_VIEWS.iterdir(), key=lambda each: each.name)
        if folder.is_dir()
        for file in sorted(folder.iterdir(), key=lambda each: each.name)
        if file.name.endswith(".js") and file.name != PLOTLY
    ]
    return {file.name: {"source": _digest(file.text), "code": _chunk(file, False)} for file in own}


def print_sources() -> None:
    """Write `sources` as JSON to the standard output, for `docs/make_release_assets.mjs`."""
    sys.stdout.write(json.dumps(sources()))
