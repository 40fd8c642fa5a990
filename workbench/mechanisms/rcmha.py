"""RCMHA: attention with learned relative positions, whose queries, keys and values pass a short convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.relative import relative_attention
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, register


class RelativeConvolutionalAttention(Mixer):
    """softmax((q·k + u·k + q·r_δ + b_δ)/√d) v of convolved q, k and v; the filters are shared by the heads.

    Args:
        place: where it stands; its own positions take the place of turned ones.
        width: positions that the causal filters see, with their own; 0 for no convolution (RMHA).

    Raises:
        WorkbenchError: a negative width, or one longer than the place.
    """

    def __init__(self, place: Place, width: int = 3) -> None:
        super().__init__(place)
        if not 0 <= width <= place.length:
            raise WorkbenchError(f"width={width} is not one of 0 to {place.length}, the tokens of the place")
        h, d, reach = self.n_heads, self.d_head, 2 * place.length - 1
        self.content_bias = nn.Parameter(torch.zeros(h, d))
        self.table, self.table_bias = nn.Parameter(torch.zeros(h, reach, d)), nn.Parameter(torch.zeros(h, reach))
        self.filters = nn.ModuleList(nn.Conv1d(d, d, width, groups=d) for _ in range(3 if width else 0))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved queries, keys and values."""
        q, k, v = (self.split(each(x)) for each in (self.q, self.k, self.v))
        if not self.filters:
            return q, k, v
        q, k, v = (self._convolved(each, t) for each, t in zip(self.filters, (q, k, v), strict=True))
        return q, k, v

    @staticmethod
    def _convolved(conv: nn.Module, t: Tensor) -> Tensor:
        assert isinstance(conv, nn.Conv1d)
        each = t.flatten(0, 1).transpose(1, 2)
        made = conv(F.pad(each, (conv.kernel_size[0] - 1, 0)))
        return made.transpose(1, 2).unflatten(0, t.shape[:2])

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Attention on convolved values."""
        return relative_attention(
            q, k, v, self.content_bias, self.table, self.table_bias, causal=self.place.causal
        )  # fmt: skip


RCMHA = register(
    Mechanism(
        "rcmha",
        Card(
            title="RCMHA: relative convolutional multi-head attention",
            arxiv="2308.03429",
            equation="A = softmax((q_i·k_j + u·k_j + q_i·r_δ + b_δ)/√d), δ = j − i; q, k, v pass causal filters first",
            map="A softmax on convolved values; `pattern.logits()` has the four parts of its scores.",
            kind="self",
            grade="exact",
            cost="O(n²) time and memory",
            causal="either",
            beside="The filters before it: what a weight reads reaches two tokens further back.",
            code="hermansh-id/rcmha says Apache-2.0 in its licence and MIT in its README: not used.",
            claims=(Claim("It is more accurate than attention with relative positions alone, and takes less memory."),),
        ),
        RelativeConvolutionalAttention,
        variants={"without convolution": {"width": 0}},
        places=(Place(24, 4, 17), Place(16, 2, 33), Place(16, 2, 35, causal=False, grid=(5, 7))),
    )
)
