"""What an intervention is: it changes what heads or modules give while the model runs, and nothing else.

Every edit makes new tensors and leaves the old ones alone, keeps autograd, and hands on the numbers of heads and
positions that it does not touch to the bit.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workbench.errors import InterventionError
from workbench.hooks.nested import first_tensor
from workbench.hooks.positions import Positions, positions_first
from workbench.hooks.rows import check_row, head_values, rows
from workbench.hooks.sites import Site
from workbench.hooks.tap import AttentionCall
from workbench.hooks.truth import Checked

Source = Callable[[AttentionCall, Tensor], Tensor]
HeadFunction = Callable[[Tensor, Site, int], Tensor]
Factor = float | Tensor | HeadFunction
"""Of a gate: a number, a tensor [position] or [batch, position], or what a function makes of the present one."""
Threads = Literal["all", "this"]
"""Whose forwards an edit changes: those of all threads, or only those of the thread that opened it."""


class _OnSites:
    """Attributes: sites: names of the modules it means to touch. fired: those it has touched."""

    def __init__(self, sites: Iterable[str]) -> None:
        self.sites = frozenset(sites)
        self.fired: set[str] = set()

    def on_inputs(self, inputs: Mapping[str, Any]) -> None:
        """The model is about to run on these inputs, by the names of its forward's arguments."""


class Edit(_OnSites, ABC):
    """Changes the output of heads at attention sites."""

    @abstractmethod
    def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
        """The heads' new output [batch, head, query, width], from the present one; never in place.

        Where other processes hold some of the heads (`call.shard`), these are NaN, and what is made of them is dropped.
        """


class OutputEdit(_OnSites, ABC):
    """Changes the output of whole modules, such as the residual stream after a block."""

    @abstractmethod
    def __call__(self, name: str, module: nn.Module, output: Any) -> Any:
        """The module's new output."""


class HeadEdit(Edit):
    """An edit of some heads at some positions; a subclass says what they give instead.

    Args:
        heads: which heads, by site.
        positions: which query positions.
    """

    def __init__(self, heads: Mapping[Site, Sequence[int]], positions: Positions) -> None:
        super().__init__(site.name for site in heads)
        self.heads = {site.name: tuple(chosen) for site, chosen in heads.items()}
        self.known = {site.name: site for site in heads}
        self.positions = positions

    @abstractmethod
    def replaced(self, call: AttentionCall, old: Tensor) -> Tensor:
        """New output of the chosen heads [batch, chosen head, query, width], at all positions."""

    def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
        """The heads' output with the chosen heads and positions replaced."""
        chosen = self.heads[call.site]
        check_range(chosen, z.shape[1], call.site)
        index = torch.tensor(chosen, device=z.device)
        old = z[:, index]
        with torch.autocast(z.device.type, enabled=False):
            new = self.replaced(call, old).expand_as(old)
        if not self.positions.everywhere:
            where = self.positions.mask(z.shape[0], z.shape[2], call.site, z.device)
            new = torch.where(where[:, None, :, None], new, old)
        return z.clone().index_copy_(1, index, new)  # unlike index_copy, in the memory layout that the model expects


class Ablation(HeadEdit):
    """Heads give what `source(call, old)` says, broadcast to their output `old` [batch, chosen head, query, width]."""

    def __init__(
        self,
        heads: Mapping[Site, Sequence[int]],
        source: Source,
        positions: Positions,
        begin: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """`begin` is told the model's inputs before it runs, for a source that depends on which examples they are."""
        super().__init__(heads, positions)
        self.source, self._begin = source, begin

    def on_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Hands them on."""
        if self._begin is not None:
            self._begin(inputs)

    def replaced(self, call: AttentionCall, old: Tensor) -> Tensor:
        """What the source gives."""
        return self.source(call, old).to(old)


def zero(call: AttentionCall, old: Tensor) -> Tensor:
    """Nothing."""
    return old.new_zeros(())


class Patch(HeadEdit):
    """Heads give a tensor, or what a function `f(z, site, head)` makes of their output [batch, position, d_head]."""

    def __init__(self, heads: Mapping[Site, Mapping[int, Tensor | HeadFunction]], positions: Positions) -> None:
        super().__init__({site: list(given) for site, given in heads.items()}, positions)
        check_functions(heads, "f(z, site, head)")
        self.given = {site.name: given for site, given in heads.items()}

    def replaced(self, call: AttentionCall, old: Tensor) -> Tensor:
        """The tensors, checked and broadcast, and what the functions give."""
        parts = []
        for number, head in enumerate(self.heads[call.site]):
            now, given = old[:, number], self.given[call.site][head]
            if call.shard is not None and head not in call.shard.here:
                parts.append(now)
                continue
            if isinstance(given, Tensor):
                what = f"the patch of head {head}"
            else:
                what = f"what the function gave for head {head}"
                given = given(now.clone(), self.known[call.site], head)
            parts.append(broadcast(given, now, what, call.site))
        return torch.stack(parts, dim=1)


class Steer(HeadEdit):
    """Heads give their output plus a direction [d_head]."""

    def __init__(self, heads: Mapping[Site, Sequence[int]], direction: Tensor, positions: Positions) -> None:
        super().__init__(heads, positions)
        self.direction = direction

    def replaced(self, call: AttentionCall, old: Tensor) -> Tensor:
        """The output, moved."""
        return old + check_direction(self.direction, old, "d_head", call.site)


class GateEdit(HeadEdit):
    """Heads give what their gate multiplies, times another factor.

    Args:
        to: by site, for each head a number, a tensor [position] or [batch, position] (1 stands for all), or a function
            `f(g, site, head)` of the factor [batch, position].
    """

    def __init__(self, to: Mapping[Site, Mapping[int, Factor]], positions: Positions) -> None:
        super().__init__({site: list(given) for site, given in to.items()}, positions)
        check_functions(to, "f(g, site, head)")
        self.to = {site.name: given for site, given in to.items()}

    def replaced(self, call: AttentionCall, old: Tensor) -> Tensor:
        """What the gates multiply, times the factors."""
        pattern = call.pattern()
        if pattern.gates is None or call.shard is not None:
            why = "are split between processes" if pattern.gates is not None else "have no gate"
            raise InterventionError(
                f"the heads {why}", site=call.site, hint="wb.sites has the gates, of kind gate; wb.ablate and wb.patch "
                "change what any head gives",
            )  # fmt: skip
        ungated, parts = pattern.ungated(call.v), []
        for head in self.heads[call.site]:
            now, given = pattern.gates[:, head].to(ungated.dtype), self.to[call.site][head]
            if isinstance(given, float):
                parts.append(torch.full_like(now, given))
                continue
            what = f"the factor of head {head}"
            if not isinstance(given, Tensor):
                what = f"what the function gave for head {head}"
                given = given(now.clone(), self.known[call.site], head)
            parts.append(_factors(given, now, what, call.site))
        return (torch.stack(parts, dim=1)[..., None] * ungated[:, list(self.heads[call.site])]).to(old)


class PatternEdit(HeadEdit):
    """Heads read their values through rows of their pattern that `edit(rows, site, head)` has made.

    Rows are [batch, n, key], float64 for float64 queries and float32 otherwise; those of the chosen queries only. The
    function sees what earlier pattern edits of the same call have made of them. What the kernel drops (dropout in
    training) is dropped from the new rows too.
    """

    def __init__(self, heads: Mapping[Site, Sequence[int]], edit: HeadFunction, queries: Positions) -> None:
        super().__init__(heads, Positions())
        check_functions({site: dict.fromkeys(chosen, edit) for site, chosen in heads.items()}, "edit(rows, site, head)")
        self.edit, self.queries = edit, queries
        self._checked = Checked()

    def replaced(self, call: AttentionCall, old: Tensor) -> Tensor:
        """rows' · V in the chosen rows of the chosen heads."""
        index = self.queries.index(old.shape[0], old.shape[2], call.site, old.device)
        if bool((index.sort(dim=-1).values.diff(dim=-1) == 0).any()):
            raise InterventionError("a query is chosen twice", site=call.site)
        site = self.known[call.site]
        return torch.stack(
            [self._head(call, site, head, index, old[:, i]) for i, head in enumerate(self.heads[call.site])], dim=1
        )

    def _head(self, call: AttentionCall, site: Site, head: int, index: Tensor, old: Tensor) -> Tensor:
        """[batch, query, width] of one head."""
        here = head
        if call.shard is not None:
            if head not in call.shard.here:
                return old
            here = head - call.shard.first
        present = rows(call, here, index, cross=site.kind == "cross")
        if self._checked.is_due(call, (call.site, head)):
            check_row(call, here, index, present)
            self._checked.add(call, (call.site, head))
        edited_before = _edited_rows.setdefault(call, {}).setdefault(head, [])
        for at, made in edited_before:
            present = _overlay(present, index, made, at)
        new = self.edit(present.clone(), site, head)  # the softmax needs its result for the backward pass
        _check(new, f"what the function gave for head {head}", present, call.site)
        if new.shape != present.shape:
            raise InterventionError(
                f"the edited rows of head {head} are {list(new.shape)}, not {list(present.shape)} [batch, query, key]",
                site=call.site,
            )
        edited_before.append((index, new))
        weights = nn.functional.dropout(new, call.dropout) if call.dropout > 0 else new
        z = weights @ head_values(call, here, call.sizes[0]).to(new.dtype)
        before = None if call.build is None else call.pattern().before
        if before is not None:  # what the rows read of a state from before is no part of them, and stays
            of_head = before[:, head].to(z)
            z = z + of_head.gather(1, index[..., None].expand(*z.shape))
        return old.scatter(1, index[..., None].expand(*z.shape), z.to(old.dtype))


# What pattern edits have made of a call's rows, by head: query rows [batch or 1, n], and the new rows [batch, n, key].
_edited_rows: WeakKeyDictionary[AttentionCall, dict[int, list[tuple[Tensor, Tensor]]]] = WeakKeyDictionary()


def _overlay(present: Tensor, index: Tensor, made: Tensor, at: Tensor) -> Tensor:
    """Rows `present` of the queries `index`, with the rows `made` of the queries `at` in their places."""
    same = index[:, :, None] == at[:, None, :]  # [batch or 1, n, m]
    from_made = made.gather(1, same.long().argmax(-1)[..., None].expand(*present.shape))
    return torch.where(same.any(-1)[..., None], from_made, present)


class SteerOutput(OutputEdit):
    """A module gives its output (of a tuple, the first tensor) plus a direction [d_model]."""

    def __init__(self, name: str, direction: Tensor, positions: Positions) -> None:
        super().__init__([name])
        self.direction, self.positions = direction, positions
        self._given: dict[int, tuple[int, ...]] = {}  # by thread, the first two sizes of what the model was given

    def on_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Keeps their sizes, by which examples are told from positions."""
        sizes = (tuple(t.shape[:2]) for t in inputs.values() if isinstance(t, Tensor) and t.dim() > 1)
        self._given[threading.get_ident()] = next(sizes, ())

    def __call__(self, name: str, module: nn.Module, output: Any) -> Any:
        """The output, moved."""
        found = first_tensor(output)
        if found is None:
            raise InterventionError(f"the module gives no tensor, or not first, but {type(output).__name__}", site=name)
        hidden, put_back = found
        moved = hidden + check_direction(self.direction, hidden, "d_model", name)
        if not self.positions.everywhere:
            if hidden.dim() != 3:
                raise InterventionError(
                    "positions need an output [batch, position, d_model]", site=name, shape=hidden.shape
                )
            first = positions_first(name, module, tuple(hidden.shape[:2]), self._given.get(threading.get_ident(), ()))
            batch, length = (hidden.shape[1], hidden.shape[0]) if first else hidden.shape[:2]
            where = self.positions.mask(batch, length, name, hidden.device)[..., None]
            moved = torch.where(where.transpose(0, 1) if first else where, moved, hidden)
        return put_back(moved)


def check_range(heads: Iterable[int], n_heads: int, site: str) -> None:
    """Raise an InterventionError if there is no such head."""
    bad = [head for head in heads if not 0 <= head < n_heads]
    if bad:
        raise InterventionError(
            f"there is no head {bad[0]}: the site has {n_heads} heads, 0 to {n_heads - 1}", site=site
        )


def check_functions(given: Mapping[Site, Mapping[int, Any]], wanted: str) -> None:
    """Raise an InterventionError if one of the functions cannot be called with three arguments, as `wanted` says."""
    for site, of_heads in given.items():
        for head, function in of_heads.items():
            try:
                inspect.signature(function).bind(None, site, head) if callable(function) else None
            except ValueError:  # a built-in function, which does not tell what it takes
                continue
            except TypeError as error:
                raise InterventionError(
                    f"the function for head {head} cannot be called as {wanted}: {error}", site=site.name,
                    hint=f"define it with these three arguments: {wanted}",
                ) from None  # fmt: skip


def check_direction(direction: Tensor, hidden: Tensor, axis: str, site: str) -> Tensor:
    """The direction, if it can be added to `hidden` [..., width].

    Raises:
        InterventionError: wrong length, dtype or device.
    """
    _check(direction, "the direction", hidden, site)
    if direction.shape[0] != hidden.shape[-1]:
        raise InterventionError(
            f"the direction has {direction.shape[0]} numbers, {axis} is {hidden.shape[-1]}", site=site
        )
    return direction


def broadcast(given: Any, z: Tensor, what: str, site: str) -> Tensor:
    """A tensor as [batch, position, d_head], the shape of `z`.

    It may be [d_head], [position, d_head] or [batch, position, d_head], where batch and position may be 1.

    Raises:
        InterventionError: no tensor, another shape, dtype or device.
    """
    _check(given, what, z, site)
    got, want = list(given.shape), list(z.shape)
    padded = [1] * (3 - len(got)) + got
    if (
        not 1 <= len(got) <= 3
        or padded[2] != want[2]
        or any(g not in (1, w) for g, w in zip(padded[:2], want[:2], strict=True))
    ):
        raise InterventionError(
            f"{what} is {got}, expected {want} [batch, position, d_head]",
            site=site,
            hint="batch and position may be 1 or left out; the position axis is that of the whole input, "
            "also where positions= chooses some of it",
        )
    return given.expand_as(z)


def _factors(given: Any, gates: Tensor, what: str, site: str) -> Tensor:
    """A tensor as [batch, position], the shape of `gates`; see `GateEdit`.

    Raises:
        InterventionError: no tensor, another shape, dtype or device.
    """
    _check(given, what, gates, site)
    sizes = zip(reversed(given.shape), reversed(gates.shape), strict=False)
    if given.dim() > 2 or any(got not in (1, want) for got, want in sizes):
        raise InterventionError(
            f"{what} is {list(given.shape)}, expected {list(gates.shape)} [batch, position]", site=site,
            hint="batch may be 1 or left out, position 1; the position axis is that of the whole input, also where "
            "positions= chooses some of it",
        )  # fmt: skip
    return given.expand_as(gates)


def _check(given: Any, what: str, like: Tensor, site: str) -> None:
    if not isinstance(given, Tensor):
        hint = "return the new tensor; changing the old one in place does nothing" if given is None else None
        raise InterventionError(f"{what} is {type(given).__name__}, expected a tensor", site=site, hint=hint)
    if given.layout != torch.strided:
        raise InterventionError(f"{what} is laid out as {given.layout}", site=site, hint="make it dense: .to_dense()")
    if given.dtype != like.dtype:
        raise InterventionError(
            f"{what} is {given.dtype}, expected {like.dtype}", site=site, hint=f"cast it with .to({like.dtype})"
        )
    if given.device != like.device:
        raise InterventionError(
            f"{what} is on {given.device}, expected {like.device}", site=site, hint=f'move it with .to("{like.device}")'
        )
