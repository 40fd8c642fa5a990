"""Leaky integrate-and-fire neurons, with a surrogate for the gradient of their step."""

from __future__ import annotations

from math import ceil, log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_number


class Fired(NamedTuple):
    """What neurons do over time, [step, …].

    Attributes:
        spikes: 1 where one fires, else 0. membrane: its potential before it may have fired.
    """

    spikes: Tensor
    membrane: Tensor


class _Step(torch.autograd.Function):
    """1 from zero on; backwards as if it were a sigmoid."""

    @staticmethod
    def forward(ctx: Any, above: Tensor, sharpness: float) -> Tensor:
        ctx.save_for_backward(above)
        ctx.sharpness = sharpness
        return (above >= 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (above,) = ctx.saved_tensors
        near = (above * ctx.sharpness).sigmoid()
        return gradients[0] * near * (1 - near) * ctx.sharpness, None


def leaky_fire(current: Tensor, *, threshold: float = 1.0, tau: float = 2.0, sharpness: float = 4.0) -> Fired:
    """H_t = V_{t−1} + (I_t − V_{t−1}) / τ, a spike where H_t ≥ θ, which sets the potential V_t back to zero.

    As in Spikformer (arXiv 2209.15425): what enters leaks too, and no gradient goes through the setting back.

    Args:
        current: I, [step, …]; neurons begin at rest.
        threshold: θ. tau: τ, at least 1. sharpness: of the sigmoid whose slope stands in for that of the step.

    Raises:
        CaptureError: no steps, or a number out of range.

    >>> leaky_fire(torch.full((6, 1), 1.5)).spikes.flatten().tolist()
    [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    """
    if current.dim() < 1 or not len(current) or not current.is_floating_point():
        raise CaptureError(
            "what drives neurons is [step, …], floating point, of at least one step", shape=current.shape
        )
    for name, value in (("threshold", threshold), ("sharpness", sharpness)):
        check_number(name, value, above_zero=True)
    if check_number("tau", tau) < 1:
        raise CaptureError(f"tau={tau} is below 1: neurons would overshoot what drives them", hint="at least 1")
    potential, spikes, membranes = torch.zeros_like(current[0]), [], []
    for drive in current:
        membrane = potential + (drive - potential) / tau
        spike: Tensor = _Step.apply(membrane - threshold, sharpness)
        potential = membrane * (1 - spike.detach())
        spikes.append(spike)
        membranes.append(membrane)
    return Fired(torch.stack(spikes), torch.stack(membranes))


def steps_between_spikes(current: float, *, threshold: float = 1.0, tau: float = 2.0) -> int | None:
    """How many steps a constant current takes to the next spike; None if it never fires.

    After n steps since the last one the potential is I (1 − (1 − 1/τ)ⁿ), which never exceeds I.

    >>> [steps_between_spikes(current) for current in (1.0, 1.5, 2.0)]
    [None, 2, 1]
    """
    if current <= threshold:
        return None
    if tau == 1:
        return 1
    return max(1, ceil(log(1 - threshold / current) / log(1 - 1 / tau) - 1e-12))
