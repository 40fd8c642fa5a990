"""A captured map as a dynamical system: `to_dsf`, a rule for each family of patterns."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.lightning import LightningPattern
from workbench.kernels.patterns import DENSE_LIMIT, Pattern
from workbench.kernels.recurrent import FilterPattern, GeneralDeltaPattern, RecurrentPattern, WKVPattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.state_space import DualPattern, SelectivePattern
from workbench.kernels.systems.layers import separable_attention
from workbench.kernels.systems.system import DynamicalSystem
from workbench.kernels.systems.taylor import n_features, taylor_features, taylor_remainder


def to_dsf(pattern: Pattern, order: int | None = None) -> DynamicalSystem:
    """The system Λ, B, C, D whose map a pattern is, in float64; `cap[site].pattern` gives one.

    Linear, recurrent and state-space layers have a state of a few numbers. A causal softmax needs one that grows: by
    default it remembers every value (n is the length, Λ = I), which is exact; with `order`, its exponential is the sum
    of its powers up to that one, n is `n_features(d, order)`, and `error` bounds what each row is off.

    Raises:
        CaptureError: a map that is not causal, an order of what is no plain softmax, or a system over 1 GiB.

    >>> from workbench.kernels.recurrent import RecurrentPattern
    >>> one = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    >>> system = to_dsf(RecurrentPattern(one, one, one[..., 0].div(2).log()))
    >>> system.kind, system.n, system.map()[0, 0, 2].tolist()
    ('scalar', 1, [0.25, 0.5, 1.0])
    """
    if pattern.n_queries != pattern.n_keys or not pattern.mask.causal or pattern.mask.offset:
        raise CaptureError(
            f"a {type(pattern).__name__} whose rows see later positions is no system that runs through them in order",
            shape=pattern.shape,
        )
    if order is None:
        return _system(pattern)
    if not isinstance(pattern, SoftmaxPattern):
        raise CaptureError(f"a {type(pattern).__name__} has no exponential to cut off", hint="leave out order=")
    return _truncated(pattern, order)


@singledispatch
def _system(pattern: Pattern) -> DynamicalSystem:
    """Any causal map, with a state that remembers every value."""
    n = pattern.n_keys
    _check_size(pattern, n)
    B = torch.eye(n, dtype=torch.float64, device=pattern.device).expand(*pattern.shape[:2], n, n)
    return DynamicalSystem(torch.ones_like(B[..., :1]), B, pattern.dense(limit=None).double())


def _check_size(pattern: Pattern, n: int) -> None:
    size = 3 * pattern.n_batch * pattern.n_heads * pattern.n_keys * n * 8
    if size > DENSE_LIMIT:
        raise CaptureError(
            f"the system would take {size:,} bytes, the limit is {DENSE_LIMIT:,}",
            shape=pattern.shape,
            hint="take a shorter input, or a smaller order=",
        )


def _of_head(pattern: Pattern, tensor: Tensor) -> Tensor:
    return tensor.double().repeat_interleave(pattern.n_heads // tensor.shape[1], dim=1)


@_system.register
def _(pattern: RecurrentPattern) -> DynamicalSystem:
    q, k = (_of_head(pattern, t) for t in (pattern.q, pattern.k))
    decay = torch.ones_like(q[..., :1])
    if pattern.log_decay is not None:
        g = pattern.log_decay.double().exp()
        decay = g if g.dim() == 4 else g[..., None]
    if pattern.beta is None:
        return DynamicalSystem(decay, k, q)
    written = k * pattern.beta.double()[..., None]
    return DynamicalSystem(decay.expand_as(k), written, q, erased=written, along=k * decay)


@_system.register
def _(pattern: GeneralDeltaPattern) -> DynamicalSystem:
    assert pattern.log_decay is not None
    q, k, a, b = (t.double() for t in (pattern.q, pattern.k, pattern.a, pattern.b))
    return DynamicalSystem(pattern.log_decay.double().exp(), k, q, erased=-b, along=a)


@_system.register
def _(pattern: LightningPattern) -> DynamicalSystem:
    q, k = (_of_head(pattern, t) for t in (pattern.q, pattern.k))
    decay = pattern.decay.to(q)[:, None, None].expand(*q.shape[:3], 1)
    return DynamicalSystem(decay, k, q)


@_system.register(DualPattern)
@_system.register(SelectivePattern)
def _(pattern: DualPattern | SelectivePattern) -> DynamicalSystem:
    B, C = (_of_head(pattern, t) for t in (pattern.B, pattern.C))
    delta, A = pattern.delta.double()[..., None], pattern.A.double()
    decay = (delta * (A[:, None] if A.dim() == 2 else A[:, None, None])).exp()
    return DynamicalSystem(decay, delta * B, C)


@_system.register
def _(pattern: FilterPattern) -> DynamicalSystem:
    """The state is the last values, which move on by one place at each position."""
    weight = pattern.weight.double()
    size, (b, h, n, _) = weight.shape[1], pattern.shape
    shift = torch.diag(weight.new_ones(size - 1), -1)[None]
    B = weight.new_zeros(b, h, n, size)
    B[..., 0] = 1.0
    if pattern.padding is not None:
        B = B * ~pattern.padding[:, None, :, None]
    C = weight.flip(1)[None, :, None].expand(b, h, n, size)
    return DynamicalSystem(torch.ones_like(B[..., :1]), B, C, block=shift)


@_system.register
def _(pattern: WKVPattern) -> DynamicalSystem:
    """h fades by e^(−w) and takes in e^k v; a row reads it as it was before its own position, which passes by it."""
    rate, k = pattern.rate.double()[:, None], pattern.k.double()
    shift = k.amax(-1, keepdim=True)  # of numerator and denominator alike
    at = torch.arange(pattern.n_keys, device=k.device)
    eta = (pattern.lse.double() - shift).exp()
    written, own = (k - shift).exp(), (k + pattern.bonus.double()[:, None] - shift).exp()
    read = rate.exp() / eta
    passed = (own - rate.exp() * written) / eta
    return DynamicalSystem(
        (-rate).exp()[..., None].expand(*k.shape, 1), written[..., None], (read * (at >= 0))[..., None], passed
    )


def _truncated(pattern: SoftmaxPattern, order: int) -> DynamicalSystem:
    q, k = pattern.q.double(), _of_head(pattern, pattern.k)
    mask = pattern.mask
    if mask.window is not None or mask.tensor is not None or mask.layout is not None or pattern.softcap is not None:
        raise CaptureError(
            "only a plain causal softmax is a sum of powers of q·k",
            hint="leave out order=: the system then remembers every value",
        )
    _check_size(pattern, n_features(q.shape[-1], order))
    q = q * pattern.scale
    scores = (q @ k.mT).masked_fill(torch.ones_like(q[0, 0] @ k[0, 0].mT, dtype=torch.bool).triu(1), -torch.inf)
    log_eta = pattern.lse.double()
    system = separable_attention(taylor_features(q, order), taylor_features(k, order), log_eta.exp())
    off = taylor_remainder(scores.masked_fill(scores == -torch.inf, 0.0), order).masked_fill(scores == -torch.inf, 0.0)
    error = off.sum(-1) / log_eta.exp()
    return DynamicalSystem(system.decay, system.B, system.C, error=error)
