"""Our file format: safetensors for the numbers, JSON in its header for the rest, a digest over both. Never pickle."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from workbench.errors import FileError, FormatError
from workbench.storage import disk
from workbench.storage.parts import DEEPEST, Part, parse, too_deep

_VERSION = 2
_MOST_HEADER = 100_000_000  # bytes, as in safetensors' own reader
_MOST_AXES = 16
_LENGTH = 8  # bytes at the start of a file that say how long its header is
# safetensors' names of numbers, and ours.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write(path: str | Path, form: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a file; it appears under its name only when it is complete. The same content gives the same bytes.

    Args:
        form: what the file holds, such as "workbench.capture"; reading asks for it.
        header: JSON values.

    Raises:
        FileError: it cannot be written, or a tensor is of a kind that files cannot hold.
    """
    target = disk.writable(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.is_meta or tensor.layout != torch.strided:
            kind = "without data" if tensor.is_meta else f"of {tensor.dtype}, {tensor.layout}"
            raise FileError(f"{name} is a tensor {kind}, which a file cannot hold", shape=tensor.shape)
    named = {_plain(name): tensor.detach() for name, tensor in tensors.items()}
    text = json.dumps({"version": _VERSION, **header}, ensure_ascii=True, sort_keys=True)
    if too_deep(text):
        raise FileError(f"what the file should say is nested more than {DEEPEST} deep, which no reader takes")
    told = {"format": form, "header": text, "sha256": _digest(text, named)}
    return disk.write(target, _pieces(told, named))


def read(path: str | Path, form: str) -> tuple[Part, dict[str, Tensor]]:
    """The header and tensors of a file.

    Raises:
        FormatError: no such file, not of this form, truncated, changed since it was written, or of another version.
    """
    path = disk.readable(path)
    metadata, named = _opened(path)
    if metadata.get("format") != form:
        if own := re.fullmatch(r"workbench\.\w{1,60}", metadata.get("format", ""), re.ASCII):
            raise FormatError(
                f"{path.name} is not a {form} file, but a {own[0]} file", hint="load it with the class that saved it"
            )
        raise FormatError(f"{path.name} is not a {form} file", hint="it was not written by this package")
    text = metadata.get("header", "")
    if _digest(text, named) != metadata.get("sha256"):
        raise FormatError(f"{path.name} was changed after it was written", hint="its digest does not fit its content")
    header = parse(text, path.name)
    version = header["version"].integer()
    if version != _VERSION:
        raise FormatError(
            f"{path.name} has format version {version}, this package reads {_VERSION}",
            hint="update the package" if version > _VERSION else "capture again with this version",
        )
    return header, {_name(key, path): tensor for key, tensor in named.items()}


def _pieces(told: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a file, in an order that follows from the content: wide numbers first, so that all are aligned.

    safetensors' own writer orders its metadata by chance.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    listed: dict[str, Any] = {"__metadata__": dict(sorted(told.items()))}
    start = 0
    for name in order:
        stop = start + tensors[name].nbytes
        facts = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        listed[name] = facts | {"data_offsets": [start, stop]}
        start = stop
    text = json.dumps(listed, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % _LENGTH)
    yield len(text).to_bytes(_LENGTH, "little")
    yield text
    for name in order:
        yield _bytes(tensors[name])


@dataclass(frozen=True)
class _Span:
    """Where a tensor lies in a file, in bytes."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _opened(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a file says of itself, and its tensors: opened once, for another may have its name a moment later."""
    if not path.is_file():
        raise FormatError(f"{path} is a folder, and no file" if path.is_dir() else f"there is no file {path}")
    try:
        with open(path, "rb", opener=disk.plain) as file:
            metadata, spans = _told(file, path)
            return metadata, _tensors(file, spans)
    except (OSError, ValueError) as error:  # a ValueError where it is cut short at this moment
        raise FormatError(f"{path.name} cannot be read: {getattr(error, 'strerror', error)}") from None


def _told(file: BinaryIO, path: Path) -> tuple[dict[str, str], dict[str, _Span]]:
    """What a file says of itself and of its tensors, once that is seen to fit its size."""
    foreign = f"{path.name} is truncated or not a safetensors file"
    length = int.from_bytes(file.read(_LENGTH), "little")
    rest = os.fstat(file.fileno()).st_size - _LENGTH - length
    if length > _MOST_HEADER or rest < 0:
        raise FormatError(foreign)
    raw = file.read(length)
    listed = parse(raw, path.name).items()
    spans, begin = {}, _LENGTH + length
    for name, facts in listed.items():
        if name != "__metadata__":
            if set(facts.items()) != {"dtype", "shape", "data_offsets"}:
                raise FormatError(f"{foreign}: of {name!r} it says more than safetensors do")
            dtype = _DTYPES[facts["dtype"].one_of(_DTYPES)]
            shape = tuple(size.integer(0) for size in facts["shape"].list(_MOST_AXES))
            start, stop = (place.integer(0) for place in facts["data_offsets"].list(2, 2))
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise FormatError(f"{foreign}: {name!r} has a size that does not fit its shape")
            spans[name] = _Span(begin + start, begin + stop, dtype, shape)
    places = sorted((span.start, span.stop) for span in spans.values())
    ends = [begin, *(stop for _, stop in places)]
    if [start for start, _ in places] != ends[:-1] or ends[-1] != begin + rest:
        raise FormatError(f"{foreign}: its tensors do not fill it")
    said = listed.get("__metadata__")
    return {} if said is None else {k: v.text() for k, v in said.items().items()}, spans


def _tensors(file: BinaryIO, spans: Mapping[str, _Span]) -> dict[str, Tensor]:
    """The tensors of a file, which lie in it until they are used: each of its own storage.

    safetensors' own reader asks torch for a tensor in a way that loses a KeyboardInterrupt in between.
    """
    made: dict[str, Tensor] = {}
    whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, span in spans.items():
        n = span.stop - span.start
        bits = torch.frombuffer(whole, dtype=torch.uint8, count=n, offset=span.start) if n else torch.empty(0).byte()
        plain = bits.clone() if span.start % span.dtype.itemsize else bits  # of foreign writers
        made[name] = plain.view(span.dtype).view(span.shape)
    return made


def _plain(name: str) -> str:
    """A name in ASCII; modules may be called anything, also what is no valid Unicode."""
    plain = json.dumps(name, ensure_ascii=True)[1:-1]
    return plain if plain != "__metadata__" else "\\u005f_metadata__"  # safetensors' own word


def _name(plain: str, path: Path) -> str:
    return parse(f'"{plain}"', path.name).text()


def _bytes(tensor: Tensor) -> memoryview:
    whole = tensor.cpu().contiguous()
    if whole.is_conj() or whole.is_neg():
        whole = whole.resolve_conj().resolve_neg()
    return whole.flatten().view(torch.uint8).numpy().data if whole.numel() else memoryview(b"")


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}\n".encode())
        digest.update(_bytes(tensors[key]))
    return digest.hexdigest()
