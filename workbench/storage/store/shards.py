"""Arrays in zarr's third format, written and read by the chunk.

Each row of an array (axis 0) is one file, a shard of zarr's `sharding_indexed` codec: its inner chunks are the heads of
the sites, each with its CRC32C, and an index at the end says where they lie. So a row is written in one step, a head is
read alone, and damage is found where it is. zarr, xarray and others read the arrays as they are; we write them
ourselves, since a row has hundreds of chunks, each of which takes zarr some 0.1 ms.

Source: zarr core specification 3.1; "sharding-indexed" and "crc32c" codecs 1.0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.errors import FormatError
from workbench.storage import disk
from workbench.storage.store.extra import need
from workbench.tokens import utf8

# torch's numbers, as zarr names them; those that zarr has no name for, as integers of their size.
_ZARR = {
    torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.complex64: "complex64",
    torch.int64: "int64", torch.int32: "int32", torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8",
    torch.uint16: "uint16", torch.uint32: "uint32", torch.uint64: "uint64", torch.bool: "bool",
    torch.bfloat16: "uint16", torch.float8_e4m3fn: "uint8", torch.float8_e5m2: "uint8",
}  # fmt: skip
_INTEGERS = {"uint16": torch.uint16, "uint8": torch.uint8}
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in _ZARR}
_CRC, _ENTRY = 4, 16  # bytes of a checksum, and of a chunk in the index
_PIECE, _PAGE = 1 << 19, 1 << 12  # bytes that are written at once, and those that the system keeps together
_LITTLE: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}


class Scratch:
    """Memory that rows are put together in, piece after piece: fresh memory would take longer than the copies."""

    def __init__(self) -> None:
        self._held = np.empty(0, np.uint8)

    def of(self, size: int) -> np.ndarray:
        """So many bytes, as they are."""
        if len(self._held) < size:
            self._held = np.empty(size, np.uint8)
        return self._held[:size]


@dataclass(frozen=True)
class Array:
    """One array of a store: of every row, the same shape.

    Attributes:
        name: of its folder. dtype: torch's name of its numbers.
        sites: how many sites are stacked in a row; 0: the row is one tensor that all sites share.
        shape: of a site's tensor. head_axis: which of its axes counts heads; None for none.
        dims: a name for each axis, of rows and sites too.
    """

    name: str
    dtype: str
    sites: int
    shape: tuple[int, ...]
    head_axis: int | None
    dims: tuple[str, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return _BY_NAME[self.dtype]

    @property
    def heads(self) -> int:
        return 1 if self.head_axis is None else self.shape[self.head_axis]

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk of one head, as an array of the site's axes."""
        return tuple(1 if axis == self.head_axis else n for axis, n in enumerate(self.shape))

    @property
    def empty(self) -> bool:
        """Whether there are no numbers in it, so that it stands in no file."""
        return 0 in self.shape

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.torch_dtype.itemsize

    @property
    def file_bytes(self) -> int:
        """Of a row: its chunks, their checksums, and the index with its own."""
        return max(1, self.sites) * self.heads * (self.chunk_bytes + _CRC + _ENTRY) + _CRC

    def file(self, folder: Path, row: int) -> Path:
        """The file of a row."""
        return folder / self.name / ".".join(["c", str(row), *["0"] * (len(self.dims) - 1)])

    def metadata(self, rows: int) -> dict[str, Any]:
        """zarr's description of the array with so many rows."""
        own = [self.sites] if self.sites else []
        whole, inner = [1, *own, *self.shape], [1, *([1] if own else []), *self.chunk]
        floating = self.torch_dtype.is_floating_point and _ZARR[self.torch_dtype].startswith("float")
        fill: Any = "NaN" if floating else [0.0, 0.0] if self.torch_dtype.is_complex else 0
        inner_codecs = {"chunk_shape": inner, "codecs": [_endian(self.torch_dtype), {"name": "crc32c"}],
                        "index_codecs": [_LITTLE, {"name": "crc32c"}], "index_location": "end"}  # fmt: skip
        attributes = {} if _ZARR[self.torch_dtype] == self.dtype else {"numbers": f"the bits of {self.dtype}"}
        return {
            "zarr_format": 3, "node_type": "array", "shape": [rows, *whole[1:]],
            "data_type": _ZARR[self.torch_dtype], "fill_value": False if self.torch_dtype == torch.bool else fill,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "sharding_indexed", "configuration": inner_codecs}],
            "attributes": attributes, "dimension_names": list(self.dims),
        }  # fmt: skip

    def encode(self, tensors: Sequence[Tensor], scratch: Scratch) -> Iterator[memoryview]:
        """The file of a row, of each site's tensor (or the one that all share), piece by piece, so that what is copied
        is still in the processor's cache when it is written. A piece lies in `scratch` until the next, and is of whole
        pages, so that none is written twice.
        """
        crc = need("google_crc32c", "a store").value
        n, size = max(1, self.sites) * self.heads, self.chunk_bytes
        part = scratch.of(_PIECE + size + _CRC + _PAGE)
        filled = 0
        for tensor in tensors:
            plain = _numbers(tensor, self.torch_dtype)
            for head in plain[None] if self.head_axis is None else np.moveaxis(plain, self.head_axis, 0):
                raw = part[filled : filled + size]
                np.ndarray(head.shape, plain.dtype, buffer=raw)[...] = head
                filled += size + _CRC
                part[filled - _CRC : filled] = np.frombuffer(crc(raw).to_bytes(_CRC, "little"), np.uint8)
                if filled >= _PIECE:
                    whole = filled - filled % _PAGE
                    yield part[:whole].data
                    part[: filled - whole] = part[whole:filled]
                    filled -= whole
        yield part[:filled].data
        index = np.empty((n, 2), "<u8")
        index[:, 0], index[:, 1] = np.arange(n, dtype="<u8") * (size + _CRC), size + _CRC
        told = index.tobytes()
        yield memoryview(told + crc(told).to_bytes(_CRC, "little"))

    def read(self, folder: Path, row: int, site: int, heads: Sequence[int] | None = None) -> Tensor:
        """A site's tensor of a row, or these heads of it, from no other bytes than theirs.

        Raises:
            FormatError: the file is gone or damaged; the place is named.
        """
        if self.empty:
            return torch.empty(self.shape, dtype=self.torch_dtype)
        path = self.file(folder, row)
        first = site * self.heads if self.sites else 0
        place = f"{folder.parent.name}/{folder.name}/{self.name}, row {row}"
        place += f", site {site}" if self.sites else ""
        try:
            with open(path, "rb", buffering=0, opener=disk.plain) as file:
                index = self._index(file.fileno(), place)
                whole = list(range(self.heads)) if heads is None else list(heads)
                chunks = [_chunk(file.fileno(), index[first + head], place, head, self.head_axis) for head in whole]
        except OSError as error:
            raise FormatError(f"{place} cannot be read: {error.strerror}", hint=_REST) from None
        if any(len(raw) != self.chunk_bytes for raw in chunks):
            raise FormatError(f"{place} has a chunk of another size", hint=_REST)
        shape = tuple(len(whole) if axis == self.head_axis else n for axis, n in enumerate(self.shape))
        made = torch.empty(shape, dtype=self.torch_dtype)
        for i, raw in enumerate(chunks):
            part = torch.frombuffer(bytearray(raw), dtype=self.torch_dtype).view(self.chunk)
            (made if self.head_axis is None else made.narrow(self.head_axis, i, 1)).copy_(part)
        return made

    def _index(self, descriptor: int, place: str) -> np.ndarray:
        n = max(1, self.sites) * self.heads
        size = _ENTRY * n + _CRC
        end = os.fstat(descriptor).st_size
        # Every chunk lies in the file by itself, so that nothing is ever larger in memory than what is on the disk.
        raw = os.pread(descriptor, size, end - size) if end >= self.file_bytes else b""
        if len(raw) != size or _wrong(raw):
            raise FormatError(f"the index of {place} is damaged", hint=_REST)
        return np.frombuffer(raw[:-_CRC], "<u8").reshape(n, 2)


_REST = "the other rows and sites can be read"


def _chunk(descriptor: int, entry: np.ndarray, place: str, head: int, head_axis: int | None) -> bytes:
    start, size = int(entry[0]), int(entry[1])
    raw = os.pread(descriptor, size, start) if size <= os.fstat(descriptor).st_size else b""
    if len(raw) != size or size < _CRC or _wrong(raw):
        which = "" if head_axis is None else f", head {head}"
        raise FormatError(f"{place}{which} is damaged: its checksum does not fit", hint=_REST)
    return raw[:-_CRC]


def _wrong(raw: bytes) -> bool:
    """Whether bytes do not end with their own checksum."""
    crc: int = need("google_crc32c", "a store").value(raw[:-_CRC])
    return crc != int.from_bytes(raw[-_CRC:], "little")


def can_hold(dtype: torch.dtype | str) -> bool:
    """Whether arrays can have such numbers."""
    return dtype in _BY_NAME if isinstance(dtype, str) else dtype in _ZARR


def _endian(dtype: torch.dtype) -> dict[str, Any]:
    return {"name": "bytes"} if dtype.itemsize == 1 else _LITTLE


def _numbers(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    plain = tensor.detach().cpu()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    name = _ZARR[dtype]
    if name != str(dtype).removeprefix("torch."):
        plain = plain.contiguous().view(_INTEGERS[name])
    found: np.ndarray = plain.numpy()
    return found.astype(found.dtype.newbyteorder("<"), copy=False)


def texts(names: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """The description and the one chunk of an array of texts along the axis "site"."""
    plain = [utf8(name).encode() for name in names]
    raw = len(plain).to_bytes(4, "little") + b"".join(len(one).to_bytes(4, "little") + one for one in plain)
    return {
        "zarr_format": 3, "node_type": "array", "shape": [len(names)], "data_type": "string", "fill_value": "",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, len(names))]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "vlen-utf8"}], "attributes": {}, "dimension_names": ["site"],
    }, raw  # fmt: skip


NUMBERED = 1024  # forwards to a chunk of their numbers


def numbers_of(rows: Sequence[int]) -> tuple[dict[str, Any], bytes, int]:
    """The description of the array "forward", its last chunk, and the number of that chunk."""
    last = max(0, len(rows) - 1) // NUMBERED
    chunk = np.zeros(NUMBERED, "<i8")
    tail = rows[last * NUMBERED :]
    chunk[: len(tail)] = tail
    return {
        "zarr_format": 3, "node_type": "array", "shape": [len(rows)], "data_type": "int64", "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [NUMBERED]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [_LITTLE], "attributes": {}, "dimension_names": ["forward"],
    }, chunk.tobytes(), last  # fmt: skip


def group(attributes: dict[str, Any] | None = None, members: dict[str, str] | None = None) -> bytes:
    """zarr's description of a group, with those of its members, as text by their paths, where they are told."""
    head = {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}
    if members is None:
        return json.dumps(head).encode()
    listed = ",".join(f"{json.dumps(name)}:{text}" for name, text in sorted(members.items()))
    told = f'"consolidated_metadata":{{"kind":"inline","must_understand":false,"metadata":{{{listed}}}}}'
    return f"{json.dumps(head)[:-1]},{told}}}".encode()
