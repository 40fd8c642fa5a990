"""Stacks of layers whose heads fail by chance, simulated, beside the formulas (arXiv 2508.08289, theorem 9)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench.analysis.conditioning import theory
from workbench.errors import WorkbenchError


class StackFailures(NamedTuple):
    """Chance that a stack fails: simulated (with its standard error), by the formula, and by its linear form."""

    simulated: float
    error: float
    exact: float
    linear: float


def simulate_stack(
    failure: float | Tensor, depth: int, heads: int, *, needed: int = 1, trials: int = 10_000, seed: int = 0
) -> StackFailures:
    """Let heads fail independently and count the stacks in which some layer has fewer than `needed` heads left.

    Args:
        failure: chance that a head fails: one number, or measured ones [depth, heads]. For these the formula is the
            product over layers of what is right for their own rates; for `needed` above 1 their mean per layer stands
            in for them, which is no longer exact.
        depth, heads: layers L, and heads H in each. needed: heads that a layer cannot do without.

    Raises:
        WorkbenchError: a chance outside [0, 1], sizes below 1, or more heads needed than there are.

    >>> simulate_stack(0.5, 2, 2).exact, simulate_stack(0.5, 2, 2).linear
    (0.4375, 0.5)
    """
    if depth < 1 or heads < 1 or trials < 1 or not 1 <= needed <= heads:
        raise WorkbenchError(f"a stack of {depth} layers, {heads} heads, {needed} needed and {trials} trials is none")
    p = torch.as_tensor(failure, dtype=torch.float64)
    if p.dim() and p.shape != (depth, heads):
        raise WorkbenchError(f"failure rates must be [depth {depth}, heads {heads}]", shape=p.shape)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise WorkbenchError("a failure rate is outside [0, 1]", hint="above 1 the bound (n − 1)/(δ d_k) says nothing")
    p = p.expand(depth, heads)
    generator = torch.Generator().manual_seed(seed)
    failed = torch.zeros(trials, dtype=torch.bool)
    for layer in p:  # one layer at a time: a deep and wide stack would not fit
        works = torch.rand(trials, heads, generator=generator, dtype=torch.float64) >= layer
        failed |= works.sum(-1) < needed
    found = failed.double().mean().item()
    if needed == 1:
        whole = p.prod(-1)  # chance that all heads of a layer fail
        exact = 1 - (1 - whole).prod().item()
    else:
        whole = torch.tensor([theory.redundant_stack_failure(m, 1, heads, needed) for m in p.mean(-1).tolist()])
        exact = 1 - (1 - whole.double()).prod().item()
    return StackFailures(found, (found * (1 - found) / trials) ** 0.5, exact, whole.sum().item())
