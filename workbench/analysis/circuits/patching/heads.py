"""Activation patching and ablation of single heads: which heads' z, queries, keys, values or patterns carry a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.circuits.engine.edges import run_nodes
from workbench.analysis.circuits.engine.prompts import Pair, Where
from workbench.analysis.circuits.engine.setup import DENOISING, NOISING, Setup, open_setup
from workbench.analysis.circuits.engine.stream import Key
from workbench.analysis.circuits.model.names import label
from workbench.analysis.circuits.patching.places import find_places
from workbench.analysis.circuits.patching.results import HeadPatching
from workbench.analysis.circuits.patching.running import (
    Runs,
    Unit,
    check_direction,
    measured,
    run_patches,
    two_runs,
    way_of,
)
from workbench.errors import InterventionError, expect, nearest
from workbench.session.ablations import find_ablation
from workbench.session.workbench import Workbench
from workbench.tasks.base import Task
from workbench.workers.engine import Engine

ACTIVATIONS = ("z", "q", "k", "v", "pattern")


def patch_heads(
    wb: Workbench,
    task: Task,
    activation: str = "z",
    *,
    direction: str = DENOISING,
    positions: Where | Sequence[Where] = None,
    by_position: bool = False,
    metric: Any = "logit_diff",
    batch_size: int = 25,
    memory: int = 1 << 30,
    resume: str | Path | None = None,
    engine: str | Engine = "local",
    progress: bool = True,
) -> HeadPatching:
    """Activation patching over heads, and positions. Arguments that are not told of here are those of `patch_layers`.

    Args:
        activation: what is put in: "z" (what the head gives to its projection), "q", "k", "v" (k and v by kv group
            where heads share them), or "pattern" (its attention weights over the values of the run it is put into).
            Heads of recurrences, and of attention with a gate, have z only: the others are of the rest of the heads.
        positions, by_position: all at once by default, and not one at a time.

    Raises:
        AttachError: the model's residual stream cannot be taken apart into heads. Others as `patch_layers`.

    Warns:
        UserWarning: scores are undefined as shares.
    """
    expect(Workbench, wb=wb)
    expect(Task, task=task)
    if activation not in ACTIVATIONS:
        raise InterventionError(f"there is no activation {activation!r}", hint=nearest(str(activation), ACTIVATIONS))
    check_direction(direction)
    with open_setup(wb, task, metric, batch_size=batch_size, memory=memory, engine=engine) as setup:
        setup.measure_baselines()
        at = "z" if activation == "pattern" else activation
        heads = _heads(setup, activation)
        units = [Unit(name, (at, i), i, _stream(setup, at, i), number) for i, number, name in heads]
        places = find_places(setup, positions, by_position)
        keys = list(dict.fromkeys(unit.key for unit in units))
        of_patterns = activation == "pattern"
        effects = run_patches(
            setup, units, places, partial(_runs, keys=keys, direction=direction, of_patterns=of_patterns),
            resume=resume, progress=progress, note=f"patching {activation}",
            activation=activation, direction=direction,
        )  # fmt: skip
        found = HeadPatching(
            heads=tuple(name for *_, name in heads), layers=tuple(setup.graph.blocks[i] for i, *_ in heads),
            numbers=tuple(n for _, n, _ in heads), activation=activation, places=tuple(place.name for place in places),
            direction=direction, effects=effects, higher_is_better=setup.metric.higher_is_better, **measured(setup),
            sign=f"{way_of(direction)}; a positive score means that the clean activation helps the task",
        )  # fmt: skip
    found.denominator.warn(f"the effect of patches on {found.metric}")
    return found


def ablate_heads(
    wb: Workbench, task: Task, how: str = "mean", *, metric: Any = "logit_diff", batch_size: int = 25,
    memory: int = 1 << 30, seed: int = 0, engine: str | Engine = "local", progress: bool = True,
) -> HeadPatching:  # fmt: skip
    """Ablate single heads at all positions: "zero", "mean", "mean_positional", "resample" or "counterfactual".

    Args:
        seed: of "resample", which replaces a prompt by others of the nearest length, several times.
        engine: "local", "ray", or a `workbench.RayWorkers`: who runs the batches.

    Raises:
        TaskError, InterventionError, AttachError: as `patch_heads`.

    Warns:
        UserWarning: scores are undefined as shares.
    """
    expect(Workbench, wb=wb)
    expect(Task, task=task)
    with open_setup(wb, task, metric, batch_size=batch_size, memory=memory, seed=seed, engine=engine) as setup:
        setup.measure_baselines()
        effects = ablation_effects(setup, how, progress)
        heads = _heads(setup, "z")
        found = HeadPatching(
            heads=tuple(name for *_, name in heads), layers=tuple(setup.graph.blocks[i] for i, *_ in heads),
            numbers=tuple(n for _, n, _ in heads), activation=f"{how} ablation", places=("all",), direction=NOISING,
            sign="noising: the head's output is replaced; a positive score means that the head helps the task",
            effects=effects[:, None], higher_is_better=setup.metric.higher_is_better, **measured(setup),
        )  # fmt: skip
    found.denominator.warn(f"the effect of ablations on {found.metric}")
    return found


def ablation_effects(setup: Setup, how: str, progress: bool = True) -> Tensor:
    """[head, example] of the metric with each head ablated, minus without."""
    find_ablation(how, twins=True)
    graph = setup.graph
    kept = torch.ones(len(graph.head_names), len(graph.senders), dtype=torch.bool)
    for row, name in enumerate(graph.head_names):
        kept[row, graph.sender_index[name]] = False
    return run_nodes(setup, kept, how, progress, "ablating heads") - setup.clean


def _heads(setup: Setup, activation: str) -> list[tuple[int, int, str]]:
    """(layer, number, label) of what has such an activation, by layer.

    Raises:
        InterventionError: nothing has.
    """
    graph, part = setup.graph, activation if activation in ("k", "v") else "q"
    if activation == "z":
        return [(i, head, label(n)) for (i, head), n in zip(graph.heads(), graph.head_names, strict=True)]
    names = [graph.receivers[column] for i in range(len(graph.layers)) for column in graph.columns(i, part)]
    if not names:
        raise InterventionError(
            f"no head of this model has {activation} that it reads from the stream by itself",
            hint='activation="z" patches what heads give, wb.edit_pattern rows of a map',
        )
    return [(graph.receiver_spot(n).layer, graph.receiver_spot(n).number, label(n.partition("<")[0])) for n in names]


def _runs(setup: Setup, pair: Pair, keys: Sequence[Key], direction: str, of_patterns: bool) -> Runs:
    runs = two_runs(setup, pair, keys, direction)
    return _with_patterns(setup, pair, runs) if of_patterns else runs


def _stream(setup: Setup, what: str, i: int) -> int:
    """The stream whose positions z, q, k or v of a layer has."""
    own = setup.graph.stream_of(i)
    return own - 1 if what in "kv" and setup.graph.layers[i].kind == "cross" else own


def _with_patterns(setup: Setup, pair: Pair, runs: Runs) -> Runs:
    """The same with z of the other run's patterns and the values of the run that is patched."""
    wb = setup.wb
    with wb.capture(statistics=(), pattern=True, queries_keys=False) as patterns:
        wb.model(**runs.out_of, **setup.stream.extra)
    with wb.capture(statistics=(), values=True) as own:
        wb.model(**runs.into, **setup.stream.extra)
    new: dict[Key, Tensor] = {}
    for i, layer in enumerate(setup.stream.anatomy.layers):
        if layer.mixer is not None:
            continue
        site = layer.site.name
        weights, values = patterns[site].pattern.dense(), own[site].pattern.values
        if values is None:
            raise InterventionError("the values of this attention are not seen", site=site)
        each = values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1).to(weights.dtype)
        new["z", i] = (weights @ each).transpose(1, 2)
    return replace(runs, new=new)
