"""The tap on Hugging Face's attention registry: one place through which every backend of `transformers` is called.

`AttentionInterface.get_interface` is replaced for as long as something listens, and gives a function that runs the one
the model asked for. The name of the backend stays the same, so that the model builds the same mask: a backend under a
new name without a mask function of its own would silently lose the mask.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks import packing
from workbench.hooks.kernel_watch import LseWatch, as_multiplied
from workbench.hooks.paged import PagedKeys
from workbench.kernels.masks import hidden_below

Backend = Callable[..., tuple[Tensor, Any]]
_MORE = (
    "attention_mask",
    "softcap",
    "s_aux",
    "position_bias",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "sliding_window",
    "cache",
)


class Listener(Protocol):
    """Runs a backend for a module and sees what it does; gives what the model goes on with."""

    def __call__(
        self, backend: str, function: Backend, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


class Around(Protocol):
    """What stands between models and all listeners, with a kernel of its own in the place of the backend's.

    Attributes:
        lse: the log-sum-exp [batch, head, query] of the kernel's last call, if it gave one.
    """

    name: str
    lse: Tensor | None

    def kernel(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]: ...

    def run(self, function: Backend, module: nn.Module, *args: Any, **kwargs: Any) -> Any: ...


class _Listeners(threading.local):
    """Those of this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Listener] = []
        self.around: Around | None = None


_listeners = _Listeners()
_lock = threading.RLock()
_installed: set[object] = set()
_original: Callable[..., Any] | None = None


def install(owner: object) -> None:
    """From here on the registry asks this module; does nothing without `transformers`, and nothing when repeated."""
    with _lock:
        _installed.add(owner)
        _settle()


def uninstall(owner: object) -> None:
    """The owner is done; with the last one the registry is as it was. Does nothing when repeated."""
    with _lock:
        _installed.discard(owner)
        _settle()


def _settle() -> None:
    global _original
    interface = _interface()
    if interface is None:
        return
    ours = interface.__dict__["get_interface"] is _get_interface
    if _installed and not ours:
        _original = interface.get_interface
        interface.get_interface = _get_interface
    elif not _installed and ours:
        interface.get_interface = _original


def listen(listener: Listener) -> None:
    """From here on, in this thread, `listener` runs the backends; does nothing when repeated."""
    if listener not in _listeners.stack:
        _listeners.stack.append(listener)


def stop_listening(listener: Listener) -> None:
    """The listener no longer runs the backends of this thread; does nothing when repeated."""
    _listeners.stack[:] = [other for other in _listeners.stack if other != listener]


def around() -> Around | None:
    """What stands around the backends in this thread."""
    return _listeners.around


def put_around(one: Around | None) -> None:
    """From here on, in this thread, calls go through this, and then to the listeners."""
    _listeners.around = one


def _interface() -> Any:
    """The class of the registry, if `transformers` is loaded: a model of its own cannot be there without it."""
    utils = sys.modules.get("transformers.modeling_utils")
    return getattr(utils, "AttentionInterface", None)


def _get_interface(self: Any, attn_implementation: str, default: Backend) -> Backend:
    assert _original is not None
    if torch.compiler.is_compiling():
        return _original(self, attn_implementation, default)
    around, name = _listeners.around, attn_implementation or ""
    function: Backend = _original(self, attn_implementation, default)
    if around is not None:
        name, function = around.name, around.kernel
    for listener in _listeners.stack:
        function = partial(_run, listener, name, function)
    return function if around is None else partial(around.run, function)


def _run(listener: Listener, backend: str, function: Backend, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return listener(backend, function, module, args, kwargs)


def is_flex(function: Backend) -> bool:
    """Whether a backend is that of `transformers` for FlexAttention, which calls no SDPA: the code that it compiles
    would be compiled anew under a mode, and is of many functions where it is not compiled.
    """
    return getattr(function, "__module__", "") == "transformers.integrations.flex_attention"


def read(
    site: str,
    backend: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inner: LseWatch,
    paged: PagedKeys | None = None,
) -> dict[str, Any]:
    """The facts of an `AttentionCall` in a call `function(module, query, key, value, attention_mask, ...)`.

    Args:
        inner: what was seen of SDPA inside the backend.
        paged: the keys and values that a paged cache gave it.

    Raises:
        CaptureError: the backend takes its mask in a form that cannot be read.
    """
    given = dict(zip(("query", "key", "value", "attention_mask"), args, strict=False)) | kwargs
    q, k, v = (as_multiplied(given[name]) for name in ("query", "key", "value"))
    mask = given.get("attention_mask")
    facts: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "scale": given.get("scaling"),
        "dropout": float(given.get("dropout") or 0.0),
        "kernel": inner.kernel if inner.called else backend.rpartition("/")[2],
        "bias": given.get("position_bias"),
        "backend": backend,
        "layout": "bqhd",
    }
    of_pages: dict[str, Any] = {}
    if paged is not None:
        keys, values, ends = paged.read(site)
        k, v = as_multiplied(keys), as_multiplied(values)
        of_pages = {"k": k, "v": v, "segments": packing.between(given["cu_seq_lens_q"], ends)}
        facts |= of_pages
    kind = _kind(backend, mask)
    if kind == "sdpa":
        return facts | _as_sdpa(module, q, k, v, mask, given, inner)
    facts |= {"softcap": given.get("softcap"), "sinks": given.get("s_aux")}
    if kind == "flash":
        if _listeners.around is not None:
            facts["lse"] = _listeners.around.lse
        return facts | _as_flash(site, module, q, k, mask, given) | of_pages
    if kind == "flex":
        return facts | {"mask": from_block_mask(mask, q, k)}
    # Written out: what is hidden stands in the mask alone.
    shown = None if mask is None else mask[..., : k.shape[-2]]
    return facts | {"mask": shown, "offset": first_position(shown, q.shape[2], k.shape[2])}


def plain_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, float | None] | None:
    """Queries, keys and scale of a call with one query, which sees every key, and nothing but the scale between their
    products and the weights, as at nearly every step of `generate()`; None for all others, which `read` takes.
    """
    if len(args) < 3 or (len(args) > 3 and args[3] is not None):
        return None
    q, k, get = args[0], args[1], kwargs.get
    if q.dim() != 4 or q.shape[2] != 1 or any(get(name) is not None for name in _MORE):
        return None
    return None if torch.is_autocast_enabled(q.device.type) else (q, k, get("scaling"))


def _kind(backend: str, mask: Any) -> str:
    """How a backend takes its mask: "sdpa", "flash", "flex" or "eager".

    A backend under a name of its own (a kernel from the hub, a user's) is known by the mask function that is registered
    with it.
    """
    masks = sys.modules.get("transformers.masking_utils")
    registered = None if masks is None else masks.ALL_MASK_ATTENTION_FUNCTIONS.get(backend)
    name = getattr(registered, "__name__", "")
    strange = mask is not None and not isinstance(mask, Tensor)
    if backend == "flex_attention" or (strange and isinstance(mask, torch.nn.attention.flex_attention.BlockMask)):
        return "flex"
    for kind in ("flash", "sdpa", "eager"):
        if name.startswith(kind):
            return kind
    for kind in ("flash", "sdpa"):
        if kind in backend:
            return kind
    return "eager" if mask is not None and mask.dim() == 4 else "flash" if mask is not None else "sdpa"


def _is_causal(module: nn.Module, given: dict[str, Any]) -> bool:
    stated = given.get("is_causal")
    return bool(getattr(module, "is_causal", True) if stated is None else stated)


def _as_sdpa(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, given: dict[str, Any], inner: LseWatch
) -> dict[str, Any]:
    n_q, n_k = q.shape[2], k.shape[2]
    causal = n_q > 1 and mask is None and _is_causal(module, given)
    facts: dict[str, Any] = {"mask": mask, "is_causal": causal, "offset": first_position(mask, n_q, n_k)}
    if causal and n_k > n_q:  # an empty static cache: keys past the queries are not seen
        facts |= {"k": k[:, :, :n_q], "v": v[:, :, :n_q]}
        if given.get("position_bias") is not None:
            facts["bias"] = given["position_bias"][..., :n_q]
    lse = inner.lse
    if lse is not None and lse.shape[2] * lse.shape[1] == q.shape[1] * n_q:
        # A single query row may arrive as [batch, kv head, group]: its heads in order.
        facts["lse"] = lse.reshape(q.shape[0], q.shape[1], n_q)
    return facts


def first_position(mask: Tensor | None, n_queries: int, n_keys: int) -> int | None:
    """Position of the first query among the keys of a cache: a cache of fixed size has room after the last query.

    None where the mask does not tell, because there is none or because nothing is cached.
    """
    if mask is None or n_keys <= n_queries or mask.dim() != 4 or mask.shape[-1] != n_keys:
        return None
    last = mask[..., -1, :].flatten(0, -2)
    seen = (last if last.dtype == torch.bool else last > hidden_below(last.dtype)).any(0).nonzero()
    return None if len(seen) == 0 else max(0, int(seen[-1]) + 1 - n_queries)


def _as_flash(
    site: str, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> dict[str, Any]:
    n_q, n_k = q.shape[2], k.shape[2]
    facts: dict[str, Any] = {"is_causal": _is_causal(module, given), "offset": n_k - n_q}
    window = given.get("sliding_window")
    if window is not None and n_k > window:
        facts["window"] = window
    if mask is not None:
        if mask.dim() != 2:
            raise CaptureError("a flash backend takes its mask as [batch, key]", site=site, shape=mask.shape)
        shown = mask[:, -n_k:].to(torch.bool)
        facts["mask"] = shown[:, None, None, :]
        if n_q > 1:  # rows of padding are not computed
            facts["mask"] = facts["mask"] & shown[:, None, -n_q:, None]
    position_ids = given.get("position_ids")
    if given.get("cu_seq_lens_q") is not None and given.get("cu_seq_lens_k") is not None:
        facts["segments"] = packing.between(given["cu_seq_lens_q"], given["cu_seq_lens_k"])
    elif mask is None and q.shape[0] == 1 and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        # Without lengths, flash backends begin a sequence at each position 0 if positions start again.
        start_again = bool(packing.restarts(position_ids)[:, 1:].any())
        facts["segments"] = packing.at_starts(position_ids == 0) if start_again else ()
    return facts


def from_block_mask(mask: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """A flex mask as a boolean tensor [batch or 1, head or 1, query, key]; a score mask stays as it is."""
    if mask is None or isinstance(mask, Tensor):
        return mask if mask is None else mask[..., : k.shape[-2]]
    n_batch, n_heads = mask.shape[:2]
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    rows = []
    for b in range(n_batch):
        heads = [mask.mask_mod(torch.tensor(b, device=q.device), torch.tensor(h, device=q.device), i, j)
                 for h in range(n_heads)]  # fmt: skip
        rows.append(torch.stack([shown.expand(len(i), j.shape[1]) for shown in heads]))
    return torch.stack(rows)
