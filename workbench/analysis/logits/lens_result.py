"""The result of `logit_lens`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from jaxtyping import Float, Int
from torch import Tensor

from workbench.storage.result import Result
from workbench.storage.typed import Among
from workbench.tokens import utf8, visible

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class LogitLens(Result):
    """The stream of one prompt after each layer, read as logits.

    Attributes:
        rows: what each row is of: the input, then behind each block. tokens, token_ids: of the prompt.
        targets, target_ids: the tokens that are followed; `given`, or the model's own first choices.
        top_ids, top_probabilities: [row, position, rank] of the likeliest tokens. word_ids, word_texts: each of
            these tokens once.
        probability, rank: [row, position] of the target; rank 1 is the likeliest.
        divergence: [row, position] KL(final ‖ lens), nats. entropy: [row, position] of the lens, nats.
    """

    form = "workbench.logit_lens"
    filled = ("row", "position", "top")

    rows: Annotated[tuple[str, ...], "row"]
    tokens: Annotated[tuple[str, ...], "position"]
    token_ids: Annotated[tuple[int, ...], "position"]
    target_ids: Annotated[tuple[int, ...], "position"]
    targets: Annotated[tuple[str, ...], "position"]
    given: bool
    top_ids: Annotated[Int[Tensor, "row position top"], Among("word_ids")]
    top_probabilities: Float[Tensor, "row position top"]
    probability: Float[Tensor, "row position"]
    rank: Int[Tensor, "row position"]
    divergence: Float[Tensor, "row position"]
    entropy: Float[Tensor, "row position"]
    word_ids: Annotated[tuple[int, ...], "word"]
    word_texts: Annotated[tuple[str, ...], "word"]
    provenance: dict[str, Any]

    @property
    def words(self) -> dict[int, str]:
        """The text of each token that is among the likeliest somewhere."""
        return dict(zip(self.word_ids, self.word_texts, strict=True))

    @property
    def table(self) -> pd.DataFrame:
        """One row per layer and position: the likeliest token, the target's probability and rank, the divergence."""
        import pandas as pd

        n, m = self.probability.shape
        words, best = self.words, self.top_ids[..., 0].flatten().tolist()
        return pd.DataFrame(
            {
                "row": [name for name in self.rows for _ in range(m)],
                "position": list(range(m)) * n,
                "token": list(map(utf8, self.tokens)) * n,
                "top": [utf8(words.get(i, str(i))) for i in best],
                "top_probability": self.top_probabilities[..., 0].flatten().double().numpy(),
                "target": list(map(utf8, self.targets)) * n,
                "probability": self.probability.flatten().double().numpy(),
                "rank": self.rank.flatten().numpy(),
                "divergence": self.divergence.flatten().double().numpy(),
                "entropy": self.entropy.flatten().double().numpy(),
            }
        )

    def __repr__(self) -> str:
        first = (self.rank[:, -1] == 1).nonzero()[:, 0]
        said = f"first after {len(self.rows)} rows" if not len(first) else f"first at {self.rows[int(first[0])]!r}"
        if not len(first):
            said = "never the likeliest"
        return f"LogitLens({len(self.rows)} rows, {len(self.tokens)} tokens; {visible(self.targets[-1])} {said})"
