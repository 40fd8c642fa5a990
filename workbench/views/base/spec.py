"""What a view shows, as data: facts, typed arrays, a table, a caption. The same spec is drawn live and on a page."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, NoReturn

import jsonschema_rs
import numpy as np
from numpy.typing import NDArray

from workbench import __version__
from workbench.errors import ReportError
from workbench.storage.json_text import finite
from workbench.tokens import visible_text
from workbench.views.base.kinds import Kind, kind_of
from workbench.views.base.selection import Scope, Selection, SharedSelection

Array = NDArray[Any]
Table = Mapping[str, "Array | Sequence[str]"]

KINDS = {"u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8"}
_STATIC = {"version": int, "kind": str, "title": str, "caption": str, "facts": dict, "blocks": dict, "table": list,
           "left_out": int, "notes": list, "origin": str, "scope": dict, "selection": dict, "state": dict}  # fmt: skip
_MOST_AXES = 8
_WORTH = 0.95  # a block is kept deflated when that makes it so much smaller


@dataclass(frozen=True)
class ViewSpec:
    """One view as data.

    Attributes:
        kind: which view: a name that is registered, see `register_kind`.
        title: a few words. caption: what is shown, over how much, in which unit, what was cut.
        facts: what the view's module needs besides arrays: JSON values, token texts as `workbench.tokens.visible` has
            them. The kind's schema says what must be there.
        blocks: arrays of 1-, 2- or 4-byte integers or 4- or 8-byte floats. NaN is a value that is not known.
        table: columns of equal length, arrays or lists of text: what the data table shows and the CSV holds.
        left_out: how many rows the table leaves out.
        notes: limits of what is shown, one sentence each: quantisation, rows left out, clipped values.
        selection: what is selected when nobody has selected anything.
        state: what has been set in this view alone, JSON values: pins and their names, a threshold.
        provenance: JSON values.
        inputs: which inputs its positions belong to, see `inputs_of`; None: not known.
    """

    kind: str
    title: str
    caption: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[str, Array] = field(default_factory=dict)
    table: Table = field(default_factory=dict)
    left_out: int = 0
    notes: tuple[str, ...] = ()
    selection: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    inputs: str | None = None

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self.table.values()}
        if len(lengths) > 1:
            raise ReportError(f"the columns of the table of {self.title!r} have lengths {sorted(lengths)}")
        for name, block in self.blocks.items():
            if block.dtype.str[1:] not in KINDS:
                raise ReportError(f"the block {name} holds {block.dtype}, which no page can read", shape=block.shape)
            block.flags.writeable = False
        # Facts are compared as JSON has them: tuples as lists, NaN as null.
        axes = {name: {"dtype": b.dtype.str[1:], "axes": b.ndim} for name, b in self.blocks.items()}
        _check(self.kind, finite(self.facts), finite(self.state), axes)

    @property
    def scope(self) -> Scope:
        """What its selection is a selection from."""
        return Scope.of(self.provenance, self.inputs)

    def choosing(self, shared: SharedSelection) -> ViewSpec:
        """The spec that begins with what is selected now, where anything is."""
        now = shared.of(self.scope)
        return replace(self, selection=now.over(Selection.of(self.selection)).to_json()) if now else self

    def to_live(self) -> dict[str, Any]:
        """The spec for a widget: arrays as bytes, which travel as binary buffers."""
        return self._as_dict(lambda block: {"data": _little(block).tobytes()})

    def to_static(self) -> dict[str, Any]:
        """The spec as JSON values: arrays in base64, deflated where that makes them smaller."""
        return self._as_dict(_packed)

    def _as_dict(self, pack: Any) -> dict[str, Any]:
        columns: list[dict[str, Any]] = []
        blocks = dict(self.blocks)
        for name, column in self.table.items():
            if isinstance(column, np.ndarray) and column.dtype.kind in "uif":
                blocks[f"table:{name}"] = column
                columns.append({"name": name, "block": f"table:{name}"})
            else:
                columns.append({"name": name, "text": [str(value) for value in column]})
        return {
            "version": 1,
            "kind": self.kind,
            "title": self.title,
            "caption": self.caption,
            "facts": finite(self.facts),
            "blocks": {
                name: {"dtype": _little(block).dtype.str[1:], "shape": list(block.shape), **pack(block)}
                for name, block in blocks.items()
            },
            "table": columns,
            "left_out": self.left_out,
            "notes": list(self.notes),
            "origin": origin_line(self.provenance),
            "scope": asdict(self.scope),
            "selection": finite(self.selection),
            "state": finite(self.state),
        }

    @property
    def digest(self) -> str:
        """SHA-256 over everything that is shown."""
        return hashlib.sha256(json.dumps(self.to_static(), sort_keys=True).encode()).hexdigest()


def origin_line(provenance: Mapping[str, Any]) -> str:
    """Where numbers come from, in a line: the models with their weights, this package's version.

    >>> origin_line({"model_name": "gpt2", "weights_sha256": "0123456789abcdef"})
    'gpt2, weights 0123456789ab; attention-workbench 0.1.0'
    """
    several = [provenance, *(value for value in provenance.values() if isinstance(value, Mapping))]
    models = []
    for each in several:
        if "model_name" in each:
            weights = each.get("weights_sha256")
            models.append(f"{each['model_name']}" + (f", weights {str(weights)[:12]}" if weights else ""))
    return visible_text("; ".join([*dict.fromkeys(models), f"attention-workbench {__version__}"]))


def check_static(spec: Mapping[str, Any]) -> None:
    """Check what `to_static` made, from a page that may hold anything.

    Raises:
        ReportError: there is no such view, or the spec is not one of it.
    """
    odd = next((name for name, wanted in _STATIC.items() if not isinstance(spec.get(name), wanted)), None)
    if odd is not None or len(spec) != len(_STATIC) or spec["version"] != 1:
        raise ReportError(f"the spec of a view is wrong at {odd or 'its version'}")
    axes = {}
    for name, block in spec["blocks"].items():
        shape = block["shape"]
        if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 2**53 for n in shape):
            raise ReportError(f"the spec of a view is wrong at the shape of {name!r}")
        if not name.startswith("table:"):
            axes[name] = {"dtype": block["dtype"], "axes": len(shape)}
    _check(spec["kind"], spec["facts"], spec["state"], axes)


def _check(kind: str, facts: Any, state: Any, blocks: Mapping[str, Any]) -> None:
    checker = validator(kind_of(kind))
    try:
        checker.validate({"facts": facts, "state": state, "blocks": blocks})
    except jsonschema_rs.ValidationError as error:
        where = ".".join(map(str, error.instance_path)) or "it"
        raise ReportError(f"the spec of a {kind} view is wrong at {where}: {error.message[:300]}") from None
    except ValueError as error:  # half a surrogate, a key that is no text, or lists within lists without an end
        raise ReportError(f"the spec of a {kind} view is no JSON: {str(error)[:300]}") from None


@cache
def validator(kind: Kind) -> jsonschema_rs.Validator:
    """What checks the specs of a kind of view.

    Raises:
        ReportError: its file holds no JSON schema, or one that needs another.
    """
    try:
        return jsonschema_rs.validator_for(kind.schema, retriever=_nothing)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
        raise ReportError(f"{kind.name}.schema.json is no schema of a view: {str(error)[:300]}") from None


def _nothing(address: str) -> NoReturn:
    raise LookupError("a schema is one file")


def _little(block: Array) -> Array:
    """The array in order, its numbers with the low byte first; whole numbers of 8 bytes take 4 where they fit."""
    if block.dtype.kind in "ui" and block.dtype.itemsize == 8:
        low, high = (int(block.min()), int(block.max())) if block.size else (0, 0)
        if not -(2**31) <= low <= high < 2**31:
            return np.ascontiguousarray(block, dtype="<f8")
        return np.ascontiguousarray(block, dtype="<i4")
    return np.ascontiguousarray(block, dtype=block.dtype.newbyteorder("<"))


def _packed(block: Array) -> dict[str, Any]:
    raw = _little(block).tobytes()
    deflated = zlib.compress(raw, 9)
    small = len(deflated) < _WORTH * len(raw)
    return {"deflate": small, "base64": base64.b64encode(deflated if small else raw).decode("ascii")}
