"""What is selected: one small object that all views of a notebook or of a page share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import traitlets

from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Selection:
    """A layer, some of its heads, a query and a key of their pattern, a token, an example. None: nothing chosen.

    Attributes:
        site: the site's name, where a model has several kinds of attention in a layer.
        heads: in the order in which they were chosen; the first one leads.
        example: which image or text of several.

    >>> print(Selection(layer=5, heads=(1, 3), query=12))
    L5H1+3, query 12
    """

    layer: int | None = None
    heads: tuple[int, ...] = ()
    query: int | None = None
    key: int | None = None
    token: int | None = None
    site: str | None = None
    example: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Selection:
        """A selection from JSON values.

        Raises:
            WorkbenchError: an unknown name, or a value that is no position.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise WorkbenchError(
                f"a selection has no {sorted(unknown)[0]!r}", hint="site, layer, heads, query, key, token, example"
            )
        made: dict[str, Any] = {
            name: tuple(value or ()) if name == "heads" else value for name, value in values.items()
        }
        for name, value in made.items():
            for one in value if isinstance(value, tuple) else (value,):
                wrong = not isinstance(one, str) if name == "site" else not isinstance(one, int) or one < 0
                if one is not None and wrong:
                    raise WorkbenchError(f"{name} is {value!r} in a selection")
        return cls(**made)

    def to_json(self) -> dict[str, Any]:
        """JSON values; `of` reads them."""
        return {**asdict(self), "heads": list(self.heads)}

    def __str__(self) -> str:
        parts = []
        if self.layer is not None:
            parts.append(f"L{self.layer}" + (f"H{'+'.join(map(str, self.heads))}" if self.heads else ""))
        parts += [
            f"{name} {at}" for name in ("query", "key", "token", "example") if (at := getattr(self, name)) is not None
        ]
        return ", ".join(parts) or "nothing selected"


class SharedSelection(traitlets.HasTraits):
    """A selection that several views follow. `value` may be read, set and observed.

    >>> shared = SharedSelection()
    >>> shared.select(layer=2, heads=(7,))
    >>> shared.value.layer
    2
    """

    value = traitlets.Instance(Selection, args=())

    def select(self, **changes: Any) -> None:
        """Change some of the selection: `select(layer=5, heads=(1,))`."""
        self.value = Selection.of({**self.value.to_json(), **changes})

    def on_select(self, callback: Callable[[Selection], object]) -> Callable[[], None]:
        """Call back with every new selection; what is returned ends that."""

        def told(change: Any) -> None:
            callback(change["new"])

        self.observe(told, "value")
        return lambda: self.unobserve(told, "value")

    def __repr__(self) -> str:
        return f"SharedSelection({self.value})"


SHARED = SharedSelection()
"""The selection that views share unless they are given one of their own."""
