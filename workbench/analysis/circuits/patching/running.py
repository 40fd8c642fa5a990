"""Runs patches: many side by side in one forward, each from its layer on, and none that changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.engine.module_hooks import Hook
from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.setup import DENOISING, NOISING, Setup
from workbench.analysis.circuits.engine.stream import Kept, Key
from workbench.analysis.circuits.patching.places import Place
from workbench.analysis.circuits.patching.progress import Patching, PatchingInterrupted, start
from workbench.errors import InterventionError
from workbench.storage.resumable import file_of, kept_when_stopped

_SAVE_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class Unit:
    """What is patched: an activation of a layer, or of one of its heads.

    Attributes:
        name: for tables. key: where the stream shows it. layer: the first one that runs otherwise.
        stream: whose positions it has. number: of the head or kv group; None for all of the activation.
    """

    name: str
    key: Key
    layer: int
    stream: int
    number: int | None = None


@dataclass(frozen=True)
class Runs:
    """Both runs of a batch.

    Attributes:
        into: the inputs of the run that is patched. out_of: those of the other.
        new, old: [batch, position, …] what units are in the other run, and in the one that is patched.
        base, clean: logits [batch, vocab] of the run that is patched, and of the prompts.
    """

    into: Mapping[str, Tensor]
    out_of: Mapping[str, Tensor]
    new: Mapping[Key, Tensor]
    old: Mapping[Key, Tensor]
    base: Tensor
    clean: Tensor


RunsOf = Callable[[Setup, Pair], Runs]
Part = tuple[list[tuple[int, int]], list[Tensor | None]]


def two_runs(setup: Setup, pair: Pair, keys: Sequence[Key], direction: str) -> Runs:
    """Run prompts and twins, and keep what stands at the keys; later runs resume from the one that is patched."""
    into, out_of = (pair.clean, pair.twin) if direction == NOISING else (pair.twin, pair.clean)
    new, old = Kept(), Kept()
    there = setup.stream.run(out_of, pair.scored, {key: [new.keep(key)] for key in keys})
    base, _ = setup.stream.record(into, pair.scored, {key: [old.keep(key)] for key in keys})
    return Runs(into, out_of, new.tensors, old.tensors, base, base if direction == NOISING else there)


def run_patches(
    setup: Setup,
    units: Sequence[Unit],
    places: Sequence[Place],
    runs_of: RunsOf,
    *,
    resume: str | Path | None = None,
    progress: bool = True,
    note: str = "patching",
    **settings: Any,
) -> Tensor:
    """[unit, place, example] by how much the metric changes with each patch; NaN where a unit has no such place.

    A patch that puts in what is there changes nothing, exactly, and is not run.

    Args:
        runs_of: both runs of a batch; it is pickled for workers.
        resume: a file to go on from, if it is there, and to write to.
        settings: what tells this patching from another.

    Raises:
        FormatError: the file is of another patching. PatchingInterrupted: on Ctrl-C, with what is done.
    """
    path = file_of(resume)
    names = tuple(unit.name for unit in units), tuple(place.name for place in places)
    now = start(setup, path, *names, **settings)

    def save() -> Patching:
        if path is not None:
            now.save(path)
        return now

    bar = tqdm(total=now.done.numel(), initial=int(now.done.sum()), disable=not progress, desc=note)
    with bar, kept_when_stopped(path, save, PatchingInterrupted), torch.no_grad():
        _run(setup, units, places, runs_of, now, path, bar)
    return save().effects


def measured(setup: Setup) -> dict[str, Any]:
    """The fields of a result that say what was measured, and on what."""
    return {
        "task": setup.task.name, "metric": setup.metric.name, "clean": setup.clean, "corrupted": setup.corrupted,
        "provenance": setup.provenance(),
    }  # fmt: skip


def check_direction(direction: str) -> None:
    """Refuse an unknown direction."""
    if direction not in (NOISING, DENOISING):
        raise InterventionError(f'the direction is "noising" or "denoising", not {direction!r}')


def way_of(direction: str) -> str:
    """What is put where."""
    return f"{direction}: the " + (
        "prompt's into the twin's run" if direction == DENOISING else "twin's into the prompt's run"
    )


def _run(
    setup: Setup, units: Sequence[Unit], places: Sequence[Place], runs_of: RunsOf, now: Patching, path: Path | None,
    bar: Any,
) -> None:  # fmt: skip
    saved = time.monotonic()
    left = [number for number in range(len(setup.pairs)) if not bool(now.done[:, :, number].all())]
    held = {number: now.done[:, :, number].clone() for number in left}
    for pair, parts in setup.over(partial(_patched, units, places, runs_of, held), left):
        done, effects = now.done[:, :, setup.number(pair)], now.effects[:, :, setup.rows(pair)]
        for cells, values in parts:  # whole parts only: an interrupt leaves those before it
            for cell, value in zip(cells, values, strict=True):
                if value is not None:
                    effects[cell] = value
            for cell in cells:
                done[cell] = True
            bar.update(int(now.done.sum()) - bar.n)
            if path is not None and time.monotonic() - saved > _SAVE_EVERY:
                now.save(path)
                saved = time.monotonic()


def _patched(
    units: Sequence[Unit], places: Sequence[Place], runs_of: RunsOf, held: Mapping[int, Tensor], setup: Setup
) -> Callable[[Pair], Iterator[Part]]:
    """Of a batch, part by part: (unit, place), and [batch] by how much each changes the metric; None where it cannot.

    Args:
        held: by the number of a batch [unit, place] bool, what is done already.
    """

    def run(pair: Pair) -> Iterator[Part]:
        done = held[setup.number(pair)]
        runs = runs_of(setup, pair)
        base = setup.measure(runs.base, pair, runs.clean)[0]
        waiting: list[tuple[int, int]] = []
        index: dict[tuple[int, int], Tensor | None] = {}
        still: dict[tuple[int, int], Tensor] = {}
        at = {(s, p): setup.positions(pair, place.where, s) for p, place in enumerate(places) for s in place.streams}
        nothing: dict[tuple[int, int], Tensor | None] = {}
        for u, unit in enumerate(units):
            for p, place in enumerate(places):
                if unit.stream not in place.streams:
                    nothing[u, p] = None
                    continue
                index[u, p] = at[unit.stream, p]
                still[u, p] = _same(unit, index[u, p], runs)
                if bool(still[u, p].all()):
                    nothing[u, p] = torch.zeros_like(base)
                else:
                    waiting.append((u, p))
        yield list(nothing), list(nothing.values())
        most = setup.most(pair, tensors=24)
        for chunk in _chunks(units, waiting, most):
            if all(bool(done[cell]) for cell in chunk):
                continue
            unit = units[chunk[0][0]]
            chosen = [(units[u].number, index[u, p]) for u, p in chunk]
            hook = _replacing(runs.new[unit.key], chosen, pair.size)
            out = setup.stream.run(runs.into, pair.scored, {unit.key: [hook]}, times=len(chunk), start=unit.layer)
            values = setup.measure(out, pair, runs.clean, len(chunk)) - base
            yield chunk, [value.masked_fill(still[cell], 0.0) for cell, value in zip(chunk, values, strict=True)]

    return run


def _chunks(units: Sequence[Unit], cells: Sequence[tuple[int, int]], most: int) -> list[list[tuple[int, int]]]:
    """Which (unit, place) run together: those of one activation of one layer; the same whatever is done already."""
    groups: dict[tuple[int, Key], list[tuple[int, int]]] = {}
    for u, p in cells:
        groups.setdefault((units[u].layer, units[u].key), []).append((u, p))
    return [group[i : i + most] for _, group in sorted(groups.items()) for i in range(0, len(group), most)]


def _same(unit: Unit, index: Tensor | None, runs: Runs) -> Tensor:
    """[batch] bool: where a patch would put in what is there."""
    new, old = runs.new[unit.key], runs.old[unit.key]
    if unit.number is not None:
        new, old = new[:, :, unit.number], old[:, :, unit.number]
    if index is not None:
        rows = torch.arange(len(index), device=new.device)[:, None]
        new, old = new[rows, index.to(new.device)], old[rows, index.to(new.device)]
    return (new == old).flatten(1).all(1).cpu()


def _replacing(new: Tensor, chosen: Sequence[tuple[int | None, Tensor | None]], size: int) -> Hook:
    """Put `new` [batch, position, (head,) width] in place, in repeat n at the n-th heads and positions."""

    def hook(old: Tensor) -> Tensor:
        made = old.clone().unflatten(0, (-1, size))
        rows = torch.arange(size, device=old.device)[:, None]
        for n, (head, index) in enumerate(chosen):
            where: tuple[Any, ...] = (slice(None), slice(None)) if index is None else (rows, index.to(old.device))
            where = where if head is None else (*where, head)
            made[n][where] = new[where].to(old.dtype)
        return made.flatten(0, 1)

    return hook
