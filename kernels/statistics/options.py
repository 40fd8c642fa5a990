"""What some statistics need besides the pattern: token ids, given sinks, how many keys, how large a block."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import LARGEST, check_range


@dataclass(frozen=True)
class Options:
    """What some statistics need besides the pattern.

    Attributes:
        tokens: [batch, key] integer ids, for `induction`.
        token_before: [batch] ids of the token that the first key follows, where a cache has forgotten its key; None if
            the first key begins the sequence.
        sink_keys: keys whose joint mass is the `sink`; None for the first visible key of each row.
        n_top: how many keys `top_keys` keeps.
        block: edge of a `pooled_*` block, in tokens.
    """

    tokens: Tensor | None = None
    sink_keys: tuple[int, ...] | None = None
    n_top: int = 8
    block: int = 16
    token_before: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("n_top", "block"):
            check_range(name, getattr(self, name), 1, LARGEST)

    def ids(self, n_batch: int, n_queries: int, n_keys: int, offset: int) -> Tensor:
        """The ids [batch, 1 + key] of the token before each key and of the last key, for queries from `offset` on.

        Raises:
            CaptureError: some query is none of the keys, or the ids are missing or too few.
        """
        if offset < 0 or offset + n_queries > n_keys:
            raise CaptureError(
                f"induction needs its queries among the keys, not {n_queries} queries from {offset} on of {n_keys} keys"
            )
        if self.tokens is None:
            raise CaptureError('"induction" compares tokens and needs their ids', hint="pass tokens=input_ids")
        if tuple(self.tokens.shape) != (n_batch, n_keys):
            raise CaptureError(
                f"the token ids are not [batch, key] = [{n_batch}, {n_keys}]",
                shape=self.tokens.shape,
                hint="pass one row of ids per batch entry, as long as the keys",
            )
        least = self.tokens.min() if self.tokens.numel() else self.tokens.new_zeros(())
        no_token = (least - 1).expand(n_batch)
        before = no_token if self.token_before is None else self.token_before.to(self.tokens)
        return torch.cat((before[:, None], self.tokens), dim=1)

    def sinks(self, n_keys: int) -> list[int]:
        """The `sink_keys`, or the error that names those that are no keys."""
        keys = list(self.sink_keys or ())
        if not keys or any(not -n_keys <= key < n_keys for key in keys):
            raise CaptureError(f"sink_keys {keys} are not keys of a map with {n_keys} keys")
        return keys

    def given(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        return [field.name for field in fields(self) if not _same(getattr(self, field.name), field.default)]


def _same(value: object, default: object) -> bool:
    return value is default or (isinstance(value, int) and value == default)
