"""What a study has to show, as numbers: panels side by side, which a view draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Heat:
    """A map, NaN where there is nothing.

    Attributes:
        title: a few words. values: [row, column]. rows, columns: what they are. row_texts, column_texts: of each.
        boxes: what is outlined: first row, first column, rows, columns.
    """

    title: str
    values: Tensor
    rows: str = ""
    columns: str = ""
    row_texts: Sequence[str] = ()
    column_texts: Sequence[str] = ()
    boxes: Sequence[tuple[int, int, int, int]] = ()


@dataclass(frozen=True)
class Lines:
    """Lines over x.

    Attributes:
        title: a few words. x: where. y: name -> [x]. across, up: what the axes are.
        spans: what is shaded: from, to, and what is there.
    """

    title: str
    x: Sequence[float]
    y: Mapping[str, Tensor]
    across: str
    up: str
    spans: Sequence[tuple[float, float, str]] = ()


@dataclass(frozen=True)
class Bars:
    """Bars beside each other.

    Attributes:
        title: a few words. names: of the groups. values: kind of bar -> its height in each group. up: what it is.
    """

    title: str
    names: Sequence[str]
    values: Mapping[str, Sequence[float]]
    up: str


@dataclass(frozen=True)
class Atoms:
    """A crystal seen along its flattest side.

    Attributes:
        title: a few words. positions: [atom, 3], in ångström. elements: of each atom.
        sizes: [atom], a share each. links: [atom, atom], who looks at whom.
    """

    title: str
    positions: Tensor
    elements: Sequence[str]
    sizes: Tensor
    links: Tensor


@dataclass(frozen=True)
class Exhibit:
    """Panels that belong together.

    Attributes:
        title: a few words. about: what is seen, in a sentence or two. panels: from left to right.
    """

    title: str
    about: str
    panels: tuple[Heat | Lines | Bars | Atoms, ...]
