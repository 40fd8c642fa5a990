"""The hash of a model's weights: what tells whether two numbers come from the same model, and at which moment."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from workbench.hooks.weights import AsTheyWere, described, is_distributed, stored

_latest: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str | None]] = weakref.WeakKeyDictionary()
_staying: weakref.WeakKeyDictionary[nn.Module, list[tuple[int, str | None]]] = weakref.WeakKeyDictionary()

_SUMS = 4093  # a prime, so that numbers a row of a weight apart, a power of two or so, are not in one sum


def weights_hash(model: nn.Module) -> str | None:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers, in order of their names.

    Offloaded weights are read from where they are kept; None if one cannot be read (`weights_note` says which). Tensors
    of several parts, as quantized ones are, count with all their parts, and a sharded one with the shard of this rank.
    Where adapters (LoRA and its like) are there, it is also over which of them act.

    >>> weights_hash(nn.Identity())[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256(_switches(model).encode("utf-8", "surrogatepass"))
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            value = stored(model, name, value)
            if value is None:
                return None
        for text, tensor in described(value):
            digest.update(f"{name} {text}\n".encode("utf-8", "surrogatepass"))
            if tensor is not None and tensor.numel():
                flat = tensor.cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


_SWITCHES = ("active_adapter", "_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def _switches(model: nn.Module) -> str:
    """Which adapters of a model act, and how strongly; "" where there are none. All of them are weights of the model
    also while they do nothing. Source: peft's `BaseTunerLayer` and `PeftModel`.
    """
    told = []
    for name, module in model.named_modules():
        held = vars(module)
        if "active_adapter" in held or "_active_adapter" in held:
            told.append(f"{name}: {[held.get(key) for key in _SWITCHES]}, {'forward' in held}\n")  # a prompt's way out
    return "".join(told)


def weights_note(model: nn.Module) -> str | None:
    """What is to be said of the hash of a model's weights: why there is none, or what it leaves out; else None."""
    if not any(is_distributed(t) or t.is_meta for t in (*model.parameters(), *model.buffers())):
        return None  # soon, since every capture asks
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    lost = [name for name, value in state.items() if stored(model, name, value) is None]
    if lost:
        return f"no hash: {len(lost)} weights are offloaded to where they cannot be read, the first is {lost[0]}"
    if any(map(is_distributed, state.values())):
        return "the hash is that of this rank's shards"
    return None


def weights_fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """What differs where weights differ, in a small part of the time of the hash: versions, places and sums of bytes.

    Changes that do not count as in place for autograd, such as those of `weight.data`, show in the sums. Those of
    offloaded weights show in neither.
    """
    parts = [part for t in (*model.parameters(), *model.buffers()) for _, part in described(t)]
    tensors = [t for t in parts if t is not None and t.device.type != "meta"]
    places, sums = tuple(t.data_ptr() for t in tensors), tuple(_sums_of_bytes(t) for t in tensors)
    return weights_version(model), _switches(model), places, sums


def _sums_of_bytes(tensor: torch.Tensor) -> bytes:
    """A hash over sums of all bytes, eight at a time as one integer, and over the bytes themselves of small tensors.

    Every 4093rd integer goes into one sum. In a single one, changed signs and exchanged numbers would cancel.
    """
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.storage_offset() % 8:  # a part of a larger tensor, which cannot be read as such integers where it lies
        flat = flat.clone()
    rows = max(0, len(flat) - 1) // (8 * _SUMS)  # something is always left, so that no change of all numbers cancels
    digest, summed = hashlib.sha256(), flat[: 8 * rows * _SUMS]
    if rows:
        digest.update(summed.view(torch.int64).view(rows, _SUMS).sum(0).cpu().numpy().data)
    # A copy: what NumPy has seen cannot be resized any more, as FSDP resizes the weights that it has gathered.
    digest.update(flat[len(summed) :].cpu().clone().numpy().data)
    return digest.digest()


def weights_version(model: nn.Module) -> int:
    """A number that grows whenever a weight is changed in place: tells cheaply whether the hash still holds."""
    return sum(0 if p.is_inference() else p._version for p in (*model.parameters(), *model.buffers()))


def weights_now(model: nn.Module) -> AsTheyWere:
    """What tells later whether the weights have changed."""
    return AsTheyWere.of((*model.parameters(), *model.buffers()))


def latest_hash(model: nn.Module) -> str | None:
    """The hash of the weights as they are, computed anew only where they have changed."""
    if any(p.device.type == "meta" for p in model.parameters()):  # nothing tells whether these have changed
        return weights_hash(model)
    staying = _staying.get(model)
    if staying and staying[-1][0] == weights_version(model):
        return staying[-1][1]
    now = weights_fingerprint(model)
    known = _latest.get(model)
    if known is None or known[0] != now:
        known = _latest[model] = (now, weights_hash(model))
    if staying is not None:
        staying.append((now[0], known[1]))
    return known[1]


@contextmanager
def weights_stay(model: nn.Module) -> Iterator[None]:
    """Inside, the weights change in no way that their versions do not count, so that their sums are taken once.

    For one piece of work that asks for the hash several times; who opens it inside of another opens nothing.
    """
    if model in _staying:
        yield
        return
    _staying[model] = []
    try:
        yield
    finally:
        _staying.pop(model, None)


class WeightsThen:
    """The weights of a model at one moment. The model is not kept alive for them."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._then, self._switched = weakref.ref(model), weights_now(model), _switches(model)

    def facts(self) -> dict[str, str | None]:
        """Their hash, for a provenance; None, with the reason, if they are there no more."""
        model = self._model()
        if model is None:
            lost = "the model was gone before it was asked for: read cap.provenance, or save, while the model is there"
        elif self._switched != _switches(model) or self._then.have_changed((*model.parameters(), *model.buffers())):
            lost = "the weights have changed since the capture began"
        else:
            return {"weights_sha256": latest_hash(model)}
        return {"weights_sha256": None, "weights_note": f"no hash: {lost}"}
