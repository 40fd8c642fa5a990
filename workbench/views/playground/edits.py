"""What is ablated in a playground: heads, rows of heads, edges of rows; by the interventions of the workbench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.hooks.edits import HeadFunction
from workbench.hooks.sites import Site
from workbench.session.workbench import Workbench


@dataclass(frozen=True)
class Ablated:
    """One thing that is taken out of the model.

    Attributes:
        site: name of the site. head: which of its heads.
        query: whose row, of the head's pattern; None: the whole head. key: where the edge from the query leads; None:
            the whole row.

    >>> Ablated("h.1.attn", 6), Ablated("h.1.attn", 6, 12, 4)
    (h.1.attn head 6, h.1.attn head 6, edge 12 → 4)
    """

    site: str
    head: int
    query: int | None = None
    key: int | None = None

    @property
    def where(self) -> str:
        """What of the head it is, in words: "" for all of it."""
        if self.query is None:
            return ""
        return f", row {self.query}" if self.key is None else f", edge {self.query} → {self.key}"

    def __repr__(self) -> str:
        return f"{self.site} head {self.head}{self.where}"


@contextmanager
def ablated(wb: Workbench, edits: Sequence[Ablated], *, renormalise: bool = False) -> Iterator[None]:
    """The model without these, for what this thread runs inside.

    A head gives zero, or zero at one query; an edge's weight is taken out of its row. Where several concern one row,
    the larger one holds. Everything else stays on the model's kernel.

    Args:
        renormalise: what an edge had goes to the other keys of its row in proportion, as if it had been masked before
            the softmax (attention knockout: Geva et al. 2023, arXiv 2304.14767); else the row sums to less.

    Raises:
        InterventionError: no such head or position.
    """
    with ExitStack() as stack:
        for head, cut in _edges(edits).items():
            edit = _without(list(cut.values()), renormalise)
            stack.enter_context(wb.edit_pattern([head], edit, queries=list(cut), threads="this"))
        for head, queries in _rows(edits).items():
            stack.enter_context(wb.ablate([head], positions=queries, threads="this"))
        if heads := [(edit.site, edit.head) for edit in edits if edit.query is None]:
            stack.enter_context(wb.ablate(heads, threads="this"))
        yield


def _edges(edits: Sequence[Ablated]) -> dict[tuple[str, int], dict[int, list[int]]]:
    """For each head the queries that lose keys, and which."""
    found: dict[tuple[str, int], dict[int, list[int]]] = {}
    for edit in edits:
        if edit.query is not None and edit.key is not None:
            found.setdefault((edit.site, edit.head), {}).setdefault(edit.query, []).append(edit.key)
    return found


def _rows(edits: Sequence[Ablated]) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for edit in edits:
        if edit.query is not None and edit.key is None:
            found.setdefault((edit.site, edit.head), []).append(edit.query)
    return found


def _without(keys: Sequence[Sequence[int]], renormalise: bool) -> HeadFunction:
    """An edit that takes keys out of rows [batch, row, key]: those of each row in turn."""

    def edit(rows: Tensor, site: Site, head: int) -> Tensor:
        kept = rows.clone()
        for row, gone in enumerate(keys):
            kept[:, row, list(gone)] = 0
        if not renormalise:
            return kept
        left = kept.sum(-1, keepdim=True)
        return torch.where(left > 0, kept * (rows.sum(-1, keepdim=True) / left), kept)

    return edit


def asked_edits(given: Any, sites: Sequence[str]) -> list[Ablated]:
    """Edits as the browser sends them: records with the number of a site, a head, and a query and key or null.

    Raises:
        WorkbenchError: anything else.
    """
    found = []
    for one in given if isinstance(given, list) else [None]:
        if not (isinstance(one, dict) and _is_one(one, len(sites))):
            raise WorkbenchError(f"{str(one)[:200]!r} names nothing that can be ablated")
        found.append(Ablated(sites[one["site"]], one["head"], one.get("query"), one.get("key")))
    return list(dict.fromkeys(found))


def _is_one(record: dict[str, Any], n_sites: int) -> bool:
    site, head, query, key = (record.get(name) for name in ("site", "head", "query", "key"))
    numbers = [site, head, *(at for at in (query, key) if at is not None)]
    if not all(type(each) is int and each >= 0 for each in numbers):
        return False
    return bool(record["site"] < n_sites) and (key is None or query is not None)
