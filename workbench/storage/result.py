"""What an analysis returns: numbers that stay as they are, a table, where they come from, and a file form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from workbench.errors import FormatError, WorkbenchError
from workbench.storage import files, typed
from workbench.storage.parts import Part
from workbench.storage.rendering import renderer
from workbench.tokens import utf8

if TYPE_CHECKING:
    import pandas as pd

_TAGS = ("tuple", "tensor", "array", "items")


class Result(ABC):
    """Base of the analyses' results. A subclass is a frozen dataclass with a field `provenance`.

    Fields may be numbers, text, None, tensors, NumPy arrays, and tuples, lists and dicts of these; `save` and `load`
    keep them all, to the bit. Of text, halves of characters (lone surrogates) become their numbers, such as \\ud800.

    Attributes:
        form: name of the file form, such as "workbench.head_importance".
        filled: axes and fields that must hold something. Files that do not fit the annotations, in which
            `storage.typed` reads what lies along what, are refused.
        file_keys: what fields are called in files, where that is not their name. former: what older files have besides,
            and are read without.
        provenance: JSON values: model, data, metric, seeds, versions.
    """

    form: ClassVar[str]
    filled: ClassVar[tuple[str, ...]] = ()
    file_keys: ClassVar[dict[str, str]] = {}
    former: ClassVar[tuple[str, ...]] = ()
    provenance: Any

    @property
    @abstractmethod
    def table(self) -> pd.DataFrame:
        """The numbers, tidy: one row per thing measured."""

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file.

        Raises:
            FileError: the file cannot be written. WorkbenchError: a field cannot be kept.
        """
        tensors: dict[str, torch.Tensor] = {}
        names = {field.name: self.file_keys.get(field.name, field.name) for field in fields(self)}  # type: ignore[arg-type]
        header = {"fields": {key: _take_apart(getattr(self, name), key, tensors) for name, key in names.items()}}
        return files.write(path, self.form, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FormatError: not such a file, truncated, or changed after it was written.
        """
        header, tensors = files.read(path, cls.form)
        names = {cls.file_keys.get(field.name, field.name): field.name for field in fields(cls)}  # type: ignore[arg-type]
        parts = {key: part for key, part in header["fields"].items().items() if key not in cls.former}
        if set(parts) != set(names):
            odd = ", ".join(sorted(set(parts) ^ set(names)))
            raise FormatError(f"{Path(path).name} does not fit this version: {odd}", hint="run the analysis again")
        held = {names[key]: _put_together(part, tensors) for key, part in parts.items()}
        typed.check(cls, held, Path(path).name)
        try:
            found = cls(**held)
            found.check_parts()
            return found
        except WorkbenchError as error:
            raise FormatError(f"{Path(path).name} holds what does not fit together: {error.message}") from None

    def check_parts(self) -> None:
        """Raise a WorkbenchError if the parts, read from a file, do not fit each other in ways no annotation tells."""
        return

    def view(self) -> Any:
        """The main view of this result, whose picture `to_png` makes; `workbench.views.all_of` gives all of them."""
        return renderer().of(self)

    def show(self) -> None:
        """Display the views in a notebook, below each other."""
        for view in renderer().all_of(self):
            view.show()

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """The views as one self-contained page: its text, or its path when one is given."""
        return renderer().page_of(self, path)

    def to_png(self, path: str | Path | None = None) -> bytes | Path:
        """The view as a picture: its bytes, or its path when one is given."""
        png: bytes | Path = self.view().to_png(path)
        return png

    def _ipython_display_(self) -> None:
        self.show()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = self.view()._repr_mimebundle_(include, exclude)
        return bundle


def _take_apart(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a field; its numbers in bulk go into `tensors`."""
    if isinstance(value, str):
        return utf8(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(np.ascontiguousarray(value))
        return {"array": name}
    if isinstance(value, (tuple, list)):
        parts = [_take_apart(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        pairs = [
            [_take_apart(key, f"{name}/{i}/key", tensors), _take_apart(item, f"{name}/{i}", tensors)]
            for i, (key, item) in enumerate(value.items())
        ]
        return {"items": pairs}
    if isinstance(value, np.generic):
        return value.item()
    raise WorkbenchError(f"{name} is a {type(value).__name__}, which a result cannot keep in a file")


def _put_together(part: Part, tensors: dict[str, torch.Tensor]) -> Any:
    """The value that `_take_apart` took apart."""
    if isinstance(part.value, list):
        return [_put_together(item, tensors) for item in part.list()]
    if isinstance(part.value, str) and utf8(part.value) != part.value:
        raise part.wrong("text of whole characters")
    if not isinstance(part.value, dict):
        return part.value
    if len(part.value) != 1:
        raise part.wrong(f"an object with one of {', '.join(_TAGS)}")
    ((tag, inner),) = part.items().items()
    if tag == "tuple":
        return tuple(_put_together(item, tensors) for item in inner.list())
    if tag == "items":
        pairs = [pair.list(2, 2) for pair in inner.list()]
        try:
            return {_put_together(key, tensors): _put_together(item, tensors) for key, item in pairs}
        except TypeError:  # a key that cannot be one, such as a list
            raise inner.wrong("pairs of keys and values") from None
    if tag not in _TAGS:
        raise FormatError(f"{part.place} has the unknown form {tag!r}")
    tensor = tensors[inner.one_of(tensors)]
    if tag == "tensor":
        return tensor
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16, say
        raise inner.wrong("an array that NumPy knows") from None
