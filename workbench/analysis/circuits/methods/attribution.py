"""Edge attribution patching (Syed et al. 2310.10348) and its integrated-gradients forms (Hanna et al. 2403.17806).

The score of an edge u → v is (u_clean − u_twin) · ∂m/∂(what v reads), summed over positions: how much the metric falls,
to first order, when v alone reads u from the twin; where a lower metric is better, how much it rises. A positive edge
thus helps the task. What v reads is the residual stream before its norm, for the queries, keys and values of each head
apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.engine.module_hooks import Hook
from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.setup import DENOISING, NOISING, Setup
from workbench.analysis.circuits.engine.stream import Kept, Key
from workbench.analysis.circuits.model.modules import Projection, unchanged
from workbench.errors import InterventionError

Path = Literal["inputs", "activations"]
_GAP = 1.0  # share of the metric's difference by which integrated gradients may miss it without a warning


@dataclass(frozen=True)
class EdgeScores:
    """What the attribution of edges gives.

    Attributes:
        scores: [sender, receiver], the mean over examples; NaN where there is no edge.
        examples: [example, edge] in the order of `Graph.edges`, or None.
        input_total: [example] sum of (input_clean − input_twin) · ∂m/∂input over the inputs of all streams, all paths
            together, in the metric's own direction: by completeness it goes to the difference of the metric as steps
            grow (along "inputs").
        completeness_gap: how far the mean of `input_total` is from the mean difference of the metric between prompts
            and twins, as a share of that difference; None along "activations", whose sums are of single places.
    """

    scores: Tensor
    examples: Tensor | None
    input_total: Tensor
    completeness_gap: float | None


def attribute_edges(
    setup: Setup,
    *,
    steps: int = 1,
    path: Path = "inputs",
    direction: str = NOISING,
    keep_examples: bool | None = None,
    progress: bool = True,
) -> EdgeScores:
    """Scores of all edges, and the setup's baselines along with them.

    Args:
        steps: gradients per prompt. 1 is plain EAP; more are averaged between twin (left out) and prompt (included).
        path: along which they are taken: the embeddings go from twin to prompt, or the output of one layer's heads, or
            of one MLP, at a time, each for the edges that start there.
        direction: "noising" takes gradients on the prompt, "denoising" on the twin; both are positive where the clean
            value improves the metric.
        keep_examples: keep the scores of single examples, for intervals; None: if they take less than 256 MiB.

    Raises:
        InterventionError: a metric without gradient, or that is smallest on the prompt.

    Warns:
        UserWarning: several steps miss completeness by more than the whole difference of the metric.
    """
    if not setup.metric.differentiable or (setup.metric.against_clean and steps == 1):
        zero = "it is smallest on the prompts, so its gradient is zero there"
        why = zero if setup.metric.against_clean else "it has none"
        raise InterventionError(f'edges cannot be scored by the gradient of "{setup.metric.name}": {why}')
    if steps < 1 or path not in ("inputs", "activations") or direction not in (NOISING, DENOISING):
        raise InterventionError(f"steps are at least 1 along inputs or activations, not {steps} along {path!r}")
    graph = setup.graph
    if keep_examples is None:
        keep_examples = len(setup.task) * graph.n_edges * 4 < 256 << 20
    total = torch.zeros(len(graph.senders), len(graph.receivers), dtype=torch.float64)
    kept: list[Tensor] = []
    clean: list[Tensor] = []
    corrupted: list[Tensor] = []
    inputs: list[Tensor] = []
    some = setup.over(partial(_attributed, steps, path, direction, keep_examples))
    for _, parts in tqdm(some, total=len(setup.pairs), disable=not progress, desc="edges"):
        for of_batch, of_edges, *rest in parts:
            total += of_batch
            kept += [of_edges] if keep_examples else []
            for several, value in zip((clean, corrupted, inputs), rest, strict=True):
                several.append(value)
    setup.take_baselines(torch.cat(clean), torch.cat(corrupted))
    scores = (total / len(setup.task)).masked_fill(~graph.exists, torch.nan)
    gap = _completeness_gap(setup, torch.cat(inputs), steps) if path == "inputs" else None
    return EdgeScores(scores, torch.cat(kept) if keep_examples else None, torch.cat(inputs), gap)


def _attributed(
    steps: int, path: Path, direction: str, keep_examples: bool, setup: Setup
) -> Callable[[Pair], Iterator[tuple[Tensor, ...]]]:
    """Of a batch: the sum of its scores, those of each example, the metric on prompts and twins, and `input_total`."""

    def run(pair: Pair) -> Iterator[tuple[Tensor, ...]]:
        batch = _Batch(setup, pair, direction)
        found, inputs = batch.scores(steps, path)
        each = found[:, setup.graph.exists].float() if keep_examples else found.new_zeros(0)
        measured = [setup.measure(one, pair, batch.clean.logits)[0] for one in (batch.clean.logits, batch.twin.logits)]
        yield found.sum(0), each, *measured, inputs

    return run


def _completeness_gap(setup: Setup, input_total: Tensor, steps: int) -> float:
    """How far attributions of the input are from what they should sum to; warns where it is more than the whole.

    Circuits rank edges, for which a few steps do; sums that are off by more than the difference itself say that the
    metric moves between the steps.
    """
    change, found = float((setup.clean - setup.corrupted).mean()), float(input_total.mean())
    gap = abs(found - change) / abs(change)
    if steps > 1 and gap > _GAP:
        warnings.warn(
            f"integrated gradients in {steps} steps sum to {found:.3g} where {setup.metric.name} changes by "
            f"{change:.3g} between twins and prompts ({gap:.0%} off): the metric moves between the steps; "
            "raise steps=, such as to 64",
            UserWarning,
            stacklevel=5,
        )
    return gap


class _Batch:
    """The scores of one batch."""

    def __init__(self, setup: Setup, pair: Pair, direction: str) -> None:
        self.setup, self.pair, self.direction = setup, pair, direction
        self.layers = setup.stream.anatomy.layers
        self.clean, self.twin = Kept(), Kept()

    def scores(self, steps: int, path: Path) -> tuple[Tensor, Tensor]:
        """[example, sender, receiver], and [example] the attribution of the input by all paths."""
        graph, stream, pair = self.setup.graph, self.setup.stream, self.pair
        found = torch.zeros(pair.size, len(graph.senders), len(graph.receivers), dtype=torch.float64)
        with torch.no_grad():
            if self.direction == NOISING:
                _, self.twin = stream.record(pair.twin, pair.scored, resume=False)
            if self.direction == DENOISING or self.setup.metric.against_clean:
                _, self.clean = stream.record(pair.clean, pair.scored, resume=False)
        # At its own end the path is the prompt (or the twin) itself, whichever sender is moved along it.
        gradients = self._gradients((), 1.0 if self.direction == NOISING else 0.0)
        inputs: list[Key] = [("input", s) for s in range(len(graph.streams))]
        differences = {key: self.clean[key] - self.twin[key] for key in inputs}

        def at_inputs() -> Tensor:
            products = [(_wide(gradients[key]) * _wide(differences[key])).flatten(1).sum(1) for key in inputs]
            return torch.stack(products).sum(0).double().cpu()

        everything = range(len(graph.senders))
        self._dot(gradients, found, everything)
        total = at_inputs()
        places = self._senders() if path == "activations" else [(tuple(inputs), everything)]
        for step in range(1, steps):
            for keys, rows in places:
                gradients = self._gradients(keys, step / steps)
                self._dot(gradients, found, rows)
                if rows == everything:
                    total += at_inputs()
        return found / steps, self.setup.metric.sign * total / steps

    def _senders(self) -> list[tuple[tuple[Key, ...], range]]:
        """The places whose output goes from twin to prompt, one at a time, and the senders there."""
        graph = self.setup.graph
        places: list[tuple[tuple[Key, ...], range]] = [
            ((("input", s),), range(row, row + 1)) for s, row in enumerate(graph.inputs)
        ]
        for i, layer in enumerate(graph.layers):
            first, last = graph.first_sender(i), graph.first_sender(i) + layer.n_heads
            places.append(((("z", i),), range(first, last)))
            if layer.mlp:
                places.append(((("mlp", i),), range(last, last + 1)))
        return places

    def _gradients(self, moved: tuple[Key, ...], share: float) -> dict[Key, Tensor]:
        """Gradients of the metric by what receivers make of the stream, with some senders between twin and prompt.

        The rest of the model runs on the prompt (noising) or on the twin (denoising). With no sender this is that run
        itself, and what it shows is kept.
        """
        own, batch = (self.clean, self.pair.clean) if self.direction == NOISING else (self.twin, self.pair.twin)
        end = self.setup.stream.end
        watched: dict[Key, Tensor] = {}
        hooks: dict[Key, list[Hook]] = {}
        for key in moved:
            hooks[key] = [_put(torch.lerp(self.twin[key], self.clean[key], share))]

        def watch(key: Key) -> Hook:
            def hook(tensor: Tensor) -> Tensor:
                apart = key[0] in ("mlp_in", "x", "final")  # from others that read the same
                watched[key] = tensor.clone() if apart else tensor
                return tensor.clone() if key[0] == "input" else watched[key]  # models add to their stream in place

            return hook

        for s in range(len(self.setup.graph.streams)):
            hooks.setdefault(("input", s), []).extend([_leaf, watch(("input", s))])
            if ("final", s) != end:  # to be looked at by the norm before cross-attention
                hooks["final", s] = [_keep(watched, ("read_final", s))]
        for n, layer in enumerate(self.layers):
            for part in layer.projections:
                hooks.setdefault((part, n), []).append(watch((part, n)))
            if layer.mixer is not None:
                hooks.setdefault(("x", n), []).append(watch(("x", n)))
            hooks.setdefault(("read", n), []).append(_keep(watched, ("read", n)))
            if layer.mlp is not None:
                hooks.setdefault(("read_mlp", n), []).append(_keep(watched, ("read_mlp", n)))
                hooks.setdefault(("mlp_in", n), []).append(watch(("mlp_in", n)))
        hooks.setdefault(end, []).append(watch(end))
        if not moved:
            for key, hook in self.setup.stream.keeping(own).items():
                hooks.setdefault(key, []).append(hook)
        with torch.enable_grad():
            logits = self.setup.stream.run(batch, self.pair.scored, hooks)
            if not moved:
                own.logits = logits.detach()
            value = self.setup.metric.sign * self.setup.metric_of(logits, self.pair, self.clean.logits).sum()
            wanted = [key for key in watched if not key[0].startswith("read")]
            gradients = torch.autograd.grad(value, [watched[key] for key in wanted], allow_unused=True)
        found = {
            key: torch.zeros_like(watched[key]) if g is None else g for key, g in zip(wanted, gradients, strict=True)
        }
        reads = {key: tensor.detach() for key, tensor in watched.items() if key[0].startswith("read")}
        return {**found, **reads}

    def _dot(self, gradients: dict[Key, Tensor], found: Tensor, rows: range) -> None:
        """Add senders' differences times receivers' gradients, layer by layer, some positions at a time."""
        graph, size = self.setup.graph, self.pair.size
        widest = len(graph.senders) + max(layer.n_heads + 2 * layer.n_kv_heads for layer in graph.layers) * 3
        most = max(1, self.setup.memory // (widest * size * graph.d_model * 4))
        ends = (*graph.inputs[1:], len(graph.senders))
        for stream, (start, stop) in enumerate(zip(graph.inputs, ends, strict=True)):
            mine = range(max(rows.start, start), min(rows.stop, stop))
            length = self.clean["input", stream].shape[1]
            for first in range(0, length if len(mine) else 0, most):
                at = slice(first, first + most)
                senders = self._differences(at, mine, stream)
                for columns, readers in self._readers(gradients, at, stream):
                    self._product(senders, readers, found, mine, columns)

    def _readers(self, gradients: dict[Key, Tensor], at: slice, stream: int) -> Iterator[tuple[range, Tensor]]:
        """Receivers of a stream that read the same senders: their indices, and the gradients by what they read.

        Gradients are [batch, receiver, position, d_model].
        """
        graph, anatomy = self.setup.graph, self.setup.stream.anatomy
        for i, layer in enumerate(self.layers):
            for part in layer.projections:
                columns = graph.columns(i, part)
                if graph.receiver_spot(graph.receivers[columns.start]).stream == stream:
                    yield columns, self._before_norm(layer.projections[part], gradients, part, i, at)
            wholes = [("x", "x", "read", layer.mixer_norm)] if layer.mixer is not None else []
            wholes += [("mlp", "mlp_in", "read_mlp", layer.mlp_norm)] if layer.mlp is not None else []
            for what, key, read, norm in wholes if graph.stream_of(i) == stream else ():
                cut = gradients[key, i][:, at][:, None]
                yield graph.columns(i, what), _back(anatomy.function(norm), gradients[read, i][:, at], cut)
        if ("final", stream) == self.setup.stream.end:
            last = len(graph.receivers) - 1
            yield range(last, last + 1), gradients["final", stream][:, at][:, None]

    def _product(self, senders: Tensor, readers: Tensor, found: Tensor, rows: range, columns: range) -> None:
        """Senders [batch, sender, position, d_model] times readers [batch, receiver, position, d_model]."""
        stop = min(rows.stop, self.setup.graph.reads[columns.start].stop)
        if stop <= rows.start:
            return
        # In float32 at least: of half precision, sums over positions would lose most of their digits.
        with torch.autocast(senders.device.type, enabled=False):
            product = _wide(senders[:, : stop - rows.start].flatten(2)) @ _wide(readers.flatten(2)).transpose(1, 2)
        found[:, rows.start : stop, columns.start : columns.stop] += product.double().cpu()

    def _differences(self, at: slice, rows: range, stream: int) -> Tensor:
        """[batch, sender, position, d_model]: what senders write on the prompt minus what they write on the twin."""
        several, graph = [], self.setup.graph
        if graph.inputs[stream] in rows:
            several.append((self.clean["input", stream] - self.twin["input", stream])[:, None, at])
        for i, layer in enumerate(self.layers):
            first = graph.first_sender(i)
            if first in rows:
                z = (self.clean["z", i] - self.twin["z", i])[:, at]
                several.append(torch.einsum("bthw,hwd->bhtd", z, layer.w_o.to(z.dtype)))
            if layer.mlp is not None and first + layer.n_heads in rows:
                several.append(layer.added_by_mlp(self.clean["mlp", i] - self.twin["mlp", i])[:, None, at])
        return torch.cat(several, dim=1)

    def _before_norm(self, part: Projection, gradients: dict[Key, Tensor], name: str, i: int, at: slice) -> Tensor:
        """[batch, head or group, position, d_model]: gradients by the stream that each head's part reads."""
        by_heads = gradients[name, i][:, at]
        behind = torch.einsum("bthw,hwd->bhtd", by_heads, part.weight.to(by_heads.dtype))
        what, index = self.setup.stream.anatomy.read_at(i, name)
        read = gradients["read_final" if what == "final" else what, index]
        return _back(self.setup.stream.anatomy.function(part.norm), read[:, at], behind)


def _back(norm: Callable[[Tensor], Tensor], stream: Tensor, gradient: Tensor) -> Tensor:
    """Gradients [batch, n, position, d_model] behind a norm, as gradients by the stream [batch, position, d_model]."""
    if norm is unchanged:
        return gradient
    with torch.enable_grad():
        leaf = stream[:, None].expand_as(gradient).detach().requires_grad_()
        (found,) = torch.autograd.grad(norm(leaf), leaf, gradient)
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _put(new: Tensor) -> Hook:
    return lambda old: new


def _keep(into: dict[Key, Tensor], key: Key) -> Hook:
    def hook(tensor: Tensor) -> None:
        into[key] = tensor.detach().clone()

    return hook
