"""Softmax attention over listed blocks of keys, by the C++ library: nothing is gathered, joined or padded."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from workbench.kernels.checks import LARGEST
from workbench.kernels.native.build import library
from workbench.kernels.native.threads import gomp_parallel

_AT_ONCE = 1 << 36  # products in one call of the library, a few seconds: only between calls can it be interrupted

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_FIELDS: list[tuple[str, type]] = [
    ("q", _P), ("k", _P), ("v", _P),
    *((f"{name}_{axis}", _I) for name in ("q", "k", "v") for axis in ("batch", "head", "row")),
    *((name, _I) for name in ("batch", "heads", "kv_heads", "n_queries", "n_keys", "d", "width")), ("scale", _F),
    *((name, _I) for name in ("causal", "offset", "block", "n_layouts", "n_rows")), ("list_of", _P), ("listed", _P),
    *((name, _I) for name in ("threads", "first_task", "last_task")), ("out", _P), ("lse", _P),
]  # fmt: skip


class _Job(ctypes.Structure):
    """The C++ struct `blocks::Job`, field by field."""

    _fields_ = _FIELDS


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Which blocks of keys each row of blocks of queries sees, as a whole but for the causal edge.

    Attributes:
        block: tokens in a block. n_layouts: as in `Layout`.
        list_of: [layout, row + 1] int64, where the list of a row begins. listed: [...] int32 blocks of keys.
        offset: position of query 0; row 0 is the one that it lies in.
        causal: whether no key after a query is seen.
    """

    block: int
    n_layouts: int
    list_of: Tensor
    listed: Tensor
    offset: int
    causal: bool

    @classmethod
    def of(cls, seen: Tensor, block: int, offset: int, causal: bool) -> BlockLists:
        """The lists of seen [layout, row, block of keys] bool."""
        ends = seen.sum(-1).flatten().cumsum(0).view(seen.shape[:2])
        before = torch.cat((ends.new_zeros(1), ends[:-1, -1]))
        listed = seen.nonzero()[:, 2].int().contiguous()
        return cls(block, len(seen), torch.cat((before[:, None], ends), 1).contiguous(), listed, offset, causal)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> tuple[Tensor, Tensor] | None:
    """Output [batch, head, query, width] and log-sum-exp [batch, head, query]; None where the library cannot do it.

    It computes in float32 on the CPU.

    Args:
        q: [batch, head, query, d]; k: [batch, kv head, key, d]; v: [batch, kv head, key, width].
    """
    alike = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (q, k, v))
    if not alike or k.shape[2] > LARGEST or (lib := library()) is None:
        return None
    _check_struct(lib)
    job, held = _Job(), []
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        held.append(tensor if tensor.stride(-1) == 1 else tensor.contiguous())
        setattr(job, name, held[-1].data_ptr())
        for axis, stride in zip(("batch", "head", "row"), held[-1].stride(), strict=False):
            setattr(job, f"{name}_{axis}", stride)
    job.batch, job.heads, job.n_queries, job.d = q.shape
    job.kv_heads, job.n_keys, job.width = k.shape[1], k.shape[2], v.shape[3]
    job.scale, job.threads = scale, torch.get_num_threads()
    job.causal, job.offset, job.block, job.n_layouts = lists.causal, lists.offset, lists.block, lists.n_layouts
    job.n_rows = lists.list_of.shape[1] - 1
    job.list_of, job.listed = lists.list_of.data_ptr(), lists.listed.data_ptr()
    out = q.new_empty(job.batch, job.n_queries, job.heads, job.width)  # as SDPA gives it
    lse = q.new_empty(job.batch, job.heads, job.n_queries)
    job.out, job.lse = out.data_ptr(), lse.data_ptr()
    tasks = job.batch * job.heads * job.n_rows
    mean = len(lists.listed) / max(1, lists.n_layouts * job.n_rows) * lists.block**2 * (job.d + job.width)
    step = max(job.threads, int(_AT_ONCE / max(1.0, mean)))
    for first in range(0, tasks, step):
        job.first_task, job.last_task = first, min(first + step, tasks)
        if lib.workbench_blocks(ctypes.byref(job), gomp_parallel()):
            raise MemoryError("attention over blocks ran out of memory")
    return out.transpose(1, 2), lse


@cache
def _check_struct(lib: ctypes.CDLL) -> None:
    lib.workbench_blocks_bytes.restype = ctypes.c_int64
    if lib.workbench_blocks_bytes() != ctypes.sizeof(_Job):
        raise AssertionError("the C++ struct and its description here have come apart")
