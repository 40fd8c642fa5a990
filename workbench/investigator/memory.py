"""What earlier investigations asked, found and cost: a folder that later ones look into."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.analysis.circuits.circuit import Circuit
from workbench.errors import FormatError, WorkbenchError
from workbench.storage import disk
from workbench.storage.json_text import finite
from workbench.storage.parts import Part, parse

_FILE = "memory.json"
_MOST = 500


@dataclass(frozen=True)
class Remembered:
    """One past investigation.

    Attributes:
        asked: the question, in words. task, model: names; prompts, weights: what they were, as hashes.
        verdict: "circuit", "none" or "undecided". found: the answer in a sentence. heads: of the circuit.
        forwards, seconds: what it cost. file: name of the circuit's file in the folder, "" if there is none.
    """

    asked: str
    task: str
    prompts: str
    model: str
    weights: str
    verdict: str
    found: str
    heads: tuple[str, ...]
    forwards: int
    seconds: float
    file: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """The same for the same question of the same weights."""
        return self.task, self.prompts, self.weights


class Memory:
    """Past investigations, in a folder; `investigate(memory=…)` looks into it, and adds to it.

    Args:
        folder: an existing folder; None keeps them as long as this object lives, without circuits.

    Raises:
        WorkbenchError: there is no such folder. FormatError: it holds a memory that is damaged.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else disk.readable(folder)
        self.all: list[Remembered] = []
        if self.folder is not None:
            if not self.folder.is_dir():
                raise WorkbenchError(f"there is no folder {self.folder}", hint="make the folder first")
            self.all = self._kept(self.folder)

    @staticmethod
    def _kept(folder: Path) -> list[Remembered]:
        file = folder / _FILE
        return [_read(part) for part in parse(disk.content(file), _FILE).list(_MOST)] if file.is_file() else []

    def __len__(self) -> int:
        return len(self.all)

    def __repr__(self) -> str:
        return f"Memory({len(self)} investigations{'' if self.folder is None else f' in {self.folder.name}'})"

    def asked_before(self, key: tuple[str, str, str]) -> Remembered | None:
        """The last investigation of the same prompts on the same weights."""
        return next((one for one in reversed(self.all) if one.key == key), None)

    def nearest(self, asked: str, key: tuple[str, str, str]) -> tuple[Remembered, float] | None:
        """The most alike question besides that itself, and the cosine of both; None where there is no other.

        The cosine is of counts of runs of three letters.
        """
        others = [one for one in self.all if one.key != key]
        scored = [(one, _cosine(asked, one.asked)) for one in others]
        return max(scored, key=lambda pair: pair[1], default=None)

    def circuits(self, key: tuple[str, str, str]) -> dict[str, Circuit]:
        """Circuits of other tasks on the same weights, by task, the last of each."""
        found: dict[str, Circuit] = {}
        for one in self.all:
            if self.folder is not None and one.file and one.key[2] == key[2] and one.key != key:
                path = self.folder / one.file
                if path.is_file():
                    found[one.task] = Circuit.load(path)
        return found

    def add(self, one: Remembered, circuit: Circuit | None = None) -> None:
        """Remember an investigation, in the place of an earlier one of the same question; the oldest are forgotten."""
        if self.folder is not None:
            self.all = self._kept(self.folder)  # with what other processes have added
        others = [old for old in self.all if old.key != one.key][-(_MOST - 1) :]
        if self.folder is not None and circuit is not None:
            name = f"circuit-{one.weights[:12]}-{one.prompts[:12]}.safetensors"
            circuit.save(self.folder / name)
            one = Remembered(**{**asdict(one), "file": name})
        self.all = [*others, one]
        if self.folder is not None:
            disk.write(self.folder / _FILE, json.dumps([finite(asdict(each)) for each in self.all], indent=1))


def _read(part: Part) -> Remembered:
    names = ("asked", "task", "prompts", "model", "weights", "verdict", "found", "file")
    texts = {name: part[name].text() for name in names}
    if "/" in texts["file"] or "\\" in texts["file"] or texts["file"].startswith("."):
        raise FormatError(f"{part.place} names a file outside of the memory: {texts['file']!r}")
    heads = tuple(one.text() for one in part["heads"].list())
    forwards, seconds = part["forwards"].integer(0), part["seconds"].number()
    return Remembered(**texts, heads=heads, forwards=forwards, seconds=seconds)


def _cosine(one: str, other: str) -> float:
    a, b = (_runs(text) for text in (one, other))
    shared = sum(a[run] * b[run] for run in a)
    return shared / math.sqrt(max(1, _square(a) * _square(b)))


def _runs(text: str) -> Counter[str]:
    plain = f"  {' '.join(text.lower().split())}  "
    return Counter(plain[i : i + 3] for i in range(len(plain) - 2))


def _square(counts: Mapping[str, int]) -> int:
    return sum(value * value for value in counts.values())


def plain(one: Remembered) -> dict[str, Any]:
    """What a planner is told of it; not what it cost in seconds, which differs from run to run."""
    return {"asked": one.asked, "verdict": one.verdict, "found": one.found, "heads": list(one.heads),
            "forwards": one.forwards}  # fmt: skip
