"""What an attention call is, whichever tap saw it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.kernels.masks import Mask, as_four
from workbench.kernels.patterns import Pattern
from workbench.kernels.softmax import SoftmaxPattern


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention kernel, at the kernel's boundary; the tensors are the model's own.

    Attributes:
        site: name of the module that made the call.
        module: that module.
        q: [batch, head, query, d_head]; k: [batch, kv head, key, d_head]; v: [batch, kv head, key, width].
        mask: as given, boolean (True: may see) or additive, or None.
        is_causal: query row i sees keys j <= i (counted from the first key, as SDPA does).
        scale: factor on q kᵀ; None means 1/√d_head.
        dropout: probability with which the kernel dropped weights.
        output: what the kernel gave; [batch, head, query, width] unless `finish` is set.
        lse: [batch, head, query] natural log of the softmax denominator, if the kernel gave it.
        kernel: name of the kernel that ran.
        tap: which tap saw the call.
        finish: maps A·V to `output`, for kernels that go on past A·V; None if `output` is A·V.
        build: makes the call's pattern, for kernels that are not SDPA; None for those that are.
    """

    site: str
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float | None
    dropout: float
    output: Tensor
    lse: Tensor | None
    kernel: str
    tap: str
    finish: Callable[[Tensor], Tensor] | None = None
    build: Callable[[], Pattern] | None = None

    def pattern(self, *, cross: bool = False) -> Pattern:
        """The lazy pattern of the call, on the model's own tensors.

        Args:
            cross: queries and keys are positions of different sequences, so that they are not aligned at the end.
        """
        if self.build is not None:
            return self.build()
        if self.q.dim() not in (3, 4):
            raise CaptureError("queries are not [batch, (head,) query, d]", site=self.site, shape=self.q.shape)
        q, k, v = (t.unsqueeze(1) if t.dim() == 3 else t for t in (self.q, self.k, self.v))
        n_q, n_k = q.shape[2], k.shape[2]
        offset = 0 if self.is_causal or cross else n_k - n_q
        tensor = None
        if self.mask is not None:
            three = self.mask.dim() == 3 and self.q.dim() == 3
            tensor = self.mask.detach().unsqueeze(1) if three else as_four(self.mask.detach())
        mask = Mask(n_q, n_k, causal=self.is_causal, offset=offset, tensor=tensor)
        return SoftmaxPattern(q, k, mask, scale=self.scale, lse=self.lse, values=v.detach())
