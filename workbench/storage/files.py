"""Our file format: safetensors for the numbers, JSON in its header for the rest, a digest over both. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.errors import FormatError, WorkbenchError

_VERSION = 2


def write(path: str | Path, form: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a file; it appears under its name only when it is complete.

    Args:
        form: what the file holds, such as "workbench.capture"; reading asks for it.
        header: JSON values.

    Raises:
        WorkbenchError: its folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise WorkbenchError(f"there is no folder {path.parent}", hint="make the folder first")
    # Copies: safetensors refuses tensors that share memory, as a mask does that several sites hold.
    ready = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    text = json.dumps({"version": _VERSION, **header}, ensure_ascii=True, sort_keys=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file(ready, temporary, {"format": form, "header": text, "sha256": _digest(text, ready)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def read(path: str | Path, form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a file.

    Raises:
        FormatError: no such file, not of this form, truncated, changed since it was written, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != form:
                raise FormatError(f"{path.name} is not a {form} file", hint="it was not written by this package")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise FormatError(f"{path.name} is truncated or not a safetensors file: {error}") from None
    text = metadata.get("header", "")
    if _digest(text, tensors) != metadata.get("sha256"):
        raise FormatError(f"{path.name} was changed after it was written", hint="its digest does not fit its content")
    header: dict[str, Any] = json.loads(text)
    if header["version"] != _VERSION:
        raise FormatError(
            f"{path.name} has format version {header['version']}, this package reads {_VERSION}",
            hint="update the package" if header["version"] > _VERSION else "capture again with this version",
        )
    return header, tensors


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
