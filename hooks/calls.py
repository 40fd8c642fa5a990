"""From what a tap saw to an `AttentionCall`: one function for each tap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks import flex, registry
from workbench.hooks.finding import heads_of, kv_heads_of
from workbench.hooks.forwards import check_plain
from workbench.hooks.kernel_watch import LseWatch
from workbench.hooks.paged import PagedKeys
from workbench.hooks.proofs.axes import Bound
from workbench.hooks.tap import AttentionCall
from workbench.hooks.truth import check_last_row
from workbench.hooks.waiting import Unplaced
from workbench.hooks.written_out import WrittenOut, ungrouped

Owner = tuple[str, nn.Module]
"""Name of the site, and the module, that made a call."""
_OWN = [None, None]  # axes of keys and values that the output does not have: the key, and the width


def of_sdpa(owner: Owner, given: Mapping[str, Any], output: Tensor, watch: LseWatch) -> Unplaced:
    """A call of scaled_dot_product_attention, from its arguments by name and what was seen of its kernel."""
    check_plain(output, owner[0])
    lead = list(range(output.dim() - 2))

    def under(axes: Bound) -> AttentionCall:
        q, k, v, mask, lse = given["query"], given["key"], given["value"], given["attn_mask"], watch.lse
        plain = axes.axes.is_plain and axes.axes.over == "positions"
        if not plain:
            q, k, v = (axes.arrange(t, [*lead, *rest]) for t, rest in ((q, [-2, None]), (k, _OWN), (v, _OWN)))
            lse = axes.arrange(lse, [*lead, -2]) if lse is not None and lse.dim() == output.dim() - 1 else None
            if mask is not None:
                mask = axes.arrange(mask, [*lead, -2, None][-mask.dim() :], whole_batch=False)
        return AttentionCall(
            *owner,
            q=q,
            k=k,
            v=v,
            mask=mask,
            is_causal=given["is_causal"],
            scale=given["scale"],
            dropout=given["dropout_p"],
            output=output,
            axes=None if plain else axes,
            lse=lse,
            kernel=watch.kernel,
            tap="sdpa",
        )

    made_of, v = tuple(given[name] for name in ("query", "key", "value", "attn_mask")), given["value"]
    values = v if v.shape[:-2] == output.shape[:-2] else None
    heads, read = heads_of(owner[1]), (v, v.shape[-2])
    return Unplaced(*owner, heads, output, (-2,), -1, under, read, made_of, values, scored=True)


def of_function(
    owner: Owner, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> AttentionCall:
    """A call of a function that tells its own pattern (see `workbench.kernels.functions`)."""
    if flex.is_flex(function):
        given = flex.arguments(args, kwargs)
        mask = registry.from_block_mask(given["block_mask"], given["query"], given["key"])
        return AttentionCall(*owner, kernel="flex_attention", tap="function", **flex.facts(given, result, mask))
    q, k, v = (args[i] if len(args) > i else kwargs[x] for i, x in enumerate("qkv"))
    return AttentionCall(
        *owner,
        q=q,
        k=k,
        v=v,
        output=result[0] if isinstance(result, tuple) else result,
        kernel=function.attention_kernel,
        tap="function",
        build=lambda: function.pattern_of(*args, **kwargs),
    )


def of_written_out(owner: Owner, found: WrittenOut) -> Unplaced:
    """An attention that the model wrote out as product, softmax, product."""
    of_weights, of_values, of_output = found.letters
    key = of_weights[-1]
    width = of_output[found.width]

    def under(axes: Bound) -> AttentionCall:
        ordered = [x for x in of_values if x not in (key, width)] + [key, width]
        values = found.values.permute([of_values.index(x) for x in ordered])
        plain = axes.axes.is_plain and axes.axes.over == "positions"
        return AttentionCall(
            *owner,
            q=None,
            k=None,
            v=ungrouped(axes.arrange(values, [_axis(of_output, x, width) for x in ordered]), kv_heads_of(owner[1])),
            weights=axes.arrange(found.weights, [_axis(of_output, x, width) for x in of_weights]),
            output=found.output,
            axes=None if plain else axes,
            dropout=found.dropout,
            kernel="written out",
            tap="written_out",
        )

    made_of, heads = (found.weights, found.values), heads_of(owner[1])
    read, values = (found.values, found.weights.shape[-1]), found.values_like_output
    return Unplaced(*owner, heads, found.output, found.mixed, found.width, under, read, made_of, values)


def _axis(of_output: str, letter: str, width: str) -> int | None:
    """The axis of the output that a letter stands for; None for the key and the width."""
    return of_output.index(letter) if letter in of_output and letter != width else None


def of_backend(
    owner: Owner, backend: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor,
    inner: LseWatch, paged: PagedKeys | None = None,
) -> AttentionCall:  # fmt: skip
    """A call of a backend of Hugging Face's registry; `inner` is what was seen of SDPA in it, `paged` of its cache."""
    facts = registry.read(owner[0], backend, module, args, kwargs, inner, paged)
    return AttentionCall(*owner, output=output, tap="registry", **facts)


def by_its_weights(call: AttentionCall, weights: Any) -> AttentionCall | None:
    """The call of a backend by the weights that it gave beside its output, if these make the output and what queries,
    keys and mask say does not: a function of one's own may do more to the scores than its arguments tell.
    """
    shape = (call.v.shape[0], call.sizes[0], *call.lengths)
    if not isinstance(weights, Tensor) or weights.shape != shape or not weights.is_floating_point():
        return None
    if call.dropout > 0 or call.segments or call.build is not None or _holds(call):
        return None
    found = replace(call, q=None, k=None, lse=None, weights=weights, kernel="written out", tap="written_out")
    return found if _holds(found) else None


def _holds(call: AttentionCall) -> bool:
    """Whether the last row of its pattern gives what the kernel gave."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(call.v.device.type, enabled=False):
        try:
            check_last_row(call, call.pattern())
        except CaptureError:
            return False
    return True
