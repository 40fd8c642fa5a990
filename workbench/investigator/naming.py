"""How heads and numbers are told of in sentences: few heads by name, many by layer, and by the roles they have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_FEW = 6
_LABEL = re.compile(r"(.*H)(\d+)")


def listed(heads: Sequence[str], last: str = " and ") -> str:
    """Heads in a sentence: each by its label where they are few, and runs of neighbours in a layer where they are many.

    >>> listed(["L0H1", "L1H2", "L1H3"])
    'L0H1, L1H2 and L1H3'
    >>> listed([f"L0H{i}" for i in range(6)] + ["L1H0", "L1H1", "L1H5"])
    'L0H0–5, L1H0–1 and L1H5'
    """
    told = list(heads) if len(heads) <= _FEW else _runs(heads)
    return f"{', '.join(told[:-1])}{last}{told[-1]}" if len(told) > 1 else "".join(told)


def rounded(value: float, digits: int = 3) -> str:
    """A number in a sentence, with a minus sign and not a hyphen.

    >>> rounded(-11.94)
    '−11.9'
    """
    return f"{value:.{digits}g}".replace("-", "−")


def _runs(heads: Sequence[str]) -> list[str]:
    found: list[tuple[str, int, int]] = []
    rest = []
    for head in heads:
        match = _LABEL.fullmatch(head)
        if match is None:
            rest.append(head)
            continue
        layer, number = match[1], int(match[2])
        if found and found[-1][0] == layer and found[-1][2] + 1 == number:
            found[-1] = layer, found[-1][1], number
        else:
            found.append((layer, number, number))
    return [f"{layer}{first}" if first == end else f"{layer}{first}–{end}" for layer, first, end in found] + rest


def said_of_roles(named: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Which heads have each role, and which have none; a head with several roles is told of with each.

    >>> said_of_roles({"L0H1": ["previous-token"], "L1H2": ["induction", "mover"], "L1H3": ["mover"], "L1H0": []})
    ('By what they look at and write: previous-token L0H1; induction L1H2; mover L1H2, L1H3.', 'No role is ... L1H0.')
    """
    groups: dict[str, list[str]] = {}
    for head, several in named.items():
        for role in several:
            groups.setdefault(role, []).append(head)
    none = [head for head, several in named.items() if not several]
    roles = "; ".join(f"{role} {listed(heads, ', ')}" for role, heads in groups.items())
    said = [f"By what they look at and write: {roles}."] if groups else []
    return (*said, *([f"No role is suggested for {listed(none)}."] if none else []))
