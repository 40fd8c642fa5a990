"""Attention backends of `transformers` on a machine without a GPU.

For flash-attn there are stand-ins: its functions with their signatures and layout, computed in float64.

`transformers` runs its own code up to the functions of the package: it makes the mask, casts, takes padding out and
puts it back, and passes on what the functions' signatures say they take.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from support.zoo.family import HUB_KERNEL


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int], softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[query, head, d] for one sequence; ends of queries and keys are aligned, window edges are inclusive."""
    group = q.shape[-2] // k.shape[-2]
    q64, k64, v64 = q.double(), *(t.double().repeat_interleave(group, dim=-2) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q64, k64) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    i = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0])[None, :]
    left, right = window[0], 0 if causal else window[1]
    hidden = ((j < i - left) if left >= 0 else i != i) | ((j > i + right) if right >= 0 else i != i)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, q.shape[0], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[0]].nan_to_num(0.0)
    return torch.einsum("hij,jhd->ihd", weights, v64).to(q.dtype)


def _batch(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
    return torch.stack([_attend(*one, *how) for one in zip(q, k, v, strict=True)])


def _sequences(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, *how: Any) -> Tensor:
    sizes_q, sizes_k = ends_q.diff().tolist(), ends_k.diff().tolist()
    parts = zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k), strict=True)
    return torch.cat([_attend(*one, *how) for one in parts])


def _version_2() -> list[ModuleType]:
    """The package `flash_attn` (version 2)."""
    from transformers import modeling_flash_attention_utils as utils

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    ) -> Tensor:  # fmt: skip
        return _batch(q, k, v, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap)

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__dict__.update(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=None
    )
    padding.__dict__.update(pad_input=utils._pad_input, unpad_input=utils._unpad_input)
    return [package, padding]


def _version_3(name: str, sinks: bool = False) -> list[ModuleType]:
    """The package `flash_attn_interface` (version 3), or a kernel of the hub that takes sink logits too."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
        qv: Tensor | None = None, window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0,
        softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False,
        sm_margin: int = 0, return_attn_probs: bool = False,
    ) -> Tensor:  # fmt: skip
        return _batch(q, k, v, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float | None = None, causal: bool = False, qv: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
        pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> Tensor:  # fmt: skip
        return _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap)

    def with_sinks(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, s_aux: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return _batch(q, k, v, softmax_scale, causal, window_size, softcap, s_aux)

    def varlen_with_sinks(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, s_aux: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap, s_aux)

    module = ModuleType(name)
    module.__dict__.update(
        flash_attn_func=with_sinks if sinks else flash_attn_func,
        flash_attn_varlen_func=varlen_with_sinks if sinks else flash_attn_varlen_func,
        flash_attn_with_kvcache=None,
    )
    return [module]


@contextmanager
def _importable(modules: list[ModuleType]) -> Iterator[None]:
    # Not mock.patch.dict: it would forget everything else that is imported meanwhile.
    for module in modules:
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    try:
        yield
    finally:
        for module in modules:
            del sys.modules[module.__name__]


@contextmanager
def flash_packages() -> Iterator[None]:
    """The packages of versions 2 and 3 can be imported, and a kernel of the hub is registered as `HUB_KERNEL`.

    What `transformers` keeps of the packages that it has loaded is as before at the end.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import modeling_flash_attention_utils as utils
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    [kernel] = _version_3(HUB_KERNEL, sinks=True)
    modules = [*_version_2(), *_version_3("flash_attn_interface")]
    loaded = {name: value for name, value in vars(utils).items() if name.startswith(("_loaded", "_flash_", "_process_"))
              or name in ("_pad_fn", "_unpad_fn")}  # fmt: skip
    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    with (
        _importable(modules),
        mock.patch.object(utils, "is_flash_attn_2_available", return_value=True),
        mock.patch.object(utils, "is_flash_attn_3_available", return_value=True),
        mock.patch("transformers.integrations.hub_kernels.load_and_register_attn_kernel", return_value=kernel),
        mock.patch.dict(registries[0]),
        mock.patch.dict(registries[1]),
    ):
        AttentionInterface.register(HUB_KERNEL, flash_attention_forward)
        AttentionMaskInterface.register(HUB_KERNEL, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
        try:
            yield
        finally:
            for name, value in loaded.items():
                setattr(utils, name, value)


def on_backend(model: nn.Module, backend: str) -> nn.Module:
    """The model, set to an attention backend without asking whether this machine could run it."""
    for module in model.modules():
        if hasattr(module, "config"):  # parts of a model may have a copy of their own
            module.config._attn_implementation = backend
    return model


def untraced_flex() -> AbstractContextManager[Any]:
    """PyTorch's flex attention, where it is not compiled, is not traced first either, which takes longer than it does.

    What tracing changes for those who watch is tested in `tests/hooks/test_flex.py`.
    """
    from torch.nn.attention import flex_attention as written

    return mock.patch.object(written, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@contextmanager
def uncompiled_flex() -> Iterator[None]:
    """Flex attention runs as it is written; compiling it takes seconds per model."""
    from transformers import masking_utils
    from transformers.integrations import flex_attention as flex

    with (
        untraced_flex(),
        mock.patch.object(flex.WrappedFlexAttention, "_instance", None),
        mock.patch.object(flex.WrappedFlexAttention, "_is_flex_compiled", True),
        mock.patch.object(flex.WrappedFlexAttention, "_compiled_flex_attention", staticmethod(flex.flex_attention)),
        mock.patch.object(flex.WrappedFlexAttention, "training", False, create=True),
        mock.patch.object(masking_utils, "create_block_mask", _uncompiled(masking_utils.create_block_mask)),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{**kwargs, "_compile": False})

    return run
