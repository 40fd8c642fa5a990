"""Waits, during one capture, for the gradients of attention outputs, and makes statistics of them when they arrive.

A tensor hook on each call's output receives ∂L/∂z while the model's own backward runs; nothing is put into the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.hooks.sites import Site
from workbench.hooks.tap import AttentionCall
from workbench.kernels.gradients import attention_times_gradient
from workbench.kernels.patterns import Pattern

Deliver = Callable[[Tensor, dict[str, Tensor]], None]


@dataclass
class _Awaited:
    """One call whose gradient may still come.

    Attributes:
        site: where. values: [batch, kv head, key, width], the model's own. deliver: takes what arrives.
        versions: tensors that belong to the model, and their versions at the call.
        z_gradient: [batch, head, query, width], the sum of what has arrived; None if nothing has.
        handle: of the hook on the output; None if the output does not require grad.
    """

    site: Site
    pattern: Pattern
    values: Tensor
    deliver: Deliver
    versions: list[tuple[Tensor, int]]
    z_gradient: Tensor | None = None
    handle: Any = None

    def arrived(self, gradient: Tensor) -> None:
        """Take ∂L/∂z [batch, head, query, width]; a further backward adds to what came before."""
        if any(tensor._version != seen for tensor, seen in self.versions):
            raise CaptureError(
                "the model has overwritten a tensor that its gradients need",
                site=self.site.name,
                hint="call loss.backward() before the next forward",
            )
        gradient = gradient.to(self.pattern.dtype)
        self.z_gradient = gradient.clone() if self.z_gradient is None else self.z_gradient + gradient
        sums = attention_times_gradient(self.pattern, self.z_gradient, self.values)
        self.deliver(self.z_gradient.transpose(1, 2).contiguous(), sums)


class GradientWatch:
    """The gradients that one capture waits for; `close` ends the wait and leaves nothing on the graph."""

    def __init__(self) -> None:
        self._awaited: list[_Awaited] = []
        self._grad_was_on = False

    def watch(self, call: AttentionCall, site: Site, pattern: Pattern, deliver: Deliver, *, grad_is_on: bool) -> None:
        """Wait for the gradient of a call's output.

        Args:
            pattern: of the call, on tensors that stay as they are.
            deliver: takes ∂L/∂z [batch, query, head, width] and the sums of `GRADIENT_SUMS`, at every backward.
            grad_is_on: whether the model runs with gradients enabled.

        Raises:
            CaptureError: the kernel dropped weights, so that the pattern is not what the gradient belongs to.
        """
        self._grad_was_on |= grad_is_on
        values = (call.v.unsqueeze(1) if call.v.dim() == 3 else call.v).detach()
        tensors = [t for t in (values, *pattern.parts()[1].values()) if not t.is_inference()]
        awaited = _Awaited(site, pattern, values, deliver, [(t, t._version) for t in tensors])
        self._awaited.append(awaited)
        if not call.output.requires_grad:
            return
        if call.dropout > 0:
            raise CaptureError(
                f"attention drops out here ({call.dropout:g}), and its gradient is that of the weights after dropout",
                site=site.name,
                hint="call model.eval(); it does not stop gradients",
            )
        shape, device = (*pattern.shape[:3], -1), call.output.device.type

        def arrived(gradient: Tensor) -> None:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                awaited.arrived(gradient.detach().reshape(shape))

        awaited.handle = call.output.register_hook(arrived)

    def check(self, *, all_must_arrive: bool) -> None:
        """Complain of gradients that never came; called at the end of the capture.

        Raises:
            CaptureError: none came, or `all_must_arrive` and one did not.
        """
        missing = [awaited for awaited in self._awaited if awaited.z_gradient is None]
        if not missing:
            return
        if not self._grad_was_on:
            raise CaptureError(
                "no gradient arrived: the model ran under no_grad",
                hint="run the forward with gradients enabled and call loss.backward(), both inside the `with`",
            )
        if len(missing) == len(self._awaited) and all(awaited.handle is None for awaited in missing):
            raise CaptureError(
                "no gradient arrived: no attention output requires grad",
                hint="let the parameters before it, or the embedded inputs, require grad",
            )
        names = list(dict.fromkeys(awaited.site.name for awaited in missing))
        listed = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        if len(missing) < len(self._awaited) and not all_must_arrive:
            warnings.warn(
                f"no gradient arrived at {len(missing)} of {len(self._awaited)} attention calls: {listed}",
                UserWarning,
                stacklevel=5,
            )
            return
        raise CaptureError(
            f"no gradient arrived at {listed}",
            hint="call loss.backward() inside the `with`, on a loss that depends on this attention; "
            "checkpointing that runs the forward again in the backward (reentrant) must be off",
        )

    def close(self) -> None:
        """Take the hooks off and let go of the model's tensors."""
        for awaited in self._awaited:
            if awaited.handle is not None:
                awaited.handle.remove()
        self._awaited.clear()


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread, as it does where checkpointing runs a forward again."""
    return torch._C._current_graph_task_id() != -1
