"""How a forward lies in a store: sites whose tensors are alike are stacked, and forwards of one shape are rows.

runs/a.zarr/workbench.json       what the store is of: model, settings, versions
            forwards.jsonl       the journal: a line for each finished forward
            shape-0/facts.json   the sites of forwards of this shape, and which arrays they have
            shape-0/self/entropy    zarr: [forward, site, batch, head, query]
            shape-0/tokens/input    zarr: [forward, batch, position] ids
            tables/heads, tables/tokens    parquet
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from workbench.capture.site_capture import KEPT, PATTERN, Forward, SiteCapture, pack
from workbench.errors import FileError
from workbench.kernels.gradients import GRADIENT_SUMS
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED
from workbench.storage.store.shards import Array, can_hold

FORM, VERSION = "workbench.store", 1
TOKENS = "tokens"
DYNAMIC = ("times", "state")  # of a site's facts, what differs from forward to forward
_OF_AXES = {"query": ("query",), "key": ("key",), "query top": ("query", "top"), "": (),
            "block": ("query_block", "key_block")}  # fmt: skip
_OF_PARTS = {
    "_z": ("batch", "query", "head", "width"), "_z_gradient": ("batch", "query", "head", "width"),
    "_before": ("batch", "query", "head", "width"), "_entering": ("batch", "query", "head", "entering"),
    "_result": ("batch", "query", "head", "d_model"), "_weights": ("batch", "head", "query", "key"),
    "q": ("batch", "head", "query", "d_head"), "k": ("batch", "kv_head", "key", "d_head"),
    "lse": ("batch", "head", "query"), "values": ("batch", "kv_head", "key", "value_width"),
    "weights": ("batch", "head", "query", "key"),
}  # fmt: skip
_QUERIES_FIRST = frozenset(KEPT) - {"_weights"}


@dataclass(frozen=True)
class Family:
    """Sites of one kind whose tensors have the same names, types and shapes.

    Attributes:
        name: of its folder. sites: their names, in the order in which they are stacked.
        entries: the facts of each, as `pack` gives them. arrays: by the names that `pack` gives their parts.
    """

    name: str
    sites: tuple[str, ...]
    entries: tuple[dict[str, Any], ...]
    arrays: dict[str, Array]

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return {"name": self.name, "entries": self.entries, "arrays": {k: asdict(a) for k, a in self.arrays.items()}}


@dataclass(frozen=True)
class Packed:
    """A forward, taken apart.

    Attributes:
        key: the same for forwards that can be rows of the same arrays. families, ids: its arrays.
        tensors: by family, or `TOKENS`, and part: the tensor of each site, or the one that all share.
        dynamic: by site, what is its own of this forward.
    """

    key: str
    families: tuple[Family, ...]
    ids: dict[str, Array]
    tensors: dict[tuple[str, str], list[Tensor]]
    dynamic: dict[str, dict[str, Any]]

    def facts(self) -> dict[str, Any]:
        """JSON values, from which a reader knows how to read the rows."""
        ids = {name: asdict(array) for name, array in self.ids.items()}
        return {"families": [family.facts() for family in self.families], "ids": ids}


def json_text(value: Any) -> str:
    """JSON in ASCII, in the order of the values."""
    return json.dumps(value, ensure_ascii=True)


def take_apart(forward: Forward) -> Packed:
    """What is to be written of a forward.

    Raises:
        CaptureError: the model has overwritten a mask. FileError: numbers of a kind that no array holds.
    """
    alike: dict[str, list[tuple[SiteCapture, dict[str, Any], dict[str, Tensor]]]] = {}
    dynamic = {}
    for name, capture in forward.sites.items():
        entry, parts = pack(capture, pattern=capture.lazy is not None)
        dynamic[name] = {key: entry.pop(key) for key in DYNAMIC if key in entry}
        told = [[key, str(tensor.dtype), list(tensor.shape)] for key, tensor in parts.items()]
        signature = json.dumps([capture.site.tower, capture.site.kind, list(capture.shape), sorted(told)])
        alike.setdefault(signature, []).append((capture, entry, parts))
    families: list[Family] = []
    tensors: dict[tuple[str, str], list[Tensor]] = {}
    for several in alike.values():
        name = _family_name(several[0][0], {family.name for family in families})
        arrays = {}
        for part in several[0][2]:
            held = [parts[part] for _, _, parts in several]
            shared = len(held) > 1 and len({_memory(tensor) for tensor in held}) == 1
            arrays[part] = _array(part, several[0][0], held[0], 0 if shared else len(held))
            tensors[name, part] = held[:1] if shared else held
        families.append(
            Family(name, tuple(c.site.name for c, _, _ in several), tuple(e for _, e, _ in several), _named(arrays))
        )
    ids = {
        stream: _plain_array(stream, tensor, ("forward", f"{stream}_batch", f"{stream}_position"))
        for stream, tensor in forward.ids.items()
    }
    tensors |= {(TOKENS, stream): [tensor] for stream, tensor in forward.ids.items()}
    key = json.dumps([[family.facts() for family in families], {name: asdict(array) for name, array in ids.items()}])
    return Packed(key, tuple(families), ids, tensors, dynamic)


def _family_name(capture: SiteCapture, taken: set[str]) -> str:
    parts = [part for part in (capture.site.tower, capture.site.kind) if part]
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(parts)).strip("-") or "sites"
    plain = f"{plain}-sites" if plain == TOKENS else plain
    name, n = plain, 1
    while name in taken:
        n += 1
        name = f"{plain}-{n}"
    return name


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What is the same for tensors that are the same memory; never that of another one while both are held."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else (id(tensor),)


def _array(part: str, capture: SiteCapture, tensor: Tensor, sites: int) -> Array:
    _check(part, tensor, capture.site.name)
    base = part.removeprefix(VALUE_WEIGHTED)
    outputs = {out: each.axes for each in STATISTICS.values() for out in each.outputs}
    plain = part.removeprefix(PATTERN).removeprefix(PATTERN)
    axes: str | None = GRADIENT_SUMS[base].axes if base in GRADIENT_SUMS else outputs.get(base)
    if axes is not None and not part.startswith(("_", PATTERN)):
        names: tuple[str, ...] = ("batch", "head", *_OF_AXES[axes])
    else:
        names = _OF_PARTS.get(part if part.startswith("_") else plain, ())
    shape = tuple(tensor.shape)
    if len(names) != len(shape):
        names = tuple(f"{plain}_{axis}" for axis in range(len(shape)))
    head_axis = 2 if part in _QUERIES_FIRST else 1
    heads = shape[head_axis] if len(shape) > head_axis else 0
    known = (capture.shape[1], capture.lazy.n_kv_heads if capture.lazy is not None else 0)
    own = ("forward", *(("site",) if sites else ()), *names)
    return Array(plain, _dtype(tensor), sites, shape, head_axis if heads > 1 and heads in known else None, own)


def _named(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays with names of folders, and with names of axes that mean one length each."""
    lengths: dict[str, int] = {}
    made: dict[str, Array] = {}
    taken: set[str] = set()
    for part, array in arrays.items():
        offset = len(array.dims) - len(array.shape)
        dims = list(array.dims)
        for axis, length in enumerate(array.shape):
            if lengths.setdefault(dims[offset + axis], length) != length:
                dims[offset + axis] = f"{array.name.strip('_')}_{axis}"
                lengths.setdefault(dims[offset + axis], length)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", array.name.lstrip("_.")) or "part"
        if part.startswith(PATTERN) and name in arrays:
            name = f"pattern.{name}"
        while name in taken or name in ("site", "forward"):
            name += "_"
        taken.add(name)
        made[part] = Array(name, array.dtype, array.sites, array.shape, array.head_axis, tuple(dims))
    return made


def _plain_array(name: str, tensor: Tensor, dims: tuple[str, ...]) -> Array:
    _check(name, tensor, "")
    return Array(name, _dtype(tensor), 0, tuple(tensor.shape), None, dims)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check(part: str, tensor: Tensor, site: str) -> None:
    if not can_hold(tensor.dtype):
        raise FileError(f"{part} is a tensor of {tensor.dtype}, which no store holds", site=site, shape=tensor.shape)
