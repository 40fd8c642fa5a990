"""Captures as files: safetensors for the numbers, JSON in its header for the rest, a digest over both. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.capture import Capture, Forward, SiteCapture
from workbench.errors import CaptureError, FormatError
from workbench.hooks.sites import Site, Sites
from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern

_FORMAT, _VERSION = "workbench.capture", 1
_PATTERN = "pattern."


def write_capture(capture: Capture, path: str | Path, *, pattern: bool = False) -> Path:
    """Write a capture; with `pattern`, also the queries, keys, lse and mask of each site.

    The file appears under its name only when it is complete.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise CaptureError(f"there is no folder {path.parent}", hint="make the folder first")
    tensors: dict[str, Tensor] = {}
    forwards = []
    for call in capture.calls:
        forward = call._only()
        entries = []
        for name, site in forward.sites.items():
            entry, parts = _pack(site, pattern)
            entries.append(entry)
            tensors |= {f"{forward.index}/{name}/{key}": tensor for key, tensor in parts.items()}
        tensors |= {f"{forward.index}//ids.{stream}": ids for stream, ids in forward.ids.items()}
        forwards.append({"index": forward.index, "sites": entries, "tokens": forward.tokens})
    header = {
        "version": _VERSION,
        "provenance": capture.provenance,
        "model_sites": [asdict(site) for site in capture.model_sites],
        "forwards": forwards,
    }
    tensors = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    text = json.dumps(header, ensure_ascii=True, sort_keys=True)
    metadata = {"format": _FORMAT, "header": text, "sha256": _digest(text, tensors)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def read_capture(path: str | Path) -> Capture:
    """Read a capture file; anything that is not exactly what was written is a FormatError."""
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise FormatError(f"{path.name} is not a capture", hint="load files written by Capture.save")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise FormatError(f"{path.name} is truncated or not a safetensors file: {error}") from None
    text = metadata.get("header", "")
    if _digest(text, tensors) != metadata.get("sha256"):
        raise FormatError(f"{path.name} was changed after it was written", hint="its digest does not fit its content")
    header = json.loads(text)
    if header["version"] > _VERSION:
        raise FormatError(
            f"{path.name} has format version {header['version']}, this package reads {_VERSION}",
            hint="update the package",
        )
    forwards = []
    for entry in header["forwards"]:
        forward = Forward(entry["index"], tokens=entry["tokens"])
        start = f"{forward.index}/"
        forward.ids = {
            key.removeprefix(f"{start}/ids."): t for key, t in tensors.items() if key.startswith(f"{start}/ids.")
        }
        for site in entry["sites"]:
            name = site["site"]["name"]
            parts = {
                key.removeprefix(f"{start}{name}/"): t
                for key, t in tensors.items()
                if key.startswith(f"{start}{name}/")
            }
            forward.sites[name] = _unpack(site, parts)
        forwards.append(forward)
    return Capture(forwards, Sites(Site(**site) for site in header["model_sites"]), header["provenance"])


def _pack(capture: SiteCapture, with_pattern: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    entry: dict[str, Any] = {"site": asdict(capture.site), "shape": list(capture.shape), "kernel": capture.kernel}
    parts = dict(capture.statistics)
    if capture.z is not None:
        parts["_z"] = capture.z
    if capture.weights is not None:
        parts["_weights"] = capture.weights
    if with_pattern:
        lazy = capture.pattern
        if isinstance(lazy, SoftmaxPattern):
            mask = lazy.mask
            entry["pattern"] = {
                "scale": lazy.scale, "softcap": lazy.softcap, "n_queries": mask.n_queries, "n_keys": mask.n_keys,
                "causal": mask.causal, "offset": mask.offset, "window": mask.window,
            }  # fmt: skip
            held = {"q": lazy.q, "k": lazy.k, "lse": lazy.lse, "values": lazy.values, "mask": mask.tensor,
                    "sinks": lazy.sinks, "key_bias": lazy.key_bias}  # fmt: skip
            parts |= {_PATTERN + name: tensor for name, tensor in held.items() if tensor is not None}
    return entry, parts


def _unpack(entry: dict[str, Any], parts: dict[str, Tensor]) -> SiteCapture:
    lazy = None
    if "pattern" in entry:
        facts = dict(entry["pattern"])
        held = {name.removeprefix(_PATTERN): parts.pop(name) for name in list(parts) if name.startswith(_PATTERN)}
        scale, softcap = facts.pop("scale"), facts.pop("softcap")
        mask = Mask(**facts, tensor=held.pop("mask", None))
        lazy = SoftmaxPattern(held.pop("q"), held.pop("k"), mask, scale=scale, softcap=softcap, **held)
    return SiteCapture(
        site=Site(**entry["site"]),
        shape=tuple(entry["shape"]),
        kernel=entry["kernel"],
        z=parts.pop("_z", None),
        weights=parts.pop("_weights", None),
        statistics=parts,
        lazy=lazy,
    )


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
