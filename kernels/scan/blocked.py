"""All prefixes of scan attention in linear time and memory: block by block with a carry, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.kernels.scan import triton
from workbench.kernels.scan.operator import Sums, exp_below, extend, identity_like, leaves


def blocks(n: int, block: int) -> list[slice]:
    """Slices of at most `block` positions."""
    return [slice(start, min(start + block, n)) for start in range(0, n, block)]


def prefix_sums(scores: Tensor, values: Tensor, block: int, before: Sums | None = None) -> Sums:
    """Inclusive scan: at each position the softmax sums of all tokens up to it.

    Args:
        scores: [batch, head, position]. values: [batch, head, position, width].
        before: sums of earlier tokens, [batch, head, 1] and [batch, head, 1, width]; None for none.
    """
    carry = identity_like(leaves(scores[..., :1], values[..., :1, :])) if before is None else before
    out = Sums(torch.empty_like(scores), torch.empty_like(scores), torch.empty_like(values))
    for at in blocks(scores.shape[-1], block):
        part = extend(carry, scores[..., at], values[..., at, :])
        out.top[..., at], out.size[..., at], out.total[..., at, :] = part
        carry = Sums(part.top[..., -1:], part.size[..., -1:], part.total[..., -1:, :])
    return out


def suffix_sums(top: Tensor, log_size: Tensor, terms: Tensor, block: int) -> Tensor:
    """R_j = Σ_{t≥j} exp(Z_j − Z_t) x_t, for every position j: [batch, head, position, width].

    Z = top + log_size is the log-sum-exp of each prefix. It never falls, so that no exponent is above zero. Its two
    parts are subtracted apart: where scores are large their sum would round the second away.

    Args:
        top, log_size: [batch, head, position]. terms: x, [batch, head, position, width].
    """
    out = torch.empty_like(terms)
    carry, carry_top, carry_log = torch.zeros_like(terms[..., :1, :]), top[..., -1:], log_size[..., -1:]
    for at in reversed(blocks(top.shape[-1], block)):
        m, u = top[..., at], log_size[..., at]
        weights = (m[..., :, None] - m[..., None, :]).add_(u[..., :, None] - u[..., None, :])
        weights = exp_below(weights).triu_()
        fade = exp_below((m - carry_top) + (u - carry_log))
        out[..., at, :] = weights @ terms[..., at, :] + fade[..., None] * carry
        carry, carry_top, carry_log = out[..., at, :][..., :1, :], m[..., :1], u[..., :1]
    return out


class PrefixAttention(torch.autograd.Function):
    """(scores [batch, head, position], values [batch, head, position, width]) -> outputs of all prefixes.

    With A[t, j] = exp(s_j − Z_t), the gradients are scans backwards in time: dv_j = Σ_{t≥j} A[t, j] do_t, and
    ds_j = v_j·dv_j − Σ_{t≥j} A[t, j] (do_t·o_t). Nothing wider than the values is kept.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor, block: int) -> Tensor:
        """Scan forwards."""
        if triton.takes(values):
            out, sizes = triton.forward(scores, values)
            ctx.save_for_backward(scores, values, sizes, out)
            return out
        with torch.autocast(scores.device.type, enabled=False):
            sums = prefix_sums(scores, values, block)
            out = sums.total.div_(sums.size[..., None])
        ctx.save_for_backward(scores, values, sums.top, sums.size, out)
        ctx.block = block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scan backwards."""
        scores, values, *sums, out = ctx.saved_tensors
        if len(sums) == 1:
            return *triton.backward(scores, values, sums[0], out, grad_out), None
        top, size = sums
        with torch.autocast(scores.device.type, enabled=False):
            log_size = size.log()
            terms = torch.cat([grad_out, (grad_out * out).sum(-1, keepdim=True)], dim=-1)
            own = exp_below((scores - top) - log_size)  # A[j, j]
            later = suffix_sums(top, log_size, terms, ctx.block).mul_(own[..., None])
            d_values, less = later[..., :-1], later[..., -1]
            return (values * d_values).sum(-1) - less, d_values, None
