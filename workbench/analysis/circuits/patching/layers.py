"""Activation patching by layer and position: of the residual stream, and of what attentions and MLPs write to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from workbench.analysis.circuits.engine.prompts import Where
from workbench.analysis.circuits.engine.setup import DENOISING, Setup, open_setup
from workbench.analysis.circuits.engine.stream import Key
from workbench.analysis.circuits.model.branches import find_branches
from workbench.analysis.circuits.model.names import label
from workbench.analysis.circuits.patching.places import find_places, tokens_at
from workbench.analysis.circuits.patching.results import LayerPatching
from workbench.analysis.circuits.patching.running import (
    Unit,
    check_direction,
    measured,
    run_patches,
    two_runs,
    way_of,
)
from workbench.errors import InterventionError, expect, nearest
from workbench.session.workbench import Workbench
from workbench.tasks.base import Task
from workbench.workers.engine import Engine

ACTIVATIONS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "resid_mid_cross", "cross_attn_out")


def patch_layers(
    wb: Workbench,
    task: Task,
    activation: str = "resid_pre",
    *,
    direction: str = DENOISING,
    positions: Where | Sequence[Where] = None,
    by_position: bool = True,
    metric: Any = "logit_diff",
    batch_size: int = 25,
    memory: int = 1 << 30,
    resume: str | Path | None = None,
    engine: str | Engine = "local",
    progress: bool = True,
) -> LayerPatching:
    """Activation patching by layer and position: where in the model is what the task needs?

    The activation of one layer at one position is taken from one run and put into the other. Patches of a layer run
    side by side, from that layer on; a patch that puts in what is there anyway is 0, exactly, and is not run.

    Args:
        wb: the model, attached with its tokenizer. task: prompts with twins of as many tokens.
        activation: the residual stream before a block, "resid_pre", behind its attention, "resid_mid", or behind the
            block, "resid_post"; what its attention adds to the stream, "attn_out", or its MLP, "mlp_out": behind the
            norm that a model may have there (Gemma 2, OLMo 2). In decoders with cross-attention also "resid_mid_cross"
            and "cross_attn_out". Heads need have no linear part in the stream; blocks side by side have no "resid_mid".
        direction: "denoising" puts the prompt's activation into the twin's run, "noising" the twin's into the prompt's.
        positions: names ("S2") or numbers of tokens, counted over a prompt's own, from −1 at its end; None for each
            token position, of both streams where there are two, which needs prompts of one length.
        by_position: patch them one at a time; False for all of them at once.
        metric: a name, or `metric(output, batch)` with the logits of the last token only.
        batch_size, memory: examples in a batch, and bytes that repeats may take.
        resume: a file to go on from, if it is there, and to write to.
        engine: "local", "ray", or a `workbench.RayWorkers`: who runs the batches.

    Raises:
        TaskError: bad prompts or metric. InterventionError: unknown activation or direction, one that the model does
            not have, a position beyond a prompt. AttachError: the model's blocks cannot be found. FormatError: the file
            is of another patching. PatchingInterrupted: on Ctrl-C, with what is done.

    Warns:
        UserWarning: scores are undefined as shares, since the metric is not surely another on prompts and twins.

    Source: Meng et al. 2202.05262 (causal tracing); names as in TransformerLens' `patching`.
    """
    expect(Workbench, wb=wb)
    expect(Task, task=task)
    if activation not in ACTIVATIONS:
        raise InterventionError(
            f"there is no activation {activation!r}", hint=nearest(str(activation), ACTIVATIONS, "activation")
        )
    check_direction(direction)
    with open_setup(
        wb, task, metric, batch_size=batch_size, memory=memory, finder=find_branches, engine=engine
    ) as setup:
        found = _places(setup, activation)
        places = find_places(setup, positions, by_position)
        setup.measure_baselines()
        streams = [setup.graph.stream_of(i) for i, _ in found]
        names = [_name(setup, i, key[0]) for i, key in found]
        units = [
            Unit(f"{name} {activation}", key, _start(setup, key), s)
            for name, s, (_, key) in zip(names, streams, found, strict=True)
        ]
        keys = [key for _, key in found]
        effects = run_patches(
            setup, units, places, partial(two_runs, keys=keys, direction=direction), resume=resume,
            progress=progress, note=f"patching {activation}", activation=activation, direction=direction,
        )  # fmt: skip
        patched = LayerPatching(
            rows=tuple(names), layers=tuple(setup.graph.blocks[i] for i, _ in found),
            streams=tuple(setup.graph.streams[s] for s in streams), activation=activation,
            places=tuple(place.name for place in places), tokens=tokens_at(setup, places), direction=direction,
            sign=f"{way_of(direction)}; 1 makes all of the difference between the runs, 0 none",
            effects=effects, **measured(setup),
        )  # fmt: skip
    patched.denominator.warn(f"the effect of patches on {patched.metric}")
    return patched


def _places(setup: Setup, activation: str) -> list[tuple[int, Key]]:
    """(layer, where the stream shows it) of an activation, for all blocks that have it.

    Raises:
        InterventionError: none has it, or it is not what the name says in this model.
    """
    graph, what = setup.graph, activation
    cross = activation.endswith("_cross") or activation.startswith("cross_")
    blocks: dict[tuple[int, int], list[int]] = {}
    for i in range(len(graph.layers)):
        blocks.setdefault((graph.stream_of(i), graph.blocks[i]), []).append(i)
    if what == "resid_pre":
        return [(several[0], ("resid", several[0])) for several in blocks.values()]
    if what == "resid_post":
        later = {block: several[0] for block, several in blocks.items()}
        _check_there(setup, activation, "resid", range(len(graph.layers)))
        return [
            (several[0], ("resid", later[s, b + 1]) if (s, b + 1) in later else ("final", s))
            for (s, b), several in blocks.items()
        ]
    if what == "mlp_out":
        _check_there(setup, activation, "mlp", range(len(graph.layers)))
        found: list[tuple[int, Key]] = [(i, ("mlp", i)) for i, layer in enumerate(graph.layers) if layer.mlp]
    else:
        key = "mid" if what.startswith("resid_mid") else "attn"
        found = [(i, (key, i)) for i, layer in enumerate(graph.layers) if (layer.kind == "cross") == cross]
        if key == "mid":  # of mixers side by side there is a stream behind all of them
            found = [(i, at) for i, at in found if not any(layer.beside for layer in graph.layers[i + 1 : i + 2])]
        _check_there(setup, activation, key, [i for i, _ in found])
    if not found:
        raise InterventionError(
            f"the model has no {activation}: no block has {'an MLP' if what == 'mlp_out' else 'cross-attention'}",
            hint=f"there are {', '.join(ACTIVATIONS[:3] if what == 'mlp_out' else ACTIVATIONS[:5])}",
        )
    if what.startswith("resid_mid"):
        _check_middle(setup, activation, [i for i, _ in found], blocks)
    return found


def _name(setup: Setup, i: int, what: str) -> str:
    """What the row of layer i is called: "L3", "decoder.3", or where a block has two mixers "blocks.3.attn"."""
    graph = setup.graph
    stream, block = graph.streams[graph.stream_of(i)], graph.blocks[i]
    if what == "attn" and any(layer.beside for layer in graph.layers):
        return label(graph.attention(i))
    return f"{stream}.{block}" if stream else f"L{block}"


def _check_there(setup: Setup, activation: str, what: str, layers: Iterable[int]) -> None:
    """Refuse what was not found in some layer."""
    for i in layers:
        lost = setup.stream.anatomy.missing.get((what, i))
        if lost is not None:
            raise InterventionError(f"the model has no {activation}: {lost.message}", site=lost.site, hint=lost.hint)


def _check_middle(setup: Setup, activation: str, several: list[int], blocks: dict[tuple[int, int], list[int]]) -> None:
    """Refuse the stream between an attention and what comes behind it where nothing reads it."""
    graph = setup.graph
    for i in several:
        last = blocks[graph.stream_of(i), graph.blocks[i]][-1] == i
        layer, block = graph.layers[i], setup.stream.anatomy.branches[i].block
        if layer.parallel:
            raise InterventionError(
                f"the model has no {activation}: attention and MLP of {block} read the same stream, side by side",
                hint='"resid_pre", "resid_post", "attn_out" and "mlp_out" are there',
            )
        if last and not layer.mlp:
            raise InterventionError(
                f"the model has no {activation}: {block} has no MLP behind its attention",
                hint='"resid_post" is the same',
            )


def _start(setup: Setup, key: Key) -> int:
    """The first layer that runs otherwise, or from which a forward can begin to come there."""
    what, i = key
    if what != "final":
        return i
    return max(layer for layer in range(len(setup.graph.layers)) if setup.graph.stream_of(layer) == i)
