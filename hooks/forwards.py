"""Where a forward of a model begins: its entries, the hook on them, its inputs, and methods that call its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks import cut_weights, multihead
from workbench.hooks.configs import read

_TORCH = str(Path(torch.__file__).parent)


class InputsHook:
    """A hook that a module carries. In a copy of the module, or a pickle, it does nothing."""

    def __init__(self, tell: Sequence[Callable[..., None]] = ()) -> None:
        self._tell = tell

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for tell in self._tell:
            tell(module, args, kwargs)

    def __reduce__(self) -> tuple[type[InputsHook], tuple[()]]:
        return type(self), ()


def calling_method(frame: FrameType | None, module: nn.Module, names: Mapping[nn.Module, str]) -> FrameType | None:
    """The frame of the method of one of the model's modules that calls `module`, a part of it.

    Of several methods of the same that call each other it is the outermost.
    """
    found: tuple[nn.Module, FrameType] | None = None
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_TORCH):  # whose frames call modules of the model, or decorate methods
            owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if found is not None and owner is not found[0]:
                break
            if isinstance(owner, nn.Module) and owner in names:
                if owner is module or not names[module].startswith(f"{names[owner]}.".lstrip(".")):
                    break
                found = owner, frame
        frame = frame.f_back
    return None if found is None else found[1]


def entries_of(model: Any) -> list[nn.Module]:
    """The model, and the encoder that Hugging Face's `generate` calls by itself; none that minds a hook."""
    entries = [model]
    if read(read(model, "config"), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        entries.append(model.get_encoder())
    modules = [each for each in dict.fromkeys(entries) if isinstance(each, nn.Module)]
    # PyTorch's own attention modules change their path when they carry a hook.
    return [each for each in modules if not isinstance(each, multihead.MODULES)]


def examples_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many examples the model is given: the length of its first tensor."""
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
    return None if first is None else first.shape[0]


def check_plain(output: Tensor, site: str) -> None:
    """Raise if a tensor stands for others: in a transform of torch.func, in several processes, or nested."""
    if torch._C._functorch.is_functorch_wrapped_tensor(output):
        raise CaptureError(
            "the model runs inside a transform of torch.func, as vmap, grad and jacrev are; its tensors stand for "
            "others and cannot be read",
            site=site,
            hint="observe the plain forward: a batch in place of vmap, loss.backward() in place of grad; "
            "or close the `with` before the transform",
        )
    if output.is_nested:
        raise CaptureError(
            "its examples have lengths of their own (a nested tensor), and cannot be read as one",
            site=site,
            hint="pad them to one length, or run them one by one",
        )
    if cut_weights.here(output) is not output:
        raise CaptureError(
            "its heads are tensors of several processes (DTensor), of which this one cannot read its part alone",
            site=site,
            hint="let the projections give local tensors: use_local_output=True in the plan of the parallel model",
        )
