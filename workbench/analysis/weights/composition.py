"""`composition_scores`: which heads read what which earlier heads write, by their weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.weights.find import SiteWeights, find_weights
from workbench.errors import CaptureError, expect
from workbench.session.workbench import Workbench
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("Q", "K", "V")


@dataclass(frozen=True, repr=False)
class CompositionScores(Result):
    """Composition of heads with those of earlier blocks.

    Attributes:
        distance: from the key to the query, for Q and K.
        layers, numbers, sites: of each head.
        scores: [kind, from, to] of "Q", "K" and "V", from 0 to 1; NaN where `from` is in no earlier block than `to`.
    """

    form = "workbench.composition_scores"
    filled = ("head",)

    distance: int
    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    scores: Float[Tensor, "3 head head"]
    provenance: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """L1H6 for each head."""
        return tuple(f"L{layer}H{head}" for layer, head in zip(self.layers, self.numbers, strict=True))

    @property
    def table(self) -> pd.DataFrame:
        """One row per kind and pair of heads, the largest score first."""
        import pandas as pd

        kind, first, second = (~self.scores.isnan()).nonzero(as_tuple=True)
        labels = self.labels
        frame = pd.DataFrame(
            {
                "kind": [KINDS[i] for i in kind.tolist()],
                "from": [labels[i] for i in first.tolist()],
                "to": [labels[i] for i in second.tolist()],
                "score": self.scores[kind, first, second].double().numpy(),
            }
        )
        return frame.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        best = ", ".join(f"{kind} {a}→{b} {score:.3f}" for kind, a, b, score in self.table.head(4).values.tolist())
        return f"CompositionScores({len(self.layers)} heads; {best or 'their weights are 0, and none has a score'})"


def composition_scores(wb: Workbench, *, distance: int = 0) -> CompositionScores:
    """Q-, K- and V-composition of all pairs of heads: ‖W_OV¹ M‖ / (‖W_OV¹‖ ‖M‖), Frobenius norms.

    M is W_QK² for Q, its transpose for K, and W_OV² for V, of the later head, where vectors are rows. Products are
    taken of the small factors, so that no [d_model, d_model] matrix is made. The score says how well the two subspaces
    fit; two random heads have about 1/√d_model, so that scores are compared with each other and not with 0.

    Gains and centring of norms are in the matrices, and their scales cancel; biases, and what MLPs make on the way, are
    left out. Where positions are rotary W_QK = W_Q R W_Kᵀ depends on the distance from key to query: 0 is W_Q W_Kᵀ
    itself, and V does not depend on it. Position biases (T5, ALiBi) are no part of W_QK. Heads that share keys or
    values have their own W_Q and W_O. Of an encoder-decoder: the decoder's self-attention.

    Raises:
        AttachError: weights are quantized or offloaded, or queries and keys go through a norm; the module is named.
        CaptureError: one layer, or a distance beyond the context.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    expect(Workbench, wb=wb)
    weights = find_weights(wb, qk=True, vocabulary=False, distance=distance)
    if len({site.order for site in weights.sites}) < 2:
        raise CaptureError("heads compose over layers, and this model has one")
    start, n = {}, 0
    for site in weights.sites:
        start[site.site.name], n = n, n + site.n_heads
    scores = torch.full((3, n, n), torch.nan, dtype=torch.float64)
    for first in weights.sites:
        for second in weights.sites:
            if first.order < second.order:
                rows = slice(start[first.site.name], start[first.site.name] + first.n_heads)
                columns = slice(start[second.site.name], start[second.site.name] + second.n_heads)
                scores[:, rows, columns] = _scores(first, second).cpu()
    return CompositionScores(
        distance=distance,
        layers=tuple(site.site.layer for site, _ in weights.heads), numbers=tuple(head for _, head in weights.heads),
        sites=tuple(site.site.name for site, _ in weights.heads), scores=scores, provenance=wb.provenance(),
    )  # fmt: skip


def _scores(first: SiteWeights, second: SiteWeights) -> Tensor:
    """[kind, from, to] of two sites."""
    read, written = _small(first.each(first.v)), first.o
    size = (read @ _small(written.mT).mT).flatten(1).norm(dim=1)
    found = []
    q, k = second.each(second.q), second.each(second.k)
    for near, far in ((q, k), (k, q), (second.each(second.v), second.o.mT)):
        end = _small(far)
        own = (_small(near) @ end.mT).flatten(1).norm(dim=1)
        between = torch.einsum("awd,bdk->abwk", written, near)
        both = (read[:, None] @ between @ end.mT).flatten(2).norm(dim=2)
        found.append(both / (size[:, None] * own))
    return torch.stack(found)


def _small(matrix: Tensor) -> Tensor:
    """R of [head, d_model, width] = Q R: the same lengths, without the long side."""
    return torch.linalg.qr(matrix, mode="r")[1]
