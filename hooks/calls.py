"""From what a tap saw to an `AttentionCall`: one function for each tap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from workbench.hooks import flex, registry
from workbench.hooks.kernel_watch import LseWatch
from workbench.hooks.sites import heads_of, kv_heads_of
from workbench.hooks.tap import AttentionCall
from workbench.hooks.written_out import WrittenOut, ungrouped

Owner = tuple[str, nn.Module]
"""Name of the site, and the module, that made a call."""


def of_sdpa(owner: Owner, given: Mapping[str, Any], output: Tensor, watch: LseWatch) -> AttentionCall:
    """A call of scaled_dot_product_attention, from its arguments by name and what was seen of its kernel."""
    return AttentionCall(
        *owner,
        q=given["query"],
        k=given["key"],
        v=given["value"],
        mask=given["attn_mask"],
        is_causal=given["is_causal"],
        scale=given["scale"],
        dropout=given["dropout_p"],
        output=output,
        layout="bhqd" if output.dim() == 4 else "nqd",
        lse=watch.lse,
        kernel=watch.kernel,
        tap="sdpa",
    )


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


def of_written_out(owner: Owner, found: WrittenOut) -> AttentionCall:
    """An attention that the model wrote out as product, softmax, product."""
    weights, values = found.weights, found.values
    if weights.dim() == 3:
        heads = heads_of(owner[1]) or 1
        heads = heads if weights.shape[0] % heads == 0 else 1
        weights, values = (t.unflatten(0, (-1, heads)) for t in (weights, values))
    return AttentionCall(
        *owner,
        q=None,
        k=None,
        v=ungrouped(values, kv_heads_of(owner[1])),
        weights=weights,
        output=found.output,
        layout=found.layout,
        dropout=found.dropout,
        kernel="written out",
        tap="written_out",
    )


def of_backend(
    owner: Owner, backend: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor,
    inner: LseWatch,
) -> AttentionCall:  # fmt: skip
    """A call of a backend of Hugging Face's registry; `inner` is what was seen of SDPA in it."""
    facts = registry.read(owner[0], backend, module, args, kwargs, inner)
    return AttentionCall(*owner, output=output, tap="registry", **facts)
