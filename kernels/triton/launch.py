"""Statistics of a softmax pattern by the Triton kernels: what they support, and the call.

Not supported, and left to the torch path: mask tensors, softcap, key bias (hence value-weighted statistics), sink
logits, given sink keys, induction, float64, and layouts that hide single tokens within a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.finishing import finish
from workbench.kernels.masks import Mask
from workbench.kernels.statistics import STATISTICS, Options, check_names
from workbench.kernels.triton.runs import AT, ROWS, Run

if TYPE_CHECKING:
    from workbench.kernels.patterns import Pattern
    from workbench.kernels.softmax import SoftmaxPattern

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 256
MAX_TOP = 16
_ROWS = {"peak_key", *ROWS, *AT}
_POOLED = {"pooled_mean", "pooled_max"}
_COLUMNS = {"received", "received_mean", *_POOLED}


def refusal(pattern: Pattern, names: Sequence[str], options: Options | None = None) -> str | None:
    """Why the kernels cannot make these statistics of this pattern, or None if they can."""
    from workbench.kernels.softmax import SoftmaxPattern

    options = options or Options()
    if not isinstance(pattern, SoftmaxPattern):
        return f"a {type(pattern).__name__} is no softmax pattern"
    unknown = [name for name in names if name not in STATISTICS or name == "induction"]
    if unknown:
        return f'the kernels have no "{unknown[0]}"'
    extras = {"softcap": pattern.softcap, "sinks": pattern.sinks, "key_bias": pattern.key_bias}
    used = [name for name, value in extras.items() if value is not None]
    if used:
        return f"the kernels have no {used[0]}"
    if "sink" in names and options.sink_keys is not None:
        return "the kernels take the first visible key as the sink, not given keys"
    if "top_keys" in names and options.n_top > MAX_TOP:
        return f"the kernels keep up to {MAX_TOP} top keys, not {options.n_top}"
    if not _POOLED.isdisjoint(names) and options.block & (options.block - 1):
        return f"the kernels pool blocks whose edge is a power of two, not {options.block}"
    return _mask_refusal(pattern.mask) or _input_refusal(pattern.q, pattern.k) or _machine_refusal(pattern.q.device)


def supports(pattern: Pattern, names: Sequence[str], options: Options | None = None) -> bool:
    """Whether `statistics` can make these statistics here; `refusal` says why not."""
    return refusal(pattern, names, options) is None


def _mask_refusal(mask: Mask) -> str | None:
    layout = mask.layout
    if mask.tensor is not None:
        return "the kernels know causal, windowed and block-sparse masks, not mask tensors"
    if layout is None:
        return None
    if not layout.exact:
        return f"{type(layout).__name__} hides single tokens within its blocks"
    if layout.block < 8 or layout.block & (layout.block - 1):
        return f"the kernels need layout blocks that are a power of two from 8 on, not {layout.block}"
    return None


def _input_refusal(q: Tensor, k: Tensor) -> str | None:
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        return f"the kernels take float16, bfloat16 or float32 queries and keys, not {q.dtype} and {k.dtype}"
    if q.shape[-1] > MAX_WIDTH:
        return f"the kernels take heads up to {MAX_WIDTH} wide, not {q.shape[-1]}"
    if min(q.numel(), k.numel()) == 0:
        return "there is nothing to compute"
    return None


def _machine_refusal(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    from workbench.kernels.triton.configs import interpreted

    if device.type == "cuda":
        old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
        return "the kernels need compute capability 8.0 or newer" if old else None
    return None if device.type == "cpu" and interpreted() else f"the kernels run on a GPU, not on {device.type}"


def raw(
    pattern: SoftmaxPattern, names: Sequence[str], options: Options, lse: Tensor | None = None
) -> dict[str, Tensor]:
    """One pass, as `SoftmaxPattern.fused_pass` wants it: raw sums for `finishing.finish`, in float32.

    Args:
        names: statistics that `refusal` lets through; "lse" and "signed_mass" add nothing.
        lse: [batch, head, query]; where it is None it is found first, and is in the result as "lse".
    """
    run = Run(pattern.q, pattern.k, pattern.mask, pattern.scale, pattern.space())
    found: dict[str, Tensor] = {}
    with run.on_device():
        if not _ROWS.isdisjoint(names):
            found |= run.rows([name for name in AT if name in names])
        elif lse is None:
            found["lse"] = run.lse()
        if lse is None:
            lse = found["lse"]
        else:
            found.pop("lse", None)
            lse = lse.to(torch.float32).contiguous()
        if not _COLUMNS.isdisjoint(names):
            found |= run.columns(lse, None if _POOLED.isdisjoint(names) else options.block)
        if "top_keys" in names:
            found |= run.top_keys(lse, options.n_top)
    return found


def statistics(pattern: SoftmaxPattern, names: Sequence[str], options: Options | None = None) -> dict[str, Tensor]:
    """The named statistics, as `workbench.kernels.streaming.statistics` gives them, in float32.

    The pattern's lse is used where it is known; one that had to be found is left in the pattern for the next call.

    Raises:
        CaptureError: an unknown statistic, or something the kernels do not support.
    """
    options, names = options or Options(), check_names(names)
    why = refusal(pattern, names, options)
    if why is not None:
        raise CaptureError(why, hint="use workbench.kernels.streaming, which supports every pattern")
    known = pattern.lse if pattern.denominators_known else None
    found = raw(pattern, names, options, known)
    if known is None:
        pattern.found_denominators(found["lse"], torch.ones_like(found["lse"]))
    found["lse"] = pattern.lse
    if "signed_mass" in names:
        found["signed_mass"] = pattern.signed_mass
    return finish(found, names, pattern.space(), options)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, scale: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention and its row statistics in one pass.

    Args:
        q: [batch, head, query, d]; k: [batch, kv head, key, d]; v: [batch, kv head, key, width], all of one dtype.
        mask: causal, windowed or block-sparse rules.

    Returns:
        (output [batch, head, query, width] in the dtype of q, zero in rows that see no key; every row statistic).

    Raises:
        CaptureError: something the kernels do not support.
    """
    from workbench.kernels.softmax import SoftmaxPattern

    pattern = SoftmaxPattern(q, k, mask, scale=scale)
    why = refusal(pattern, AT)
    fits = v.dim() == 4 and v.shape[:3] == k.shape[:3] and v.dtype == q.dtype and v.device == q.device
    if why is None and (not fits or v.shape[-1] > MAX_WIDTH):
        why = f"values {list(v.shape)} {v.dtype} do not fit keys {list(k.shape)} {k.dtype}"
    if why is not None:
        raise CaptureError(why, hint="use torch's scaled_dot_product_attention and workbench.kernels.streaming")
    run = Run(pattern.q, pattern.k, pattern.mask, pattern.scale, pattern.space())
    with run.on_device():
        found = run.rows(AT, v.detach())
    output = found.pop("output")
    return output, finish(found, tuple(found), pattern.space(), Options())
