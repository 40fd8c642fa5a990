"""Writes the forwards of a capture to a store, each as soon as it is over.

A forward's rows are written first, then what zarr says of the arrays' lengths, then the line in the journal. A process
may be killed between any two of these: a forward without a line is none, and the next one is written over it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench.capture.settings import Settings
from workbench.capture.site_capture import Forward
from workbench.capture.store.plan import FORM, TOKENS, VERSION, Family, Packed, json_text, take_apart
from workbench.capture.store.reading import StoredRows, StoredShape, read_header, read_rows
from workbench.capture.store.tables import Tables
from workbench.capture.unrecorded import Unrecorded
from workbench.errors import CaptureError, FileError, FormatError
from workbench.hooks.projections import Projection
from workbench.hooks.sites import Sites
from workbench.storage import disk
from workbench.storage.parts import Part
from workbench.storage.store import shards
from workbench.storage.store.extra import need
from workbench.storage.store.journal import Journal
from workbench.storage.store.parallel import Writers
from workbench.storage.store.shards import Array

Provenance = dict[str, Any]
LOCK = ".lock"
_NONE = Part(None, "")


class StoreWriter:
    """A store that is open to be added to, by one process at a time. Made by `open_writer`."""

    def __init__(self, path: Path, settings: Settings, lock: int) -> None:
        self.path, self._settings, self._held = path, settings, os.fstat(lock)
        self._lock, self._process = threading.Lock(), os.getpid()
        self._sites: Sites | None = None
        self._writers = Writers()
        journal = path / "forwards.jsonl"
        stored = read_rows(path) if journal.exists() else None  # before a line that is not whole is cut off
        self._journal = Journal(journal)
        try:
            self._go_on(stored)
        except BaseException:
            self.close()
            raise

    def _go_on(self, stored: StoredRows | None = None) -> None:
        """Know what is there, and mend what was left half done by a killed process, an interrupt or a full disk."""
        try:
            self._mend(read_rows(self.path) if stored is None else stored)
        except OSError as error:
            raise disk.failed(self.path, error) from error

    def _mend(self, stored: StoredRows) -> None:
        self.n_forwards = len(stored.rows)
        self._vocabulary = dict(stored.vocabulary)
        self._shapes: dict[str, _Shape] = {}
        self._members: dict[str, str] = {}  # zarr's texts by path, for the root
        for name, shape in stored.shapes.items():
            made = _Shape(self.path / name, shape.families, shape.ids)
            made.make_folders()
            made.write_names()
            made.rows = [row["forward"].integer() for row in stored.rows if row["shape"].value == name]
            self._shapes[shape.key] = made
            self._members |= made.write_metadata()
        if self._shapes:
            self._write_root()
        self._tables = Tables(self.path / "tables", self._settings)
        for index in range(self._tables.open(), self.n_forwards):
            self._tables.add(stored.forward(index), index)
        self._sound = True

    def add(self, forward: Forward, projections: Mapping[str, Projection | None]) -> Forward:
        """Write a forward; it is in the store when this returns.

        Args:
            projections: of its sites; they are kept by the forward that is given back, and not by the store.

        Returns:
            The same forward, whose tensors lie in the store.

        Raises:
            FileError: no room, or no right to write; what was finished before stays readable.
        """
        packed = take_apart(forward)
        with self._lock:
            self._check_place()
            self._writers.wait()  # an interrupt may have left some at work
            if not self._sound:  # what was broken off, and where, only the disk knows
                self._journal.close()
                self._journal = Journal(self.path / "forwards.jsonl")
                self._go_on()
            self._sound = False
            index, known = self.n_forwards, self._shapes.get(packed.key)
            try:
                shape = self._new_shape(packed) if known is None else known
                row = len(shape.rows)
                shape.write(packed, row, index, self._writers)
                added = self._new_texts(forward)
                self._journal.add(_line(forward, index, shape.path.name, row, packed.dynamic, added))
                self.n_forwards += 1
                self._vocabulary |= added
                self._members |= shape.texts()
                self._write_root()
                self._tables.add(forward, index)
            except OSError as error:
                raise disk.failed(self.path, error) from error
            self._sound = True
        told = json.loads(json_text(_told(forward, index, shape.path.name, row, packed.dynamic)))
        return shape.stored.made(Part(told, "a forward"), self._vocabulary, projections)

    def _check_place(self) -> None:
        """Raise a FileError where another folder, or none, stands where this one was, and in a forked process."""
        if self._forked:
            raise FileError(
                f"{self.path.name} is being written by the process that this one was forked from",
                hint="in each process, open a capture with a store of its own",
            )
        try:
            there = os.stat(self.path / LOCK)
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (self._held.st_dev, self._held.st_ino):
            raise FileError(
                f"{self.path.name} was moved, removed or replaced while it was being written",
                hint="what was finished is where it was moved to; capture again with store= its new name",
            )

    @property
    def _forked(self) -> bool:
        """Whether this is another process than the one that opened the store: both would write the same rows."""
        return os.getpid() != self._process

    def _new_texts(self, forward: Forward) -> dict[int, str]:
        """The texts of tokens that were not seen before."""
        added: dict[int, str] = {}
        for stream, rows in forward.tokens.items():
            for ids, texts in zip(forward.ids[stream].tolist(), rows, strict=True):
                added |= {i: text for i, text in zip(ids, texts, strict=True) if i not in self._vocabulary}
        return added

    def _new_shape(self, packed: Packed) -> _Shape:
        path = self.path / f"shape-{len(self._shapes)}"
        made = _Shape(path, packed.families, packed.ids)
        made.begin(packed)
        self._shapes[packed.key] = made
        return made

    def say(
        self, sites: Sites | None = None, unrecorded: Sequence[Unrecorded] = (), provenance: Provenance | None = None
    ) -> None:
        """Write down what is known of the model and of what could not be recorded.

        Raises:
            FileError: it cannot be written.
        """
        said: dict[str, Any] = {}
        if sites is not None and sites != self._sites:
            said["model_sites"] = [asdict(site) for site in sites]
            said["unread"], said["looked"] = [asdict(one) for one in sites.unread], sites.looked
        if unrecorded:
            said["unrecorded"] = [asdict(one) for one in unrecorded]
        if provenance:
            said["provenance"] = provenance
        if said and not self._forked:
            with self._lock:
                self._journal.add(said)
                self._sites = sites

    def _write_root(self) -> None:
        told = {"format": FORM, "version": VERSION}
        _replace(self.path / "zarr.json", shards.group(told, self._members))

    def close(self) -> None:
        """Nothing more is written."""
        if not self._forked:  # whose threads are not here
            self._writers.close()
        self._journal.close()


class _Shape:
    """The arrays of the forwards of one shape."""

    def __init__(self, path: Path, families: Sequence[Family], ids: Mapping[str, Array]) -> None:
        self.path, self.families, self.ids = path, families, ids
        self.rows: list[int] = []  # the forward of each row
        self._fixed: dict[str, str] = {}
        self._arrays = [(f.name, part, a) for f in families for part, a in f.arrays.items() if not a.empty]
        self._arrays += [(TOKENS, stream, array) for stream, array in ids.items() if not array.empty]

    def begin(self, packed: Packed) -> None:
        """Make the folders, and write down what the arrays are."""
        self.make_folders()
        self.write_names()
        _replace(self.path / "facts.json", json_text(packed.facts() | {"key": packed.key}).encode())

    def make_folders(self) -> None:
        """Have a folder for each array.

        Raises:
            OSError: one cannot be made, or is a link: a store is written in its own folder alone.
        """
        disk.inside(self.path.parent, self.path.name)
        inner = [(folder, array.name) for folder, _, array in self._arrays]
        inner += [(family.name, name) for family in self.families for name in ("site", "forward")]
        for folder, name in inner:
            disk.inside(self.path, folder, name)

    def write_names(self) -> None:
        """Write the sites' names, which all rows share."""
        for family in self.families:
            _replace(self.path / family.name / "site" / "c.0", shards.texts(family.sites)[1])

    @cached_property
    def stored(self) -> StoredShape:
        """How its rows are read."""
        return StoredShape.read(self.path)

    def write(self, packed: Packed, row: int, index: int, writers: Writers) -> None:
        """Write a row, and let the arrays have it."""
        writers.write(
            (array, packed.tensors[folder, part], array.file(self.path / folder, row))
            for folder, part, array in self._arrays
        )
        self.rows[row:] = [index]
        self.write_metadata()

    def texts(self) -> dict[str, str]:
        """zarr's texts of the groups and arrays, by their paths in the store."""
        base, found = self.path.name, {}
        found[base] = _group_text()
        rows = len(self.rows)
        for folder in dict.fromkeys(folder for folder, _, _ in self._arrays):
            found[f"{base}/{folder}"] = _group_text()
        for folder, _, array in self._arrays:
            place = f"{base}/{folder}/{array.name}"
            if place not in self._fixed:
                text = json.dumps(array.metadata(0))
                self._fixed[place] = text
            found[place] = self._fixed[place].replace('"shape": [0', f'"shape": [{rows}', 1)
        for family in self.families:
            place = f"{base}/{family.name}/site"
            if place not in self._fixed:
                self._fixed[place] = json.dumps(shards.texts(family.sites)[0])
            found[place] = self._fixed[place]
            found[f"{base}/{family.name}/forward"] = json.dumps(shards.numbers_of(self.rows)[0])
        return found

    def write_metadata(self) -> dict[str, str]:
        """Write zarr's texts; a folder's own, which tells of its arrays too, comes after theirs."""
        found, base = self.texts(), self.path.name
        for family in self.families:
            _, chunk, last = shards.numbers_of(self.rows)
            _replace(self.path / family.name / "forward" / f"c.{last}", chunk)
        groups = {name for name, text in found.items() if text == _group_text()}
        for name, text in found.items():
            if name not in groups:
                _replace(self.path.parent / name / "zarr.json", text.encode())
        for name in groups - {base}:
            inside = {k.removeprefix(f"{name}/"): v for k, v in found.items() if k.startswith(f"{name}/")}
            _replace(self.path.parent / name / "zarr.json", shards.group(members=inside))
        _replace(self.path / "zarr.json", shards.group())
        return found


def _group_text() -> str:
    return shards.group().decode()


def _replace(path: Path, content: bytes) -> None:
    """Write a small file in one step. It is not flushed to the disk, which would take longer than a forward."""
    draft = path.with_name(f".{path.name}.draft")
    with open(draft, "wb", opener=disk.plain) as file:
        file.write(content)
    os.replace(draft, path)


def _told(forward: Forward, index: int, shape: str, row: int, dynamic: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    said: dict[str, Any] = {"forward": index, "shape": shape, "row": row, "thread": forward.thread, "sites": dynamic}
    if forward.packed is not None:
        said["packed"] = list(forward.packed)
    if forward.span is not None:
        said["span"] = list(forward.span)
    if forward.tokens:
        said["texts"] = sorted(forward.tokens)
    return said


def _line(
    forward: Forward, index: int, shape: str, row: int, dynamic: Mapping[str, dict[str, Any]], texts: Mapping[int, str]
) -> dict[str, Any]:
    said = _told(forward, index, shape, row, dynamic)
    return said | ({"vocabulary": [list(pair) for pair in texts.items()]} if texts else {})


@contextmanager
def open_writer(
    path: str | Path, settings: Settings, provenance: Provenance, identity: Mapping[str, Any]
) -> Iterator[StoreWriter]:
    """A store to be added to: a new one, or one of the same model and settings.

    Args:
        provenance: JSON values of the model and its run. identity: those that must be the same to go on.

    Raises:
        FileError: it cannot be written, or another process writes it. FormatError: what stands there is no store, or of
            another version. CaptureError: it is of another model, or has other settings.
    """
    for module in ("google_crc32c", "pyarrow.parquet"):
        need(module, "a store")
    folder = disk.as_path(path)
    facts, tokens = settings.state()
    if tokens:
        raise CaptureError("a store takes the ids of each forward, not tokens=", hint="leave tokens= out")
    header = {"format": FORM, "version": VERSION, "provenance": provenance, "settings": facts,
              "identity": dict(identity)}  # fmt: skip
    try:
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder} is a file", hint="a store is a folder: give another name")
        there = {one.name for one in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
        if there and "workbench.json" not in there:
            raise FormatError(f"{folder.name} is a folder, and no store", hint="give the name of a new one")
        folder.mkdir(exist_ok=True)
        lock = disk.plain(folder / LOCK, os.O_RDWR | os.O_CREAT)
    except (OSError, ValueError) as error:  # a name with characters that no path may have is a ValueError
        raise disk.failed(folder, error) from error
    try:
        if not disk.locked(lock):
            raise FileError(f"{folder.name} is being written by another capture", hint="give another name, or wait")
        if (folder / "workbench.json").exists():
            _check_same(folder, header)
        else:
            disk.write(folder / "workbench.json", json_text(header))
            disk.write(folder / "zarr.json", shards.group({"format": FORM, "version": VERSION}, {}))
        writer = StoreWriter(folder, settings, lock)
        try:
            yield writer
        finally:
            writer.close()
    finally:
        with suppress(OSError):
            os.close(lock)


def _check_same(folder: Path, header: Mapping[str, Any]) -> None:
    there, asked = read_header(folder), json.loads(json_text(header))
    own, now = (each["identity"].items() if isinstance(each, Part) else each["identity"] for each in (there, asked))
    other = sorted(name for name in {*own, *now} if own.get(name, _NONE).value != now.get(name))
    if other:
        raise CaptureError(
            f"{folder.name} holds forwards of another model: {', '.join(other)} differs",
            hint="give the name of a new store",
        )
    known = there["settings"].items()
    differing = sorted(k for k, value in asked["settings"].items() if known.get(k, _NONE).value != value)
    differing = [name for name in differing if name != "limit"]
    if differing:
        raise CaptureError(
            f"{folder.name} was captured with another {', '.join(differing)}=", hint="give the name of a new store"
        )
