"""The result of `attention_rollout`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from jaxtyping import Float
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.storage.result import Result
from workbench.storage.typed import Places
from workbench.tokens import utf8, visible

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class AttentionRollout(Result):
    """Shares of a prompt's tokens in what chosen positions are in the end, by a method that the docstring describes.

    Attributes:
        method: "attention", "norm", "alti" or "value_zeroing". residual: the share that the stream was given; None
            where it was measured.
        sites: names of the attentions in order, the encoder's first.
        tokens, streams: texts of all tokens, and whether they are "input" or "decoder".
        targets: of which tokens, as places in `tokens`.
        shares: [place, target, token] before each site, and behind the last; they sum to 1 over tokens. `shares[0]`
            is the rollout down to the input.
        own: [site, target, token] shares by one site alone; NaN where the target is no query of it. A target that has
            attended to nothing keeps all.
        assumed: what the method takes for granted, in words.
    """

    form = "workbench.attention_rollout"
    filled = ("site", "target", "token")

    method: str
    residual: float | None
    sites: Annotated[tuple[str, ...], "site"]
    targets: Annotated[tuple[int, ...], "target", Places("token")]
    tokens: Annotated[tuple[str, ...], "token"]
    streams: Annotated[tuple[str, ...], "token"]
    shares: Float[Tensor, "place target token"]
    own: Float[Tensor, "site target token"]
    assumed: str
    provenance: dict[str, Any]

    def check_parts(self) -> None:
        """Places are those before each site, and one behind the last."""
        if len(self.shares) != len(self.sites) + 1:
            raise WorkbenchError(f"shares at {len(self.shares)} places around {len(self.sites)} sites")

    @property
    def rollout(self) -> Tensor:
        """[target, token] shares of the input's tokens."""
        return self.shares[0]

    @property
    def table(self) -> pd.DataFrame:
        """One row per target and token, the largest share first: rolled out, and by the last site alone."""
        import pandas as pd

        n, m = len(self.targets), len(self.tokens)
        frame = pd.DataFrame(
            {
                "target": [i for i in self.targets for _ in range(m)],
                "position": list(range(m)) * n,
                "stream": list(self.streams) * n,
                "token": list(map(utf8, self.tokens)) * n,
                "share": self.rollout.flatten().double().numpy(),
                "last_site": self.own[-1].flatten().double().numpy(),
            }
        )
        order = frame.sort_values(["target", "share"], ascending=[True, False], kind="stable")
        return order.reset_index(drop=True)

    def __repr__(self) -> str:
        last = self.rollout[-1]
        best = last.argsort(descending=True)[:4].tolist()
        shown = ", ".join(f"{visible(self.tokens[i])} {float(last[i]):.3f}" for i in best)
        return (
            f"AttentionRollout({self.method}: {len(self.sites)} sites, {len(self.tokens)} tokens; "
            f"{visible(self.tokens[self.targets[-1]])} at {self.targets[-1]} from {shown})"
        )
