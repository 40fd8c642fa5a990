"""`find_circuit`: the circuit of a task, by path patching, edge attribution, ablation or greedy pruning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.engine.prompts import SCORED, Where
from workbench.analysis.circuits.engine.setup import DENOISING, NOISING, Setup, open_setup
from workbench.analysis.circuits.methods.acdc import prune_edges
from workbench.analysis.circuits.methods.attribution import attribute_edges
from workbench.analysis.circuits.methods.path_patching import Paths, run_paths
from workbench.analysis.circuits.patching import ablation_effects
from workbench.analysis.circuits.shares import Denominator
from workbench.errors import InterventionError, expect, nearest
from workbench.session.workbench import Workbench
from workbench.storage.resumable import file_of
from workbench.tasks.base import Task
from workbench.workers.engine import Engine

METHODS = ("path_patching", "eap", "eap_ig", "ablation", "acdc")
_SIGN = "noising: positive where the clean value improves the metric, as a share of clean minus corrupted"


@dataclass(frozen=True)
class Stage:
    """One stage of path patching.

    Attributes:
        receivers: "logits"; or "q", "k", "v", "kv" or "qkv" of the heads that the stage before chose, or of `of` (of a
            mixer's heads always all that they read, "x"); or names of receivers, such as ("a9.h6<q>",) or ("a3<x>",).
        positions: where activations are patched: names ("end", "S2") or numbers of tokens; "scored" for the tokens from
            which an answer is predicted, where that is not the last one alone; None for all.
        of: heads whose q, k or v receive, in place of those chosen before.
        before: senders come before "any" of the receivers, or before "all" of them, as in Merullo et al.
        name: for the result.
    """

    receivers: str | tuple[str, ...] = "logits"
    positions: Where = "end"
    of: tuple[Any, ...] | None = None
    before: str = "any"
    name: str = ""


# Whoever moves the answer to the end; whoever tells those where to look; and what those themselves read.
STAGES = (
    Stage("logits", "end", name="logits"),
    Stage("q", "end", name="queries"),
    Stage("kv", None, name="keys and values"),
)


def find_circuit(
    wb: Workbench,
    task: Task,
    method: str = "path_patching",
    *,
    metric: Any = "logit_diff",
    fraction: float = 0.02,
    n_edges: int | float | None = None,
    stages: Sequence[Stage] | None = None,
    freeze_mlps: bool = False,
    steps: int = 5,
    path: str = "inputs",
    direction: str = NOISING,
    threshold: float = 0.01,
    ablation: str | None = None,
    absolute: bool = True,
    batch_size: int = 25,
    memory: int = 1 << 30,
    seed: int = 0,
    resume: str | Path | None = None,
    engine: str | Engine = "local",
    progress: bool = True,
) -> Circuit:
    """Find the circuit of a task.

    Args:
        wb: the model, attached with its tokenizer; a decoder, or an encoder-decoder, whose residual streams are sums.
        task: prompts with twins.
        method: "path_patching", stage by stage from the logits back (Merullo et al. 2310.08744);
            "eap", edge attribution patching (2310.10348); "eap_ig", with integrated gradients (2403.17806);
            "ablation" of single heads; "acdc", greedy pruning of edges (2304.14997).
        metric: "logit_diff", "probability", "kl_divergence", "accuracy", or `metric(output, batch)` that gives [batch];
            it sees the logits of the last token only, [batch, 1, vocab].
        fraction: of all heads, chosen per stage (path patching), or in all (ablation); rounded up.
        n_edges: of edge methods, how many edges the circuit has, before those that lead nowhere are dropped; a float is
            a share. By default a tenth of them. `Circuit.top` and `above` choose anew at no cost.
        stages: of path patching. By default the logits, the queries of the heads found there, and the keys and values
            of those found then, as far as there are heads below; the first two where the answer is predicted.
        freeze_mlps: path patching freezes MLPs on the way to the receivers too.
        steps, path: of "eap_ig"; along "inputs" or "activations". Along "inputs" the scores of the input's edges should
            sum to the change of the metric; by how much they miss it, `Circuit.settings["completeness_gap"]` tells.
        direction: of "eap" and "eap_ig": "noising" (gradients on the prompts) or "denoising" (on the twins). Steps of
            "eap_ig" along "inputs" are the same in both but for one end: "noising" leaves out the twin, "denoising" the
            prompt, as MIB's code does.
        threshold: of "acdc", the share of clean minus corrupted below which an edge is left out.
        ablation: what replaces heads ("ablation", by default "mean") or edges ("acdc", by default
            "counterfactual"): also "zero", "mean_positional", "resample".
        absolute: choose by magnitude, so that what works against the task is found too.
        batch_size: examples in one forward. memory: bytes that variants side by side may take.
        seed: of "resample", which replaces a prompt by others of the nearest length, several times.
        resume: of "acdc", a file to go on from, if it is there, and to write to; the result is the same to the bit.
        engine: "local", "ray", or a `workbench.RayWorkers`: who runs the batches; of "acdc", whose edges are tried one
            after another, "local" only.

    Raises:
        TaskError: prompts and twins of unequal length, or that do not differ; answers that cannot be compared; a metric
            that is the same on both.
        InterventionError: unknown names, receivers before their senders. AttachError: the model cannot be taken apart.
        FormatError: the file is truncated, or of another model, task or settings.
        PruningInterrupted: on Ctrl-C during "acdc", with what is done.

    Warns:
        UserWarning: none of the chosen edges lies on a path from an input to the logits.
    """
    expect(Workbench, wb=wb)
    expect(Task, task=task)
    if method not in METHODS:
        raise InterventionError(f"there is no method {method!r}", hint=nearest(str(method), METHODS, "method"))
    if not 0 < fraction <= 1:
        raise InterventionError(f"the fraction of heads is {fraction}, it lies above 0 and up to 1")
    if resume is not None and method != "acdc":
        raise InterventionError(f'"{method}" writes no file to resume from', hint='only "acdc" does; leave out resume=')
    if method == "acdc" and engine != "local":
        raise InterventionError(
            '"acdc" tries one edge after another, which workers cannot share', hint='engine="local"'
        )
    file = file_of(resume)
    with open_setup(wb, task, metric, batch_size=batch_size, memory=memory, seed=seed, engine=engine) as setup:
        if method in ("eap", "eap_ig"):
            several = steps if method == "eap_ig" else 1
            return _by_attribution(setup, method, several, path, direction, n_edges, absolute, progress)
        setup.measure_baselines()
        if method == "acdc":
            return _by_pruning(setup, threshold, ablation or "counterfactual", progress, file)
        if method == "ablation":
            return _by_ablation(setup, ablation or "mean", fraction, absolute, progress)
        given = STAGES if stages is None else stages
        if stages is None and not setup.measured_at_end:
            given = [replace(one, positions=SCORED) if one.positions == "end" else one for one in given]
        return _by_paths(setup, given, fraction, freeze_mlps, absolute, progress, stages is None)


def _blank(setup: Setup, method: str, level: str, sign: str, settings: dict[str, Any]) -> Circuit:
    graph = setup.graph
    shape = (len(graph.senders), len(graph.receivers))
    apart = Denominator.of(setup.clean, setup.corrupted)
    if "share of" in sign and not apart.defined:
        sign = f"{sign}, which may be 0: {apart}"
    return Circuit(
        model=graph.facts, task=setup.task.name, method=method, metric=setup.metric.name, direction=NOISING, sign=sign,
        level=level, senders_in=torch.zeros(shape[0], dtype=torch.bool), edges_in=torch.zeros(shape, dtype=torch.bool),
        node_scores=torch.full(shape[:1], torch.nan, dtype=torch.float64),
        edge_scores=torch.full(shape, torch.nan, dtype=torch.float64), threshold={}, stages=(), examples=None,
        clean=setup.clean, corrupted=setup.corrupted, settings=settings,
        provenance=setup.provenance() | {"anatomy_error": setup.stream.anatomy.error},
    )  # fmt: skip


def _by_attribution(
    setup: Setup, method: str, steps: int, path: Any, direction: str, n_edges: int | float | None, absolute: bool,
    progress: bool,
) -> Circuit:  # fmt: skip
    found = attribute_edges(setup, steps=steps, path=path, direction=direction, progress=progress)
    sign = f"{direction}: positive where the clean value of the sender improves the metric, in the metric's units"
    settings = {
        "steps": steps, "path": path, "input_total": float(found.input_total.mean()),
        "kept_examples": found.examples is not None, "completeness_gap": found.completeness_gap,
    }  # fmt: skip
    blank = replace(_blank(setup, method, "edge", sign, settings), direction=direction)
    of_nodes = found.scores.nan_to_num(0.0).abs().sum(1)
    scored = replace(blank, edge_scores=found.scores, node_scores=of_nodes, examples=found.examples)
    return _not_empty(scored.top(0.1 if n_edges is None else n_edges, absolute=absolute))


def _by_pruning(setup: Setup, threshold: float, how: str, progress: bool, resume: Path | None) -> Circuit:
    kept, scores = prune_edges(setup, threshold, how, progress=progress, resume=resume)
    sign = "noising: positive where leaving the edge out worsened the metric, as a share of clean minus corrupted"
    blank = _blank(setup, "acdc", "edge", sign, {"ablation": how})
    of_nodes = scores.nan_to_num(0.0).abs().sum(1)
    scored = replace(blank, edge_scores=scores.masked_fill(~setup.graph.exists, torch.nan), node_scores=of_nodes)
    return _not_empty(scored.with_edges(setup.graph.pruned(kept), {"kind": "acdc", "value": threshold}))


def _not_empty(circuit: Circuit) -> Circuit:
    """The circuit itself, with a warning if nothing is left of it."""
    if not circuit.n_edges:
        warnings.warn(
            "the circuit is empty: none of the chosen edges lies on a path from an input to the logits; the scores are "
            "kept, and circuit.top(n) chooses more of them",
            UserWarning,
            stacklevel=4,
        )
    return circuit


def _by_ablation(setup: Setup, how: str, fraction: float, absolute: bool, progress: bool) -> Circuit:
    effects = ablation_effects(setup, how, progress)
    graph = setup.graph
    places = [graph.sender_index[name] for name in graph.head_names]
    examples = torch.full((len(setup.task), len(graph.senders)), torch.nan, dtype=torch.float64)
    examples[:, places] = -effects.T / setup.scale
    scores = examples.mean(0)
    blank = _blank(setup, "ablation", "node", _SIGN, {"ablation": how})
    chosen = _best(scores, math.ceil(fraction * len(places)), absolute)
    return replace(
        blank, node_scores=scores, senders_in=chosen, examples=examples,
        threshold={"kind": "fraction of heads", "value": fraction, "absolute": absolute},
    )  # fmt: skip


def _by_paths(
    setup: Setup, stages: Sequence[Stage], fraction: float, freeze_mlps: bool, absolute: bool, progress: bool,
    default: bool,
) -> Circuit:  # fmt: skip
    if not stages:
        raise InterventionError("there is no stage", hint='stages=[Stage("logits", "end"), Stage("q", "end")]')
    graph = setup.graph
    circuit = _blank(setup, "path_patching", "node", _SIGN, {"freeze_mlps": freeze_mlps})
    edges_in, edge_scores = circuit.edges_in.clone(), circuit.edge_scores.clone()
    inside = circuit.senders_in.clone()
    done: list[dict[str, Any]] = []
    examples: list[Tensor] = []
    before: tuple[str, ...] = ()
    for number, stage in enumerate(stages):
        receivers = _receivers(setup, stage, before)
        if stage.before not in ("any", "all"):
            raise InterventionError(f'senders come before "any" or "all" of the receivers, not {stage.before!r}')
        read = graph.exists[:, [graph.receiver_index[name] for name in receivers]]
        read = read.any(1) if stage.before == "any" else read.all(1)
        taken = {name.partition("<")[0] for name in receivers}
        names = graph.head_names
        senders = [n for n in names if bool(read[graph.sender_index[n]]) and n not in taken]
        if not senders and default and done:
            break  # the chain has come down to the first layer
        if not senders:
            raise InterventionError(
                f"stage {number + 1} has no sender: no head writes before {stage.before} of its receivers "
                f"{', '.join(receivers[:4])}, which reach down to the first layer",
                hint="fewer stages, a smaller fraction" + (', or Stage(before="any")' if stage.before == "all" else ""),
            )
        paths = Paths(receivers, tuple((n,) for n in senders), stage.positions, freeze_mlps)
        values = run_paths(setup, paths, progress, stage.name or f"stage {number + 1}")
        each = torch.full((len(setup.task), len(graph.senders)), torch.nan, dtype=torch.float64)
        each[:, [graph.sender_index[n] for n in senders]] = ((setup.clean - values) / setup.scale).T
        importance = each.mean(0)
        chosen = _best(importance, math.ceil(fraction * len(names)), absolute)
        for receiver in receivers:
            column = graph.receiver_index[receiver]
            real = graph.exists[:, column]
            edge_scores[:, column] = torch.where(real, importance, edge_scores[:, column])
            edges_in[:, column] |= chosen & real
        inside |= chosen
        before = tuple(graph.senders[i] for i in chosen.nonzero()[:, 0].tolist())
        done.append({
            "name": stage.name or f"stage {number + 1}", "receivers": receivers, "positions": _plain(stage.positions),
            "importance": importance, "chosen": before,
        })  # fmt: skip
        examples.append(each)
    importances = torch.stack([stage["importance"] for stage in done])
    largest = importances.nan_to_num(0.0).abs().argmax(0)
    scores = importances.gather(0, largest[None])[0]
    return replace(
        circuit, senders_in=inside, edges_in=edges_in, edge_scores=edge_scores, node_scores=scores, stages=tuple(done),
        examples=torch.cat(examples, dim=1),
        threshold={"kind": "fraction of heads per stage", "value": fraction, "absolute": absolute},
        settings=circuit.settings | {"stages": [asdict(replace(s, positions=_plain(s.positions))) for s in stages]},
    )  # fmt: skip


def _receivers(setup: Setup, stage: Stage, before: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the receivers of a stage."""
    graph = setup.graph
    if stage.receivers == "logits":
        return ("logits",)
    if isinstance(stage.receivers, str) and set(stage.receivers) <= set("qkv"):
        heads = before if stage.of is None else tuple(graph.head_name(head) for head in stage.of)
        if not heads:
            raise InterventionError(
                f'the stage "{stage.name or stage.receivers}" has no heads to receive: it comes first',
                hint='begin with Stage("logits"), or name them with of=…',
            )
        return tuple(dict.fromkeys(graph.receiver(head, part) for head in heads for part in stage.receivers))
    several = (stage.receivers,) if isinstance(stage.receivers, str) else tuple(stage.receivers)
    for name in several:
        graph.receiver_spot(name)
    return several


def _best(scores: Tensor, n: int, absolute: bool) -> Tensor:
    """[sender] bool: the n highest; fewer where fewer are scored."""
    order = (scores.abs() if absolute else scores).nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order[: min(n, int((~scores.isnan()).sum()))]] = True
    return chosen


def _plain(where: Where) -> Any:
    return where if where is None or isinstance(where, (str, int)) else tuple(where)


__all__ = ["DENOISING", "METHODS", "NOISING", "STAGES", "Stage", "find_circuit"]
