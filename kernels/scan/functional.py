"""Scan attention for models: all prefixes at once, or token by token in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.functions import attention_function
from workbench.kernels.history import learns, without_gradients
from workbench.kernels.scan.blocked import PrefixAttention, prefix_sums
from workbench.kernels.scan.operator import Sums
from workbench.kernels.scan.pattern import ScanPattern, check_scan, scores_of


def _pattern(q: Tensor, k: Tensor, scale: float | None = None) -> ScanPattern:
    return ScanPattern(q, k, scale)


@attention_function(_pattern)
def scan_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, block: int = 128) -> Tensor:
    """Attention of one learned query per head over every prefix of the tokens (Aaren, arXiv 2405.13956).

    Linear in time and memory, forward and backward. Gradients reach q, k and v. Tensors on CUDA run Triton kernels, all
    others PyTorch.

    Args:
        q: [batch or 1, head, 1, d], one query per head: a parameter, not a function of the tokens.
        k: [batch, kv head, position, d]; heads are a multiple of kv heads.
        v: [batch, kv head, position, width].
        scale: factor on q·k; 1/√d if None.
        block: positions per block in PyTorch. It changes the speed, and the result by rounding only.

    Returns:
        [batch, head, position, width] in the dtype of v: position t is attention over tokens 0..t.

    Raises:
        CaptureError: more than one query row, sizes that do not fit, no tokens, mixed dtypes, NaN or inf, a block
            below 1.

    >>> v = torch.tensor([[[[3.0], [1.0], [2.0]]]])
    >>> scan_attention(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 3, 8), v).flatten().tolist()
    [3.0, 2.0, 2.0]
    """
    wide = check_scan(q, k, v)
    if block < 1:
        raise CaptureError(f"block is {block}; a block has at least one position", hint="pass 64 or 128")
    scores = scores_of(wide, k, scale)
    values = v.to(scores.dtype).repeat_interleave(scores.shape[1] // v.shape[1], dim=1)
    out: Tensor = PrefixAttention.apply(scores, values, block)
    return out.to(v.dtype)


class ScanState:
    """Scan attention over a stream, in memory that does not grow with it: width + 2 numbers per head.

    Outputs equal those of `scan_attention` over all tokens so far. There are no gradients through a stream: where a
    query, key or value asks for some, `backward` is a CaptureError.

    Args:
        q: [batch or 1, head, 1, d], the learned query of each head.
        scale: factor on q·k; 1/√d if None.
        block: positions per block within one update.

    >>> state = ScanState(torch.zeros(1, 1, 1, 8))
    >>> [state.update(torch.zeros(1, 1, 8), torch.tensor([[[x]]])).item() for x in (3.0, 1.0, 2.0)]
    [3.0, 2.0, 2.0]
    """

    def __init__(self, q: Tensor, scale: float | None = None, *, block: int = 128) -> None:
        if block < 1:
            raise CaptureError(f"block is {block}; a block has at least one position", hint="pass 64 or 128")
        self.q, self.scale, self.block = q.detach(), scale, block
        self._forgets = learns(q)
        self.sums: Sums | None = None
        self.n_tokens = 0

    def update(self, k: Tensor, v: Tensor) -> Tensor:
        """Read one token or a block of them, and return the outputs of the prefixes that end at them.

        Args:
            k: [batch, kv head, d] for one token, or [batch, kv head, n, d].
            v: [batch, kv head, width], or [batch, kv head, n, width].

        Returns:
            [batch, head, width], or [batch, head, n, width], in the dtype of v.

        Raises:
            CaptureError: as `scan_attention`; also when batch, heads or width differ from those of earlier tokens.
        """
        self._forgets = self._forgets or learns(k, v)
        with torch.no_grad():
            out = self._updated(k, v)
        if not self._forgets:
            return out
        hint = "take scan_attention over the whole sequence, or stream under torch.no_grad()"
        return without_gradients(out, "a stream keeps sums of tokens without their history", hint)

    def _updated(self, k: Tensor, v: Tensor) -> Tensor:
        single = k.dim() == 3 and v.dim() == 3
        if single:
            k, v = k.unsqueeze(2), v.unsqueeze(2)
        scores = scores_of(check_scan(self.q, k, v), k, self.scale)
        values = v.to(scores.dtype).repeat_interleave(scores.shape[1] // v.shape[1], dim=1)
        known = None if self.sums is None else self.sums.total.shape
        if known is not None and known != values[:, :, -1:].shape:
            b, h, _, width = known
            raise CaptureError(
                f"earlier tokens had batch {b}, {h} heads and values of width {width}",
                shape=v.shape,
                hint="start a new ScanState for another stream",
            )
        with torch.autocast(scores.device.type, enabled=False):
            sums = prefix_sums(scores, values, self.block, self.sums)
        self.sums = Sums(*(t[:, :, -1:].clone() for t in sums))
        self.n_tokens += k.shape[2]
        out = sums.output.to(v.dtype)
        return out.squeeze(2) if single else out
