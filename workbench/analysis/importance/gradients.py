"""Head importance from one backward pass: the gradient of a gate on each head, and attention times gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InterventionError, WorkbenchError
from workbench.hooks.edits import Edit
from workbench.hooks.sites import Site
from workbench.hooks.split_models import check_unsplit
from workbench.hooks.tap import AttentionCall
from workbench.kernels.gradients import attention_times_gradient
from workbench.metrics import Metric
from workbench.session.workbench import Workbench
from workbench.sweep.inputs import size_of


class Gates(Edit):
    """A factor of 1 on each head's output, which gradients flow to.

    Attributes:
        calls: what was seen: the call, the heads' output before and behind the gate [batch, head, query, width].
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(site.name for site in sites)
        self.calls: list[tuple[AttentionCall, Tensor, Tensor]] = []

    def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
        """The same numbers."""
        if call.replay:
            return z
        gated = z * torch.ones(z.shape[0], z.shape[1], 1, 1, dtype=z.dtype, device=z.device, requires_grad=True)
        self.calls.append((call, z.detach(), gated))
        return gated


def gate_gradients(
    wb: Workbench, sites: Sequence[Site], batch: Mapping[str, Any], metric: Metric, *, attention: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The metric of each example and its gradients, of one batch; nothing is added to the `.grad` of weights.

    Args:
        attention: also Σ_ij |A_ij ∂M/∂A_ij|, which needs the patterns.

    Returns:
        The metric [batch]; by site, ∂M/∂ξ [batch, head] of a gate ξ on each head at ξ = 1, where M is the metric of
        the example (Michel et al. 2019, arXiv 1905.10650, equation 3, there of the loss and with its absolute value);
        and by site Σ_ij |A_ij ∂M/∂A_ij| [batch, head]. Without the absolute value that sum is ∂M/∂ξ again.

    Raises:
        WorkbenchError: the metric has no gradient.
    """
    gates = Gates(sites)
    check_unsplit()
    with torch.inference_mode(False), torch.enable_grad(), wb.editing(gates):
        output = wb.model(**batch)
        values = metric.examples(output, batch, size_of(batch))
        if not values.requires_grad:
            raise WorkbenchError(
                f'the metric "{metric.name}" has no gradient',
                hint="is it computed under no_grad, detached, or a count? leave the gradient methods out",
            )
        arrived = torch.autograd.grad(values.sum(), [gated for _, _, gated in gates.calls], allow_unused=True)
    by_gate: dict[str, Tensor] = {}
    by_attention: dict[str, Tensor] = {}
    kinds = {site.name: site.kind for site in sites}
    for (call, z, _), gradient in zip(gates.calls, arrived, strict=True):
        gradient = torch.zeros_like(z) if gradient is None else gradient
        _add(by_gate, call, (z.double() * gradient.double()).sum((2, 3)))
        if attention:
            pattern = call.pattern(cross=kinds[call.site] == "cross")
            values_of = call.v.detach() if call.v.dim() == 4 else call.v.detach().unsqueeze(1)
            here = gradient if call.shard is None else call.shard.narrowed(gradient)
            sums = attention_times_gradient(pattern, here.to(pattern.dtype), values_of)["key_gradient_magnitude"]
            _add(by_attention, call, (sums if call.shard is None else call.shard.widened(sums)).double().sum(-1))
    return values.detach().double().cpu(), by_gate, by_attention


def _add(held: dict[str, Tensor], call: AttentionCall, found: Tensor) -> None:
    """Add what was found [batch, head]; of heads in other processes, which run the same, it comes from them."""
    if call.shard is not None:
        found = call.shard.gathered(call.shard.narrowed(found))
    if call.site in held and held[call.site].shape != found.shape:
        raise InterventionError(
            f"the site runs on {len(found)} examples in one call and on {len(held[call.site])} in another, so that no "
            "gradient is one example's",
            site=call.site, hint="leave the gradient methods out",
        )  # fmt: skip
    held[call.site] = held[call.site] + found.cpu() if call.site in held else found.cpu()
