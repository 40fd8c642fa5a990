"""Value zeroing: how much a position changes behind its block when the value of another is taken away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.recording import first_float, same_product
from workbench.analysis.rollout.maps import shares, tiles
from workbench.errors import AttachError
from workbench.hooks.changes import Changes
from workbench.kernels.patterns import Pattern


@dataclass
class BlockRun:
    """A block as it ran: what it was given and gave.

    Attributes:
        args, kwargs: of its call. given, gave: [1, position, d_model].
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Tensor
    gave: Tensor

    def again(self, at: Tensor, out: nn.Module, z: Tensor) -> Tensor:
        """What the block makes of chosen positions, if their heads give z.

        All positions of one run are used for what is asked, whatever it is of: behind its attention a block works on
        each position alone. What its attention makes of this run is thrown away.

        Args:
            at: [n] positions. out: the module that joins the heads. z: [n, head · width] that it is given.

        Returns:
            [n, d_model]
        """
        length, found = self.given.shape[1], []
        for start in range(0, len(at), length):
            index, rows = at[start : start + length], z[start : start + length]
            short = length - len(index)
            if short:
                index, rows = (
                    torch.cat([index, index[-1:].expand(short)]),
                    torch.cat([rows, rows[-1:].expand(short, -1)]),
                )
            made = self._run(index, out, rows)
            found.append(made[: length - short])
        return torch.cat(found)

    def _run(self, index: Tensor, out: nn.Module, rows: Tensor) -> Tensor:
        swapped = 0

        def joined(_: nn.Module, args: tuple[Any, ...]) -> Any:
            nonlocal swapped
            swapped += 1
            return (rows.reshape(args[0].shape).to(args[0]), *args[1:])

        stream, first = self.given[:, index], first_float((*self.args, *self.kwargs.values()))
        args = tuple(stream if value is first else value for value in self.args)
        kwargs = {key: stream if value is first else value for key, value in self.kwargs.items()}
        kwargs = {key: None if hasattr(value, "get_seq_length") else value for key, value in kwargs.items()}  # a cache
        try:
            with Changes() as changes, torch.no_grad():
                changes.before(out, joined)
                output = first_float(self.module(*args, **kwargs))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise AttachError(f"the block {self.name} cannot be run again by itself: {error}") from error
        if swapped != 1 or output is None:
            raise AttachError(f"the block {self.name} cannot be run again by itself: {swapped} calls joined its heads")
        return output[0]


class ZeroingMap:
    """Cosine distances of a block's output from that without a key's values: Mohebbi et al. 2023 (arXiv 2301.12971)."""

    def __init__(self, pattern: Pattern, values: Tensor, z: Tensor, run: BlockRun, out: nn.Module) -> None:
        """`values` are [kv head, key, width], `z` [query, head · width].

        Raises:
            AttachError: the block mixes positions elsewhere than in its attention.
        """
        self.pattern, self.z, self.run, self.out = pattern, z, run, out
        self.values = values.repeat_interleave(pattern.n_heads // values.shape[0], 0)
        turned = torch.arange(len(z) - 1, -1, -1, device=z.device)
        eps = torch.finfo(run.gave.dtype).eps
        if not same_product(run.gave[0, turned], run.again(turned, out, z[turned]), eps):
            raise AttachError(
                f"the block {run.name} mixes positions elsewhere than in its attention",
                hint="value zeroing needs blocks that work on each position alone behind their attention",
            )

    def rows(self, queries: slice) -> tuple[Tensor, Tensor]:
        """[query, key], and zeros: what stays of the stream is no part of this definition."""
        found = torch.zeros(
            queries.stop - queries.start, self.pattern.n_keys, dtype=torch.float64, device=self.z.device
        )
        length = self.run.given.shape[1]
        for keys, p in tiles(self.pattern, queries, max(1, length // 2)):
            at, key = (p != 0).any(0).nonzero(as_tuple=True)
            for start in range(0, len(at), length):
                q, k = at[start : start + length], key[start : start + length]
                gone = p[:, q, k, None] * self.values[:, keys][:, k].to(p)  # [head, pair, width]
                z = self.z[queries][q] - gone.transpose(0, 1).flatten(1).to(self.z)
                made = self.run.again(q + queries.start, self.out, z)
                whole = self.run.gave[0, queries][q]
                near = torch.cosine_similarity(made.double(), whole.double(), dim=-1)
                found[q, k + keys.start] = (1 - near).clamp_min(0)
        return shares(found, torch.zeros_like(found[:, 0]))
