"""Kinds of views: where the JavaScript, the schema and the style sheet of each lie. Anyone can add one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from workbench.errors import ReportError, nearest


@dataclass(frozen=True)
class Kind:
    """One kind of view.

    Attributes:
        name: as `ViewSpec.kind` has it.
        folder: holds `<name>.js`, `<name>.schema.json` and, where there is one, `<name>.css`.
        plotly: its module draws with plotly, which a page then holds once.
    """

    name: str
    folder: Traversable
    plotly: bool = False

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a spec; with the properties of the kind that it extends besides its own."""
        return self._own if self._base is None else _extended(self._own, self._base.schema)

    @cached_property
    def styles(self) -> tuple[str, ...]:
        """Its style sheet, after those of the kind that it extends."""
        found = self.folder.joinpath(f"{self.name}.css")
        own = (read(self.folder, found.name),) if found.is_file() else ()
        return own if self._base is None else (*self._base.styles, *own)

    @cached_property
    def _own(self) -> dict[str, Any]:
        schema: dict[str, Any] = json.loads(read(self.folder, f"{self.name}.schema.json"))
        return schema

    @property
    def _base(self) -> Kind | None:
        return kind_of(self._own["extends"]) if "extends" in self._own else None


_KINDS: dict[str, Kind] = {}


def register_kind(name: str, folder: str | Path | Traversable, *, plotly: bool = False) -> Kind:
    """Add a kind of view: `ViewSpec(kind=name, …)` can then be shown in notebooks, on pages and in reports.

    Args:
        name: letters, digits and underscores; that of the files in the folder.
        folder: a package's name, such as `__package__`, or a folder. It holds `<name>.js`, an ES module that exports
            `render({ model, el })`, `<name>.schema.json`, and `<name>.css` if the views' own style is not enough.
        plotly: the module draws with plotly.

    Raises:
        ReportError: the name is taken by files elsewhere, or a file is missing.
    """
    if not name.isidentifier():
        raise ReportError(f"{name!r} cannot be the name of a kind of view", hint="use letters, digits and underscores")
    home = Path(folder) if isinstance(folder, Path) else files(folder) if isinstance(folder, str) else folder
    missing = [end for end in (".js", ".schema.json") if not home.joinpath(f"{name}{end}").is_file()]
    if missing:
        raise ReportError(f"the kind {name!r} has no {name}{missing[0]}", hint=f"write it into {home}")
    known = _KINDS.get(name)
    if known is not None and str(known.folder) != str(home):
        raise ReportError(f"there is a kind {name!r} already, in {known.folder}", hint="choose another name")
    _KINDS[name] = Kind(name, home, plotly)
    return _KINDS[name]


def kind_of(name: str) -> Kind:
    """The kind of this name.

    Raises:
        ReportError: there is none.
    """
    if name not in _KINDS:
        raise ReportError(
            f"there is no view {name!r}",
            hint=f"{nearest(name, list(_KINDS), 'kind')} Kinds of your own are added by workbench.views.register_kind",
        )
    return _KINDS[name]


def kinds() -> tuple[str, ...]:
    """The names of all kinds, in order."""
    return tuple(sorted(_KINDS))


_TEXTS: dict[tuple[str, str], str] = {}


def read(folder: Traversable, name: str) -> str:
    """The text of a file, read once. A policy hashes text between tags, where a browser reads CR LF as LF: so do we."""
    where = str(folder), name
    if where not in _TEXTS:
        _TEXTS[where] = folder.joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")
    return _TEXTS[where]


def _extended(inner: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that has all of another one's properties besides its own."""
    made = dict(base) | {"title": inner["title"], "properties": dict(base["properties"])}
    for name, more in inner["properties"].items():
        old = base["properties"].get(name, {"properties": {}})
        required = [*old.get("required", []), *more.get("required", [])]
        made["properties"][name] = {**old, "properties": old["properties"] | more["properties"], "required": required}
    return made
