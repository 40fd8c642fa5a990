"""`attach`: a `Workbench` on a model, if it has attention that can be seen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from workbench.errors import AttachError
from workbench.hooks.code import scripted_attention
from workbench.hooks.compiled.regions import uncompiled
from workbench.hooks.finding import find_sites
from workbench.hooks.layouts import Layouts
from workbench.hooks.proofs.axes import Axes
from workbench.session.workbench import Workbench, attached_to


def attach(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    check: bool = True,
    layout: Mapping[str, str] | None = None,
    compiled: Literal["recorded", "eager"] = "recorded",
) -> Workbench:
    """Attach to a model, so that its attention can be captured while it stays on its own kernel.

    Args:
        model: any `nn.Module` that calls scaled_dot_product_attention, a backend of Hugging Face's, PyTorch's attention
            modules, or writes attention out as product, softmax, product.
        tokenizer: a Hugging Face tokenizer, to take text and to label tokens; optional.
        check: refuse a model in whose code no attention is found. Pass False for one that reaches its kernel in a way
            that cannot be read from the code; its sites are then found when it runs.
        layout: by site, what the axes of its kernel's output are, where values cannot show it, as in einops:
            {"blocks.0.attn": "(head=4 batch) query width"}; see `docs/how-it-works.md`.
        compiled: how what `torch.compile` made of the model runs while something is captured: "recorded", compiled once
            more with an operator of ours behind each attention, or "eager", uncompiled for as long as the workbench is
            attached, as interventions need it.

    Raises:
        AttachError: no module, no attention in it, or attached already.
        CaptureError: a layout of a site that there is not, or that cannot be read.

    >>> import torch
    >>> wb = attach(nn.TransformerEncoderLayer(16, 4, batch_first=True).eval())
    >>> with wb.capture() as cap:
    ...     _ = wb.model(torch.randn(2, 5, 16))
    >>> cap["self_attn"].entropy.shape
    torch.Size([2, 4, 5])
    >>> wb.detach()
    """
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)
        hint = "attach to its .model" if isinstance(inner, nn.Module) else "pass the nn.Module itself"
        raise AttachError(f"cannot attach to a {type(model).__name__}", hint=hint)
    if compiled not in ("recorded", "eager"):
        raise AttachError(f'compiled is "recorded" or "eager", not {compiled!r}')
    whole, model = model, uncompiled(model)
    if attached_to(model) is not None:
        raise AttachError(
            f"{type(model).__name__} is attached already", hint="use that Workbench, or call its detach() first"
        )
    sites, scripted = find_sites(model), scripted_attention(model)
    if scripted:
        parts = ", ".join(name or "the model itself" for name in scripted[:5])
        warnings.warn(
            f"attention in TorchScript cannot be seen, and is no site: {parts}; "
            "attach to the model as it was before torch.jit.script or torch.jit.trace",
            UserWarning,
            stacklevel=2,
        )
    if check and not sites and not scripted:
        raise AttachError(
            f"no attention was found in {type(model).__name__}",
            hint="nothing in the code of its modules calls an attention kernel or multiplies a softmax with values; "
            "if it does so in a hidden way, attach with check=False; wb.look(**inputs) then lists what mixes tokens",
        )
    stated = {sites.find(name).name if check else name: text for name, text in (layout or {}).items()}
    for text in stated.values():
        Axes.parse(text, heads=1)
    return Workbench(whole, tokenizer, sites, Layouts(stated), eager=compiled == "eager")
