"""Linear recurrences in Triton: sums that fade, and what a delta rule writes.

With G_i the sum of log decays up to i, one for a head (`by_head`) or one for each channel c of its state
(`by_channel`), all is made of two sums of three tensors in any roles, and of these against time (ᵀ, where i and j
change places):

    f(q, k, v)_i = Σ_{j ≤ i} (Σ_c q_i[c] exp(G_i − G_j)[c] k_j[c]) v_j        f′: the same for j < i
    g(x, k, v)_i[c] = Σ_{j < i} (x_i·v_j) exp(G_i − G_j)[c] k_j[c]

A delta rule writes u = β e, where e = v − f′(k, k, β e) is what of a value the state did not hold: the one thing that
is no such sum, solved in blocks. All that is left are sums:

    o  = f(q, k, u)
    y  = fᵀ(k, q, do),  r = y − f′ᵀ(k, k, β r),  z = β r          without a delta rule u = v, z = y and no f′
    dv = z,  dβ = r·e,  a = −g(z, k, u),  b = gᵀ(u, q, do) − gᵀ(u, k, z),  d = g(do, k, u)
    dq = d + (do·u) k,  dk = a + b + (do·u) q,  dG = q d + k a − k b

r obeys the equation of e against time. What a position reads of itself fades by nothing, so that g leaves it out: dG
would have to cancel it, and it can be far larger than all else. f and g begin with the initial state, fᵀ with the
gradient of the final one; what that adds to dk and to the decays' gradient is a sum of its own, for the same reason.

Only `autograd.py` and lightning attention import this package, when they have CUDA tensors: Triton has no wheels for
some systems.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.recurrent.chunked import Inputs
from workbench.kernels.recurrent.triton.by_channel import ChannelSums
from workbench.kernels.recurrent.triton.by_head import Sums


def forward(inputs: Inputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output [batch, head, position, width] in v's dtype, and the final state [batch, head, d, width] float32."""
    sums = _sums(inputs)
    written = inputs.v
    if inputs.beta is not None:
        written = sums.news(inputs.k, inputs.v, inputs.beta, state)[0] * inputs.beta[..., None].float()
    return sums(inputs.q, inputs.k, written, state, dtype=inputs.v.dtype)


def backward(
    inputs: Inputs, state: Tensor | None, grad_out: Tensor, grad_state: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the inputs there are, by name, and of the initial state, from those of output and final state."""
    q, k, v, beta = inputs.q, inputs.k, inputs.v, inputs.beta
    sums, found = _sums(inputs), dict[str, Tensor]()
    y, d_state = sums(k, q, grad_out, grad_state, reverse=True)
    written, dv, rows = v, y, torch.zeros((), device=v.device)
    if beta is not None:
        steps = beta[..., None].float()
        news, _ = sums.news(k, v, beta, state)
        written = news * steps
        reached, more = sums.news(k, y, beta, reverse=True)
        d_state, dv = d_state - more, reached * steps
        found["beta"] = (reached * news).sum(-1)
        rows = -sums.keys(dv, k, written, state)
    queries = sums.keys(grad_out, k, written, state)
    columns = sums.keys(written, q, grad_out, reverse=True)
    if beta is not None:
        columns = columns - sums.keys(written, k, dv, reverse=True)
    own = (grad_out.float() * written.float()).sum(-1, keepdim=True)
    found |= {"q": queries + own * k, "k": rows + columns + own * q, "v": dv}
    kept = None if grad_state is None else sums.keys(written, torch.zeros_like(q), grad_out, grad_state, reverse=True)
    if kept is not None:
        found["k"] = found["k"] + kept
    if inputs.log_decay is not None and inputs.log_decay.requires_grad:
        d_logs = (q * queries + k * (rows - columns)).double().flip(2).cumsum(2).flip(2)
        if (
            grad_state is not None and kept is not None
        ):  # what was written fades from there on, the first state throughout
            after = (k * kept).double()
            d_logs += after.cumsum(2) - after
            if state is not None:
                left = inputs.log_decay.double().sum(2).exp().view(*k.shape[:2], -1)
                d_logs += ((state * grad_state).double().sum(-1) * left)[:, :, None]
        found["log_decay"] = d_logs if inputs.log_decay.dim() == 4 else d_logs.sum(-1)
    return {name: t.to(getattr(inputs, name).dtype) for name, t in found.items()}, d_state


def _sums(inputs: Inputs) -> Sums | ChannelSums:
    g = inputs.log_decay
    return ChannelSums(g, inputs.q.dtype) if g is not None and g.dim() == 4 else Sums(g, inputs.q.dtype)
