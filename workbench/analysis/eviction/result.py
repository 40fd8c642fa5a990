"""The result of `eviction`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.statistics.intervals import means_t, without_interval
from workbench.errors import CaptureError, WorkbenchError
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Eviction(Result):
    """Which keys a cache keeps, and what weight lies on those that it has dropped.

    Attributes:
        policy: as in `eviction`. sinks, heavy, recent, prompt: its numbers; 0 for those that it has not.
        layers, numbers, sites: of each head.
        lost: [head, example, query] the share of the query's weight that lies on keys which were dropped before; NaN of
            padding.
        seen_by: [head, example, key] how many queries see the key, of which its own is the first; 0 of padding.
    """

    form = "workbench.eviction"
    filled = ("head", "example", "query")

    policy: str
    sinks: int
    heavy: int
    recent: int
    prompt: int
    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    lost: Float[Tensor, "head example query"]
    seen_by: Int[Tensor, "head example query"]
    provenance: dict[str, Any]

    def check_parts(self) -> None:
        """No key is seen by more queries than there are from its own on."""
        n = self.seen_by.shape[-1]
        if bool(((self.seen_by < 0) | (self.seen_by > n - torch.arange(n))).any()):
            raise WorkbenchError(f"keys that are seen by more of {n} queries than there are from their own on")

    @property
    def leaves(self) -> Tensor:
        """[head, example, key] the first query that no longer sees the key; as many as there are queries where that
        never comes, −1 of padding.
        """
        behind = torch.arange(self.seen_by.shape[-1]) + self.seen_by
        return behind.masked_fill(self.seen_by == 0, -1)

    def kept(self, layer: int, head: int, example: int = 0) -> Tensor:
        """[query, key] bool of one head: which keys each query sees.

        Raises:
            CaptureError: no such head or example.
        """
        places = [i for i, each in enumerate(zip(self.layers, self.numbers, strict=True)) if each == (layer, head)]
        if len(places) != 1 or not 0 <= example < self.seen_by.shape[1]:
            raise CaptureError(
                f"there is no one head L{layer}H{head} of example {example}",
                hint=f"{len(self.layers)} heads of {self.seen_by.shape[1]} examples; read leaves",
            )
        leaves = self.leaves[places[0], example]
        i = torch.arange(len(leaves))[:, None]
        return (i >= torch.arange(len(leaves))) & (leaves > i) & (leaves[:, None] >= 0)

    @property
    def keys(self) -> Tensor:
        """[head, example, query] how many keys each query sees."""
        there, n = self.seen_by > 0, self.seen_by.shape[-1]
        gone = torch.zeros(*self.seen_by.shape[:2], n + 1, dtype=torch.long)
        gone.scatter_add_(2, self.leaves.clamp(min=0), there.long())
        return (there.long() - gone[..., :n]).cumsum(-1)

    @property
    def interval(self) -> Tensor:
        """[head, 2] 95 % t intervals over examples of the mean weight that a query loses; NaN of one example, and
        where few carry a mean."""
        return means_t(self.lost.double().nanmean(-1))

    @property
    def table(self) -> pd.DataFrame:
        """One row per head, the largest loss first: its mean with interval, the worst query's, keys at the end."""
        import pandas as pd

        ends = self.interval
        frame = pd.DataFrame(
            {
                "layer": self.layers, "head": self.numbers, "site": self.sites,
                "lost": self.lost.double().nanmean((1, 2)).numpy(),
                "low": ends[:, 0].numpy(), "high": ends[:, 1].numpy(),
                "worst": self.lost.double().nan_to_num(0.0).amax((1, 2)).numpy(),
                "keys": self.keys[..., -1].double().mean(1).numpy(),
            }
        )  # fmt: skip
        return frame.sort_values("lost", ascending=False, kind="stable").reset_index(drop=True)

    @property
    def budget(self) -> str:
        """The numbers of the policy in words."""
        if self.policy == "observed":
            return f"the {self.heavy} heaviest keys of a prompt of {self.prompt}, and all later ones"
        first = f"{self.sinks} sinks" if self.policy == "streaming" else f"the {self.heavy} heaviest keys"
        return f"{first} and {self.recent} recent ones"

    def __repr__(self) -> str:
        ordered = list(self.table.itertuples())
        most, least = (f"L{row.layer}H{row.head} {row.lost:.3f}" for row in (ordered[0], ordered[-1]))
        return (
            f"Eviction({self.policy}, {self.budget}: {len(self.layers)} heads, {self.lost.shape[1]} examples of "
            f"{self.lost.shape[2]} tokens; weight lost from {least} to {most}"
            f"{without_interval(self.interval, self.lost.shape[1])})"
        )
