"""Opens stores: their forwards are a capture's, whose tensors are read when something computes with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from workbench.capture.capture import Capture
from workbench.capture.reading import settings_of, site_capture
from workbench.capture.site_capture import Forward, SiteCapture
from workbench.capture.store.plan import FORM, TOKENS, VERSION, Family
from workbench.capture.unrecorded import Unrecorded
from workbench.errors import FormatError
from workbench.hooks.projections import Projection
from workbench.hooks.sites import Site, Sites, Unread
from workbench.storage import disk, typed
from workbench.storage.parts import Part, each_text, parse
from workbench.storage.store.journal import lines
from workbench.storage.store.shards import Array, can_hold
from workbench.storage.store.stored_tensor import StoredTensor

T = TypeVar("T")
_LONGEST = 2**40
_MOST_AXES = 16


class Made(MutableMapping[str, T], Generic[T]):
    """A dict whose values are made when they are looked up, and not kept; what is put in is."""

    def __init__(self, names: Sequence[str], make: Callable[[str], T]) -> None:
        self._names, self._make = dict.fromkeys(names), make
        self._changed: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name in self._changed:
            return self._changed[name]
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __setitem__(self, name: str, value: T) -> None:
        self._names[name] = None
        self._changed[name] = value

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self._changed.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class StoredShape:
    """Forwards of one shape: how their parts are read.

    Attributes:
        folder: theirs. families, ids: their arrays. place: by site, its family and number there. key: as `Packed.key`.
    """

    folder: Path
    families: tuple[Family, ...]
    ids: Mapping[str, Array]
    place: Mapping[str, tuple[Family, int, Site]]
    key: str = ""

    @classmethod
    def of(cls, folder: Path, families: Sequence[Family], ids: Mapping[str, Array], key: str = "") -> StoredShape:
        """The shape whose arrays these are."""
        place = {}
        for family in families:
            for i, entry in enumerate(family.entries):
                site = typed.record(Part(entry["site"], f"{folder.name}, site {i}"), Site)
                place[site.name] = family, i, site
        return cls(folder, tuple(families), ids, place, key)

    @classmethod
    def read(cls, folder: Path) -> StoredShape:
        """The shape that a folder tells of.

        Raises:
            FormatError: it tells of none.
        """
        facts = _json(folder / "facts.json")
        families = []
        for one in facts["families"].list():
            arrays = {name: _array(part) for name, part in one["arrays"].items().items()}
            entries = tuple(entry.value for entry in one["entries"].list() if entry["site"].items())
            names = tuple(entry["site"]["name"].text() for entry in one["entries"].list())
            if any(array.sites not in (0, len(entries)) for array in arrays.values()):
                raise one.wrong("a family whose arrays are of all its sites")
            families.append(Family(_folder_name(one["name"]), names, entries, arrays))
        ids = {name: _array(part) for name, part in facts["ids"].items().items()}
        for name, array in ids.items():
            if len(array.shape) != 2 or array.torch_dtype.is_floating_point or array.torch_dtype.is_complex:
                raise facts["ids"][name].wrong("ids [batch, position]")
        return cls.of(folder, families, ids, facts["key"].text())

    def made(
        self, told: Part, vocabulary: Mapping[int, str], projections: Mapping[str, Projection | None] | None = None
    ) -> Forward:
        """The forward that a line of the journal tells of."""
        row, dynamic = told["row"].integer(0), told["sites"].items()
        packed, span = told.get("packed"), told.get("span")
        texts = [] if (part := told.get("texts")) is None else each_text(part)
        if not self.ids.keys() >= set(texts):
            raise told["texts"].wrong("streams that have ids")

        def ids(stream: str) -> Tensor:
            return _stored(self.ids[stream], self.folder / TOKENS, row, 0)

        def tokens(stream: str) -> list[list[str]]:
            try:
                return [[vocabulary[i] for i in each] for each in ids(stream).tolist()]
            except KeyError as error:
                raise FormatError(f"the journal has no text of the token {error}") from None

        def site(name: str) -> SiteCapture:
            made = self._site(name, row, dynamic[name])
            return made if projections is None else replace(made, projection=projections.get(name))

        order = {name: i for i, name in enumerate(dynamic)}
        names = sorted(self.place, key=lambda name: order.get(name, len(order)))
        forward = Forward(
            told["forward"].integer(0), Made(names, site), Made(list(self.ids), ids),
            Made(texts, tokens), told["thread"].integer(0),
        )  # fmt: skip
        if span is not None:
            began, ended = (time.number() for time in span.list(2, 2))
            forward.span = began, ended
        if packed is not None:
            at, start, stop = (number.integer(0, _LONGEST) for number in packed.list(3, 3))
            forward.packed = at, start, stop
        return forward

    def _site(self, name: str, row: int, dynamic: Part) -> SiteCapture:
        family, number, site = self.place[name]
        own = {key: part.value for key, part in dynamic.items().items()}
        entry = Part(family.entries[number] | own, f"{self.folder.name}, site {name}")
        folder = self.folder / family.name
        parts = {part: _stored(array, folder, row, number) for part, array in family.arrays.items()}
        return site_capture(entry, site, parts, rows=False)


def _stored(array: Array, folder: Path, row: int, site: int) -> Tensor:
    return StoredTensor(
        array.shape, array.torch_dtype, lambda heads: array.read(folder, row, site, heads), array.head_axis
    )


@dataclass
class StoredRows:
    """What a store's journal tells.

    Attributes:
        rows: a line for each forward. shapes: by the name of their folder. vocabulary: texts of tokens by their ids.
        model_sites, unrecorded, provenance: as a capture has them, as far as the journal knows.
    """

    rows: list[Part] = field(default_factory=list)
    shapes: dict[str, StoredShape] = field(default_factory=dict)
    vocabulary: dict[int, str] = field(default_factory=dict)
    model_sites: Sites | None = None
    unrecorded: dict[str, Unrecorded] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def forward(self, index: int) -> Forward:
        """One of its forwards."""
        told = self.rows[index]
        return self.shapes[told["shape"].text()].made(told, self.vocabulary)


def read_rows(folder: Path) -> StoredRows:
    """What the journal of a store tells.

    Raises:
        FormatError: it is damaged, tells of what is not there, or has lost what is there.
    """
    found, there = StoredRows(), _rows_there(folder)  # in this order: what is being written comes into both
    told = Counter[str]()
    for line in lines(folder / "forwards.jsonl"):
        if (sites := line.get("model_sites")) is not None:
            unread, looked = line["unread"].list(), line.get("looked")
            found.model_sites = Sites(
                [typed.record(site, Site) for site in sites.list()], [typed.record(one, Unread) for one in unread],
                None if looked is None else looked.flag(),
            )  # fmt: skip
        for part in [] if (missed := line.get("unrecorded")) is None else missed.list():
            one = typed.record(part, Unrecorded)
            before = found.unrecorded.get(one.site)
            found.unrecorded[one.site] = one if before is None else replace(before, calls=before.calls + one.calls)
        if (facts := line.get("provenance")) is not None:
            found.provenance |= {name: part.plain() for name, part in facts.items().items()}
        for pair in [] if (texts := line.get("vocabulary")) is None else texts.list():
            number, text = pair.list(2, 2)
            found.vocabulary[number.integer()] = text.text()
        if line.get("forward") is None:
            continue
        if line["forward"].integer(0) != len(found.rows):
            raise FormatError(f"{line.place} tells of forward {line['forward'].value}, not {len(found.rows)}")
        name = _folder_name(line["shape"])
        if name not in found.shapes:
            found.shapes[name] = StoredShape.read(folder / name)
        if line["sites"].items().keys() != found.shapes[name].place.keys():
            raise FormatError(f"{line.place} has other sites than {name}")
        found.rows.append(line)
        told[name] += 1
    for name, rows in there.items():
        if rows > told[name] + 1:  # one more is that of a forward that was broken off
            raise FormatError(
                f"{name} holds {rows} forwards, and forwards.jsonl tells of {told[name]} of them",
                hint="its lines are gone: without a copy of that file the forwards cannot be told apart",
            )
    return found


def _rows_there(folder: Path) -> dict[str, int]:
    """How many rows the arrays of each shape say that they have, where they can be asked."""
    found: dict[str, int] = {}
    for path in folder.glob("shape-*/*/forward/zarr.json"):
        with suppress(FormatError):
            found[path.parts[-4]] = _json(path)["shape"].list(1, 1)[0].integer(0, _LONGEST)
    return found


def read_header(folder: Path) -> Part:
    """What a store says of itself.

    Raises:
        FormatError: it is no store, or of another version.
    """
    if not (folder / "workbench.json").is_file():
        raise FormatError(f"{folder.name} is a folder, and no store", hint="it was not written by this package")
    header = _json(folder / "workbench.json")
    if header["format"].value != FORM:
        raise FormatError(f"{folder.name} is no {FORM}", hint="it was not written by this package")
    version = header["version"].integer()
    if version != VERSION:
        raise FormatError(
            f"{folder.name} has format version {version}, this package reads {VERSION}",
            hint="update the package" if version > VERSION else "capture again with this version",
        )
    return header


def read_store(folder: Path) -> Capture:
    """The capture that lies in a store.

    Raises:
        FormatError: it is no store, of another version, or its journal is damaged.
    """
    header = read_header(folder)
    found = read_rows(folder)
    forwards = [found.forward(index) for index in range(len(found.rows))]
    sites = found.model_sites
    if sites is None:
        sites = Sites([site for _, _, site in _all(found.shapes.values())], [], None)
    provenance = {name: part.plain() for name, part in header["provenance"].items().items()} | found.provenance
    return Capture(
        forwards, sites, provenance, settings=settings_of(header["settings"], {}), unrecorded=found.unrecorded
    )


def _all(shapes: Any) -> list[tuple[Family, int, Site]]:
    known = {name: place for shape in shapes for name, place in shape.place.items()}
    return [place for place in known.values() if place[2].call == 0]


def _json(path: Path) -> Part:
    try:
        return parse(disk.content(path), f"{path.parent.name}/{path.name}")
    except OSError as error:
        raise FormatError(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}") from None


def _folder_name(part: Part) -> str:
    name = part.text()
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise part.wrong("the name of a folder")
    return name


def _array(part: Part) -> Array:
    dtype = part["dtype"].text()
    if not can_hold(dtype):
        raise part.wrong("an array of numbers that this package knows")
    shape = tuple(n.integer(0, _LONGEST) for n in part["shape"].list(_MOST_AXES))
    axis, sites = part.get("head_axis"), part["sites"].integer(0, 2**20)
    dims = tuple(each_text(part["dims"]))
    if math.prod(max(n, 1) for n in shape) > _LONGEST:
        raise part.wrong("an array that a file can hold")
    head_axis = None if axis is None else axis.integer(0, len(shape) - 1)
    if len(dims) != len(shape) + (2 if sites else 1):
        raise part.wrong("an array with a name for each axis")
    return Array(_folder_name(part["name"]), dtype, sites, shape, head_axis, dims)
