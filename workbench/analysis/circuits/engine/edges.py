"""Exact edge patching: forwards in which receivers read some senders as they are and others as something else.

Every receiver gets a residual stream of its own: what is there, plus, for each of its patched edges, the replacement of
the sender minus what the sender writes in this very forward. Several choices of edges run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.engine.module_hooks import Hook
from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.replacements import Replacements, replaced_nodes, stream_of
from workbench.analysis.circuits.engine.setup import Begin, Setup
from workbench.analysis.circuits.engine.stream import Kept, Key


def run_edges(
    setup: Setup, kept: Tensor, how: str = "counterfactual", progress: bool = True, note: str = "edges"
) -> Tensor:
    """[variant, example] of the metric when all edges but the kept ones are patched.

    Args:
        kept: [variant, sender, receiver] bool.
        how: what patched edges carry; see `Replacements`.
    """
    replacements = Replacements(setup, how)
    return _summed(setup, partial(_edges, kept, replacements), len(kept), replacements.draws, progress, note)


def _summed(setup: Setup, begin: Begin, n: int, draws: int, progress: bool, note: str) -> Tensor:
    """[variant, example] of what batches gave, part by part: the first variant, and [variant, batch] of some."""
    found = torch.zeros(n, len(setup.task), dtype=torch.float64)
    bar = tqdm(total=n * len(setup.pairs) * draws, disable=not progress, desc=note)
    with bar, torch.no_grad():
        for pair, parts in setup.over(begin):
            for first, measured in parts:
                found[first : first + len(measured), setup.rows(pair)] += measured / draws
                bar.update(len(measured))
    return found


def _edges(kept: Tensor, replacements: Replacements, setup: Setup) -> Callable[[Pair], Iterator[tuple[int, Tensor]]]:
    values_of = replacements.on(setup)
    widest = len(setup.graph.senders) + 2 * max(
        layer.n_heads + 2 * layer.n_kv_heads + layer.mlp for layer in setup.graph.layers
    )

    def run(pair: Pair) -> Iterator[tuple[int, Tensor]]:
        logits, clean, twin = setup.record(pair)
        most = setup.most(pair, tensors=widest + 16)
        for values in values_of.several(pair, clean, twin):
            for first in range(0, len(kept), most):
                patched = (~kept[first : first + most] & setup.graph.exists).to(logits.dtype)
                out = patch_edges(setup, pair, clean, values, patched)
                yield first, setup.measure(out, pair, logits, len(patched))

    return run


def run_nodes(
    setup: Setup, kept: Tensor, how: str = "counterfactual", progress: bool = True, note: str = "nodes"
) -> Tensor:
    """[variant, example] of the metric when the output of all senders but the kept ones is replaced.

    Args:
        kept: [variant, sender] bool.
        how: what replaces them; see `Replacements`.
    """
    replacements = Replacements(setup, how)
    return _summed(setup, partial(_nodes, kept, replacements), len(kept), replacements.draws, progress, note)


def _nodes(kept: Tensor, replacements: Replacements, setup: Setup) -> Callable[[Pair], Iterator[tuple[int, Tensor]]]:
    values_of = replacements.on(setup)

    def run(pair: Pair) -> Iterator[tuple[int, Tensor]]:
        logits, clean, twin = setup.record(pair)
        most = setup.most(pair, tensors=24)
        for values in values_of.several(pair, clean, twin):
            for first in range(0, len(kept), most):
                some = kept[first : first + most]
                hooks = {key: [hook] for key, hook in replaced_nodes(setup, some, values, pair.size)}
                start = 0 if any(what == "input" for what, _ in hooks) else min((i for _, i in hooks), default=0)
                out = setup.stream.run(pair.clean, pair.scored, hooks, times=len(some), start=start)
                yield first, setup.measure(out, pair, logits, len(some))

    return run


def patch_edges(setup: Setup, pair: Pair, clean: Kept, values: Kept, patched: Tensor) -> Tensor:
    """Logits [variant · batch, vocab] with edges patched by `patched` [variant, sender, receiver], 1 for wholly.

    Gradients flow to `patched`. Layers below the first that has a patched edge are not run again.
    """
    touched = (patched.detach() != 0).flatten(0, 1).any(0)
    graph = setup.graph
    layers = [graph.layer_of(graph.receivers[r]) for r in touched.nonzero()[:, 0].tolist()]
    start = min([*layers, len(graph.layers) - 1])
    run = _Patched(setup, pair, clean, values, patched, start)
    return setup.stream.run(pair.clean, pair.scored, run.hooks(), times=len(patched), start=start)


class _Patched:
    """One forward, in which the differences of the senders so far are kept."""

    def __init__(self, setup: Setup, pair: Pair, clean: Kept, values: Kept, patched: Tensor, start: int) -> None:
        self.setup, self.pair, self.clean, self.values = setup, pair, clean, values
        self.patched, self.start = patched.to(clean["input", 0].device), start
        self.times, self.layers = len(patched), setup.stream.anatomy.layers
        self.reading: dict[Key, Tensor] = {}
        # By stream [variant, sender, batch, position, d_model], in the order of the graph.
        self.differences: list[list[Tensor]] = [[] for _ in setup.graph.streams]
        for s in range(len(setup.graph.streams)):
            self._unchanged(("input", s))
            if s < setup.graph.stream_of(start):
                self.reading["final", s] = clean["final", s].repeat(self.times, 1, 1)
        for i in range(start):
            for what in ("z", "mlp"):
                if (what, i) in clean:
                    self._unchanged((what, i))

    def hooks(self) -> dict[Key, list[Hook]]:
        """For all layers from the start on."""
        graph = self.setup.graph
        made: dict[Key, list[Hook]] = {self.setup.stream.end: [self._final]}
        for s in range(graph.stream_of(self.start), len(graph.streams) - 1):
            made["final", s] = [self._stash(("final", s))]
        for i, layer in enumerate(self.layers):
            if i < self.start:
                continue
            made["read", i] = [self._stash(("read", i))]
            for part in layer.projections:
                made[part, i] = [self._heads(part, i)]
            if layer.mixer is not None:
                made["x", i] = [self._whole("x", "read", i, layer.mixer_norm)]
            made["z", i] = [self._writes(("z", i))]
            if layer.mlp is not None:
                made["read_mlp", i] = [self._stash(("read_mlp", i))]
                made["mlp_in", i] = [self._whole("mlp", "read_mlp", i, layer.mlp_norm)]
                made["mlp", i] = [self._writes(("mlp", i))]
        return made

    def _unchanged(self, key: Key) -> None:
        """Senders that write what they wrote on the prompt."""
        self._add(key, self.clean[key].expand(self.times, *self.clean[key].shape))

    def _add(self, key: Key, now: Tensor) -> None:
        """Keep replacement minus present output of the senders at a place."""
        difference = self.values[key] - now
        mine = self.differences[stream_of(self.setup, key)]
        if key[0] == "z":
            w_o = self.layers[key[1]].w_o.to(difference.dtype)
            mine.append(torch.einsum("nbthw,hwd->nhbtd", difference, w_o))
        elif key[0] == "mlp":
            mine.append(self.layers[key[1]].added_by_mlp(difference)[:, None])
        else:
            mine.append(difference[:, None])

    def _writes(self, key: Key) -> Hook:
        def hook(value: Tensor) -> None:
            self._add(key, value.unflatten(0, (self.times, -1)))

        return hook

    def _stash(self, key: Key) -> Hook:
        def hook(value: Tensor) -> None:
            self.reading[key] = value.clone()

        return hook

    def _senders(self, which: int) -> Tensor:
        """[variant, sender, batch, position, d_model]: all differences of a stream so far, put together once."""
        mine = self.differences[which]
        if len(mine) > 1:
            mine[:] = [torch.cat(mine, dim=1)]
        return mine[0]

    def _moved(self, stream: Tensor, columns: list[int]) -> Tensor:
        """[variant, receiver, batch, position, d_model]: the streams of some receivers that read the same senders."""
        graph = self.setup.graph
        reads, which = graph.reads[columns[0]], graph.receiver_spot(graph.receivers[columns[0]]).stream
        senders = self._senders(which)[:, : len(reads)]
        mask = self.patched[:, reads.start : reads.stop, columns].to(senders.dtype)
        moved = (mask.mT @ senders.flatten(2)).unflatten(2, senders.shape[2:])
        return stream.unflatten(0, (self.times, -1))[:, None] + moved.to(stream.dtype)

    def _alone(self, stream: Tensor, columns: list[int]) -> Tensor:
        """[variant · batch, position, d_model]: the stream of a single receiver."""
        return self._moved(stream, columns)[:, 0].flatten(0, 1)

    def _chosen(self, columns: range) -> list[int]:
        """Those of the columns in which anything is patched."""
        any_edge = (self.patched[:, :, columns.start : columns.stop].detach() != 0).flatten(0, 1).any(0)
        return [columns[j] for j in any_edge.nonzero()[:, 0].tolist()]

    def _heads(self, part: str, i: int) -> Hook:
        """The projection of each head's own stream in the place of that of the common one."""
        mine, anatomy = self.setup.graph.columns(i, part), self.setup.stream.anatomy

        def hook(old: Tensor) -> Tensor | None:
            columns = self._chosen(mine)
            if not columns:
                return None
            reader = self.layers[i].projections[part]
            heads = [column - mine.start for column in columns]
            read = self.reading[anatomy.read_at(i, part)]
            streams = anatomy.function(reader.norm)(self._moved(read, columns))
            made = torch.einsum("nrbtd,rwd->nbtrw", streams, reader.weight[heads].to(streams.dtype)).flatten(0, 1)
            made = made if reader.bias is None else made + reader.bias[heads].to(made.dtype)
            return old.index_copy(2, torch.tensor(heads, device=old.device), made.to(old.dtype))

        return hook

    def _whole(self, what: str, read: str, i: int, norm: str | None) -> Hook:
        """Its own stream, behind its norm, for an MLP or a mixer."""
        mine = self.setup.graph.columns(i, what)

        def hook(old: Tensor) -> Tensor | None:
            columns = self._chosen(mine)
            if not columns:
                return None
            made: Tensor = self.setup.stream.anatomy.function(norm)(self._alone(self.reading[read, i], columns))
            return made

        return hook

    def _final(self, old: Tensor) -> Tensor | None:
        last = len(self.setup.graph.receivers) - 1
        columns = self._chosen(range(last, last + 1))
        return self._alone(old, columns) if columns else None
