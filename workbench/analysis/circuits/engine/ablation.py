"""Replacements for nodes that are left out: zeros, a mean, another prompt's activations, or the twin's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.setup import Setup
from workbench.analysis.circuits.engine.stream import Hook, Kept, Key
from workbench.errors import InterventionError
from workbench.session.ablations import find_ablation


class Ablation:
    """Replacements for what senders write, batch by batch.

    "counterfactual" takes them from each prompt's twin; "resample" from the next prompt of the batch, position by
    position; "mean" averages over all prompts and positions, "mean_positional" over prompts; "zero" is nothing.

    Raises:
        InterventionError: an unknown name; "resample" in batches of one.
    """

    def __init__(self, setup: Setup, how: str) -> None:
        find_ablation(how, twins=True)
        if how == "resample" and any(pair.size == 1 for pair in setup.pairs):
            raise InterventionError(
                "there is a batch of one example, which has no other to resample from", hint="choose another batch_size"
            )
        self.setup, self.how = setup, how
        self.means = self._means() if how.startswith("mean") else {}

    def keys(self) -> list[Key]:
        """Places where senders write."""
        return sender_keys(self.setup)

    def of(self, pair: Pair, clean: Kept, twin: Kept) -> Kept:
        """The replacement of each sender in a batch; the tensors may be broadcast."""
        found = Kept()
        for key in self.keys():
            if self.how == "counterfactual":
                found.tensors[key] = twin[key]
            elif self.how == "resample":
                found.tensors[key] = clean[key].roll(1, 0)
            elif self.how == "zero":
                found.tensors[key] = torch.zeros_like(clean[key])
            else:
                mean, length = self.means[key], clean[key].shape[1]
                found.tensors[key] = (mean[:, :length] if mean.shape[1] > 1 else mean).expand_as(clean[key])
        return found

    def _means(self) -> dict[Key, Tensor]:
        """[1, position or 1, …] for each place; padding does not count."""
        setup = self.setup
        streams = range(len(setup.graph.streams))
        longest = [max(setup.length(pair, s) for pair in setup.pairs) for s in streams]
        totals: dict[Key, Tensor] = {}
        counts = [torch.zeros(n, dtype=torch.float64) for n in longest]
        with torch.no_grad():
            for pair in setup.pairs:
                _, clean = setup.stream.record(pair.clean, pair.last)
                real = [pair.mask(s, setup.length(pair, s)).double() for s in streams]
                for s in streams:
                    counts[s][: real[s].shape[1]] += real[s].sum(0).cpu()
                for key in self.keys():
                    s, value = stream_of(setup, key), clean[key].double()
                    value = (value * real[s].view(*real[s].shape, *[1] * (value.dim() - 2))).sum(0)
                    total = totals.setdefault(key, value.new_zeros(longest[s], *value.shape[1:]))
                    total[: len(value)] += value
                dtype = clean["input", 0].dtype
        made = {}
        for key, total in totals.items():
            count = counts[stream_of(setup, key)].to(total.device)
            by_place = total / count.clamp(min=1).view(-1, *[1] * (total.dim() - 1))
            over_all = total.sum(0, keepdim=True) / count.sum()
            made[key] = (by_place if self.how == "mean_positional" else over_all)[None].to(dtype)
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
