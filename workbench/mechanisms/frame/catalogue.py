"""Which mechanisms there are: every module of the package above registers its own when it is imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, overload

from workbench.errors import WorkbenchError, nearest
from workbench.mechanisms.frame.findings import with_findings
from workbench.mechanisms.frame.mechanism import Mechanism
from workbench.mechanisms.frame.options import unwrapped

if TYPE_CHECKING:
    import pandas as pd

_MECHANISMS: dict[str, Mechanism] = {}
_HOMES: dict[str, tuple[str, str]] = {}  # where each was registered, and what it was made by
_ROOMS = Path(__file__).parents[1]
_OURS = __name__.removesuffix(".frame.catalogue")


def register(mechanism: Mechanism) -> Mechanism:
    """Put a mechanism into the list; one of a package of your own, or of a notebook, too.

    What is registered again from the same place, as when a cell of a notebook runs a second time, takes the place of
    what was there.

    Returns:
        The mechanism, with what was found of its claims on its card.

    Raises:
        WorkbenchError: it is no mechanism, or another one has this name.
    """
    if not isinstance(mechanism, Mechanism):
        raise WorkbenchError(f"{mechanism!r} is no mechanism", hint="register(Mechanism(name, card, make))")
    frame = inspect.currentframe()
    caller = frame.f_back if frame is not None else None
    where = "" if caller is None else str(caller.f_globals.get("__name__", ""))
    home = (where, getattr(unwrapped(mechanism.make), "__qualname__", ""))
    known = _MECHANISMS.get(mechanism.name)
    again = _HOMES.get(mechanism.name) == home and all(home) and not where.startswith(f"{_OURS}.")
    if known is not None and known.make is not mechanism.make and not again:
        raise WorkbenchError(f'there is a mechanism "{mechanism.name}" already', hint="give yours another name")
    card = with_findings(mechanism.name, mechanism.card)
    if card is not mechanism.card:
        mechanism = replace(mechanism, card=card)
    _MECHANISMS[mechanism.name], _HOMES[mechanism.name] = mechanism, home
    return mechanism


@cache
def _import_rooms() -> None:
    for module in iter_modules([str(_ROOMS)]):
        import_module(f"..{module.name}", __package__)


def listed() -> Mechanisms:
    """All mechanisms, as a table."""
    _import_rooms()
    return Mechanisms(_MECHANISMS[name] for name in sorted(_MECHANISMS))


def get(name: str) -> Mechanism:
    """The mechanism of that name.

    Raises:
        WorkbenchError: there is none; the hint names the nearest.
    """
    known = listed()
    if not isinstance(name, str):
        raise WorkbenchError(f'there is no mechanism "{name}"', hint=nearest(name, known.names, "mechanism"))
    room, colon, _ = name.partition(":")
    if colon and room in known.names:
        raise WorkbenchError(f'there is no mechanism "{name}"', hint=f'get("{room}").build(place, variant)')
    return known[name]


def named(name: str) -> tuple[Mechanism, str | None]:
    """The mechanism and its variant, or None, of a name such as "moh" or "sqa:mha".

    Raises:
        WorkbenchError: no such mechanism or variant.
    """
    room, colon, variant = name.partition(":") if isinstance(name, str) else (name, "", "")
    found = get(room)
    if not colon:
        return found, None
    if variant not in found.variants:
        raise WorkbenchError(
            f'"{room}" has no variant "{variant}"', hint=nearest(variant, list(found.variants), "variant")
        )
    return found, variant


class Mechanisms(Sequence[Mechanism]):
    """Mechanisms in the order of their names; indexed by position or name."""

    def __init__(self, mechanisms: Iterator[Mechanism]) -> None:
        self._all = tuple(mechanisms)

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, key: int | str) -> Mechanism: ...
    @overload
    def __getitem__(self, key: slice) -> Mechanisms: ...
    def __getitem__(self, key: int | str | slice) -> Mechanism | Mechanisms:
        if isinstance(key, slice):
            return Mechanisms(iter(self._all[key]))
        if isinstance(key, int):
            return self._all[key]
        found = next((one for one in self._all if one.name == key), None)
        if found is None:
            raise WorkbenchError(f'there is no mechanism "{key}"', hint=nearest(key, self.names, "mechanism"))
        return found

    @property
    def names(self) -> list[str]:
        """What `mechanisms.get` takes."""
        return [one.name for one in self._all]

    @property
    def table(self) -> pd.DataFrame:
        """One row for each: name, title, paper, what its sites mix, grade, cost, what it needs, and open claims."""
        import pandas as pd

        rows = [
            {
                "name": one.name,
                "title": one.card.title,
                "arXiv": one.card.arxiv,
                "kind": one.card.kind,
                "grade": one.card.grade,
                "cost": one.card.cost,
                "causal": one.card.causal,
                "grid": one.card.grid,
                "claims": len(one.card.claims),
                "examined": sum(claim.outcome != "not examined" for claim in one.card.claims),
            }
            for one in self._all
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        rows = [("name", "title", "arXiv", "kind", "grade", "causal", "input", "claims examined")]
        for one in self._all:
            card, done = one.card, sum(claim.outcome != "not examined" for claim in one.card.claims)
            stands = "image" if card.grid else "sequence" if card.causal == "always" else "any"
            claims = f"{done} of {len(card.claims)}"
            rows.append((one.name, card.title, card.arxiv, card.kind, card.grade, card.causal, stands, claims))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False)
