"""Activation patching by hand: plain hooks on a model's modules, and one whole forward for each patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from workbench.metrics import logit_diff

Changed = Callable[[Tensor], Tensor]


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def with_first(value: Any, new: Tensor) -> Any:
    return new if isinstance(value, Tensor) else type(value)((new, *value[1:]))


def after(module: nn.Module, change: Changed) -> Any:
    return module.register_forward_hook(lambda m, args, out: with_first(out, change(first(out))))


def before(module: nn.Module, change: Changed) -> Any:
    def hook(m: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def before_in_place(module: nn.Module, change: Changed) -> Any:
    """The stream itself, which the model goes on adding to, and not what this module alone reads of it."""

    def hook(m: nn.Module, args: Any) -> None:
        args[0].copy_(change(args[0].clone()))

    return module.register_forward_pre_hook(hook)


@torch.no_grad()
def by_hand(
    model: nn.Module, where: list[tuple[nn.Module, Any]], into: Any, out_of: Any, lengths: list[int], **options: Any
) -> dict[tuple[int, int], Tensor]:
    """(row, position) -> [example] logit differences, one whole forward for each. `lengths`: positions of each row."""
    options = options or {"use_cache": False}
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor.clone())
        return tensor

    handles = [how(module, keep) for module, how in where]
    model(**out_of, **options)
    for handle in handles:
        handle.remove()
    found = {}
    for row, (module, how) in enumerate(where):
        for place in range(lengths[row]):

            def put(tensor: Tensor, row: int = row, place: int = place) -> Tensor:
                new = tensor.clone()
                new[:, place] = seen[row][:, place]
                return new

            handle = how(module, put)
            found[row, place] = logit_diff(model(**into, **options), into)
            handle.remove()
    return found
