"""Where the queries of a call stand among its keys.

Positions can only be compared where that is known: where a mask lets each query see one key more, where the values of
as many keys as there are queries are what a linear function gave, with no key after them that is seen, or where the
site has had as many of both before, so that the first keys come from a cache. Else nothing shows it, as where one query
in two is left out, a class token alone asks, or learned keys come last.

Of as many keys as queries each query is taken for the key of its number, unless what the linear functions were given
shows the keys in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.hooks.tap import AttentionCall
from workbench.kernels.masks import as_four, hidden_below


class Alignment:
    """What is known of the sites of a model: those whose queries are the last of their keys."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._moved: set[str] = set()  # sites whose keys have another order

    def of(self, call: AttentionCall, made: Sequence[tuple[Tensor, Tensor]]) -> AttentionCall:
        """The call with what tells where its first query stands, if its kernel does not.

        Args:
            made: what linear functions before it were given and what they gave, the last one last.
        """
        told = call.block or call.part or call.segments or call.build or call.is_causal or call.windows > 1
        if told or call.finish is not None or call.v.dim() != 4:
            return call
        by_contract = getattr(call.module, "is_causal", call.tap == "registry")
        n_queries, n_keys = call.lengths
        if n_queries == n_keys and not by_contract:
            if call.site not in self._known and is_moved(call, made):
                self._moved.add(call.site)
            if call.site in self._moved:
                return call.standing(_nowhere)
        if n_queries == n_keys:
            self._known.add(call.site)
        if by_contract or n_queries == n_keys:
            return call
        return call.standing(Place(self._known, call, [gave for _, gave in made]))


def _nowhere() -> None:
    """Nothing shows where the first query stands."""


def is_moved(call: AttentionCall, made: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether keys have another order than queries, as where a model turns them round, as far as values show it.

    A query and the value of its number are looked up in what linear functions gave, and so in what these were given:
    there what the query comes from stands elsewhere than what the value comes from. Rotated or normalised queries are
    found nowhere, and nothing is said of them.
    """
    n, q = call.lengths[0], call.q
    if n < 2 or q is None or q.dim() != 4:
        return False
    with torch.no_grad():
        for at in (0, n // 2):
            query, value = (_comes_from(t[0, 0, at], made) for t in (q, call.v))
            if query is None or value is None:
                continue
            (asked, rows), (read, there) = query, value
            if asked.shape[-1] != read.shape[-1] or (asked.dtype, asked.device) != (read.dtype, read.device):
                continue
            same = (read == asked[rows[0]]).all(-1)  # rows that hold what the query comes from
            if bool(same.any()) and not bool(same[there].any()):
                return True
    return False


def _comes_from(vector: Tensor, made: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Of a vector that is a part of what a linear function gave: the rows that it was given [row, feature], and which
    of them the vector is of.
    """
    for given, gave in reversed(made):
        width = len(vector)
        if gave.dtype != vector.dtype or gave.device != vector.device or gave.shape[-1] % width:
            continue
        parts = gave.reshape(-1, gave.shape[-1] // width, width)
        if given.shape[:-1].numel() != len(parts):
            continue
        found = (parts == vector).all(-1).any(-1).nonzero().flatten()
        if len(found):
            return given.reshape(len(parts), -1), found
    return None


class Place:
    """Finds where the first query of a call stands, when it is first asked."""

    def __init__(self, known: set[str], call: AttentionCall, made: Sequence[Tensor]) -> None:
        self._known, self._call, self._made = known, call, made
        self._found: int | None = None
        self._asked = False

    def __call__(self) -> int | None:
        """The position of the first query among the keys; None: nothing shows it."""
        if not self._asked:
            with torch.no_grad():
                self._found = self._find()
            self._asked, self._made = True, ()
        return self._found

    def _find(self) -> int | None:
        call = self._call
        n_queries, n_keys = call.lengths
        last = _last_seen(call)  # of each query
        if n_queries > n_keys:
            return None
        if last is not None and n_queries > 1 and bool((last.diff() == 1).all()):
            self._known.add(call.site)
            return int(last[0])
        end = n_keys if last is None else int(last.max()) + 1  # after the last key that any query sees
        if call.site in self._known and end >= n_queries:
            return end - n_queries
        for start in sorted({end - n_queries, n_keys - n_queries, *range(n_keys - n_queries)}, reverse=True):
            if start >= 0 and any(_lies_in(made, call.v, start, n_queries) for made in reversed(self._made)):
                if start + n_queries < end:
                    return None  # the keys after the queries are no positions of theirs
                self._known.add(call.site)
                return start
        return None


def _last_seen(call: AttentionCall) -> Tensor | None:
    """[query] the last key that each sees in any example and head; None if nothing is hidden, or a query sees none."""
    if call.weights is not None:
        shown = call.weights.detach() != 0
    elif call.mask is None:
        return None
    else:
        mask = as_four(call.mask.detach())
        shown = mask if mask.dtype == torch.bool else mask > hidden_below(mask.dtype)
    n_queries, n_keys = call.lengths
    seen = shown.flatten(0, -3).any(0).expand(n_queries, n_keys)
    last = torch.where(seen, torch.arange(n_keys, device=seen.device), -1).amax(-1)
    return None if bool((last < 0).any()) or bool((last == n_keys - 1).all()) else last


def _lies_in(made: Tensor, values: Tensor, start: int, n: int) -> bool:
    """Whether the values [batch, head, key, width] of n keys are features of as many rows, in this order."""
    batch, _, _, width = values.shape
    if made.dtype != values.dtype or made.numel() % (batch * n * width) or made.dim() < 2 or made.shape[-1] % width:
        return False
    if made.numel() // made.shape[-1] != batch * n:
        return False
    first = values[:, :1, start : start + n].transpose(1, 2).to(made.device)  # [batch, key, 1, width]
    rows = made.reshape(-1, made.shape[-1] // width, width)
    for ordered in (rows.unflatten(0, (batch, n)), rows.unflatten(0, (n, batch)).transpose(0, 1)):
        if bool((ordered == first).all(-1).flatten(0, 1).all(0).any()):
            return True
    return False
