"""Path patching: what a head writes, seen through chosen receivers only (Wang et al. 2211.00593).

For each sender the prompt runs with the sender's output of the twin, all other heads frozen; what the receivers then
read is put into a further run in which nothing is frozen. With every head frozen at the patched positions, the first
run does not mix positions: only norms and MLPs act, so all senders go through them at once and no attention is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.graph import head_of
from workbench.analysis.circuits.prompts import Pair, Where, find_positions
from workbench.analysis.circuits.stream import Hook, Hooks, Kept, Key
from workbench.analysis.circuits.study import Study
from workbench.errors import InterventionError

Unit = tuple[str, ...]


@dataclass(frozen=True)
class Paths:
    """Which paths are patched.

    Attributes:
        receivers: such as ("logits",) or ("a9.h6<q>", "a9.h9<q>").
        senders: each one or several nodes that are patched together.
        positions: names or numbers of tokens; None for all.
        freeze_mlps: whether MLPs keep their clean output on the way to the receivers.
    """

    receivers: tuple[str, ...]
    senders: tuple[Unit, ...]
    positions: Where = "end"
    freeze_mlps: bool = False


def check_paths(study: Study, paths: Paths) -> None:
    """Refuse receivers that are none, and senders that come after every receiver.

    Raises:
        InterventionError: as said.
    """
    graph = study.graph
    if not paths.receivers or not paths.senders:
        raise InterventionError(f"there is no {'receiver' if not paths.receivers else 'sender'}")
    for name in paths.receivers:
        if name not in graph.receiver_index:
            raise InterventionError(f"{name!r} is no receiver", hint="logits, m3, or q, k or v of a head: a9.h6<q>")
    reach = max(graph.reads[graph.receiver_index[name]] for name in paths.receivers)
    for unit in paths.senders:
        for name in unit:
            if name not in graph.sender_index:
                raise InterventionError(f"{name!r} is no sender", hint="input, a head such as a9.h6, or an MLP: m3")
            if graph.sender_index[name] >= reach:
                raise InterventionError(
                    f"the sender {name} comes after the receivers {', '.join(paths.receivers[:4])}",
                    hint="a receiver reads what was written before it",
                )


def run_paths(study: Study, paths: Paths, progress: bool = True, note: str = "path patching") -> Tensor:
    """[sender, example] of the metric after patching each sender's paths."""
    check_paths(study, paths)
    found = torch.zeros(len(paths.senders), len(study.task), dtype=torch.float64)
    bar = tqdm(total=len(study.pairs) * len(paths.senders), disable=not progress, desc=note)
    with torch.no_grad():
        for pair in study.pairs:
            logits, clean, twin = study.record(pair)
            where = find_positions(study.task, study.wb.tokenizer, pair, paths.positions)
            if "logits" in paths.receivers and where is not None and not bool((where == pair.last[:, None]).any()):
                raise InterventionError(
                    "the logits are read at the last token, which the positions leave out",
                    hint='positions="end", or None for all',
                )
            index = torch.arange(pair.length, device=pair.last.device).expand(pair.size, -1) if where is None else where
            width = index.shape[1]
            most = study.most(pair, parts=max(4, 4 + 12 * width // pair.length))
            later = study.most(pair, parts=24)
            for first in range(0, len(paths.senders), most):
                units = paths.senders[first : first + most]
                flow = _Flow(study, pair, clean, twin, index, paths)
                received, changed = flow.run(units)
                values = _second(study, pair, logits, clean, received, index, len(units), later)
                plain = study.measure(logits, pair, logits)
                found[first : first + len(units), study.rows(pair)] = torch.where(changed.cpu(), values, plain)
                bar.update(len(units))
    bar.close()
    return found


class _Flow:
    """The first run: what the receivers of one batch read at the patched positions, for many senders at once."""

    def __init__(self, study: Study, pair: Pair, clean: Kept, twin: Kept, index: Tensor, paths: Paths) -> None:
        self.study, self.clean, self.twin, self.index, self.paths = study, clean, twin, index, paths
        self.layers = study.stream.anatomy.layers
        self.wanted = {name: study.graph.layer_of(name) for name in paths.receivers}

    def run(self, units: Sequence[Unit]) -> tuple[dict[str, Tensor], Tensor]:
        """What each receiver is given [unit, batch, n, …], and [unit, batch] bool: whether any differs from clean."""
        anatomy, graph = self.study.stream.anatomy, self.study.graph
        given: dict[str, Tensor] = {}
        delta = self._at(self.clean["input", 0]).new_zeros(len(units), *self._at(self.clean["input", 0]).shape)
        self._add(delta, units, "input", lambda: self._difference("input", 0))
        changed = torch.zeros(delta.shape[:2], dtype=torch.bool, device=delta.device)
        for i, layer in enumerate(self.layers):
            before = delta
            for name, at in self.wanted.items():
                if at == i and name != f"m{i}":
                    given[name] = self._projected(i, name, before)
                    changed |= (before != 0).flatten(2).any(-1)
            if i >= max(self.wanted.values()) and f"m{i}" not in self.wanted:
                break
            delta = delta.clone()
            self._heads(delta, units, i)
            if layer.mlp is None:
                continue
            reads = before if graph.layers[i].parallel else delta
            if f"m{i}" in self.wanted:
                norm = anatomy.function(layer.mlp_norm)
                given[f"m{i}"] = norm(self._at(self.clean["read_mlp", i]) + reads)
                changed |= (reads != 0).flatten(2).any(-1)
            if not self.paths.freeze_mlps:
                delta = delta + self._mlp(i, reads)
            if any(f"m{i}" in unit for unit in units):
                delta = self._replace_mlp(delta, units, i, reads)
        if "logits" in self.wanted:
            given["logits"] = self._at(self.clean["final", 0]) + delta
            changed |= (delta != 0).flatten(2).any(-1)
        return given, changed

    def _at(self, tensor: Tensor) -> Tensor:
        """[batch, n, …] of [batch, position, …], at the patched positions."""
        rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
        return tensor[rows, self.index]

    def _difference(self, what: str, i: int) -> Tensor:
        return self._at(self.twin[what, i]) - self._at(self.clean[what, i])

    def _add(self, delta: Tensor, units: Sequence[Unit], name: str, difference: object) -> None:
        for number, unit in enumerate(units):
            if name in unit:
                delta[number] += difference()  # type: ignore[operator]

    def _heads(self, delta: Tensor, units: Sequence[Unit], i: int) -> None:
        """Add what the senders among the heads of a layer write anew."""
        chosen = [
            (n, head[1]) for n, unit in enumerate(units) for name in unit if (head := head_of(name)) and head[0] == i
        ]
        if not chosen:
            return
        heads = sorted({head for _, head in chosen})
        slices = self.layers[i].w_o[heads].to(delta.dtype)
        written = torch.einsum("bnhw,hwd->hbnd", self._difference("z", i)[:, :, heads], slices)
        for number, which in chosen:
            delta[number] += written[heads.index(which)]

    def _projected(self, i: int, name: str, delta: Tensor) -> Tensor:
        """Queries, keys or values [unit, batch, n, width] that a receiver makes of the changed stream."""
        part = self.layers[i].parts[name[-2]]
        number = int(name.partition(".")[2].strip("hkv").partition("<")[0])
        read = self.study.stream.anatomy.function(part.norm)(self._at(self.clean["read", i]) + delta)
        bias = part.bias
        made = read @ part.weight[number].T.to(read.dtype)
        return made if bias is None else made + bias[number].to(read.dtype)

    def _mlp(self, i: int, reads: Tensor) -> Tensor:
        """What the MLP writes anew where what it reads has changed; exactly nothing elsewhere."""
        layer, anatomy = self.layers[i], self.study.stream.anatomy
        moved = (reads != 0).flatten(2).any(-1)
        new = torch.zeros_like(reads)
        if bool(moved.any()):
            clean = self._at(self.clean["read_mlp", i]).expand_as(reads)
            out = anatomy.function(layer.mlp)(anatomy.function(layer.mlp_norm)((clean + reads)[moved]))
            out = out if isinstance(out, Tensor) else out[0]
            new[moved] = out.reshape_as(new[moved]) - self._at(self.clean["mlp", i]).expand_as(reads)[moved]
        return new

    def _replace_mlp(self, delta: Tensor, units: Sequence[Unit], i: int, reads: Tensor) -> Tensor:
        """Where the MLP is a sender it writes what it wrote on the twin, whatever it reads."""
        mine = torch.tensor([f"m{i}" in unit for unit in units], device=delta.device)
        own = torch.zeros_like(reads) if self.paths.freeze_mlps else self._mlp(i, reads)
        return torch.where(mine[:, None, None, None], delta - own + self._difference("mlp", i), delta)


def _second(
    study: Study, pair: Pair, logits: Tensor, clean: Kept, received: dict[str, Tensor], index: Tensor, n: int, most: int
) -> Tensor:
    """[unit, batch] of the metric when the receivers, and nothing else, are given what they received."""
    graph, stream = study.graph, study.stream
    if set(received) == {"logits"}:
        place = (index == pair.last[:, None]).float().argmax(1)
        rows = torch.arange(pair.size, device=place.device)
        final = received["logits"][:, rows, place].flatten(0, 1)
        return study.measure(stream.unembed(final), pair, logits, n)
    start = min(graph.layer_of(name) for name in received)
    values = []
    for first in range(0, n, most):
        chunk = {name: tensor[first : first + most] for name, tensor in received.items()}
        times = next(iter(chunk.values())).shape[0]
        out = stream.run(
            pair.clean, pair.last, _hooks(study, chunk, index), times=times, start=min(start, len(stream.blocks) - 1)
        )
        values.append(study.measure(out, pair, logits, times))
    return torch.cat(values)


def _hooks(study: Study, received: dict[str, Tensor], index: Tensor) -> Hooks:
    """Hooks that put what the receivers received in its place, at the patched positions."""
    hooks: dict[Key, list[Hook]] = {}
    for name, tensor in received.items():
        i = study.graph.layer_of(name)
        flat = tensor.flatten(0, 1)
        if name == "logits":
            hooks.setdefault(("final", 0), []).append(_put(flat, index, tensor.shape[0], None))
        elif name == f"m{i}":
            hooks.setdefault(("mlp_in", i), []).append(_put(flat, index, tensor.shape[0], None))
        else:
            number = int(name.partition(".")[2].strip("hkv").partition("<")[0])
            hooks.setdefault((name[-2], i), []).append(_put(flat, index, tensor.shape[0], number))
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
