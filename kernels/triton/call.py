"""The kernels on the tensors of one problem: what is allocated, passed and put together afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.kernels.checks import LARGEST
from workbench.kernels.masks import hidden_below
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.statistics import Options
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


class Call:
    """One call's tensors and the arguments that its kernels share."""

    def __init__(self, problem: SoftmaxProblem) -> None:
        self.problem, self.mask = problem, problem.mask
        self.q, self.k = _rows_contiguous(problem.q), _rows_contiguous(problem.k)
        self._scores = self._score_arguments()

    def on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on torch's current device: make that the tensors' own."""
        return torch.cuda.device(self.q.device) if self.q.is_cuda else nullcontext()

    @property
    def sparse(self) -> bool:
        """Whether the kernels visit the tiles of a layout."""
        return self.mask.layout is not None and tables.has_words(self.mask.layout)

    @property
    def shaped(self) -> bool:
        return any(self._scores[name] for name in ("MASK", "BIAS", "SOFTCAP"))

    def rows(self, at: Sequence[str], options: Options, values: Tensor | None = None, *, induction: bool = False
             ) -> dict[str, Tensor]:  # fmt: skip
        """lse and all row statistics, of `sink`, `current`, `previous` those named; `output` where values are given.

        Args:
            induction: it too, of the ids that the options give.
        """
        known, named = self.problem.seen.derived, ("triton targets", *at, options.sink_keys)
        if named not in known:
            known[named] = tables.targets(at, options.sink_keys, self.mask, self.problem.seen, self.q.device)
        wanted = known[named]
        ids = options.ids(*self._sizes, self.mask.offset).to(self.q.device).contiguous() if induction else None
        planes, keys, weights, output = self._rows(wanted, True, values, ids)
        found = dict(zip(("lse", *ROWS, "induction"), planes, strict=False))
        found |= {name: weights[part].sum(0) if len(part) > 1 else weights[part[0]]
                  for name, part in tables.parts(at, options.sink_keys, self.mask.n_keys).items()}  # fmt: skip
        found["peak_key"] = keys
        return found if output is None else found | {"output": output}

    def lse(self) -> Tensor:
        """[batch, head, query] log of the softmax denominator; -inf in rows that see no key."""
        nothing = self._new(0, 1, 1, 1, dtype=torch.int32)
        return self._rows(nothing, False, None, None)[0][0]

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """(batch, queries, keys)."""
        return self.q.shape[0], self.q.shape[2], self.k.shape[2]

    def _rows(
        self, wanted: Tensor, stats: bool, v: Tensor | None, ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(lse and the planes of ROWS, peak key, weight on the `wanted` keys, output)."""
        shape = self.q.shape[:3]
        planes = self._new((1 if not stats else 1 + len(ROWS)) + (ids is not None), *shape)
        keys, weights = self._new(*shape, dtype=torch.int32), self._new(len(wanted), *shape)
        v = self.k if v is None else _rows_contiguous(v)
        output = None if v is self.k else self._new(*shape, v.shape[-1], dtype=self.q.dtype)
        width = max(self.q.shape[-1], 1 if output is None else v.shape[-1])
        sinks = self.problem.sinks
        own = {
            "v_ptr": v,
            "out_ptr": planes if output is None else output,
            "stats_ptr": planes,
            "peak_key_ptr": keys,
            "target_ptr": wanted,
            "at_ptr": weights,
            "sink_ptr": planes if sinks is None else sinks.contiguous(),
            "id_ptr": keys if ids is None else ids,
            "n_targets": len(wanted),
            "target_batches": wanted.shape[1],
            "target_heads": wanted.shape[2],
            "DV": v.shape[-1],
            "SINKS": sinks is not None,
            "STATS": stats,
            "INDUCTION": ids is not None,
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
        sums, most = torch.zeros((2, *cells), device=self.q.device) if block else self._new(2, *cells)
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
        among = configs.tiles(kind, self.q.element_size() == 2, configs.padded(width), self.sparse, self.shaped)
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
            "scale": self.problem.scale,
            "D": d,
            "BD": configs.padded(d),
            "CAUSAL": mask.causal,
            "WINDOW": mask.window is not None,
            "SPARSE": self.sparse,
            "PRECISION": precision(self.q),
            **self._scores,
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

    def _score_arguments(self) -> dict[str, Any]:
        """What changes and hides scores. What is not there is a stand-in that no kernel reads."""
        problem, mask = self.problem, self._mask_tensor()
        found: dict[str, Any] = {
            "mask_ptr": self.q, "bias_ptr": self.q, "hidden_below": 0.0, "softcap": problem.softcap or 1.0,
            "stride_mb": 0, "stride_mh": 0, "stride_mn": 0, "stride_mk": 0, "stride_bb": 0, "stride_bh": 0,
            "MASK": 0, "BIAS": 0,
            "SOFTCAP": 2 if problem.of_magnitudes else int(problem.softcap is not None),
        }  # fmt: skip
        if mask is not None:
            whole = mask.expand(*problem.shape)  # what is broadcast has strides of zero
            found |= zip(("stride_mb", "stride_mh", "stride_mn", "stride_mk"), whole.stride(), strict=True)
            additive = mask.is_floating_point()
            found["mask_ptr"] = whole if additive else whole.view(torch.uint8)
            found["MASK"] = 2 if additive else 1
            found["hidden_below"] = hidden_below(mask.dtype) if additive else 0.0
        biases = problem.fades if problem.key_bias is None else problem.key_bias.float()
        if biases is not None:
            biases = _rows_contiguous(biases).expand(*problem.shape[:2], -1)
            found |= {"bias_ptr": biases, "stride_bb": biases.stride(0), "stride_bh": biases.stride(1)}
            found["BIAS"] = 2 if problem.key_bias is None else 1
        return found

    def _mask_tensor(self) -> Tensor | None:
        """The mask's own, and what a layout hides within its blocks."""
        layout, tensor = self.mask.layout, self.mask.tensor
        if layout is None or tables.is_said_by_words(layout):
            return tensor
        known = self.problem.seen.derived
        if "tokens of the layout" not in known:
            known["tokens of the layout"] = tables.tokens_of(self.mask, self.q.device)
        shown: Tensor = known["tokens of the layout"]
        if tensor is None:
            return shown
        return torch.where(shown, tensor, -torch.inf) if self.mask.additive else shown & tensor

    def _layout(self, tile: tuple[int, int, int, int], by_key: bool) -> dict[str, Any]:
        """The tables of the layout for tiles of this size, or stand-ins that no kernel reads."""
        n_key_tiles = -(-self.mask.n_keys // tile[1])
        if self.mask.layout is None or not self.sparse:
            nothing = self._new(1, dtype=torch.int32)
            return {
                "list_ptr": nothing,
                "count_ptr": nothing,
                "word_ptr": nothing,
                "heads_per_layout": 1,
                "layout_block": 16,
                "n_query_blocks": 1,
                "n_key_tiles": n_key_tiles,
            }
        size = ("triton tables", *tile[:2])
        known = self.problem.seen.derived
        if size not in known:
            known[size] = tables.Tables.of(self.mask, *tile[:2], self.q.device)
        made = known[size]
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


def precision(q: Tensor) -> str:
    """How products of float32 are made: "ieee", exact, or "tf32" after `torch.set_float32_matmul_precision("high")`.

    TF32 keeps 11 bits of queries and keys: a score is off by 2⁻¹⁰ · scale · Σ|q·k| at most, and a weight by a factor of
    e to twice the most of its row. Products of 16 bits are exact either way: all are added up in float32.
    """
    allowed = q.is_cuda and q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def _rows_contiguous(x: Tensor) -> Tensor:
    """The tensor with neighbouring channels next to each other, as the kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}b": x.stride(0), f"stride_{name}h": x.stride(1), f"stride_{name}n": x.stride(2)}


def _gathered(cells: Tensor, each: int) -> Tensor:
    """[..., Q, K] to [..., Q / each, each, K / each, each], padded with zeros at the far edges."""
    padded = torch.nn.functional.pad(cells, (0, -cells.shape[-1] % each, 0, -cells.shape[-2] % each))
    return padded.unflatten(-1, (-1, each)).unflatten(-3, (-1, each))
