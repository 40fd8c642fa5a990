"""Partial pruning: a head loses some query rows, or what it reads from near or from far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import InterventionError
from workbench.hooks.positions import Positions, Where
from workbench.hooks.sites import Site
from workbench.sweep.variants import Variant

Grid = tuple[int, int]
_MOST_PREFIX = 16  # tokens before the patches that are taken for granted: CLS, distillation, registers


class Hops:
    """Takes from a pattern the weights of the keys within, or beyond, some hops.

    A hop is a step between tokens; on a grid, a ring: max(|row − row'|, |column − column'|). What prefix tokens such as
    CLS read, and what is read from them, stays.

    Args:
        k: how far. inside: whether keys at up to k hops lose their weight, or those beyond.
        grid: rows and columns of patches; None for text.
        prefix: how many tokens stand before the patches; None for as many as there are more than patches.
        renormalise: whether the weights that stay are scaled to the row's former sum; a row that loses all stays empty.

    >>> edit = Hops(0, inside=True)
    >>> edit(torch.full((1, 2, 2), 0.5), None, 0).tolist()
    [[[0.0, 0.5], [0.5, 0.0]]]
    """

    def __init__(
        self, k: int, *, inside: bool, grid: Grid | None = None, prefix: int | None = None, renormalise: bool = False
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise InterventionError(f"hops are counted from 0, not {k!r}")
        self.k, self.inside, self.grid, self.prefix, self.renormalise = k, inside, grid, prefix, renormalise

    def __call__(self, rows: Tensor, site: Site | None, head: int) -> Tensor:
        """Rows [batch, query, key] without those weights."""
        name = None if site is None else site.name
        if rows.shape[-1] != rows.shape[-2] or (site is not None and site.kind == "cross"):
            raise InterventionError("hops need as many queries as keys, of one sequence", site=name, shape=rows.shape)
        gone = self.gone(rows.shape[-1], name).to(rows.device)
        left = rows.masked_fill(gone, 0.0)
        if not self.renormalise:
            return left
        sums = left.sum(-1, keepdim=True)
        return left * torch.where(sums > 0, rows.sum(-1, keepdim=True) / sums, 0.0)

    def gone(self, length: int, site: str | None = None) -> Tensor:
        """[query, key], True where a weight is taken.

        Raises:
            InterventionError: the grid does not match the tokens.
        """
        prefix = prefix_length(length, self.grid, self.prefix, site)
        if self.grid is None:
            at = torch.arange(length - prefix)[:, None]
        else:
            at = torch.cartesian_prod(torch.arange(self.grid[0]), torch.arange(self.grid[1]))
        hops = (at[:, None] - at[None]).abs().amax(-1)
        gone = torch.zeros(length, length, dtype=torch.bool)
        gone[prefix:, prefix:] = hops <= self.k if self.inside else hops > self.k
        return gone


def prefix_length(length: int, grid: Grid | None, prefix: int | None, site: str | None = None) -> int:
    """How many of `length` tokens stand before the patches of a grid.

    Raises:
        InterventionError: the grid does not match the tokens.
    """
    if grid is None:
        return prefix or 0
    patches = grid[0] * grid[1]
    found = length - patches if prefix is None else prefix
    if found < 0 or found + patches != length or (prefix is None and found > _MOST_PREFIX):
        said = "" if prefix is None else f" and {prefix} before them"
        raise InterventionError(
            f"a grid of {grid[0]} x {grid[1]} patches{said} does not match {length} tokens",
            site=site,
            hint="give grid=(rows, columns) and prefix=, the number of tokens such as CLS before the patches",
        )
    return found


def find_grid(model: nn.Module, batch: Mapping[str, Any]) -> Grid | None:
    """Rows and columns of patches of a batch of images, or None where the model has no patches."""
    images = batch.get("pixel_values")
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if not isinstance(images, Tensor) or images.dim() != 4 or size is None:
        return None
    high, wide = size if isinstance(size, (tuple, list)) else (size, size)
    return images.shape[-2] // int(high), images.shape[-1] // int(wide)


def part_variants(
    part: Any, name: str, heads: Sequence[tuple[str, Any]], grid: Grid | None, prefix: int | None, renormalise: bool
) -> list[Variant]:
    """A variant for each head that loses a part of what it does.

    Args:
        part: "cls" or "patches", the query rows of either; ("inside", k) or ("outside", k), what is read from keys up
            to k hops away, or from those beyond; or query positions.
        name: what the part is called. heads: label and head, as interventions take it.

    Raises:
        InterventionError: it is none of these.
    """
    if isinstance(part, tuple) and len(part) == 2 and part[0] in ("inside", "outside"):
        edit = Hops(part[1], inside=part[0] == "inside", grid=grid, prefix=prefix, renormalise=renormalise)
        return [Variant(head, edit=edit, label=f"{name} {label}") for label, head in heads]
    positions: Where
    if isinstance(part, str):
        if part not in ("cls", "patches"):
            raise InterventionError(
                f'there is no part "{part}"', hint='"cls", "patches", ("inside", k), ("outside", k) or query positions'
            )
        first = 1 if prefix is None else prefix
        if first < 1 and part == "cls":
            raise InterventionError("there is no CLS: prefix is 0")
        positions = slice(0, first) if part == "cls" else slice(first, None)
    else:
        Positions(part)
        positions = part
    return [Variant(head, positions=positions, label=f"{name} {label}") for label, head in heads]


def named_parts(parts: Any) -> dict[str, Any]:
    """Parts by name; several are a dict by name, or a list whose entries name themselves."""
    if parts is None:
        return {}
    if isinstance(parts, Mapping):
        return {str(name): part for name, part in parts.items()}
    several = parts if isinstance(parts, list) else [parts]
    return {_name(part): part for part in several}


def _name(part: Any) -> str:
    if isinstance(part, str):
        return f"{part} rows"
    if isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], str):
        return f"{part[0]} {part[1]} {'hop' if part[1] == 1 else 'hops'}"
    return f"rows {part}"
