"""What a workbench says of models that `torch.compile` compiled, and refuses."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from workbench.errors import CaptureError
from workbench.hooks.compiled.regions import EAGER, find_regions

_EAGER = "run uncompiled: outputs are those of the eager model, to the bit"
_KEPT = (
    "the graph is the model's own, with what its fused attention kernels take and give recorded: outputs are those of "
    "the compiled model, to the bit"
)
_CHANGED = (
    "attention outside of fused kernels is recorded, so that the compiler may have merged it less: outputs are those "
    "of the compiled model within the rounding of their dtype"
)


def check_gradients(model: nn.Module) -> None:
    """Raise a CaptureError if something of the model is compiled: in it the heads' outputs have no history."""
    for region in find_regions(model):
        raise CaptureError(
            f"{region.what} is compiled, and gradients are not seen in it",
            site=region.name or None,
            hint=f"use {EAGER}",
        )


def unseen_in(model: nn.Module) -> str:
    """Why attention of a compiled model may go unseen, and the next step; "" of a model that is not compiled."""
    for region in find_regions(model):
        return (
            f"{region.what} is compiled; what the compiler leaves to Python there is not seen, as a function that "
            f"raised while it was compiled, or PyTorch's native layers: use {EAGER}"
        )
    return ""


def whose_bits(graphs: Collection[str], *, eager: bool) -> dict[str, str]:
    """What a capture's provenance says of a compiled model; nothing of others.

    Args:
        graphs: what became of its graphs (`AttentionCall.compiled`). eager: it ran uncompiled.
    """
    if eager:
        return {"compiled": _EAGER}
    return {"compiled": _CHANGED if "changed" in graphs else _KEPT} if graphs else {}
