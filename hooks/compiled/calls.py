"""From what a compiled graph recorded to an `AttentionCall`, or to what waits for its axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from workbench.hooks import calls, flex, registry
from workbench.hooks.calls import Owner
from workbench.hooks.compiled.graph import Place, mask_key
from workbench.hooks.compiled.operator import Recorded
from workbench.hooks.configs import config_of, read
from workbench.hooks.finding import kv_heads_of
from workbench.hooks.kernel_watch import LseWatch, kernel_lse
from workbench.hooks.tap import AttentionCall
from workbench.hooks.waiting import Unplaced
from workbench.hooks.written_out import of_einsum, of_product, ungrouped


def of_recorded(
    owner: Owner, place: Place, given: Recorded, joins: tuple[str, nn.Module] | None
) -> AttentionCall | Unplaced | None:
    """The call; None if what is written out turns out to be no attention.

    Args:
        joins: path and module of the linear layer that takes what the heads give.
    """
    facts: dict[str, Any] = {
        "compiled": "kept" if given.kernel else "changed",
        "joins": joins,
        "mask_key": mask_key(given.place, given.mask),
        "backend": read(config_of(owner[1]), "_attn_implementation", "") or "",
    }
    if place.kind == "flex":
        return replace(_of_flex(owner, place, given), **facts)
    if place.axes is None:  # they are looked at when its axes are known; compiled code writes over them
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(given).items()}
        given = replace(given, **copies)
    made = _of_sdpa(owner, given, facts) if place.kind == "sdpa" else _of_written_out(owner, place, given)
    if made is None:
        return None
    return replace(made, under=lambda axes: replace(made.under(axes), **facts), shown=place.axes)


def _tensors(given: Recorded) -> dict[str, Tensor]:
    every = {name: getattr(given, name) for name in ("q", "k", "v", "out", "weights", "mask", "lse")}
    return {name: tensor for name, tensor in every.items() if tensor is not None}


def _of_sdpa(owner: Owner, given: Recorded, facts: dict[str, Any]) -> Unplaced:
    assert given.q is not None
    assert given.k is not None
    watch = LseWatch()
    watch.kernel = given.kernel or "math"
    if given.lse is not None:
        watch.lse = kernel_lse((given.out, given.lse), given.q.shape[-2])
    # Under autocast the graph has them as they were before.
    q, k, v = (tensor.to(given.out.dtype) for tensor in (given.q, given.k, given.v))
    kv_heads = kv_heads_of(owner[1])
    if k.dim() == 4 and v.dim() == 4:
        fewer = ungrouped(k, kv_heads), ungrouped(v, kv_heads)
        k, v = fewer if fewer[0].shape[1] == fewer[1].shape[1] else (k, v)
    facts["offset"] = registry.first_position(given.mask, q.shape[-2], k.shape[-2])
    arguments = {
        "query": q,
        "key": k,
        "value": v,
        "attn_mask": given.mask,
        "dropout_p": given.dropout,
        "is_causal": given.causal,
        "scale": given.scale,
    }
    return calls.of_sdpa(owner, arguments, given.out, watch)


def _of_written_out(owner: Owner, place: Place, given: Recorded) -> Unplaced | None:
    assert given.weights is not None
    parts = (given.weights, given.dropout, given.v, given.out)
    if place.equation is None:
        found = of_product(*parts)
    else:
        found = of_einsum(place.equation, *parts, weights_first=place.weights_first)
    return None if found is None else calls.of_written_out(owner, found)


def _of_flex(owner: Owner, place: Place, given: Recorded) -> AttentionCall:
    assert given.q is not None
    assert given.k is not None
    assert place.mask is not None
    q, k = given.q, given.k
    of_score, of_mask = given.buffers[: place.n_score_buffers], given.buffers[place.n_score_buffers :]
    b, h, i, j = (
        torch.arange(n, device=q.device).view([-1 if axis == own else 1 for axis in range(4)])
        for own, n in enumerate((*q.shape[:3], k.shape[2]))
    )
    mask = _only(place.mask(b, h, i, j, *of_mask))
    shown = None if mask is None or mask.dim() == 0 else mask  # a function that hides nothing gives a single True
    if shown is not None:
        shown = shown.expand(*shown.shape[: shown.dim() - 2], q.shape[2], k.shape[2])
    arguments: dict[str, Any] = {"query": q, "key": k, "value": given.v, "scale": given.scale, "score_mod": None}
    if place.score is not None and not _gives_its_input(place.score):
        arguments["score_mod"] = _with_buffers(place.score, of_score)
    known = flex.facts(arguments, given.out, shown)
    return AttentionCall(*owner, kernel="flex_attention", tap="function", **known)


def _with_buffers(function: fx.GraphModule, buffers: list[Tensor]) -> Callable[..., Any]:
    return lambda *given: _only(function(*given, *buffers))


def _only(given: Any) -> Any:
    return given[0] if isinstance(given, (tuple, list)) else given


def _gives_its_input(function: fx.GraphModule) -> bool:
    """Whether a function of scores leaves them as they are."""
    first = function.graph.find_nodes(op="placeholder")[0]
    [output] = function.graph.find_nodes(op="output")
    return output.all_input_nodes == [first]
