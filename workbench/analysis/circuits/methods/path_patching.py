"""Path patching: what a head writes, seen through chosen receivers only (Wang et al. 2211.00593).

For each sender the prompt runs with the sender's output of the twin, all other heads frozen; what the receivers then
read is put into a further run in which nothing is frozen. With every head frozen at the patched positions, the first
run does not mix positions: only norms and MLPs act, so all senders go through them at once and no attention is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.engine.module_hooks import Hook
from workbench.analysis.circuits.engine.prompts import Pair, Where
from workbench.analysis.circuits.engine.setup import Setup
from workbench.analysis.circuits.engine.stream import Hooks, Kept, Key
from workbench.errors import InterventionError

Unit = tuple[str, ...]


@dataclass(frozen=True)
class Paths:
    """Which paths are patched.

    Attributes:
        receivers: such as ("logits",) or ("a9.h6<q>", "a9.h9<q>").
        senders: each one or several nodes that are patched together.
        positions: names or numbers of tokens of the stream that a receiver reads; None for all.
        freeze_mlps: whether MLPs keep their clean output on the way to the receivers.
    """

    receivers: tuple[str, ...]
    senders: tuple[Unit, ...]
    positions: Where = "end"
    freeze_mlps: bool = False


def check_paths(setup: Setup, paths: Paths) -> None:
    """Refuse receivers that are none, and senders that come after every receiver.

    Raises:
        InterventionError: as said.
    """
    graph = setup.graph
    if not paths.receivers or not paths.senders:
        raise InterventionError(f"there is no {'receiver' if not paths.receivers else 'sender'}")
    for name in paths.receivers:
        graph.receiver_spot(name)
    read = graph.exists[:, [graph.receiver_index[name] for name in paths.receivers]].any(1)
    for unit in paths.senders:
        for name in unit:
            graph.sender(name)
            if not bool(read[graph.sender_index[name]]):
                raise InterventionError(
                    f"the sender {name} comes after the receivers {', '.join(paths.receivers[:4])}, or writes to "
                    "another stream",
                    hint="a receiver reads what was written before it to its own stream",
                )


def run_paths(setup: Setup, paths: Paths, progress: bool = True, note: str = "path patching") -> Tensor:
    """[sender, example] of the metric after patching each sender's paths."""
    check_paths(setup, paths)
    found = torch.zeros(len(paths.senders), len(setup.task), dtype=torch.float64)
    bar = tqdm(total=len(setup.pairs) * len(paths.senders), disable=not progress, desc=note)
    with bar, torch.no_grad():
        for pair, parts in setup.over(partial(_patched, paths)):
            for first, values in parts:
                found[first : first + len(values), setup.rows(pair)] = values
                bar.update(len(values))
    return found


def _patched(paths: Paths, setup: Setup) -> Callable[[Pair], Iterator[tuple[int, Tensor]]]:
    """Of a batch, part by part: the first sender, and [sender, batch] of the metric of some."""
    streams = sorted({setup.graph.receiver_spot(name).stream for name in paths.receivers})

    def run(pair: Pair) -> Iterator[tuple[int, Tensor]]:
        logits, clean, twin = setup.record(pair)
        index = {stream: _index(setup, pair, paths, stream) for stream in streams}
        share = max(index[stream].shape[1] / setup.length(pair, stream) for stream in streams)
        most = setup.most(pair, tensors=max(4, 4 + int(12 * share)))
        later = setup.most(pair, tensors=24)
        flows = [_Flow(setup, clean, twin, index[stream], paths, stream) for stream in streams]
        for first in range(0, len(paths.senders), most):
            units = paths.senders[first : first + most]
            received: dict[str, Tensor] = {}
            changed = torch.zeros(len(units), pair.size, dtype=torch.bool, device=logits.device)
            for flow in flows:
                given, differs = flow.run(units)
                received |= given
                changed |= differs
            values = _second(setup, pair, logits, received, index, len(units), later)
            yield first, torch.where(changed.cpu(), values, setup.measure(logits, pair, logits))

    return run


def _index(setup: Setup, pair: Pair, paths: Paths, stream: int) -> Tensor:
    """[batch, n] the patched positions of a stream."""
    where = setup.positions(pair, paths.positions, stream)
    if where is None:
        return torch.arange(setup.length(pair, stream), device=pair.last.device).expand(pair.size, -1)
    end = stream == setup.stream.end[1]
    if end and "logits" in paths.receivers and not bool(_among(pair.scored, where).all()):
        several = pair.scored.shape[1] > 1
        raise InterventionError(
            "the logits are read at several tokens, some of which the positions leave out"
            if several
            else "the logits are read at the last token, which the positions leave out",
            hint='Stage(positions="scored"), for those' if several else 'positions="scored", or None for all',
        )
    return where


def _among(wanted: Tensor, where: Tensor) -> Tensor:
    """[batch, n] bool: which of the wanted columns [batch, n] are among others [batch, m]."""
    return (wanted[:, :, None] == where[:, None]).any(-1)


class _Flow:
    """The first run: what the receivers of one stream read at the patched positions, for many senders at once."""

    def __init__(self, setup: Setup, clean: Kept, twin: Kept, index: Tensor, paths: Paths, stream: int) -> None:
        self.setup, self.clean, self.twin, self.index, self.paths = setup, clean, twin, index, paths
        self.layers, self.stream = setup.stream.anatomy.layers, stream
        graph = setup.graph
        self.here = [i for i in range(len(self.layers)) if graph.stream_of(i) == stream]
        spots = {name: graph.receiver_spot(name) for name in paths.receivers}
        # Receivers by the layer that they are in, and those that read what the stream is in the end.
        self.wanted = {name: spot for name, spot in spots.items() if spot.stream == stream and spot.layer in self.here}
        self.at_end = {name: spot for name, spot in spots.items() if spot.stream == stream and name not in self.wanted}

    def run(self, units: Sequence[Unit]) -> tuple[dict[str, Tensor], Tensor]:
        """What each receiver is given [unit, batch, n, …], and [unit, batch] bool: whether any differs from clean."""
        anatomy, graph = self.setup.stream.anatomy, self.setup.graph
        given: dict[str, Tensor] = {}
        start = self._at(self.clean["input", self.stream])
        delta = start.new_zeros(len(units), *start.shape)
        self._inputs(delta, units)
        changed = torch.zeros(delta.shape[:2], dtype=torch.bool, device=delta.device)
        deepest = max((spot.layer for spot in self.wanted.values()), default=-1)
        before = delta
        for i in self.here:
            layer = self.layers[i]
            before = before if graph.layers[i].beside else delta
            for name, spot in self.wanted.items():
                if spot.layer == i and spot.what != "mlp":
                    given[name] = self._projected(name, before)
                    changed |= (before != 0).flatten(2).any(-1)
            mlp = next((name for name, spot in self.wanted.items() if (spot.layer, spot.what) == (i, "mlp")), None)
            if i >= deepest and mlp is None and not self.at_end:
                break
            delta = delta.clone()
            self._heads(delta, units, i)
            if layer.mlp is None:
                continue
            reads = before if graph.layers[i].parallel else delta
            if mlp is not None:
                norm = anatomy.function(layer.mlp_norm)
                given[mlp] = norm(self._at(self.clean["read_mlp", i]) + reads)
                changed |= (reads != 0).flatten(2).any(-1)
            if not self.paths.freeze_mlps:
                delta = delta + self._mlp(i, reads)
            delta = self._replace_mlp(delta, units, i, reads)
        for name, spot in self.at_end.items():
            final = self._at(self.clean["final", self.stream]) + delta
            given[name] = final if spot.what == "logits" else self._projected(name, delta)
            changed |= (delta != 0).flatten(2).any(-1)
        return given, changed

    def _at(self, tensor: Tensor) -> Tensor:
        """[batch, n, …] of [batch, position, …], at the patched positions."""
        rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
        return tensor[rows, self.index]

    def _difference(self, what: str, i: int) -> Tensor:
        return self._at(self.twin[what, i]) - self._at(self.clean[what, i])

    def _inputs(self, delta: Tensor, units: Sequence[Unit]) -> None:
        """Add the twin's input where it is a sender."""
        name = self.setup.graph.senders[self.setup.graph.inputs[self.stream]]
        for number, unit in enumerate(units):
            if name in unit:
                delta[number] += self._difference("input", self.stream)

    def _heads(self, delta: Tensor, units: Sequence[Unit], i: int) -> None:
        """Add what the senders among the heads of a layer write anew."""
        spots = [(n, self.setup.graph.sender(name)) for n, unit in enumerate(units) for name in unit]
        chosen = [(n, spot.number) for n, spot in spots if (spot.layer, spot.what) == (i, "head")]
        if not chosen:
            return
        heads = sorted({head for _, head in chosen})
        slices = self.layers[i].w_o[heads].to(delta.dtype)
        written = torch.einsum("bnhw,hwd->hbnd", self._difference("z", i)[:, :, heads], slices)
        for number, which in chosen:
            delta[number] += written[heads.index(which)]

    def _projected(self, name: str, delta: Tensor) -> Tensor:
        """What a receiver makes of the changed stream [unit, batch, n, width]: queries, keys, values, or x."""
        spot, anatomy = self.setup.graph.receiver_spot(name), self.setup.stream.anatomy
        if spot.what == "mixer":
            norm = anatomy.function(self.layers[spot.layer].mixer_norm)
            given: Tensor = norm(self._at(self.clean["read", spot.layer]) + delta)
            return given
        part = self.layers[spot.layer].projections[spot.part]
        stream = self._at(self.clean[anatomy.read_at(spot.layer, spot.part)])
        read = anatomy.function(part.norm)(stream + delta)
        bias = part.bias
        made = read @ part.weight[spot.number].T.to(read.dtype)
        return made if bias is None else made + bias[spot.number].to(read.dtype)

    def _mlp(self, i: int, reads: Tensor) -> Tensor:
        """What the MLP writes anew where what it reads has changed; exactly nothing elsewhere."""
        layer, anatomy = self.layers[i], self.setup.stream.anatomy
        moved = (reads != 0).flatten(2).any(-1)
        new = torch.zeros_like(reads)
        if bool(moved.any()):
            clean = self._at(self.clean["read_mlp", i]).expand_as(reads)
            out = anatomy.mlp(i, anatomy.function(layer.mlp_norm)((clean + reads)[moved]))
            change = out.reshape_as(new[moved]) - self._at(self.clean["mlp", i]).expand_as(reads)[moved]
            new[moved] = layer.added_by_mlp(change.to(new.dtype))
        return new

    def _replace_mlp(self, delta: Tensor, units: Sequence[Unit], i: int, reads: Tensor) -> Tensor:
        """Where the MLP is a sender it writes what it wrote on the twin, whatever it reads."""
        spots = [[self.setup.graph.sender(name) for name in unit] for unit in units]
        mine = torch.tensor([any((s.layer, s.what) == (i, "mlp") for s in unit) for unit in spots], device=delta.device)
        if not bool(mine.any()):
            return delta
        own = torch.zeros_like(reads) if self.paths.freeze_mlps else self._mlp(i, reads)
        twin = self.layers[i].added_by_mlp(self._difference("mlp", i))
        return torch.where(mine[:, None, None, None], delta - own + twin, delta)


def _second(
    setup: Setup, pair: Pair, logits: Tensor, received: dict[str, Tensor], index: dict[int, Tensor], n: int, most: int
) -> Tensor:
    """[unit, batch] of the metric when the receivers, and nothing else, are given what they received."""
    graph, stream = setup.graph, setup.stream
    if set(received) == {"logits"}:
        place = (index[stream.end[1]][:, None] == pair.scored[:, :, None]).float().argmax(2)
        rows = torch.arange(pair.size, device=place.device)[:, None]
        final = received["logits"][:, rows, place]
        made = stream.unembed(final.flatten(0, 2))
        return setup.measure(made.view(n * pair.size, -1, made.shape[-1]), pair, logits, n)
    start = min(graph.layer_of(name) for name in received)
    values = []
    for first in range(0, n, most):
        chunk = {name: tensor[first : first + most] for name, tensor in received.items()}
        times = next(iter(chunk.values())).shape[0]
        out = stream.run(
            pair.clean, pair.scored, _hooks(setup, chunk, index), times=times, start=min(start, len(stream.blocks) - 1)
        )
        values.append(setup.measure(out, pair, logits, times))
    return torch.cat(values)


def _hooks(setup: Setup, received: dict[str, Tensor], index: dict[int, Tensor]) -> Hooks:
    """Hooks that put what the receivers received in its place, at the patched positions."""
    hooks: dict[Key, list[Hook]] = {}
    for name, tensor in received.items():
        spot = setup.graph.receiver_spot(name)
        whole = {"logits": setup.stream.end, "mlp": ("mlp_in", spot.layer), "mixer": ("x", spot.layer)}
        key = whole.get(spot.what, (spot.part, spot.layer))
        number = None if spot.what in whole else spot.number
        put = _put(tensor.flatten(0, 1), index[spot.stream], tensor.shape[0], number)
        hooks.setdefault(key, []).append(put)
    return hooks


def _put(new: Tensor, index: Tensor, times: int, head: int | None) -> Hook:
    where = index.repeat(times, 1)

    def hook(old: Tensor) -> Tensor:
        rows = torch.arange(old.shape[0], device=old.device)[:, None]
        made = old.clone()
        if head is None:
            made[rows, where] = new.to(old.dtype)
        else:
            made[rows, where, head] = new.to(old.dtype)
        return made

    return hook
