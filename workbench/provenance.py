"""Where a number comes from: versions, model, weights, kernel. Plain JSON values, carried by captures and reports."""

from __future__ import annotations

import hashlib
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

Provenance = dict[str, Any]
_ROTARY = re.compile(r"[Rr]otary|RoPE|Rope(?![a-z])")


def describe(model: nn.Module) -> Provenance:
    """What is known of a model and of the software that runs it, without reading its weights."""
    config = getattr(model, "config", None)
    parameters = list(model.parameters())
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "model_name": _name(getattr(config, "name_or_path", "")) or type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        "device": ", ".join(sorted({str(p.device) for p in parameters})),
        "attention_backend": getattr(config, "_attn_implementation", None) or "torch",
        "training": model.training,
        "rotary": any(_ROTARY.search(type(module).__name__) for module in model.modules()),
        "versions": versions(),
    }


def _name(name_or_path: str) -> str:
    """A hub name as it is; of a local folder only its own name, since pages are passed on."""
    return Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in ("attention-workbench", "torch", "transformers", "transformer-lens", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers, in order of their names.

    >>> weights_hash(nn.Identity())[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.device.type != "meta":
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def weights_version(model: nn.Module) -> int:
    """A number that grows whenever a weight is changed in place: tells cheaply whether the hash still holds."""
    return sum(0 if p.is_inference() else p._version for p in (*model.parameters(), *model.buffers()))
