"""Waits, during one capture, for the gradients of attention outputs, and makes statistics of them when they arrive.

A tensor hook on each call's output receives ∂L/∂z while the model's own backward runs; nothing is put into the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
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
    """One call whose gradients may still come.

    Attributes:
        site, pattern: of the call. values: [batch, kv head, key, width], the model's own.
        deliver: takes what arrives.
        versions: tensors that belong to the model, and their versions at the call.
        z_gradient: [batch, head, query, width], the sum of what has arrived; None if nothing has.
        kernel_gradient: the same for what the kernel gave, where an intervention changed it before the model went on.
        handles: of the hooks.
    """

    site: Site
    pattern: Pattern
    values: Tensor
    deliver: Deliver
    versions: list[tuple[Tensor, int]]
    edited: bool
    z_gradient: Tensor | None = None
    kernel_gradient: Tensor | None = None
    handles: list[Any] = field(default_factory=list)

    def z_arrived(self, gradient: Tensor) -> None:
        """Take ∂L/∂z [batch, head, query, width]; a further backward adds to what came before."""
        self.z_gradient = self._added(self.z_gradient, gradient)
        if not self.edited:
            self.kernel_gradient = self.z_gradient
        self._deliver()

    def kernel_arrived(self, gradient: Tensor) -> None:
        """Take the gradient of the kernel's output, which an intervention has let through."""
        self.kernel_gradient = self._added(self.kernel_gradient, gradient)
        self._deliver()

    def _added(self, before: Tensor | None, gradient: Tensor) -> Tensor:
        if any(tensor._version != seen for tensor, seen in self.versions):
            raise CaptureError(
                "the model has overwritten a tensor that its gradients need",
                site=self.site.name,
                hint="call loss.backward() before the next forward",
            )
        gradient = gradient.to(self.pattern.dtype)
        return gradient.clone() if before is None else before + gradient

    def _deliver(self) -> None:
        if self.z_gradient is None:
            return
        kernel = torch.zeros_like(self.z_gradient) if self.kernel_gradient is None else self.kernel_gradient
        sums = attention_times_gradient(self.pattern, kernel, self.values)
        self.deliver(self.z_gradient.transpose(1, 2).contiguous(), sums)


class GradientWatch:
    """The gradients that one capture waits for; `close` ends the wait and leaves nothing on the graph."""

    def __init__(self) -> None:
        self._awaited: list[_Awaited] = []
        self._grad_was_on = False

    def watch(
        self, call: AttentionCall, edited: Tensor | None, site: Site, pattern: Pattern, deliver: Deliver, *,
        grad_is_on: bool,
    ) -> None:  # fmt: skip
        """Wait for the gradients of a call's output.

        Args:
            edited: [batch, head, query, width] that an intervention has made of it; then `z_gradient` is that of what
                the model goes on with, and the sums are those of the kernel's own output.
            pattern: of the call, with its values.
            deliver: takes ∂L/∂z [batch, query, head, width] and the sums of `GRADIENT_SUMS`, at every backward.
            grad_is_on: whether the model runs with gradients enabled.

        Raises:
            CaptureError: the kernel dropped weights, so that the pattern is not what the gradient belongs to.
        """
        self._grad_was_on |= grad_is_on
        values = call.v if pattern.values is None else pattern.values
        tensors = [t for t in (values, *pattern.state()[1].values()) if not t.is_inference()]
        versions = [(t, t._version) for t in tensors]
        awaited = _Awaited(site, pattern, values.detach(), deliver, versions, edited is not None)
        self._awaited.append(awaited)
        if not call.output.requires_grad and (edited is None or not edited.requires_grad):
            return
        if call.dropout > 0:
            raise CaptureError(
                f"attention drops out here ({call.dropout:g}), and its gradient is that of the weights after dropout",
                site=site.name,
                hint="call model.eval(); it does not stop gradients",
            )
        kernel_arrived = awaited.z_arrived if edited is None else awaited.kernel_arrived
        if call.finish is None:
            heads_of = call.heads_of
            _hook(call.output, lambda g: kernel_arrived(heads_of(g)), awaited.handles)
        elif edited is None:
            carry_back = _through_finish(call)
            _hook(call.output, lambda g: kernel_arrived(carry_back(g)), awaited.handles)
        else:  # then the model goes on with what was computed of it, not with what the module gave
            _hook(call.mixed, kernel_arrived, awaited.handles)
        if edited is not None:
            _hook(edited, lambda g: awaited.z_arrived(call.own(g)), awaited.handles)

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
        if len(missing) == len(self._awaited) and not any(awaited.handles for awaited in missing):
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
                stacklevel=4,
            )
            return
        raise CaptureError(
            f"no gradient arrived at {listed}",
            hint="call loss.backward() inside the `with`, on a loss that depends on this attention; "
            "checkpointing that runs the forward again in the backward (reentrant) must be off",
        )

    def close(self) -> None:
        """Take the hooks off."""
        for awaited in self._awaited:
            for handle in awaited.handles:
                handle.remove()


def _through_finish(call: AttentionCall) -> Callable[[Tensor], Tensor]:
    """From the gradient of what a module gave to that of its heads' output, all that follows from others held fixed."""
    assert call.finish is not None
    with torch.enable_grad():
        z = call.mixed.detach().requires_grad_()
        again = call.finish(z)

    def carry_back(gradient: Tensor) -> Tensor:
        [found] = torch.autograd.grad(again, z, gradient.to(again.dtype), retain_graph=True)
        return found

    return carry_back


def _hook(tensor: Tensor, take: Callable[[Tensor], None], handles: list[Any]) -> None:
    """Give the tensor's gradient to `take` at every backward, if there can be one."""
    if not tensor.requires_grad:
        return
    device = tensor.device.type

    def hook(gradient: Tensor) -> None:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            take(gradient.detach())

    handles.append(tensor.register_hook(hook))
