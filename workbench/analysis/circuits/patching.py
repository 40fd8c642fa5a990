"""Activation patching and ablation of single heads: which heads' z, queries, keys, values or patterns carry a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.engine.edges import run_nodes
from workbench.analysis.circuits.engine.prompts import Pair, Where
from workbench.analysis.circuits.engine.setup import DENOISING, NOISING, Setup, open_setup
from workbench.analysis.circuits.engine.stream import Hook, Kept, Key
from workbench.analysis.circuits.model.names import label
from workbench.analysis.statistics.intervals import share_intervals
from workbench.errors import InterventionError, nearest
from workbench.session.ablations import find_ablation
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.tasks.base import Task

if TYPE_CHECKING:
    import pandas as pd

ACTIVATIONS = ("z", "q", "k", "v", "pattern")


@dataclass(frozen=True, repr=False)
class HeadPatching(Result):
    """What putting single heads' activations from one run into another does to a metric.

    Attributes:
        heads: labels, "L2KV1" for shared keys and values. layers, numbers: of each; of an encoder and a decoder apart.
        activation: "z", "q", "k", "v", "pattern", or "ablation".
        places: names of the positions patched, one at a time; ("all",) for all at once.
        direction: "noising" or "denoising". sign: what a positive effect means.
        effects: [head, place, example] of the metric with the patch, minus without; NaN where a decoder's head has no
            such place, because it is one in the prompt.
        clean, corrupted: [example] of the metric on prompts and twins. higher_is_better: of the metric.
    """

    form = "workbench.head_patching"

    heads: Annotated[tuple[str, ...], "head"]
    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    activation: str
    places: Annotated[tuple[str, ...], "place"]
    direction: str
    sign: str
    task: str
    metric: str
    effects: Float[Tensor, "head place example"]
    clean: Float[Tensor, " example"]
    corrupted: Float[Tensor, " example"]
    provenance: dict[str, Any]
    higher_is_better: bool = True

    @property
    def scores(self) -> Tensor:
        """[head, place]: the mean effect, as a share of the difference between prompts and twins.

        Noising: the share of the difference that is lost. Denoising: that is restored. Positive: the clean activation
        helps the task, by a higher or a lower metric, whichever is better.
        """
        sign = (1 if self.higher_is_better else -1) * (-1 if self.direction == NOISING else 1)
        return sign * self.effects.mean(-1) / (self.clean.mean() - self.corrupted.mean()).abs()

    @property
    def interval(self) -> Tensor:
        """[head, place, 2] 95 % intervals (Fieller's) of `scores` over prompts; NaN where prompts and twins may not
        differ, or of one prompt."""
        gap = self.clean - self.corrupted
        sign = (1 if self.higher_is_better else -1) * (-1 if self.direction == NOISING else 1)
        return share_intervals(sign * self.effects, gap * gap.mean().sign())

    @property
    def table(self) -> pd.DataFrame:
        """One row per head and place, highest magnitude first: the score with its interval, and the mean effect."""
        import pandas as pd

        scores, effects, ends = self.scores, self.effects.mean(-1), self.interval
        error = self.effects.std(-1) / max(self.effects.shape[-1], 1) ** 0.5
        rows = [
            (head, self.layers[i], self.numbers[i], place, float(scores[i, j]), *ends[i, j].tolist(),
             float(effects[i, j]), float(error[i, j]))
            for i, head in enumerate(self.heads)
            for j, place in enumerate(self.places)
        ]  # fmt: skip
        columns = ["head", "layer", "number", "position", "score", "low", "high", "effect", "standard_error"]
        frame = pd.DataFrame(rows, columns=columns)
        return frame.sort_values("score", key=abs, ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        best = ", ".join(f"{row.head} {row.score:.2f}" for row in self.table.head(5).itertuples())
        return f"HeadPatching({self.activation}, {self.direction}, {self.task}: {best})"


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
    progress: bool = True,
) -> HeadPatching:
    """Activation patching over heads, and positions.

    Args:
        wb: the model, attached with its tokenizer. task: prompts with twins.
        activation: what is put in: "z" (the head's output), "q", "k", "v" (k and v by kv group where heads share them),
            or "pattern" (its attention weights over the values of the run it is put into).
        direction: "denoising" puts the prompt's activation into the twin's run, "noising" the twin's into the prompt's.
        positions: names ("S2") or numbers of tokens; None for all. by_position: patch them one at a time; with
            `positions` None each token position is one, which needs prompts of one length.
        metric: a name, or `metric(output, batch)` with the logits of the last token only.
        batch_size, memory: examples in a batch, and bytes that repeats may take.

    Raises:
        TaskError: bad prompts or metric. InterventionError: unknown activation or direction.
        AttachError: the model's residual stream cannot be taken apart.
    """
    if activation not in ACTIVATIONS:
        raise InterventionError(f"there is no activation {activation!r}", hint=nearest(str(activation), ACTIVATIONS))
    if direction not in (NOISING, DENOISING):
        raise InterventionError(f'the direction is "noising" or "denoising", not {direction!r}')
    with open_setup(wb, task, metric, batch_size=batch_size, memory=memory) as setup:
        setup.measure_baselines()
        if activation == "pattern":
            heads = _heads(setup, "z")
            where: list[Where] = [positions]  # type: ignore[list-item]
            if by_position:
                where = _places(setup, positions)
            effects = _pattern_effects(setup, heads, where, direction, progress)
        else:
            heads = _heads(setup, activation)
            where = _places(setup, positions) if by_position else [positions]  # type: ignore[list-item]
            effects = _effects(setup, heads, activation, where, direction, progress)
        start = "prompt's into the twin's run" if direction == DENOISING else "twin's into the prompt's run"
        return HeadPatching(
            heads=tuple(name for *_, name in heads), layers=tuple(setup.graph.blocks[i] for i, *_ in heads),
            numbers=tuple(n for _, n, _ in heads), activation=activation,
            places=tuple("all" if place is None else str(place) for place in where), direction=direction,
            sign=f"{direction}: the {start}; a positive score means that the clean activation helps the task",
            task=task.name, metric=setup.metric.name, effects=effects, clean=setup.clean, corrupted=setup.corrupted,
            provenance=setup.provenance(), higher_is_better=setup.metric.higher_is_better,
        )  # fmt: skip


def ablate_heads(
    wb: Workbench, task: Task, how: str = "mean", *, metric: Any = "logit_diff", batch_size: int = 25,
    memory: int = 1 << 30, seed: int = 0, progress: bool = True,
) -> HeadPatching:  # fmt: skip
    """Ablate single heads at all positions: "zero", "mean", "mean_positional", "resample" or "counterfactual".

    Args:
        seed: of "resample", which replaces a prompt by others of the nearest length, several times.

    Raises:
        TaskError, InterventionError, AttachError: as `patch_heads`.
    """
    with open_setup(wb, task, metric, batch_size=batch_size, memory=memory, seed=seed) as setup:
        setup.measure_baselines()
        effects = ablation_effects(setup, how, progress)
        heads = _heads(setup, "z")
        return HeadPatching(
            heads=tuple(name for *_, name in heads), layers=tuple(setup.graph.blocks[i] for i, *_ in heads),
            numbers=tuple(n for _, n, _ in heads), activation=f"{how} ablation", places=("all",), direction=NOISING,
            sign="noising: the head's output is replaced; a positive score means that the head helps the task",
            task=task.name, metric=setup.metric.name, effects=effects[:, None], clean=setup.clean,
            corrupted=setup.corrupted, provenance=setup.provenance(),
            higher_is_better=setup.metric.higher_is_better,
        )  # fmt: skip


def ablation_effects(setup: Setup, how: str, progress: bool = True) -> Tensor:
    """[head, example] of the metric with each head ablated, minus without."""
    find_ablation(how, twins=True)
    graph = setup.graph
    kept = torch.ones(len(graph.head_names), len(graph.senders), dtype=torch.bool)
    for row, name in enumerate(graph.head_names):
        kept[row, graph.sender_index[name]] = False
    return run_nodes(setup, kept, how, progress, "ablating heads") - setup.clean


def _heads(setup: Setup, activation: str) -> list[tuple[int, int, str]]:
    """(layer, number, label) of what has such an activation, by layer."""
    graph, part = setup.graph, activation if activation in "kv" else "q"
    names = [graph.receivers[column] for i in range(len(graph.layers)) for column in graph.columns(i, part)]
    return [(graph.receiver_spot(n).layer, graph.receiver_spot(n).number, label(n.partition("<")[0])) for n in names]


def _stream(setup: Setup, what: str, i: int) -> int:
    """The stream whose positions z, q, k or v of a layer has."""
    own = setup.graph.stream_of(i)
    return own - 1 if what in "kv" and setup.graph.layers[i].kind == "cross" else own


def _indices(setup: Setup, pair: Pair, what: str, i: int, where: list[Where]) -> list[Tensor | None]:
    """[batch, n] positions of each place for heads of layer i; empty where a decoder has no such place."""
    stream = _stream(setup, what, i)
    found: list[Tensor | None] = []
    for place in where:
        names = {place} if isinstance(place, (str, int)) else set(place or ())
        if stream and any(isinstance(name, str) and name != "end" for name in names):
            found.append(torch.empty(pair.size, 0, dtype=torch.long))
        else:
            found.append(setup.positions(pair, place, stream))
    return found


def _unless_absent(values: Tensor, index: Tensor | None) -> Tensor:
    return values if index is None or index.shape[1] else torch.full_like(values, torch.nan)


def _places(setup: Setup, positions: Any) -> list[Where]:
    if positions is not None:
        return [positions] if isinstance(positions, (str, int)) else list(positions)
    if len(setup.graph.streams) > 1:
        raise InterventionError(
            "an encoder and a decoder have positions of their own", hint='name them: positions=["S2", "end"]'
        )
    lengths = {int(n) for pair in setup.pairs for n in pair.last.tolist()}
    if len(lengths) != 1:
        raise InterventionError(
            f"prompts of {min(lengths) + 1} to {max(lengths) + 1} tokens have no common positions",
            hint="name the positions: positions=[\"S2\", \"end\"]",
        )  # fmt: skip
    return list(range(lengths.pop() + 1))


def _effects(
    setup: Setup, heads: list[tuple[int, int, str]], what: str, where: list[Where], direction: str, progress: bool
) -> Tensor:
    """[head, place, example] of z, q, k or v."""
    effects = torch.zeros(len(heads), len(where), len(setup.task), dtype=torch.float64)
    bar = tqdm(total=len(setup.pairs) * len(heads) * len(where), disable=not progress, desc=f"patching {what}")
    variants = [(h, w) for h in range(len(heads)) for w in range(len(where))]
    layers = [heads[h][0] for h, _ in variants]
    with torch.no_grad():
        for pair in setup.pairs:
            run, source, from_logits, clean_logits = _two_runs(setup, pair, what, direction)
            base = setup.measure(from_logits, pair, clean_logits)[0]
            most = setup.most(pair, tensors=24)
            for i in sorted(set(layers)):
                index = _indices(setup, pair, what, i, where)
                group = [n for n, layer in enumerate(layers) if layer == i]
                for first in range(0, len(group), most):
                    chunk = group[first : first + most]
                    chosen = [(heads[variants[n][0]][1], index[variants[n][1]]) for n in chunk]
                    hook = _replacing(source[what, i], chosen, pair.size)
                    out = setup.stream.run(run, pair.last, {(what, i): [hook]}, times=len(chunk), start=i)
                    values = setup.measure(out, pair, clean_logits, len(chunk)) - base
                    for row, n in enumerate(chunk):
                        h, w = variants[n]
                        effects[h, w, setup.rows(pair)] = _unless_absent(values[row], index[w])
                    bar.update(len(chunk))
    bar.close()
    return effects


def _two_runs(setup: Setup, pair: Pair, what: str, direction: str) -> tuple[Any, Kept, Tensor, Tensor]:
    """The batch that is run, the activations that are put in, and the logits of that batch and of the prompts."""
    into, out_of = (pair.clean, pair.twin) if direction == NOISING else (pair.twin, pair.clean)
    kept = Kept()
    hooks: dict[Key, list[Hook]] = {}
    if what in "qkv":
        hooks = {(what, i): [kept.keep((what, i))] for i in range(len(setup.graph.layers))}
    source_logits, source = setup.stream.record(out_of, pair.last, hooks, resume=False)
    source.tensors.update(kept.tensors)
    base_logits, _ = setup.stream.record(into, pair.last)
    return into, source, base_logits, base_logits if direction == NOISING else source_logits


def _replacing(new: Tensor, chosen: list[tuple[int, Tensor | None]], size: int) -> Hook:
    """Put `new` [batch, position, head, width] in place: in repeat n at the n-th of the chosen heads and positions."""

    def hook(old: Tensor) -> Tensor:
        made = old.clone().unflatten(0, (-1, size))
        rows = torch.arange(size, device=old.device)[:, None]
        for n, (head, index) in enumerate(chosen):
            if index is None:
                made[n, :, :, head] = new[:, :, head].to(old.dtype)
            else:
                made[n, rows, index, head] = new[rows, index, head].to(old.dtype)
        return made.flatten(0, 1)

    return hook


def _pattern_effects(
    setup: Setup, heads: list[tuple[int, int, str]], where: list[Where], direction: str, progress: bool
) -> Tensor:
    """[head, place, example]: the head's z is replaced by that of the other run's pattern and this run's values."""
    wb = setup.wb
    effects = torch.zeros(len(heads), len(where), len(setup.task), dtype=torch.float64)
    with torch.no_grad():
        for pair in tqdm(setup.pairs, disable=not progress, desc="patching patterns"):
            run, _, from_logits, clean_logits = _two_runs(setup, pair, "z", direction)
            base = setup.measure(from_logits, pair, clean_logits)[0]
            out_of = pair.twin if direction == NOISING else pair.clean
            with wb.capture(statistics=(), pattern=True, queries_keys=False) as patterns:
                wb.model(**out_of, **setup.stream.extra)
            with wb.capture(statistics=(), values=True) as own:
                wb.model(**run, **setup.stream.extra)
            most = setup.most(pair, tensors=24)
            for i in sorted({i for i, *_ in heads}):
                site = setup.stream.anatomy.layers[i].site.name
                weights, values = patterns[site].pattern.dense(), own[site].pattern.values
                if values is None:
                    raise InterventionError("the values of this attention are not seen", site=site)
                each = values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1).to(weights.dtype)
                z, index = (weights @ each).transpose(1, 2), _indices(setup, pair, "z", i, where)
                group = [(h, w) for h, head in enumerate(heads) if head[0] == i for w in range(len(where))]
                for first in range(0, len(group), most):
                    chunk = group[first : first + most]
                    hook = _replacing(z, [(heads[h][1], index[w]) for h, w in chunk], pair.size)
                    out = setup.stream.run(run, pair.last, {("z", i): [hook]}, times=len(chunk), start=i)
                    found = setup.measure(out, pair, clean_logits, len(chunk)) - base
                    for row, (h, w) in enumerate(chunk):
                        effects[h, w, setup.rows(pair)] = _unless_absent(found[row], index[w])
    return effects
