"""`singular_vectors`: the directions that a head reads and writes, as tokens of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.weights.find import find_weights
from workbench.errors import CaptureError, expect
from workbench.hooks.heads import parse_heads
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.storage.typed import Among
from workbench.tokens import piece, visible

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class SingularVectors(Result):
    """Singular vectors of heads, each with the tokens that lie farthest along it, and those farthest against it.

    Attributes:
        circuit: "ov" or "qk". distance: from the key to the query, for "qk".
        layers, numbers, sites: of each head.
        values: [head, vector] singular values, up to the scales of norms. share: [head, vector] of the squared total.
        left_ids, right_ids: [head, vector, sign, rank] tokens of the two sides: what an OV circuit reads and writes,
            or the query and the key of a QK circuit. Sign 0 is along the vector, 1 against it; the two sides go
            together.
        left_scores, right_scores: like these, products of the token's vector with the singular vector.
        word_ids, word_texts: each token that is named, once.
    """

    form = "workbench.singular_vectors"
    filled = ("head", "vector", "rank")

    circuit: str
    distance: int
    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    values: Float[Tensor, "head vector"]
    share: Float[Tensor, "head vector"]
    left_ids: Annotated[Int[Tensor, "head vector 2 rank"], Among("word_ids")]
    right_ids: Annotated[Int[Tensor, "head vector 2 rank"], Among("word_ids")]
    left_scores: Float[Tensor, "head vector 2 rank"]
    right_scores: Float[Tensor, "head vector 2 rank"]
    word_ids: Annotated[tuple[int, ...], "word"]
    word_texts: Annotated[tuple[str, ...], "word"]
    provenance: dict[str, Any]

    @property
    def sides(self) -> tuple[str, str]:
        """What the left and right vectors are of."""
        return ("reads", "writes") if self.circuit == "ov" else ("query", "key")

    @property
    def table(self) -> pd.DataFrame:
        """One row per head, vector and sign: the value, its share, and the tokens of both sides.

        No tokens stand where the value is 0 but for rounding: any direction is such a singular vector.
        """
        import pandas as pd

        least = 100 * torch.finfo(self.values.dtype).eps * self.values.amax(1)
        words, rows = dict(zip(self.word_ids, self.word_texts, strict=True)), []
        for h, v, sign in torch.cartesian_prod(*map(torch.arange, self.left_ids.shape[:3])).tolist():
            texts = [" ".join(visible(words[i]) for i in ids[h, v, sign].tolist())
                     for ids in (self.left_ids, self.right_ids)]  # fmt: skip
            if not bool(self.values[h, v] > least[h]):
                texts = ["", ""]
            rows.append(
                {
                    "layer": self.layers[h], "head": self.numbers[h], "vector": v, "sign": "+-"[sign],
                    "value": float(self.values[h, v]), "share": float(self.share[h, v]),
                    self.sides[0]: texts[0], self.sides[1]: texts[1],
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        first = self.table.iloc[0]
        if not first.value:
            return f"SingularVectors({self.circuit}: L{first.layer}H{first['head']} is 0 and has no directions)"
        return (
            f"SingularVectors({self.circuit}: {len(self.layers)} heads, {self.values.shape[1]} vectors; L{first.layer}"
            f"H{first['head']} {self.sides[0]} {first[self.sides[0]]}, {self.sides[1]} {first[self.sides[1]]})"
        )


def singular_vectors(
    wb: Workbench, heads: Any, *, circuit: Literal["ov", "qk"] = "ov", vectors: int = 3, top: int = 8, distance: int = 0
) -> SingularVectors:
    """The largest singular vectors of heads' W_V W_O or W_Q W_Kᵀ, read in the vocabulary.

    What an OV circuit reads is compared with the embeddings W_E, what it writes with the unembedding W_U; both sides
    of a QK circuit with W_E. Only the small factors are decomposed, never a [d_model, d_model] matrix. Gains and
    centring of norms are in the matrices; biases and positions that are added are not, nor a position bias (T5, ALiBi).

    Where positions are rotary W_Q R W_Kᵀ depends on the distance from key to query, and on nothing else: `distance=0`
    is W_Q W_Kᵀ itself. Heads that share keys or values have their own W_Q and W_O. In later layers the stream holds
    more than embeddings, so that tokens describe a direction and do not exhaust it.

    Args:
        heads: as in `wb.ablate`: "L1H6", (1, 6), or several.
        vectors: how many, the largest first. top: tokens of each side and sign.

    Raises:
        AttachError: weights are quantized or offloaded, or queries and keys go through a norm (for "qk"); the module is
            named. InterventionError: no such head. CaptureError: a number that does not fit.

    Source: Elhage et al. 2021; Millidge & Black 2022, "The Singular Value Decompositions of Transformer Weight Matrices
    are Highly Interpretable".
    """
    expect(Workbench, wb=wb)
    if circuit not in ("ov", "qk"):
        raise CaptureError(f'circuit is "ov" or "qk", and not {circuit!r}')
    chosen = parse_heads(wb.sites, heads)
    weights = find_weights(wb, qk=circuit == "qk", distance=distance)
    several = [(site, head) for site, head in weights.heads if head in chosen.get(site.site.name, ())]
    missing = set(chosen) - {site.site.name for site in weights.sites}
    if missing:
        raise CaptureError("this is no self-attention of the stream that the logits are read from",
                           site=sorted(missing)[0])  # fmt: skip
    most, n = len(weights.embedding), min(site.v.shape[-1] for site, _ in several)
    if not 1 <= vectors <= n or not 1 <= top <= most:
        raise CaptureError(f"vectors is from 1 to {n} and top from 1 to {most}, not {vectors} and {top}")
    values, share, sides = [], [], []
    for site, head in several:
        if circuit == "ov":
            first, second = site.each(site.v)[head], site.o[head].T
        else:
            first, second = site.each(site.q)[head], site.each(site.k)[head]
        left, size, right = _decomposed(first, second)
        values.append(size[:vectors])
        share.append(size[:vectors].square() / size.square().sum())
        reader = weights.unembedding if circuit == "ov" else weights.embedding
        sides.append((_farthest(weights.embedding @ left[:, :vectors], top),
                      _farthest(reader @ right[:, :vectors], top)))  # fmt: skip
    ids = [torch.stack([each[side][0] for each in sides]).cpu() for side in (0, 1)]
    scores = [torch.stack([each[side][1] for each in sides]).cpu() for side in (0, 1)]
    words = torch.cat([each.flatten() for each in ids]).unique().tolist()
    return SingularVectors(
        circuit=circuit, distance=distance if circuit == "qk" else 0,
        layers=tuple(site.site.layer for site, _ in several), numbers=tuple(head for _, head in several),
        sites=tuple(site.site.name for site, _ in several),
        values=torch.stack(values).cpu(), share=torch.stack(share).cpu(),
        left_ids=ids[0], right_ids=ids[1], left_scores=scores[0], right_scores=scores[1],
        word_ids=tuple(words),
        word_texts=tuple(str(one) if wb.tokenizer is None else piece(wb.tokenizer, one) for one in words),
        provenance=wb.provenance(),
    )  # fmt: skip


def _decomposed(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(left [d_model, n], values [n], right [d_model, n]) of first · secondᵀ, both [d_model, width]."""
    q1, r1 = torch.linalg.qr(first)
    q2, r2 = torch.linalg.qr(second)
    u, s, vh = torch.linalg.svd(r1 @ r2.T)
    return q1 @ u, s, q2 @ vh.T


def _farthest(products: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Ids and products [vector, sign, rank] of the tokens farthest along and against each vector."""
    both = torch.stack([products.T, -products.T], 1).topk(top, -1)
    signs = products.new_tensor([1.0, -1.0])[:, None]
    return both.indices, both.values * signs
