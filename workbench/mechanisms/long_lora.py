"""Shifted groups: LongLoRA's sparse attention for training on long texts, and SinkLoRA's with sinks for all."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.grouped import shifted_attention
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, by_blocks, register

LONG = (False, True)
SINK = (False, False, False, True)


class ShiftedGroups(Mixer):
    """Softmax attention inside groups of neighbours, which a part of the heads shifts by half a group.

    Args:
        place: a sequence; its heads are a multiple of the parts.
        group: tokens in a group; a quarter of the place's length if None.
        shifted: for each part of the heads, whether it shifts.
        n_sinks: first tokens that every token sees.
        wrap: as in the released code without its fast kernel: the shifted group at the end goes on at the beginning,
            and the first tokens see the last ones.

    Raises:
        WorkbenchError: groups longer than the sequence, no parts, heads that they do not divide, or less than no sinks.
    """

    def __init__(
        self,
        place: Place,
        group: int | None = None,
        shifted: tuple[bool, ...] = LONG,
        n_sinks: int = 0,
        wrap: bool = False,
    ) -> None:
        super().__init__(place)
        self.group = -(-place.length // 4) if group is None else group
        if not 1 <= self.group <= place.length:
            raise WorkbenchError(
                f"groups of {self.group} tokens do not fit a sequence of {place.length}",
                hint=f"group=1 to {place.length}; a quarter of the length if it is left out",
            )
        if not shifted:
            raise WorkbenchError("shifted=() names no part of the heads", hint="(False, True): the second half shifts")
        if n_sinks < 0:
            raise WorkbenchError(f"n_sinks={n_sinks} is below 0", hint="0 for none; SinkLoRA has 4")
        if self.n_heads % len(shifted):
            raise WorkbenchError(
                f"{self.n_heads} heads cannot be split into {len(shifted)} equal parts", hint="a multiple of them"
            )
        self.shifted, self.n_sinks, self.wrap = tuple(shifted), n_sinks, wrap

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Each group by itself."""
        return shifted_attention(
            q, k, v, group=self.group, shifted=self.shifted, n_sinks=self.n_sinks, wrap=self.wrap,
            causal=self.place.causal,
        )  # fmt: skip


def _halves(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """The weight between halves of groups: what groups do not hold is not seen."""
    assert isinstance(module, ShiftedGroups)
    return {"halves": by_blocks(pattern.dense()[0], max(1, module.group // 2))}


_SIGNATURE = Signature(
    "Groups, and groups that are shifted",
    "Halves of groups, of queries down and of keys across: what a query gives to the half, a mean over its own; "
    "grey is not seen. Heads that shift join the halves on both sides of a border.",
    _halves,
    rows="half group of queries",
    columns="half group of keys",
)


LONG_LORA = register(
    Mechanism(
        "long_lora",
        Card(
            title="LongLoRA: shifted sparse attention (S²-Attn)",
            arxiv="2309.12307",
            equation="A = softmax(q kᵀ/√d) inside groups of G tokens; half of the heads begin theirs G/2 later",
            map="A masked softmax.",
            kind="self",
            grade="exact",
            cost="O(n·G) time, O(n) memory",
            causal="either",
            code="dvlab-research/LongLoRA, Apache-2.0. Its path without the fast kernel lets the first half group see "
            "the last one (wrap=True); its other path does not, and is what is here by default.",
            claims=(
                Claim("Models trained with shifted groups reach about the loss of training with full attention."),
                Claim("Without the shift information does not pass between groups, and the loss is higher."),
            ),
        ),
        ShiftedGroups,
        variants={"unshifted": {"shifted": (False, False)}},
        signature=_SIGNATURE,
    )
)

SINK_LORA = register(
    Mechanism(
        "sink_lora",
        Card(
            title="SinkLoRA: sink fixed attention (SF-Attn)",
            arxiv="2406.05678",
            equation="A = softmax(q kᵀ/√d) inside groups and on the first 4 tokens; a quarter of the heads shift",
            map="A masked softmax.",
            kind="self",
            grade="exact",
            cost="O(n·G) time, O(n) memory",
            causal="either",
            code="The released repository has no code of this attention: it is a reconstruction from the paper's text.",
            claims=(Claim("It is nearer to full attention than LongLoRA's shifted groups."),),
        ),
        partial(ShiftedGroups, shifted=SINK, n_sinks=4),
        places=(Place(24, 4, 33), Place(32, 4, 3), Place(16, 4, 18, causal=False)),
        signature=_SIGNATURE,
    )
)
