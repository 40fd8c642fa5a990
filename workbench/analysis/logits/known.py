"""The parts of a stream as they were found last, for as long as nothing of the model has changed.

They are found by value in a forward of its own, which takes as long as a short prompt. What they depend on is compared
each time: weights, modules with their settings and hooks, the inputs' names, autocast. Code that is replaced elsewhere
shows in none of these, so that known parts have to add up to the stream again where they are used.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.logits.writers import Writers, find_writers
from workbench.inputs import device_for_inputs, shortened
from workbench.session.workbench import Workbench

_PLAIN = (bool, int, float, complex, str, bytes, type, torch.dtype, torch.device)
_DEEPEST = 4  # of objects in objects, such as parts of a config
_known: weakref.WeakKeyDictionary[Workbench, tuple[Any, Writers]] = weakref.WeakKeyDictionary()


def known_writers(wb: Workbench, batch: Mapping[str, Any], *, anew: bool = False) -> tuple[Writers, bool]:
    """All that writes to the stream that the logits are read from, and whether it was known.

    Args:
        batch: model inputs. anew: find it again in any case.

    Raises:
        AttachError: as `find_writers` does.
    """
    state = _state_of(wb, batch)
    before = _known.get(wb)
    if before is not None and state is not None and before[0] == state and not anew:
        return before[1], True
    found = find_writers(wb, shortened(batch))
    if state is not None:
        _known[wb] = state, found
    return found, False


def _state_of(wb: Workbench, batch: Mapping[str, Any]) -> Any:
    """What is the same only where the model and the form of its inputs are; None where that cannot be told soon."""
    model, seen = wb.model, dict[int, tuple[Any, Any]]()
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        return None
    weights = wb.weights_hash()
    device = device_for_inputs(model).type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    inputs = [(name, (value.dtype, value.dim()) if isinstance(value, Tensor) else _told(value, seen))
              for name, value in batch.items()]  # fmt: skip
    modules = [(name, weakref.ref(module), _of_module(module, seen)) for name, module in model.named_modules()]
    return None if weights is None else (weights, autocast, inputs, modules)


def _of_module(module: nn.Module, seen: dict[int, tuple[Any, Any]]) -> Any:
    """Its settings and hooks; not its weights and parts, which are told of by themselves."""
    own = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}
    return type(module), _told(own, seen)


def _told(value: Any, seen: dict[int, tuple[Any, Any]], depth: int = 0) -> Any:
    """What can be compared later of a value: itself where it cannot change, what it holds, or which object it is.

    Args:
        seen: by id, what was told of objects already; with the objects, so that no other takes their place meanwhile.
    """
    if value is None or isinstance(value, _PLAIN):
        return type(value), value
    if id(value) in seen:
        return seen[id(value)][1]
    told: tuple[Any, ...] = (type(value), id(value))
    seen[id(value)] = value, told  # for objects that hold themselves
    if isinstance(value, Tensor):
        told = (*told, tuple(value.shape), None if value.is_inference() else value._version)
    elif isinstance(value, nn.Module):
        told = (type(value), weakref.ref(value))
    elif depth < _DEEPEST and isinstance(value, Mapping):
        held = [(_told(key, seen, depth + 1), _told(one, seen, depth + 1)) for key, one in value.items()]
        told = (type(value), held)
    elif depth < _DEEPEST and isinstance(value, (list, tuple, set, frozenset)):
        told = (type(value), [_told(one, seen, depth + 1) for one in value])
    elif depth < _DEEPEST and isinstance(getattr(value, "__dict__", None), dict):
        told = (*told, _told(dict(vars(value)), seen, depth + 1))
    seen[id(value)] = value, told
    return told
