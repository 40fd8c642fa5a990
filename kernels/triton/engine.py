"""The engine of the Triton kernels: what they support, and the calls.

Left to plain torch, which takes 30 to 250 launches for each tile of 256 queries and keys: float64, heads wider than
256, more than 16 top keys, statistics of a user's own, and layouts that hide single tokens within blocks
(neighborhoods) of more than 16,384 queries and keys; shorter ones are read from a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.errors import CaptureError
from workbench.kernels import softmax_backward
from workbench.kernels.checks import LARGEST, check_attention
from workbench.kernels.engines import unknown
from workbench.kernels.masks import Mask
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.statistics import Options, check_names, finish
from workbench.kernels.triton import tables
from workbench.kernels.triton.call import AT, ROWS, Call

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 256
MAX_TOP = 16
MAX_SINKS = 16
_ROWS = {"peak_key", "induction", *ROWS, *AT}
_POOLED = {"pooled_mean", "pooled_max"}
_COLUMNS = {"received", "received_mean", *_POOLED}
_NAMES = {"lse", "signed_mass", "row_sum", "top_keys", *_ROWS, *_COLUMNS}
_OPTIONS = ("tokens", "token_before", "sink_keys", "n_top", "block")


class TritonEngine:
    """Streams statistics by the Triton kernels."""

    name = "triton"

    def refusal(self, problem: SoftmaxProblem, names: Sequence[str], options: Options) -> str | None:
        """Why the kernels cannot make these here; None if they can. On a CPU they run for tests alone."""
        return "it runs on a GPU" if problem.device.type == "cpu" else refusal(problem, names, options)

    def raw(self, problem: SoftmaxProblem, names: Sequence[str], options: Options) -> dict[str, Tensor]:
        """The raw sums of one pass, in float32, and "lse" where the problem has none."""
        return raw(problem, names, options)


def refusal(problem: SoftmaxProblem, names: Sequence[str], options: Options | None = None) -> str | None:
    """Why the kernels cannot make these statistics of this problem, or None if they can."""
    options = options or Options()
    why = unknown(names, options, _NAMES, _OPTIONS)
    if why is not None:
        return why
    if "sink" in names and len(options.sink_keys or ()) > MAX_SINKS:
        return f"the kernels take up to {MAX_SINKS} sink keys, not {len(options.sink_keys or ())}"
    if "top_keys" in names and options.n_top > MAX_TOP:
        return f"the kernels keep up to {MAX_TOP} top keys, not {options.n_top}"
    if not _POOLED.isdisjoint(names) and options.block & (options.block - 1):
        return f"the kernels pool blocks whose edge is a power of two, not {options.block}"
    return _mask_refusal(problem.mask) or _input_refusal(problem.q, problem.k) or _machine_refusal(problem.device)


def _mask_refusal(mask: Mask) -> str | None:
    layout = mask.layout
    if mask.farthest > LARGEST:
        return "the kernels' positions have 31 bits"
    if layout is None:
        return None
    if not tables.is_said_by_words(layout) and tables.cells_of(mask) > tables.MOST_CELLS:
        return f"a table of all queries and keys, as {type(layout).__name__} of this length needs, would be too large"
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


def raw(problem: SoftmaxProblem, names: Sequence[str], options: Options) -> dict[str, Tensor]:
    """The raw sums of one pass, in float32; where the problem has no lse it is found, and is among them as "lse"."""
    call, lse = Call(problem), problem.lse
    found: dict[str, Tensor] = {}
    with call.on_device():
        if not _ROWS.isdisjoint(names):
            found |= call.rows([name for name in AT if name in names], options, induction="induction" in names)
        elif lse is None:
            found["lse"] = call.lse()
        if "peak_key" in names:
            found["peak_key"] = found["peak_key"].long()
        if lse is None:
            lse = found["lse"]
        else:
            found.pop("lse", None)
            lse = lse.to(torch.float32).contiguous()
        if not _COLUMNS.isdisjoint(names):
            found |= call.columns(lse, None if _POOLED.isdisjoint(names) else options.block)
        if "top_keys" in names:
            found |= call.top_keys(lse, options.n_top)
    return found


def statistics(problem: SoftmaxProblem, names: Sequence[str], options: Options | None = None) -> dict[str, Tensor]:
    """The named statistics by these kernels alone, as `workbench.kernels.streaming.statistics` gives them.

    Raises:
        CaptureError: an unknown statistic, or something that the kernels do not support.
    """
    options, names = options or Options(), check_names(names)
    why = refusal(problem, names, options)
    if why is not None:
        raise CaptureError(why, hint="use workbench.kernels.streaming, which supports every pattern")
    found = raw(problem, names, options)
    if problem.lse is not None:
        found["lse"] = problem.lse
    if "signed_mass" in names:
        found["signed_mass"] = torch.ones_like(found["lse"])
    if "row_sum" in names:
        in_sink = 0.0 if problem.sinks is None else (problem.sinks[:, None] - found["lse"]).exp()
        found["row_sum"] = torch.ones_like(found["lse"]) - in_sink
    return finish(found, names, problem.space(), options)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, scale: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention and its row statistics in one pass.

    Gradients of the output reach q, k and v, streamed tile by tile in plain torch (`softmax_backward`); the statistics
    have none.

    Args:
        q: [batch, head, query, d]; k: [batch, kv head, key, d]; v: [batch, kv head, key, width], all of one dtype.
        mask: causal, windowed or block-sparse rules, and a mask tensor.

    Returns:
        (output [batch, head, query, width] in the dtype of q, zero in rows that see no key; every row statistic).

    Raises:
        CaptureError: something the kernels do not support, or a mask's tensor that asks for gradients.
    """
    check_attention(q, k)
    mask = mask or Mask(q.shape[2], k.shape[2])
    problem = SoftmaxProblem(q.detach(), k.detach(), mask, q.shape[-1] ** -0.5 if scale is None else float(scale))
    why = refusal(problem, AT)
    fits = v.dim() == 4 and v.shape[:3] == k.shape[:3] and v.dtype == q.dtype and v.device == q.device
    if why is None and (not fits or v.shape[-1] > MAX_WIDTH):
        why = f"values {list(v.shape)} {v.dtype} do not fit keys {list(k.shape)} {k.dtype}"
    if why is None and torch.is_grad_enabled() and mask.tensor is not None and mask.tensor.requires_grad:
        why = "the mask's tensor would get no gradient"
    if why is not None:
        raise CaptureError(why, hint="use torch's scaled_dot_product_attention and workbench.kernels.streaming")
    found: dict[str, Tensor] = {}
    output: Tensor = _Attention.apply(q, k, v, problem, found)
    found["peak_key"] = found["peak_key"].long()
    return output, finish(found, tuple(found), problem.space(), Options())


class _Attention(torch.autograd.Function):
    """(q, k, v) -> output; the statistics go into a dict."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: SoftmaxProblem, found: dict[str, Tensor]) -> Tensor:
        call = Call(problem)
        with call.on_device():
            found |= call.rows(AT, Options(), v)
        output = found.pop("output")
        ctx.save_for_backward(q, k, v, output, found["lse"])
        ctx.problem = replace(problem, q=q[:0], k=k[:0])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        problem = replace(ctx.problem, q=q, k=k, lse=lse.clamp(min=-1e20))
        return *softmax_backward.backward(problem, v, output, d_out), None, None
