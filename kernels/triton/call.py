"""The kernels on the tensors of one problem: what is allocated, passed and put together afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.kernels.checks import LARGEST
from workbench.kernels.masks import Mask
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.tile import Space
from workbench.kernels.triton import tables

if TYPE_CHECKING:
    from workbench.kernels.triton.configs import Kind

AT = ("sink", "current", "previous")
ROWS = (
    "entropy",
    "peak",
    "effective_keys",
    "distance",
    "distance_var",
)  # in the order in which rows_kernel writes them
POOL_EDGE = 32  # divides the edges of every tile of columns_kernel


@dataclass
class Call:
    """One call's tensors and the arguments that its kernels share."""

    q: Tensor
    k: Tensor
    mask: Mask
    scale: float
    space: Space

    @classmethod
    def of(cls, problem: SoftmaxProblem) -> Call:
        """The call for a problem."""
        return cls(problem.q, problem.k, problem.mask, problem.scale, problem.space())

    def __post_init__(self) -> None:
        self.q, self.k = _rows_contiguous(self.q), _rows_contiguous(self.k)
        self._tables: dict[tuple[int, int], tables.Tables] = {}

    def on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on torch's current device: make that the tensors' own."""
        return torch.cuda.device(self.q.device) if self.q.is_cuda else nullcontext()

    @property
    def sparse(self) -> bool:
        return self.mask.layout is not None

    def rows(self, at: Sequence[str], values: Tensor | None = None) -> dict[str, Tensor]:
        """lse and all row statistics, of `sink`, `current`, `previous` those named; `output` where values are given."""
        wanted = tables.targets(at, self.mask, self.space.seen, self.q.device)
        planes, keys, weights, output = self._rows(wanted, True, values)
        found = dict(zip(("lse", *ROWS), planes, strict=True)) | dict(zip(at, weights, strict=True))
        found["peak_key"] = keys.long()
        return found if output is None else found | {"output": output}

    def lse(self) -> Tensor:
        """[batch, head, query] log of the softmax denominator; -inf in rows that see no key."""
        return self._rows(torch.empty(0, 1, 1, dtype=torch.int32, device=self.q.device), False, None)[0][0]

    def _rows(self, wanted: Tensor, stats: bool, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(lse and the planes of ROWS, peak key, weight on the `wanted` keys, output)."""
        shape = self.q.shape[:3]
        planes = self._new(1 + len(ROWS) if stats else 1, *shape)
        keys, weights = self._new(*shape, dtype=torch.int32), self._new(len(wanted), *shape)
        v = self.k if v is None else _rows_contiguous(v)
        output = None if v is self.k else self._new(*shape, v.shape[-1], dtype=self.q.dtype)
        width = max(self.q.shape[-1], 1 if output is None else v.shape[-1])
        own = {
            "v_ptr": v,
            "out_ptr": planes if output is None else output,
            "stats_ptr": planes,
            "peak_key_ptr": keys,
            "target_ptr": wanted,
            "at_ptr": weights,
            "n_targets": len(wanted),
            "target_heads": wanted.shape[1],
            "DV": v.shape[-1],
            "STATS": stats,
            "OUT": output is not None,
            **_strides("v", v),
        }
        self._launch("rows", own, width)
        return planes, keys, weights, output

    def columns(self, lse: Tensor, block: int | None) -> dict[str, Tensor]:
        """`received` and, where a block edge is given, `pooled_sum` and `pooled_max`."""
        (n_batch, n_heads, n_queries, _), n_keys = self.q.shape, self.k.shape[2]
        received = self._new(n_batch, n_heads, n_keys)
        edge = min(block or POOL_EDGE, POOL_EDGE)  # larger blocks are put together from these
        cells = (n_batch, n_heads, -(-n_queries // edge), -(-n_keys // edge)) if block else (1,)
        sums, most = (torch.zeros(cells, device=self.q.device) for _ in range(2))
        own = {
            "lse_ptr": lse,
            "received_ptr": received,
            "sum_ptr": sums,
            "max_ptr": most,
            "EDGE": edge,
            "POOLED": block is not None,
        }
        self._launch("columns", own, self.q.shape[-1])
        if block is None:
            return {"received": received}
        sums, most = _gathered(sums, block // edge), _gathered(most, block // edge)
        return {"received": received, "pooled_sum": sums.sum((-1, -3)), "pooled_max": most.amax((-1, -3))}

    def top_keys(self, lse: Tensor, n_top: int) -> dict[str, Tensor]:
        """The heaviest keys of each row and their weights, heaviest first; of equal ones the first key."""
        n = min(n_top, self.k.shape[2])
        shape = (*self.q.shape[:3], n)
        weight, key = self._new(*shape), self._new(*shape, dtype=torch.int32)
        own = {"lse_ptr": lse, "weight_ptr": weight, "key_ptr": key, "n_top": n, "SLOTS": 16}
        self._launch("top", own, self.q.shape[-1])
        key, order = torch.where(key < 0, torch.iinfo(torch.int32).max, key).sort(dim=-1)
        weight, heaviest = weight.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return {"top_keys_index": key.gather(-1, heaviest).long(), "top_keys_weight": weight}

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def _launch(self, kind: Kind, own: dict[str, Any], width: int) -> None:
        """Run a kernel, tuned for tiles `width` wide, with its own arguments and those that all share."""
        from workbench.kernels.triton import configs
        from workbench.kernels.triton.columns import columns_kernel, top_kernel
        from workbench.kernels.triton.rows import rows_kernel

        by_key = kind == "columns"
        kernel = {"rows": rows_kernel, "columns": columns_kernel, "top": top_kernel}[kind]
        among = configs.tiles(kind, self.q.element_size() == 2, configs.padded(width), self.sparse)
        mask, (n_batch, n_heads, n_queries, d) = self.mask, self.q.shape
        n_keys = self.k.shape[2]
        shared = {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "n_queries": n_queries,
            "n_keys": n_keys,
            "offset": mask.offset,
            "window": min(mask.window or 0, LARGEST),
            "heads_per_kv": n_heads // self.k.shape[1],
            "scale": self.scale,
            "D": d,
            "BD": configs.padded(d),
            "CAUSAL": mask.causal,
            "WINDOW": mask.window is not None,
            "SPARSE": self.sparse,
            "PRECISION": "ieee",
            **_strides("q", self.q),
            **_strides("k", self.k),
            **self._layout(among[0], by_key),
        }
        if by_key:
            own["n_query_tiles"] = -(-n_queries // among[0][0])

        def grid(meta: dict[str, int]) -> tuple[int, int, int]:
            tiles = -(-n_keys // meta["BN"]) if by_key else -(-n_queries // meta["BM"])
            return tiles, n_heads, n_batch

        if kind == "rows":
            own["BDV"] = configs.padded(own["DV"])
        configs.tuned(kernel, among)[grid](**shared, **own)

    def _layout(self, tile: tuple[int, int, int, int], by_key: bool) -> dict[str, Any]:
        """The tables of the layout for tiles of this size, or stand-ins that no kernel reads."""
        n_key_tiles = -(-self.mask.n_keys // tile[1])
        if self.mask.layout is None:
            nothing = torch.zeros(1, dtype=torch.int32, device=self.q.device)
            return {
                "list_ptr": nothing,
                "count_ptr": nothing,
                "word_ptr": nothing,
                "heads_per_layout": 1,
                "layout_block": 16,
                "n_query_blocks": 1,
                "n_key_tiles": n_key_tiles,
            }
        size = tile[:2]
        if size not in self._tables:
            self._tables[size] = tables.Tables.of(self.mask, *size, self.q.device)
        made = self._tables[size]
        listed = (made.query_tiles, made.n_query_tiles) if by_key else (made.key_tiles, made.n_key_tiles)
        return {
            "list_ptr": listed[0],
            "count_ptr": listed[1],
            "word_ptr": made.words,
            "heads_per_layout": self.q.shape[1] // self.mask.layout.n_layouts,
            "layout_block": made.block,
            "n_query_blocks": made.words.shape[1],
            "n_key_tiles": n_key_tiles,
        }


def _rows_contiguous(x: Tensor) -> Tensor:
    """The tensor with neighbouring channels next to each other, as the kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}b": x.stride(0), f"stride_{name}h": x.stride(1), f"stride_{name}n": x.stride(2)}


def _gathered(cells: Tensor, each: int) -> Tensor:
    """[..., Q, K] to [..., Q / each, each, K / each, each], padded with zeros at the far edges."""
    padded = torch.nn.functional.pad(cells, (0, -cells.shape[-1] % each, 0, -cells.shape[-2] % each))
    return padded.unflatten(-1, (-1, each)).unflatten(-3, (-1, each))
