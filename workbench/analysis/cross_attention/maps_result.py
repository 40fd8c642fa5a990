"""`CrossAttention`: the rows of a decoder's cross-attention that lead to each output token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.storage.result import Result
from workbench.tokens import utf8

if TYPE_CHECKING:
    import pandas as pd

WEIGHTINGS = ("raw", "value_weighted", "gradient")


@dataclass(frozen=True, repr=False)
class CrossAttention(Result):
    """Cross-attention of one example, one map per head. Made by `workbench.cross_attention`.

    A map's row belongs to an output token: it is the row of the decoder position that predicts the token.

    Attributes:
        maps: [layer, head, output token, encoder position].
        mass: [layer, head, output token] weight on the kept positions before any renormalising.
        sites: names of the cross-attention sites, one per layer. layers: their numbers.
        weighting: "raw", "value_weighted" (p·‖v‖, each row normalised), or "gradient" (A∘∂L/∂A, signed, L the sum of
            the tokens' log-probabilities).
        rollout: whether the rows were carried through the encoder's self-attention to its input.
        renormalised: whether rows were scaled to sum 1 after positions were left out.
        target_ids, target_texts, special: of the output tokens.
        position_texts: of encoder positions that are tokens; empty for others.
        kept_positions: encoder positions that the last axis holds. length: how many the encoder gave.
        seconds_per_position: duration of an encoder position, where known.
        alignment_heads: (layer, head) that the model's generation config names, or that were given; may be empty.
        provenance: of the capture.
    """

    form = "workbench.cross_attention"
    filled: ClassVar = ("position",)

    maps: Float[Tensor, "layer head token position"]
    mass: Float[Tensor, "layer head token"]
    sites: Annotated[tuple[str, ...], "layer"]
    layers: Annotated[tuple[int, ...], "layer"]
    weighting: str
    rollout: bool
    renormalised: bool
    target_ids: Annotated[tuple[int, ...], "token"]
    target_texts: Annotated[tuple[str, ...], "token"]
    special: Annotated[tuple[bool, ...], "token"]
    position_texts: Annotated[tuple[str, ...], "?position"]
    kept_positions: Annotated[tuple[int, ...], "position"]
    length: int
    seconds_per_position: float | None
    alignment_heads: tuple[tuple[int, int], ...]
    provenance: dict[str, Any]

    @property
    def n_heads(self) -> int:
        """Heads of each layer."""
        return self.maps.shape[1]

    def mean(self, layers: Sequence[int] | int | None = None, heads: Sequence[int] | int | None = None) -> Tensor:
        """[output token, encoder position] average over these layers and heads; None takes all.

        Raises:
            WorkbenchError: there is no such layer or head.
        """
        rows = self.layers if layers is None else [layers] if isinstance(layers, int) else list(layers)
        columns = range(self.n_heads) if heads is None else [heads] if isinstance(heads, int) else list(heads)
        bad = [f"layer {one}" for one in rows if one not in self.layers]
        bad += [f"head {one}" for one in columns if not 0 <= one < self.n_heads]
        if bad or not rows or not columns:
            raise WorkbenchError(f"there is no {bad[0] if bad else 'empty set'} to average over")
        index = [self.layers.index(one) for one in rows]
        return self.maps[index][:, list(columns)].mean((0, 1))

    def of_heads(self, heads: Sequence[tuple[int, int]]) -> Tensor:
        """[output token, encoder position] average over (layer, head) pairs."""
        if not heads:
            raise WorkbenchError("there is no head to average over")
        return sum((self.mean(layer, head) for layer, head in heads), self.maps.new_zeros(())) / len(heads)

    def aggregates(self) -> dict[str, tuple[str, int | None, int | None]]:
        """Every map of the study by name: (kind, layer, head) with kind "head", "layer", "head index", "all", ….

        "L3H1" is one head, "L3" the mean of a layer's heads, "H1" the mean of a head index over layers, "all" the mean
        of all, "alignment heads" the mean of those where the model names some.
        """
        several = range(self.n_heads)
        found: dict[str, tuple[str, int | None, int | None]] = {}
        found |= {f"L{layer}H{head}": ("head", layer, head) for layer in self.layers for head in several}
        found |= {f"L{layer}": ("layer", layer, None) for layer in self.layers}
        found |= {f"H{head}": ("head index", None, head) for head in several}
        found["all"] = ("all", None, None)
        if self.alignment_heads:
            found["alignment heads"] = ("alignment heads", None, None)
        return found

    def aggregate(self, name: str) -> Tensor:
        """[output token, encoder position] of one of `aggregates`."""
        known = self.aggregates()
        if name not in known:
            raise WorkbenchError(f"there is no aggregate {name!r}", hint=f"such as {', '.join(list(known)[-3:])}")
        kind, layer, head = known[name]
        return self.of_heads(self.alignment_heads) if kind == "alignment heads" else self.mean(layer, head)

    @property
    def table(self) -> pd.DataFrame:
        """One row per head and output token: where its weight lies."""
        import pandas as pd

        peak, at = self.maps.max(-1)
        rows = [
            {
                "layer": layer,
                "head": head,
                "token": token,
                "token_text": utf8(self.target_texts[token]),
                "peak": float(peak[row, head, token]),
                "peak_position": self.kept_positions[int(at[row, head, token])],
                "mass": float(self.mass[row, head, token]),
            }
            for row, layer in enumerate(self.layers)
            for head in range(self.n_heads)
            for token in range(len(self.target_ids))
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        rows, heads, tokens, positions = self.maps.shape
        marks = f"{self.weighting}{', rollout' if self.rollout else ''}{', renormalised' if self.renormalised else ''}"
        return f"CrossAttention({rows} layers x {heads} heads, {tokens} tokens, {positions} positions, {marks})"
