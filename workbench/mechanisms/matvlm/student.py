"""A student: a copy of a language model in which Mamba-2 layers stand where some attention was."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import AttachError, WorkbenchError
from workbench.hooks.changes import Changes
from workbench.hooks.heads import block_of
from workbench.inputs import device_for_inputs, without_cache
from workbench.mechanisms.matvlm.layer import Mamba2
from workbench.mechanisms.matvlm.seed import attention_weights, seed_mamba2
from workbench.session.workbench import Workbench

_CACHES = ("past_key_values", "past_key_value", "layer_past")


class InPlaceOfAttention(nn.Module):
    """A Mamba-2 layer that is called as the attention module before it was, and gives what that gave.

    Args:
        mixer: the layer.
        n_outputs: how many things the module gave, of which the first is the output; None for the output alone.
    """

    def __init__(self, mixer: Mamba2, n_outputs: int | None) -> None:
        super().__init__()
        self.mixer, self.n_outputs = mixer, n_outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output; what else the module gave (weights, a cache) is None.

        Raises:
            WorkbenchError: padding on the left, which a recurrence would read, or a cache, which holds no state of it.
        """
        if any(kwargs.get(name) is not None for name in _CACHES):
            raise WorkbenchError(
                "a Mamba-2 layer in place of attention keeps no keys, and cannot go on from a cache",
                hint="use_cache=False, which is the student's default",
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and _hides_earlier(mask):
            raise WorkbenchError(
                "a Mamba-2 layer in place of attention reads every position, and some here are padding before a text",
                shape=mask.shape,
                hint="pass rows of one length, or pad them on the right",
            )
        out = self.mixer(hidden_states)
        return out if self.n_outputs is None else (out, *[None] * (self.n_outputs - 1))


def _hides_earlier(mask: Tensor) -> bool:
    """Whether a mask hides a key from all queries that lies before one which is seen, as padding on the left is."""
    seen = mask if mask.dtype == torch.bool else mask == 0 if mask.is_floating_point() else mask != 0
    seen = seen.any(-2) if mask.dim() == 4 else seen
    return bool((seen[..., 1:] & ~seen[..., :-1]).any())


def evenly_spaced(n_layers: int, share: float) -> list[int]:
    """The layers that are replaced, a share of all, as MaTVLM spaces them: 0, 4, …, 28 are a quarter of 32.

    >>> evenly_spaced(32, 0.25)
    [0, 4, 8, 12, 16, 20, 24, 28]
    """
    n = round(n_layers * share)
    if not 0 <= n <= n_layers:
        raise WorkbenchError(f"share={share} is no share of {n_layers} layers", hint="from 0 to 1")
    return [i * n_layers // n for i in range(n)] if n else []


class Student(nn.Module):
    """A teacher's copy with Mamba-2 layers in the place of some attention; called as the teacher is, without a cache.

    `model.generate` works, and runs the whole text at each step.

    Attributes:
        model: the model. replaced: names of the sites of the teacher that were replaced, in order.
        blocks: name of the block of each.
    """

    def __init__(self, model: nn.Module, replaced: Sequence[str], blocks: Sequence[str]) -> None:
        super().__init__()
        self.model, self.replaced, self.blocks = model, tuple(replaced), tuple(blocks)

    @property
    def mixers(self) -> list[Mamba2]:
        """The layers that replaced attention."""
        found = [self.model.get_submodule(name) for name in self.replaced]
        return [each.mixer for each in found if isinstance(each, InPlaceOfAttention)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        return self.model(*args, **kwargs)


def student(
    wb: Workbench, sites: Sequence[str | int], *, seeded: bool = True, conv: int = 4, gated: bool = True, seed: int = 0
) -> Student:
    """A student of the attached language model, its Mamba-2 layers seeded from the attention that they replace.

    Everything else (MLPs, norms, embeddings, other attention) is the teacher's.

    Args:
        sites: layers or names, such as `evenly_spaced(len(wb.sites), 0.25)`.
        seeded: False leaves all of the new layers' weights drawn at random, for a comparison.
        conv, gated, seed: as `seed_mamba2` takes them; each layer has a seed of its own.

    Raises:
        AttachError: the projections of a site cannot be found, a site is no module of its own, or is named twice.
    """
    names = [wb.sites[site].name for site in sites]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise AttachError("a layer is replaced once, and this one is named twice", site=twice[0])
    outputs = _outputs(wb, names)
    model = deepcopy(wb.model)
    if names:
        for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
            if config is not None and hasattr(config, "use_cache"):
                config.use_cache = False  # `generate` runs the whole text at each step
    blocks = []
    for order, name in enumerate(names):
        block = block_of(wb.model, wb.sites, name)
        if not block or block == name:
            raise AttachError("the attention is no module of its own in a block", site=name)
        blocks.append(block)
        weights = attention_weights(wb, name)
        made = seed_mamba2(weights, conv=conv, gated=gated, seed=seed + order)
        if not seeded:
            generator = torch.Generator().manual_seed(seed + order)
            n_heads, width, d_model = weights.q.shape
            bias = made.in_proj.bias is not None
            made = Mamba2(d_model, n_heads, width, len(weights.k), conv=conv, gated=gated, bias=bias,
                          generator=generator).to(weights.q)  # fmt: skip
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, InPlaceOfAttention(made, outputs[name]))
    return Student(model.train(wb.model.training), names, blocks)


def _outputs(wb: Workbench, names: Sequence[str]) -> dict[str, int | None]:
    """How many things each of these modules gives; None for a tensor alone."""
    found: dict[str, int | None] = {}

    def seen(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = len(output) if isinstance(output, tuple) else None

        return hook

    ids = torch.zeros(1, 2, dtype=torch.long, device=device_for_inputs(wb.model))
    with torch.no_grad(), Changes() as changes:
        for name in names:
            changes.after(wb.model.get_submodule(name), seen(name))
        wb.model(input_ids=ids, **without_cache(wb.model))
    missing = [name for name in names if name not in found]
    if missing:
        raise AttachError("the module of this site was not called", site=missing[0])
    return found
