"""vLLM: a back end of its registry that does what another one does, and tells what chosen heads look at.

    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from workbench.hooks.serving import recording_backend

    backend = recording_backend(FlashAttentionBackend, {"model.layers.3.self_attn.attn": [0, 5]}, tell)
    register_backend(AttentionBackendEnum.CUSTOM, "my_plugin.backend")   # in a module that every worker imports

Written against vLLM's documented interface (`vllm.v1.attention.backend`, `vllm.v1.attention.backends.registry`,
releases 0.22 to 0.32) and tested with a stand-in for it; see docs/scale.md for what was run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from workbench.errors import CaptureError
from workbench.hooks.serving.paged_batch import PagedBatch, Served

_log = logging.getLogger(__name__)
# Sizes that no cache has by chance, so that its shape says which axis is which.
_BLOCKS, _BLOCK, _KV_HEADS, _WIDTH = 7919, 48, 11, 80
_NEEDED = ("num_actual_tokens", "query_start_loc", "seq_lens", "block_table")


def recording_backend(
    base: type[Any],
    heads: Mapping[str, Sequence[int]],
    tell: Callable[[str, Served], None],
    statistics: Sequence[str] = (),
) -> type[Any]:
    """A back end that computes what `base` computes, with its kernels, and tells what heads do for each request.

    What cannot be told, or what `tell` raises, is logged once per layer and never breaks a request. Calls inside CUDA
    graphs are not seen: serve with `cudagraph_mode="PIECEWISE"`, which leaves attention outside of them, or with
    `enforce_eager=True`. vLLM's metadata does not name requests: `Served.request` is the row of the batch, and
    `Served.blocks` the pages, of which full ones may be shared by requests with the same beginning.

    Args:
        base: the back end's class, such as `FlashAttentionBackend`.
        heads: by the layer's name, such as "model.layers.3.self_attn.attn", which heads (of this rank).
        tell: is given the layer's name and a request, after each call of the layer.
        statistics: names as in `capture`, over each step's queries.

    Raises:
        CaptureError: the shape of the back end's cache does not say where its keys are.
    """
    order = cache_axes(base)
    plain = base.get_impl_cls()

    class RecordingImpl(plain):  # type: ignore[misc, valid-type]
        """The base's implementation, with a listener behind it."""

        def forward(
            self, layer: Any, query: Tensor, key: Any, value: Any, kv_cache: Tensor, attn_metadata: Any, *args: Any,
            **named: Any,
        ) -> Any:  # fmt: skip
            given = super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **named)
            name = getattr(layer, "layer_name", "")
            if attn_metadata is not None and name in heads:  # None while memory is measured
                _tell(self, name, query, kv_cache, attn_metadata)
            return given

    failed: set[str] = set()

    def _tell(impl: Any, name: str, query: Tensor, kv_cache: Tensor, metadata: Any) -> None:
        try:
            for served in batch_of(impl, query, kv_cache, metadata, order).served(heads[name], statistics):
                tell(name, served)
        except Exception as error:  # a request is no place for our errors
            if name not in failed:
                failed.add(name)
                _log.warning("what %s looks at could not be told: %s: %s", name, type(error).__name__, error)

    class RecordingBackend(base):
        """The base, with that implementation."""

        @staticmethod
        def get_impl_cls() -> type[Any]:
            return RecordingImpl

    RecordingBackend.__name__ = RecordingBackend.__qualname__ = f"Recording{base.__name__}"
    return RecordingBackend


def cache_axes(base: type[Any]) -> tuple[int, int, int, int, int]:
    """Which axes of a back end's cache are (keys and values, block, slot, kv head, width).

    Raises:
        CaptureError: its shape does not say so.
    """
    shape = tuple(base.get_kv_cache_shape(_BLOCKS, _BLOCK, _KV_HEADS, _WIDTH))
    wanted = (2, _BLOCKS, _BLOCK, _KV_HEADS, _WIDTH)
    if sorted(shape) != sorted(wanted):
        raise CaptureError(
            f"the cache of {base.__name__} is no pages of keys beside values: a shape of {shape} for {_BLOCKS} blocks "
            f"of {_BLOCK} slots, {_KV_HEADS} heads of {_WIDTH}"
        )
    kv, block, slot, head, width = (shape.index(size) for size in wanted)
    return kv, block, slot, head, width


def batch_of(
    impl: Any, query: Tensor, kv_cache: Tensor, metadata: Any, order: tuple[int, int, int, int, int]
) -> PagedBatch:
    """The call of an implementation, from its attributes, arguments and metadata.

    Raises:
        CaptureError: the metadata lacks something, requests attend in other ways than causally, or the cache is
            quantized.
    """
    missing = [name for name in _NEEDED if getattr(metadata, name, None) is None]
    if missing:
        raise CaptureError(f"the metadata of {type(impl).__name__} has no {', '.join(missing)}")
    if not getattr(metadata, "causal", True) or getattr(impl, "attn_type", "decoder") != "decoder":
        raise CaptureError("only causal attention of decoders is told of")
    if getattr(metadata, "use_cascade", False):
        raise CaptureError("a cascade attends to a shared prefix by itself", hint="disable_cascade_attn=True")
    if str(getattr(impl, "kv_cache_dtype", "auto")).startswith("fp8") or not kv_cache.is_floating_point():
        raise CaptureError("the keys of a quantized cache are not read", hint='kv_cache_dtype="auto"')
    keys = kv_cache.permute(order)[0]  # [block, slot, kv head, d_head]
    window = getattr(impl, "sliding_window", None)
    if isinstance(window, (tuple, list)):
        window = None if window[0] < 0 else int(window[0]) + 1
    n_requests = len(metadata.seq_lens)
    return PagedBatch(
        query=query[: metadata.num_actual_tokens].reshape(metadata.num_actual_tokens, impl.num_heads, impl.head_size),
        keys=keys, starts=metadata.query_start_loc[: n_requests + 1], n_keys=metadata.seq_lens,
        table=metadata.block_table, scale=float(impl.scale), window=window or None,
        softcap=getattr(impl, "logits_soft_cap", None) or None, sinks=getattr(impl, "sinks", None),
        slopes=getattr(impl, "alibi_slopes", None),
    )  # fmt: skip
