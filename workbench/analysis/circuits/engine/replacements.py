"""Replacements for nodes that are left out: zeros, a mean, other prompts' activations, or the twin's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.circuits.engine.donors import batch_of, donors_of
from workbench.analysis.circuits.engine.module_hooks import Hook
from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.setup import Setup
from workbench.analysis.circuits.engine.stream import Kept, Key
from workbench.session.ablations import find_ablation
from workbench.session.resampling import aligned


class Replacements:
    """What takes the place of what senders write, batch by batch.

    "counterfactual" takes it from each prompt's twin; "resample" from other prompts, aligned on real positions, several
    times (see `workbench.session.resampling`); "mean" averages over all prompts and their real positions,
    "mean_positional" over prompts at each real position; "zero" is nothing.

    Attributes:
        draws: how often each prompt is replaced, once if it is not resampled; the metric is averaged over them.

    Raises:
        InterventionError: an unknown name; "resample" without two prompts that differ.
    """

    def __init__(self, setup: Setup, how: str) -> None:
        self.kind = find_ablation(how, twins=True)
        self.setup, self.draws = setup, 1
        self.means = self._means() if self.kind.needs == "reference" and not self.kind.singles else {}
        self.donors: list[list[int]] = []
        if how == "resample":
            self.donors = donors_of(setup)
            self.draws = len(self.donors[0])
            setup.drawn = {"draws": self.draws, "seed": setup.seed}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "setup"}  # a worker has its own

    def on(self, setup: Setup) -> Replacements:
        """The same on a setup that is opened anew."""
        self.setup = setup
        return self

    def several(self, pair: Pair, clean: Kept, twin: Kept) -> list[Kept]:
        """The replacement of each sender in a batch, for each draw; the tensors may be broadcast."""
        if self.donors:
            return [self._of_donors(pair, clean, draw) for draw in range(self.draws)]
        found = Kept()
        for key in sender_keys(self.setup):
            if self.kind.needs == "twins":
                found.tensors[key] = twin[key]
            elif self.kind.needs == "nothing":
                found.tensors[key] = torch.zeros_like(clean[key])
            elif self.kind.by_position:
                real = self.setup.real(pair, stream_of(self.setup, key))
                rank = (real.cumsum(1) - 1).clamp_min(0).to(self.means[key].device)
                found.tensors[key] = self.means[key][0][rank]
            else:
                found.tensors[key] = self.means[key].expand_as(clean[key])
        return [found]

    def _of_donors(self, pair: Pair, clean: Kept, draw: int) -> Kept:
        """What other prompts write, at the positions that correspond to those of each prompt."""
        setup = self.setup
        chosen = [self.donors[i][draw] for i in range(pair.start, pair.start + pair.size)]
        donors = batch_of(setup.pairs, chosen)
        _, seen = setup.stream.record(donors.clean, donors.scored, resume=False)
        places = [aligned(setup.real(pair, s), setup.real(donors, s)) for s in range(len(setup.graph.streams))]
        found = Kept()
        for key in sender_keys(setup):
            index = places[stream_of(setup, key)]
            rows = torch.arange(pair.size, device=index.device)[:, None]
            found.tensors[key] = seen[key][rows, index]
        return found

    def _means(self) -> dict[Key, Tensor]:
        """[1, rank among real positions or 1, …] for each place; padding does not count."""
        setup = self.setup
        streams = range(len(setup.graph.streams))
        longest = [max(setup.length(pair, s) for pair in setup.pairs) for s in streams]
        totals: dict[Key, Tensor] = {}
        counts = [torch.zeros(n, dtype=torch.float64) for n in longest]
        with torch.no_grad():
            for pair in setup.pairs:
                _, clean = setup.stream.record(pair.clean, pair.scored)
                real = [setup.real(pair, s) for s in streams]
                ranks = [(each.cumsum(1) - 1)[each] for each in real]
                for s in streams:
                    counts[s] += torch.bincount(ranks[s].cpu(), minlength=longest[s])
                for key in sender_keys(setup):
                    s = stream_of(setup, key)
                    value = clean[key].double()[real[s]]
                    total = totals.setdefault(key, value.new_zeros(longest[s], *value.shape[1:]))
                    total.index_add_(0, ranks[s].to(value.device), value)
                dtype = clean["input", 0].dtype
        made = {}
        for key, total in totals.items():
            count = counts[stream_of(setup, key)].to(total.device)
            by_place = total / count.clamp(min=1).view(-1, *[1] * (total.dim() - 1))
            over_all = total.sum(0, keepdim=True) / count.sum()
            made[key] = (by_place if self.kind.by_position else over_all)[None].to(dtype)
        return made


def sender_keys(setup: Setup) -> list[Key]:
    """Places where senders write: the inputs, and heads and MLP of each layer."""
    layers = enumerate(setup.graph.layers)
    inputs = [("input", s) for s in range(len(setup.graph.streams))]
    return [*inputs, *((what, i) for i, layer in layers for what in ("z", *(["mlp"] if layer.mlp else [])))]


def stream_of(setup: Setup, key: Key) -> int:
    """Index of the stream that the senders at a place write to."""
    what, i = key
    return i if what == "input" else setup.graph.stream_of(i)


def replaced_nodes(setup: Setup, kept: Tensor, values: Kept, size: int) -> Iterator[tuple[Key, Hook]]:
    """Hooks that put `values` in the place of the senders that are not kept.

    Args:
        kept: [variant, sender] bool, for variants that run side by side. size: of one batch.
    """
    graph = setup.graph
    for i, layer in enumerate(graph.layers):
        first = graph.first_sender(i)
        heads = kept[:, first : first + layer.n_heads]
        if not bool(heads.all()):
            yield ("z", i), _mixed(heads[:, None, None, :, None], values["z", i], size)
        if layer.mlp and not bool(kept[:, first + layer.n_heads].all()):
            yield ("mlp", i), _mixed(kept[:, first + layer.n_heads][:, None, None, None], values["mlp", i], size)
    for s, row in enumerate(graph.inputs):
        if not bool(kept[:, row].all()):
            yield ("input", s), _mixed(kept[:, row][:, None, None, None], values["input", s], size)


def _mixed(keep: Tensor, value: Tensor, size: int) -> Hook:
    def hook(old: Tensor) -> Tensor:
        apart = old.unflatten(0, (-1, size))
        return torch.where(keep.to(old.device), apart, value.to(old.dtype)).flatten(0, 1)

    return hook
