"""`ov_copying`: whether what a head writes about a token raises the logit of that token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.weights.find import find_weights
from workbench.errors import expect
from workbench.session.workbench import Workbench
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class OVCopying(Result):
    """Eigenvalues of every head's OV circuit in the vocabulary.

    Attributes:
        layers, numbers, sites: of each head.
        eigenvalues: [head, eigenvalue, 2] real and imaginary parts, the largest magnitude first.
    """

    form = "workbench.ov_copying"
    filled = ("head",)

    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    eigenvalues: Float[Tensor, "head eigenvalue 2"]
    provenance: dict[str, Any]

    @property
    def scores(self) -> Tensor:
        """[head] Σλ / Σ|λ|, from −1 to 1; NaN for a head that writes nothing."""
        values = self.eigenvalues.double()
        return values[..., 0].sum(-1) / values.norm(dim=-1).sum(-1)

    @property
    def table(self) -> pd.DataFrame:
        """One row per head, the largest score first."""
        import pandas as pd

        frame = pd.DataFrame(
            {"layer": self.layers, "head": self.numbers, "site": self.sites, "score": self.scores.numpy()}
        )
        return frame.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        rows = self.table.dropna(subset="score")
        best = [f"L{row.layer}H{row.head} {row.score:+.2f}" for row in rows.head(4).itertuples()]
        if silent := len(self.layers) - len(rows):
            best.append(f"{silent} that can write nothing have no score")
        return f"OVCopying({len(self.layers)} heads; {', '.join(best)})"


def ov_copying(wb: Workbench) -> OVCopying:
    """How far each head copies, by its weights alone: eigenvalues of W_E W_V W_O W_U, [vocab, vocab].

    A positive eigenvalue means that tokens raise their own logits where the head attends to them. They are found as
    those of the [d_head, d_head] matrix W_O W_U W_E W_V, which are the same but for zeros. The score Σλ / Σ|λ| is 1 for
    a head that copies everything, −1 for one that suppresses it.

    The direct path alone: positions, biases, MLPs and what other heads do to the stream are left out. Gains and
    centring of norms are in the matrices; their scales, positive numbers, leave the score as it is. Values have no
    positions, so that rotary ones change nothing, and heads that share values each have their own W_O. Of an
    encoder-decoder: the decoder's self-attention.

    Raises:
        AttachError: weights are quantized or offloaded to where they cannot be read, or parts cannot be found; the
            module is named.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", "Copying / primacy of eigenvalues".
    """
    expect(Workbench, wb=wb)
    weights = find_weights(wb, qk=False)
    between = weights.unembedding.T @ weights.embedding  # W_U W_E, summed over the vocabulary
    found = []
    for site in weights.sites:
        values = torch.linalg.eigvals(site.o @ between @ site.each(site.v))
        order = values.abs().argsort(-1, descending=True)
        found.append(torch.view_as_real(values.gather(-1, order)))
    widest = max(each.shape[1] for each in found)
    padded = [torch.nn.functional.pad(each, (0, 0, 0, widest - each.shape[1])) for each in found]
    return OVCopying(
        layers=tuple(site.site.layer for site, _ in weights.heads), numbers=tuple(head for _, head in weights.heads),
        sites=tuple(site.site.name for site, _ in weights.heads),
        eigenvalues=torch.cat(padded).cpu(), provenance=wb.provenance(),
    )  # fmt: skip
