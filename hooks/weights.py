"""A model's weights as they are, however they are kept: offloaded, quantized, or in a tensor of several parts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from workbench.errors import CaptureError
from workbench.hooks.configs import read

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class AsTheyWere:
    """What tells later, at no cost, whether tensors have changed: each one's dtype, device, place and writes to it.

    They have where one was written to, or another took its place. One that is only on another device now has not. What
    is written through `.data` PyTorch counts nowhere.

    >>> layer = nn.Linear(2, 2)
    >>> then = AsTheyWere.of(layer.parameters())
    >>> then.have_changed(layer.parameters()), then.have_changed(layer.bfloat16().parameters())
    (False, True)
    """

    told: tuple[tuple[torch.dtype, torch.device, int, int], ...]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> AsTheyWere:
        """Of the tensors as they are now."""
        return cls(tuple((t.dtype, t.device, _place(t), 0 if t.is_inference() else t._version) for t in tensors))

    def have_changed(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the tensors are others now."""
        now = AsTheyWere.of(tensors).told
        return len(now) != len(self.told) or any(map(_differs, self.told, now))


def _place(tensor: Tensor) -> int:
    """Where its numbers lie; 0 where it has no place of its own, as what is offloaded or of several parts."""
    return 0 if tensor.is_meta or is_traceable_wrapper_subclass(tensor) else tensor.data_ptr()


def _differs(a: tuple[torch.dtype, torch.device, int, int], b: tuple[torch.dtype, torch.device, int, int]) -> bool:
    moved = a[2] != b[2] and a[2] != 0 and b[2] != 0 and a[1] == b[1]
    return a[0] != b[0] or a[3] != b[3] or moved


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; there is none unless their module is loaded."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def sources(module: nn.Module) -> list[Tensor]:
    """What the weight of a linear module is made of: itself, or what is parametrized, normed or pruned to give it."""
    if isinstance(module.weight, nn.Parameter):
        return [module.weight]
    named = (*module.named_parameters(), *module.named_buffers())
    found = [tensor for name, tensor in named if name.split(".")[-1] != "bias"]
    return found or [tensor for tensor in (module.weight,) if isinstance(tensor, Tensor)]


def stored(model: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
    """The tensor of that name with its numbers; None if they are nowhere.

    An offloaded weight is on the "meta" device until its module runs. Whoever brings it then keeps it in the
    `weights_map` of a hook, on the module itself or on one that holds it, as `accelerate` does.
    """
    if tensor.device.type != "meta":
        return tensor
    parts = name.split(".")
    for at in reversed(range(len(parts))):
        hook = read(model.get_submodule(".".join(parts[:at])), "_hf_hook")
        for each in (hook, *read(hook, "hooks", ())):
            weights = read(each, "weights_map")
            try:
                found = None if weights is None else weights[".".join(parts[at:])]
            except KeyError:
                continue
            if isinstance(found, Tensor) and found.device.type != "meta":
                return found
    return None


def described(value: Any) -> Iterator[tuple[str, Tensor | None]]:
    """What a value of a state dict consists of: texts, each with the plain tensor that it describes, or with None.

    >>> [text for text, _ in described(torch.zeros(2, 3))]
    ['torch.float32 [2, 3]']
    """
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from described(one)
    elif not isinstance(value, Tensor):
        yield _ADDRESS.sub("", repr(value)), None
    elif is_traceable_wrapper_subclass(value):
        names, settings = value.__tensor_flatten__()
        yield _ADDRESS.sub("", f"{type(value).__name__} {value.dtype} {list(value.shape)} {settings}"), None
        for name in names:
            for text, tensor in described(getattr(value, name)):
                yield f"{name} {text}", tensor
    elif value.is_quantized:
        per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        yield f"{value.dtype} {list(value.shape)} {value.qscheme()}", value.int_repr()
        if per_channel:
            yield "scales", value.q_per_channel_scales()
            yield "zero points", value.q_per_channel_zero_points()
        else:
            yield f"{value.q_scale()!r} {value.q_zero_point()}", None
    else:
        yield f"{value.dtype} {list(value.shape)}", value.detach()


def kinds(model: nn.Module) -> list[str]:
    """In what kinds of numbers a model's weights are kept, in the order of their names: "int8 for float32", "float32".

    Of tensors of several parts, as quantized ones are, it is the kind of their narrowest part, with the kind that they
    stand for; where a tensor tells of a kind that PyTorch does not store ("int4", "nf4"), it is that. Numbers that
    layers pack into buffers of up to 32 bits (GPTQ) count as the parameters that they take the place of; positions,
    which have 64, and masks do not.

    >>> kinds(nn.Linear(2, 2))
    ['float32']
    """
    found = {_kind(parameter) for parameter in model.parameters()}
    found |= {_kind(buffer) for buffer in model.buffers() if buffer.dim() > 1 and buffer.dtype in _PACKED}
    for module in model.modules():  # PyTorch's own quantized layers keep theirs in no parameter
        weight = getattr(module, "weight", None) if not list(module.parameters(recurse=False)) else None
        try:
            given = weight() if callable(weight) else weight
        except (RuntimeError, TypeError):
            continue
        found |= {_kind(given)} if isinstance(given, Tensor) and given.is_quantized else set()
    return sorted(found)


_PACKED = {torch.int8, torch.uint8, torch.int16, torch.int32}


def _kind(tensor: Tensor) -> str:
    own = _named(tensor.dtype)
    parts: list[Tensor] = []
    if is_traceable_wrapper_subclass(tensor):
        parts = [part for _, part in described(tensor) if part is not None]
    least = min(parts, key=lambda part: part.element_size(), default=tensor)
    packed = read(tensor, "quant_state")  # of weights packed in blocks, as bitsandbytes has them
    if isinstance(read(packed, "dtype"), torch.dtype):
        return f"{read(packed, 'quant_type') or own} for {_named(packed.dtype)}"
    kept = read(tensor, "target_dtype")  # the numbers are of this kind, in whatever they are stored
    kept = kept if isinstance(kept, torch.dtype) else least.dtype
    return own if kept == tensor.dtype else f"{_named(kept)} for {own}"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear module as a plain floating-point matrix, without gradients; a view where it can be one.

    Of a linear layer that keeps no such matrix (numbers packed into bytes) it is what its own code multiplies by.

    Raises:
        CaptureError: it is not there, or has no floating-point form.
    """
    given: Any = module.weight
    hint = "is it quantized? load the model in floating point"
    weight = given.detach() if isinstance(given, Tensor) else given
    if isinstance(weight, Tensor) and weight.device.type == "meta":
        found = stored(module, "weight", weight)
        if found is None:
            raise CaptureError(
                f"the weight of {type(module).__name__} is offloaded, and who offloaded it does not tell where to",
                shape=weight.shape,
                hint="compute results with the model in memory",
            )
        weight = found.detach()
    if is_distributed(weight):
        weight = _columns_here(module, weight)
    if is_traceable_wrapper_subclass(weight) or (isinstance(weight, Tensor) and weight.is_quantized):
        hint = f"a {type(weight).__name__} cannot be turned into one; load the model in floating point"
        convert = getattr(weight, "dequantize", None)
        try:
            weight = None if convert is None else convert()
        except (NotImplementedError, RuntimeError, TypeError):
            weight = None
        if is_traceable_wrapper_subclass(weight):  # such as a shard of a larger tensor
            weight = None
    elif isinstance(weight, Tensor) and isinstance(module, nn.Linear) and not weight.is_floating_point():
        weight = _multiplied(module)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise CaptureError(
            f"the weight of {type(module).__name__} is no matrix of floating-point numbers",
            shape=getattr(given, "shape", None),
            hint=hint,
        )
    return weight


_LINEAR_TO = 0.05  # layers that round what enters them to 8 bits are off by a percent
_PROBED = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def _multiplied(module: nn.Linear) -> Tensor | None:
    """[out, in] what a linear layer multiplies by, as it does to each unit vector; None if it is no linear function."""
    n, bias = module.in_features, module.bias
    for dtype in _PROBED:
        generator = torch.Generator().manual_seed(0)
        rows = torch.cat([torch.eye(n), torch.zeros(1, n), torch.randn(1, n, generator=generator)])
        rows = rows.to(module.weight.device, dtype)
        try:
            given = module.forward(rows)
        except (RuntimeError, TypeError, ValueError):  # it computes in another dtype
            continue
        if given.shape != (n + 2, module.out_features) or not given.is_floating_point():
            return None
        given = given.float() if bias is None else given.float() - bias.float()
        columns, nothing, both = given[:n], given[n], given[n + 1]
        off = (rows[n + 1].float() @ columns - both).norm()
        return columns.T if float(nothing.norm() + off) <= _LINEAR_TO * float(both.norm()) else None
    return None


def _columns_here(module: nn.Module, weight: Any) -> Tensor:
    """Of a weight that is cut over processes along its inputs, this process's part: the columns of its own heads."""
    of_inputs = 1 if isinstance(module, nn.Linear) else 0
    cut = {place.dim % weight.dim() for place in weight.placements if place.is_shard()}
    if not cut <= {of_inputs} or any(place.is_partial() for place in weight.placements):
        raise CaptureError(
            f"the weight of {type(module).__name__} is cut over processes across its outputs",
            shape=tuple(weight.shape),
            hint="with FSDP, call unshard() on the model first, and reshard() after it; if the model runs in between, "
            "fully_shard(…, reshard_after_forward=False)",
        )
    part: Tensor = weight.to_local().detach()
    return part
