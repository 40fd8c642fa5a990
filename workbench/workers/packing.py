"""What is sent to workers: a model with its tokenizer, and functions that refer to it without holding it once more.

Ray sends by pickle, between processes of one user; no file is read or written so. A function's references to the model,
its modules and parameters are names, which a worker looks up in its own.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench.errors import WorkbenchError
from workbench.session.attaching import attach
from workbench.session.workbench import Workbench

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Surroundings:
    """What torch computes by besides its inputs: as here, there too.

    Attributes:
        autocast: by device type, the dtype that products run in. grad, inference: the modes.
        matmul: precision of float32 products. deterministic: whether only such algorithms are used.
    """

    dtype: torch.dtype
    autocast: Mapping[str, torch.dtype]
    grad: bool
    inference: bool
    matmul: str
    deterministic: bool

    @classmethod
    def here(cls) -> Surroundings:
        """Those of this thread."""
        on = {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
        return cls(
            torch.get_default_dtype(), on, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    @contextmanager
    def there(self) -> Iterator[None]:
        """Inside, they hold in this thread."""
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul)
        torch.use_deterministic_algorithms(self.deterministic)
        with ExitStack() as stack:
            for device, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(device, dtype))
            if self.inference:
                stack.enter_context(torch.inference_mode())
            else:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            yield


def packed(value: Any, known: Mapping[int, str] | None = None) -> bytes:
    """A value as bytes; functions of a notebook go with it, what is `known` by its id is named.

    Raises:
        WorkbenchError: it, or something in it, cannot be pickled.
    """
    from ray import cloudpickle

    names = known or {}

    class Packer(cloudpickle.Pickler):
        def persistent_id(self, one: Any) -> str | None:
            return names.get(id(one))

        def reducer_override(self, one: Any) -> Any:
            if isinstance(one, Tensor) and one.is_cuda:
                kind = nn.Parameter if isinstance(one, nn.Parameter) else None
                return _arrived, (one.detach().cpu(), kind is not None, one.requires_grad)
            return super().reducer_override(one)

    buffer = io.BytesIO()
    try:
        Packer(buffer).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise WorkbenchError(
            f"what was given cannot be sent to workers: {str(error).splitlines()[0][:300]}",
            hint="metrics, edits and batches are pickled: none may hold an open file, a lock, a generator or a "
            'connection; or run it here, with engine="local"',
        ) from error
    return buffer.getvalue()


def unpacked(found: bytes, known: Mapping[str, Any] | None = None) -> Any:
    """What was packed, with what is known here in the place of names."""
    names = known or {}

    class Unpacker(pickle.Unpickler):
        def persistent_load(self, name: str) -> Any:
            return names[name]

    return Unpacker(io.BytesIO(found)).load()


def _arrived(tensor: Tensor, parameter: bool, requires_grad: bool) -> Tensor:
    """A tensor of a GPU, on the one that this process has been given."""
    there = tensor.to("cuda")
    return nn.Parameter(there, requires_grad) if parameter else there.requires_grad_(requires_grad)


def names_of(wb: Workbench | None) -> dict[str, Any]:
    """What functions may refer to, by name: workbench, model, tokenizer, modules, parameters and buffers."""
    if wb is None:
        return {}
    found: dict[str, Any] = {"workbench": wb}
    for kind, several in (
        ("module", wb.model.named_modules()),
        ("parameter", wb.model.named_parameters()),
        ("buffer", wb.model.named_buffers()),
    ):
        found |= {f"{kind} {name}": one for name, one in several}
    if wb.tokenizer is not None:
        found["tokenizer"] = wb.tokenizer
    return found


def packed_job(job: Any, wb: Workbench | None) -> bytes:
    """A function with the surroundings that it is called in, the model left out."""
    return packed((Surroundings.here(), job), {id(one): name for name, one in names_of(wb).items()})


def packed_model(wb: Workbench, load: Callable[[], Any] | None) -> bytes:
    """What a worker attaches to: model and tokenizer, or how to load them, with the weights that they must have.

    Raises:
        WorkbenchError: the model cannot be pickled.
    """
    settings = {"check": bool(len(wb.sites)), "layout": wb.stated_layout}
    if load is None:
        return packed(((wb.model, wb.tokenizer), None, "", settings))
    return packed((None, load, wb.weights_identity(), settings))


def attached(found: bytes) -> Workbench:
    """A workbench on the model that was sent, or that is loaded here.

    Raises:
        WorkbenchError: a model that is loaded has other weights than the one it stands for.
    """
    given, load, weights, settings = unpacked(found)
    if load is not None:
        given = load()
    model, tokenizer = given if isinstance(given, tuple) else (given, None)
    _keep_hooks_apart(model)
    wb = attach(model, tokenizer, **settings)
    if load is not None and wb.weights_identity() != weights:
        raise WorkbenchError(
            f"load= gave a {type(model).__name__} with other weights than the model that is attached",
            hint="load the same checkpoint in the same dtype, or leave load= out and the model itself is sent",
        )
    return wb


def _keep_hooks_apart(model: nn.Module) -> None:
    """New hooks are numbered behind those that a model has brought from another process, which they would replace."""
    held = [
        number
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
        for number in hooks
    ]
    RemovableHandle.next_id = max([RemovableHandle.next_id, *(number + 1 for number in held)])
