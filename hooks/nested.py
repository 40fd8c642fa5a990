"""What models and modules give: tensors inside tuples, lists, mappings, dataclasses and Hugging Face's outputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from workbench.errors import CaptureError


def items_of(value: Any) -> dict[Any, Any] | None:
    """The things inside a nested value by key, index or field; None for a tensor and for what holds nothing.

    >>> items_of((1, [2]))
    {0: 1, 1: [2]}
    """
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    return None


def rebuilt(old: Any, items: Mapping[Any, Any]) -> Any:
    """A value like `old` with these items in place of its own; a mapping may have fewer.

    >>> rebuilt((1, [2]), {0: 3, 1: 4})
    (3, 4)
    """
    if isinstance(old, Mapping):
        if type(old) is dict:
            return dict(items)
        if dataclasses.is_dataclass(old):  # an output of Hugging Face's is made from its fields
            return type(old)(**items)
        made: Any = copy.copy(old)
        for key in [key for key in made if key not in items]:
            del made[key]
        for key, item in items.items():
            made[key] = item
        return made
    if isinstance(old, (tuple, list)):
        return type(old)(*items.values()) if hasattr(old, "_fields") else type(old)(items.values())
    made = copy.copy(old)
    for name, item in items.items():
        object.__setattr__(made, name, item)  # also where it is frozen
    return made


def walk(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nested value, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    for item in (items_of(value) or {}).values():
        yield from walk(item)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nested value, in order.

    >>> import torch
    >>> len(tensors({"logits": torch.zeros(2), "layers": (torch.zeros(1), None)}))
    2
    """
    return list(walk(value))


def tensors_within(value: Any) -> list[Tensor]:
    """Every tensor in a nested value, also in the attributes of plain objects (caches, results of a class of the
    model's own), in order, each object once.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> len(tensors_within(SimpleNamespace(h=torch.zeros(2), rest=[SimpleNamespace(c=torch.zeros(1))])))
    2
    """
    found: list[Tensor] = []
    seen: set[int] = set()

    def look(one: Any) -> None:
        if isinstance(one, Tensor):
            found.append(one)
            return
        if id(one) in seen or isinstance(one, (str, bytes, type, nn.Module)) or callable(one):
            return
        seen.add(id(one))
        items = items_of(one)
        for item in (getattr(one, "__dict__", {}) if items is None else items).values():
            look(item)

    look(value)
    return found


def fresh(value: Any) -> Any:
    """The inputs for one run of a model: tensors as they are, containers with what they hold and caches copied, so that
    a run that writes into one does not change the caller's.

    Raises:
        CaptureError: an object that holds tensors cannot be copied.
    """
    if isinstance(value, Tensor) or not tensors_within(value):
        return value
    if isinstance(value, (Mapping, tuple, list)):
        return rebuilt(value, {key: _copied(item) for key, item in (items_of(value) or {}).items()})
    return _copied(value)


def _copied(value: Any, within: bool = False) -> Any:
    """One input; of a container, which may be a model's state, the tensors in it too."""
    if isinstance(value, Tensor):
        return value.clone() if within else value
    if not tensors_within(value):
        return value
    if isinstance(value, (Mapping, tuple, list)):
        return rebuilt(value, {key: _copied(item, True) for key, item in (items_of(value) or {}).items()})
    # What a cache holds may be part of a graph, which a deep copy refuses.
    known = {id(tensor): tensor.detach().clone() for tensor in tensors_within(value)}
    try:
        return copy.deepcopy(value, known)
    except Exception as error:
        raise CaptureError(
            f"a {type(value).__name__} among the inputs cannot be copied, and the runs would change it: {error}",
            hint="verify without it",
        ) from error


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same nested value with `function` of each of its tensors.

    >>> import torch
    >>> map_tensors(lambda t: t + 1, {"logits": [torch.zeros(1)]})
    {'logits': [tensor([1.])]}
    """
    if isinstance(value, Tensor):
        return function(value)
    items = items_of(value)
    return value if items is None else rebuilt(value, {key: map_tensors(function, item) for key, item in items.items()})


def first_tensor(value: Any) -> tuple[Tensor, Callable[[Tensor], Any]] | None:
    """A module's output as a tensor, or the first thing in it if that is one, and what puts another in its place.

    None if the output does not begin with a tensor.
    """
    if isinstance(value, Tensor):
        return value, lambda new: new
    items = items_of(value)
    if not items:
        return None
    key, first = next(iter(items.items()))
    if not isinstance(first, Tensor):
        return None
    return first, lambda new: rebuilt(value, {**items, key: new})
