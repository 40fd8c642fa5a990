"""Exact edge patching: forwards in which receivers read some senders as they are and others as something else.

Every receiver gets a residual stream of its own: what is there, plus, for each of its patched edges, the replacement of
the sender minus what the sender writes in this very forward. Several choices of edges run side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.ablation import Ablation, replaced_nodes
from workbench.analysis.circuits.prompts import Pair
from workbench.analysis.circuits.stream import Hook, Kept, Key
from workbench.analysis.circuits.study import Study


def run_edges(
    study: Study, kept: Tensor, how: str = "counterfactual", progress: bool = True, note: str = "edges"
) -> Tensor:
    """[variant, example] of the metric when all edges but the kept ones are patched.

    Args:
        kept: [variant, sender, receiver] bool.
        how: what patched edges carry; see `Ablation`.
    """
    ablation = Ablation(study, how)
    found = torch.zeros(len(kept), len(study.task), dtype=torch.float64)
    widest = len(study.graph.senders) + 2 * max(
        len(study.graph.receivers_of(i)) for i in range(len(study.graph.layers))
    )
    bar = tqdm(total=len(kept) * len(study.pairs), disable=not progress, desc=note)
    with torch.no_grad():
        for pair in study.pairs:
            logits, clean, twin = study.record(pair)
            values = ablation.of(pair, clean, twin)
            most = study.most(pair, parts=widest + 16)
            for first in range(0, len(kept), most):
                patched = (~kept[first : first + most] & study.graph.exists).to(logits.dtype)
                out = patch_edges(study, pair, clean, values, patched)
                found[first : first + most, study.rows(pair)] = study.measure(out, pair, logits, len(patched))
                bar.update(len(patched))
    bar.close()
    return found


def run_nodes(
    study: Study, kept: Tensor, how: str = "counterfactual", progress: bool = True, note: str = "nodes"
) -> Tensor:
    """[variant, example] of the metric when the output of all senders but the kept ones is replaced.

    Args:
        kept: [variant, sender] bool.
        how: what replaces them; see `Ablation`.
    """
    ablation = Ablation(study, how)
    found = torch.zeros(len(kept), len(study.task), dtype=torch.float64)
    bar = tqdm(total=len(kept) * len(study.pairs), disable=not progress, desc=note)
    with torch.no_grad():
        for pair in study.pairs:
            logits, clean, twin = study.record(pair)
            values = ablation.of(pair, clean, twin)
            most = study.most(pair, parts=24)
            for first in range(0, len(kept), most):
                part = kept[first : first + most]
                hooks = {key: [hook] for key, hook in replaced_nodes(study, part, values, pair.size)}
                start = 0 if ("input", 0) in hooks else min((i for _, i in hooks), default=0)
                out = study.stream.run(pair.clean, pair.last, hooks, times=len(part), start=start)
                found[first : first + most, study.rows(pair)] = study.measure(out, pair, logits, len(part))
                bar.update(len(part))
    bar.close()
    return found


def patch_edges(study: Study, pair: Pair, clean: Kept, values: Kept, patched: Tensor) -> Tensor:
    """Logits [variant · batch, vocab] with edges patched by `patched` [variant, sender, receiver], 1 for wholly.

    Gradients flow to `patched`. Layers below the first that has a patched edge are not run again.
    """
    touched = (patched.detach() != 0).flatten(0, 1).any(0)
    graph = study.graph
    layers = [graph.layer_of(graph.receivers[r]) for r in touched.nonzero()[:, 0].tolist()]
    start = min([*layers, len(graph.layers) - 1])
    run = _Patched(study, pair, clean, values, patched, start)
    return study.stream.run(pair.clean, pair.last, run.hooks(), times=len(patched), start=start)


class _Patched:
    """One forward, in which the differences of the senders so far are kept."""

    def __init__(self, study: Study, pair: Pair, clean: Kept, values: Kept, patched: Tensor, start: int) -> None:
        self.study, self.pair, self.clean, self.values = study, pair, clean, values
        self.patched, self.start = patched.to(clean["input", 0].device), start
        self.times, self.layers = len(patched), study.stream.anatomy.layers
        self.streams: dict[Key, Tensor] = {}
        self.differences: list[Tensor] = []  # [variant, batch, sender, position, d_model], in the order of the graph
        self._add(("input", 0), clean["input", 0].expand(self.times, *clean["input", 0].shape))
        for i in range(start):
            for what in ("z", "mlp"):
                if (what, i) in clean:
                    self._add((what, i), clean[what, i].expand(self.times, *clean[what, i].shape))

    def hooks(self) -> dict[Key, list[Hook]]:
        """For all layers from the start on."""
        made: dict[Key, list[Hook]] = {("final", 0): [self._final]}
        column = 0
        for i, layer in enumerate(self.layers):
            names = self.study.graph.receivers_of(i)
            if i >= self.start:
                made["read", i] = [self._stash(("read", i))]
                for part in "qkv":
                    own = [n for n, name in enumerate(names) if name.endswith(f"<{part}>")]
                    made[part, i] = [self._heads(part, i, column + own[0], len(own))]
                made["z", i] = [self._writes(("z", i))]
                if layer.mlp is not None:
                    made["read_mlp", i] = [self._stash(("read_mlp", i))]
                    made["mlp_in", i] = [self._mlp(i, column + len(names) - 1)]
                    made["mlp", i] = [self._writes(("mlp", i))]
            column += len(names)
        return made

    def _add(self, key: Key, now: Tensor) -> None:
        """Keep replacement minus present output of the senders at a place."""
        difference = self.values[key] - now
        if key[0] == "z":
            w_o = self.layers[key[1]].w_o.to(difference.dtype)
            self.differences.append(torch.einsum("nbthw,hwd->nbhtd", difference, w_o))
        else:
            self.differences.append(difference[:, :, None])

    def _writes(self, key: Key) -> Hook:
        def hook(value: Tensor) -> None:
            self._add(key, value.unflatten(0, (self.times, -1)))

        return hook

    def _stash(self, key: Key) -> Hook:
        def hook(value: Tensor) -> None:
            self.streams[key] = value.clone()

        return hook

    def _moved(self, stream: Tensor, columns: list[int]) -> Tensor:
        """[variant · batch, receiver, position, d_model]: the streams of some receivers."""
        reads = self.study.graph.reads[columns[0]]
        senders = torch.cat(self.differences, dim=2)[:, :, :reads]
        mask = self.patched[:, :reads, columns].to(senders.dtype)
        moved = torch.einsum("nsr,nbstd->nbrtd", mask, senders).flatten(0, 1)
        return stream[:, None] + moved

    def _chosen(self, first: int, n: int) -> list[int]:
        """Columns, of `n` from `first` on, in which anything is patched."""
        any_edge = (self.patched[:, :, first : first + n].detach() != 0).flatten(0, 1).any(0)
        return [first + j for j in any_edge.nonzero()[:, 0].tolist()]

    def _heads(self, part: str, i: int, first: int, n: int) -> Hook:
        """The projection of each head's own stream in the place of that of the common one."""

        def hook(old: Tensor) -> Tensor | None:
            columns = self._chosen(first, n)
            if not columns:
                return None
            reader = self.layers[i].parts[part]
            heads = [column - first for column in columns]
            streams = self.study.stream.anatomy.function(reader.norm)(self._moved(self.streams["read", i], columns))
            made = torch.einsum("brtd,rwd->btrw", streams, reader.weight[heads].to(streams.dtype))
            made = made if reader.bias is None else made + reader.bias[heads].to(made.dtype)
            return old.index_copy(2, torch.tensor(heads, device=old.device), made)

        return hook

    def _mlp(self, i: int, column: int) -> Hook:
        def hook(old: Tensor) -> Tensor | None:
            if not self._chosen(column, 1):
                return None
            norm = self.study.stream.anatomy.function(self.layers[i].mlp_norm)
            made: Tensor = norm(self._moved(self.streams["read_mlp", i], [column])[:, 0])
            return made

        return hook

    def _final(self, old: Tensor) -> Tensor | None:
        column = len(self.study.graph.receivers) - 1
        return self._moved(old, [column])[:, 0] if self._chosen(column, 1) else None
