"""Visual Attention Network: large-kernel attention, a gate that convolutions with a wide reach make."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks.readers import reader
from workbench.hooks.readers.gates import depthwise, through_convolutions
from workbench.kernels.filters import composite_kernel
from workbench.kernels.gates import AdditivePattern
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame import Card, Claim, Gate, Mechanism, Place, Signature, read_gate, register


class LargeKernelAttention(Gate):
    """x + P₂(u · G), u = GELU(P₁ x), G = Conv₁ₓ₁(DWConv far(DWConv near(u))): a large kernel in three parts.

    A nominal kernel of K with dilation d is a depth-wise one of 2d − 1, one of ⌈K/d⌉ with dilation d, and a 1 × 1
    convolution. What they make together is wider than K: 23 for the paper's 21 (`kernel`).

    Args:
        place: a grid.
        kernel: K. dilation: d.
        shortcut: add x, as the paper's attention block does.
        adapts: multiply with u. Without it G alone goes on, which is a convolution, the same for every input.

    Raises:
        WorkbenchError: a kernel or dilation below 1, or a part of even size.
    """

    def __init__(
        self, place: Place, kernel: int = 21, dilation: int = 3, shortcut: bool = True, adapts: bool = True
    ) -> None:
        super().__init__(place)
        if kernel < 1 or dilation < 1:
            raise WorkbenchError(f"kernel={kernel} with dilation={dilation} is none", hint="both are at least 1")
        far = -(-kernel // dilation)
        if not far % 2:
            raise WorkbenchError(
                f"kernel={kernel} with dilation={dilation} has a dilated part of {far}, which has no middle",
                hint=f"kernel={(far - 1) * dilation} or kernel={(far + 1) * dilation}",
            )
        d, near = place.d_model, 2 * dilation - 1
        self.shortcut, self.adapts = shortcut, adapts
        self.enter, self.out = nn.Linear(d, d), nn.Linear(d, d)
        self.near = nn.Conv2d(d, d, near, padding=near // 2, groups=d)
        self.far = nn.Conv2d(d, d, far, padding=dilation * (far // 2), dilation=dilation, groups=d)
        self.point = nn.Conv2d(d, d, 1)

    def _image(self, t: Tensor) -> Tensor:
        """[batch, token, channel] to [batch, channel, row, column]."""
        assert self.place.grid is not None
        return t.transpose(1, 2).unflatten(2, self.place.grid)

    def parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """u, or ones in its place, and G made of u."""
        u = F.gelu(self.enter(x))
        g: Tensor = self.point(self.far(self.near(self._image(u))))
        return u if self.adapts else torch.ones_like(u), g.flatten(2).transpose(1, 2)

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """Projected, and added to x."""
        made: Tensor = self.out(y)
        return made + x if self.shortcut else made

    def source_map(self, x: Tensor, source: Tensor) -> AdditivePattern:
        """Σ_c' W[c, c'] k_c'(j − i) u_c'(j): what patch j adds to channel c of the factor at i, beside the biases."""
        u = self._image(F.gelu(self.enter.forward(x)))
        return through_convolutions(u, [self.near, self.far], self.point.weight.flatten(1))

    def additive(self, x: Tensor) -> AdditivePattern:
        """u_c(i) · source[c, i, j]: what patch j adds to channel c of u · G at i, beside what biases do.

        The product is of second degree in u: this is exact for this input, and half of its derivative.
        """
        source, u = self.source_map(x, x), F.gelu(self.enter.forward(x)) if self.adapts else torch.ones_like(x)
        return AdditivePattern(source.base, source.read, source.readout, u.transpose(1, 2))

    def kernel(self) -> Tensor:
        """[channel, rows, columns]: the one depth-wise kernel that the two make, away from the border."""
        found = [one for each in (self.near, self.far) if (one := depthwise(each)) is not None]
        return composite_kernel([weight for weight, _ in found], [dilation for _, dilation in found]).detach()


reader(LargeKernelAttention, kind="gate", follows=("near", "far"))(read_gate)


def _kernels(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """|k_eff| of each channel."""
    return {"kernel": module.kernel().abs()} if isinstance(module, LargeKernelAttention) else {}


VAN = register(
    Mechanism(
        "van",
        Card(
            title="Visual Attention Network: large-kernel attention",
            arxiv="2202.09741",
            equation="y = u · G, G = Conv₁ₓ₁(DWConv₇ₓ₇,₃(DWConv₅ₓ₅(u))), u = GELU(P₁ x)",
            map="The gate G, neither normalised nor positive. The map “source” tells what each patch adds to it, "
            "`additive` what it adds to the output; both are signed and leave out biases.",
            kind="gate",
            grade="exact",
            cost="O(n·((2d−1)² + ⌈K/d⌉² + d_model))",
            causal="never",
            grid=True,
            code="Visual-Attention-Network/VAN-Classification, Apache-2.0; its LKA is read, and agrees.",
            claims=(
                Claim("Long reach and adaptation to the input make it better than convolutions of the same cost."),
                Claim("The three parts do as well as a dense kernel of 21 × 21 at a small part of its parameters."),
            ),
        ),
        LargeKernelAttention,
        variants={
            "small": {"kernel": 9},
            "undilated": {"kernel": 7, "dilation": 1},
            "bare": {"shortcut": False},
            "convolutions": {"adapts": False},
            "dense": {"kernel": 21, "dilation": 1},
        },
        signature=Signature(
            "The kernel of each channel",
            "The size of the one depth-wise kernel that the near and the dilated convolution make together, 23 × 23 "
            "where the paper's nominal one is 21: how much a patch so far down and across counts for the gate. The "
            "middle is the patch itself.",
            _kernels,
            rows="patches down",
            columns="patches across",
            value="size",
        ),
    )
)
