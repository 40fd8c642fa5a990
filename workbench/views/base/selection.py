"""What is selected: one small object that all views of a notebook or of a page share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from workbench.errors import WorkbenchError

_PARTS = {"model": ("layer", "heads", "site"), "inputs": ("query", "key", "token", "example")}
_MODEL = ("model_class", "model_name", "parameters")  # checkpoints of one model have the same heads


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

    def has(self, layer: int | None, head: int, site: str | None = None) -> bool:
        """Whether a head is chosen; without a site it is known by its layer alone."""
        return layer == self.layer and head in self.heads and (None in (site, self.site) or site == self.site)

    def __bool__(self) -> bool:
        return self != Selection()

    def over(self, first: Selection) -> Selection:
        """This selection, with the heads or the positions of the first one where none of its own are chosen."""
        nothing, made = Selection(), self
        for names in _PARTS.values():
            if all(getattr(self, name) == getattr(nothing, name) for name in names):
                made = replace(made, **{name: getattr(first, name) for name in names})
        return made

    def __str__(self) -> str:
        parts = []
        if self.layer is not None:
            parts.append(f"L{self.layer}" + (f"H{'+'.join(map(str, self.heads))}" if self.heads else ""))
        parts += [
            f"{name} {at}" for name in ("query", "key", "token", "example") if (at := getattr(self, name)) is not None
        ]
        return ", ".join(parts) or "nothing selected"


@dataclass(frozen=True)
class Scope:
    """What a view's selection is a selection from: views of another model, or of other inputs, have one of their own.

    Attributes:
        model: whose heads. None: not known; then those of the only model that is shown, if there is but one.
        inputs: whose tokens and examples. None likewise.
    """

    model: str | None = None
    inputs: str | None = None

    @classmethod
    def of(cls, provenance: Mapping[str, Any], inputs: str | None = None) -> Scope:
        """The scope of what has this provenance; one with several models in it is of none of them."""
        several = [provenance, *(value for value in provenance.values() if isinstance(value, Mapping))]
        models = {tuple(str(each.get(name)) for name in _MODEL) for each in several if "model_class" in each}
        return cls(_short(models.pop()) if len(models) == 1 else None, inputs)


def inputs_of(tokens: Sequence[str]) -> str:
    """A short name of inputs by their tokens, the same for all views of them.

    >>> inputs_of(["a", "b"]) == inputs_of(("a", "b")) != inputs_of(["ab"])
    True
    """
    return _short(tokens)


def _short(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:12]


class SharedSelection:
    """A selection that several views follow, each within its scope. `value` is what was selected last.

    >>> shared = SharedSelection()
    >>> shared.select(layer=2, heads=(7,))
    >>> shared.value.layer
    2
    """

    def __init__(self) -> None:
        self._last = Selection()
        self._everywhere: dict[str, Any] = {}
        # For the scopes of each part, by their name: what was selected there.
        self._chosen: dict[str, dict[str, dict[str, Any]]] = {part: {} for part in _PARTS}
        self._known: dict[str, set[str]] = {part: set() for part in _PARTS}
        self._followers: list[_Follower] = []

    @property
    def value(self) -> Selection:
        """What was selected last; what is set here is selected in every scope."""
        return self._last

    @value.setter
    def value(self, selection: Selection) -> None:
        self.select(**selection.to_json())

    def of(self, scope: Scope) -> Selection:
        """What is selected in a scope."""
        found = dict(self._everywhere)
        for part, chosen in self._chosen.items():
            found |= chosen.get(self._name(part, scope), {})
        return Selection(**found)

    def select(self, scope: Scope | None = None, **changes: Any) -> None:
        """Change some of the selection, in a scope or in every one: `select(layer=5, heads=(1,))`.

        A layer without a site is meant wherever it is: the site that was chosen before is so no longer.

        Raises:
            WorkbenchError: an unknown name, or a value that is no position.
        """
        changes = {"site": None, **changes} if "layer" in changes else changes
        given = Selection.of(changes)
        for part, names in _PARTS.items():
            made = {name: getattr(given, name) for name in names if name in changes}
            if scope is not None and made:
                self._chosen[part].setdefault(self._name(part, scope), {}).update(made)
            elif scope is None:
                self._everywhere |= made
                self._chosen[part] = {
                    name: {key: value for key, value in chosen.items() if key not in made}
                    for name, chosen in self._chosen[part].items()
                }
        self._last = replace(self._last, **{name: getattr(given, name) for name in changes})
        if scope is not None:
            self._last = self.of(scope)
        self._tell()

    def on_select(self, callback: Callable[[Selection], object], scope: Scope | None = None) -> Callable[[], None]:
        """Call back with every new selection, of one scope or of any; what is returned ends that."""
        follower = _Follower(callback, scope, self._seen(scope))
        self._followers.append(follower)

        def end() -> None:
            if follower in self._followers:
                self._followers.remove(follower)

        return end

    def join(self, scope: Scope) -> None:
        """Make a scope known: views that do not know theirs share that of the only one."""
        for part, known in self._known.items():
            if (name := getattr(scope, part)) is not None:
                known.add(name)

    def copy(self) -> SharedSelection:
        """What is selected now, for later; nobody follows it."""
        made = SharedSelection()
        made._last, made._everywhere = self._last, dict(self._everywhere)
        made._chosen, made._known = deepcopy((self._chosen, self._known))
        return made

    def _name(self, part: str, scope: Scope) -> str:
        given: str | None = getattr(scope, part)
        known = self._known[part]
        return given if given is not None else next(iter(known)) if len(known) == 1 else ""

    def _seen(self, scope: Scope | None) -> Selection:
        return self._last if scope is None else self.of(scope)

    def _tell(self) -> None:
        for follower in list(self._followers):
            now = self._seen(follower.scope)
            if now != follower.told:
                follower.told = now
                follower.callback(now)

    def __repr__(self) -> str:
        return f"SharedSelection({self.value})"


@dataclass(eq=False)
class _Follower:
    """Who is told of what is selected in a scope, and what they were told last."""

    callback: Callable[[Selection], object]
    scope: Scope | None
    told: Selection


SHARED = SharedSelection()
"""The selection that views share unless they are given one of their own."""
