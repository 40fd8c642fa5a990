"""Edges: attribution against the gradient of edge masks, integrated gradients, exact patching, pruning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch

import workbench
from support.circuits import ENCODER_DECODERS, INDUCTION_EDGES, Words, induction_model, random_task, task_for, tiny
from support.hybrid_models import SUMS
from workbench.analysis.circuits import find
from workbench.analysis.circuits.engine.edges import _Patched, run_edges, run_nodes
from workbench.analysis.circuits.engine.setup import Setup, open_setup
from workbench.analysis.circuits.find import Stage, find_circuit
from workbench.analysis.circuits.methods.acdc import prune_edges
from workbench.analysis.circuits.methods.attribution import attribute_edges
from workbench.analysis.circuits.stability import auroc
from workbench.errors import InterventionError

NAMES = ["gpt2", "llama-gqa", "granite", "gpt-neox", *ENCODER_DECODERS]
IN_FLOAT32 = ("llama-gqa", "granite", "t5", *SUMS)  # whose norms, or recurrences, are in float32


def mask_gradient(setup: Setup) -> torch.Tensor:
    """[sender, receiver]: −∂(mean metric)/∂mask at masks of zero, by autograd through the exact patching of edges."""
    total = torch.zeros(setup.graph.exists.shape, dtype=torch.float64)
    for pair in setup.pairs:
        logits, clean, twin = setup.record(pair)
        mask = torch.zeros(1, *setup.graph.exists.shape, dtype=torch.float64, requires_grad=True)
        run = _Patched(setup, pair, clean, twin, mask, 0)
        run._chosen = list  # type: ignore[method-assign,assignment]
        out = setup.stream.run(pair.clean, pair.last, run.hooks())
        total -= torch.autograd.grad(setup.metric_of(out, pair, logits).sum(), mask)[0][0]
    return total / len(setup.task)


@pytest.mark.parametrize("name", [*NAMES, *SUMS])
def test_it_is_the_gradient_of_edge_masks(name: str) -> None:
    with (
        workbench.attach(tiny(name), Words()) as wb,
        open_setup(wb, task_for(name, 4, lengths=2), batch_size=3) as setup,
    ):
        found = attribute_edges(setup, progress=False)
        exists = setup.graph.exists
        assert bool(found.scores[~exists].isnan().all())
        allowed = 1e-5 if name in IN_FLOAT32 else 1e-9
        assert (found.scores - mask_gradient(setup))[exists].abs().max() < allowed
        assert found.scores[exists].abs().max() > 1e-3
        assert found.examples is not None
        assert torch.allclose(found.examples.double().mean(0), found.scores[exists], atol=1e-5)
        for path in ("inputs", "activations"):
            one = attribute_edges(setup, steps=1, path=path, progress=False)  # type: ignore[arg-type]
            assert torch.equal(one.scores[exists], found.scores[exists])
        setup.memory = 1  # a position at a time
        assert torch.allclose(attribute_edges(setup, progress=False).scores[exists], found.scores[exists])


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", ["gpt2", "mbart"])
def test_integrated_gradients_are_complete(name: str, direction: str) -> None:
    with workbench.attach(tiny(name), Words()) as wb, open_setup(wb, task_for(name, 3)) as setup:
        errors = []
        for steps in (8, 32):
            found = attribute_edges(setup, steps=steps, direction=direction, progress=False)
            errors.append(float((found.input_total - (setup.clean - setup.corrupted)).abs().max()))
        span = float((setup.clean - setup.corrupted).abs().max())
        assert errors[1] < errors[0] / 3
        assert errors[1] < 0.1 * span


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "mbart", "t5"])
def test_a_circuit_says_how_far_its_integrated_gradients_are_from_complete(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between twin and prompt the T5's metric, behind norms of large weights, moves more than its ends differ."""
    steps, made = 16, []

    def noted(setup: Setup, **how: Any) -> Any:
        made.append((setup, attribute_edges(setup, **how)))
        return made[-1][1]

    monkeypatch.setattr(find, "attribute_edges", noted)
    with workbench.attach(tiny(name), Words()) as wb, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        task = task_for(name, 3)
        circuit = find_circuit(wb, task, "eap_ig", steps=steps, progress=False)
        setup, found = made.pop()
        change = float((setup.clean - setup.corrupted).mean())
        gap = abs(float(found.input_total.mean()) - change) / abs(change)
        assert found.completeness_gap == pytest.approx(gap)
        assert (gap > 1) == (name == "t5")
        assert len(said) == (gap > 1)
        if said:
            assert f"in {steps} steps sum to {float(found.input_total.mean()):.3g}" in str(said[0].message)
        assert circuit.settings["completeness_gap"] == pytest.approx(gap)
        assert f"sums miss {gap:.0%} of the metric's change" in repr(circuit)
        assert "sums miss" not in repr(find_circuit(wb, task, "eap_ig", path="activations", progress=False))


def test_along_activations_of_a_linear_reader_it_is_exact() -> None:
    """Without norm the logits read the last heads linearly: scores of their edges are the exact effects of patching."""
    model, task = induction_model()
    with workbench.attach(model, Words()) as wb, open_setup(wb, task) as setup:
        found = attribute_edges(setup, steps=3, path="activations", progress=False)
        kept = setup.graph.exists.clone()
        edge = setup.graph.edge("a1.h2->logits")
        kept[edge] = False
        exact = setup.clean.mean() - run_edges(setup, kept[None], progress=False).mean()
        assert float(found.scores[edge]) == pytest.approx(float(exact), rel=1e-9)


@pytest.fixture(scope="module")
def measured() -> Iterator[Callable[[str], Setup]]:
    """Each tiny model with a task of two lengths, opened and measured once for all that replaces its nodes."""
    with ExitStack() as stack:

        @cache
        def of(name: str) -> Setup:
            wb = stack.enter_context(workbench.attach(tiny(name), Words()))
            setup = stack.enter_context(open_setup(wb, task_for(name, 4, lengths=2), batch_size=2))
            setup.measure_baselines()
            return setup

        yield of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["counterfactual", "zero", "mean", "mean_positional", "resample"])
def test_all_edges_of_a_node_patched_is_the_node_replaced(
    name: str, how: str, measured: Callable[[str], Setup]
) -> None:
    setup = measured(name)
    graph = setup.graph
    names: tuple[str, ...] = ("a0.h1", "m0", "a1.h2", "m1", "input")
    if name in ENCODER_DECODERS:
        names = ("decoder.x1.h1", "encoder.a0.h2", "decoder.a0.h1", "encoder.m1", "decoder.m1", "encoder.input")
    nodes = torch.ones(len(names) + 2, len(graph.senders), dtype=torch.bool)
    edges = graph.exists.expand(len(names) + 2, -1, -1).clone()
    for row, name_of in enumerate(names):
        nodes[row, graph.sender_index[name_of]] = False
        edges[row, graph.sender_index[name_of]] = False
    nodes[-1], edges[-1] = False, False
    by_node, by_edge = run_nodes(setup, nodes, how, progress=False), run_edges(setup, edges, how, progress=False)
    assert (by_node - by_edge).abs().max() < 1e-9
    assert (by_edge[-2] - setup.clean).abs().max() < 1e-12
    assert (by_edge[0] - setup.clean).abs().max() > 1e-7
    if how == "counterfactual":
        assert (by_edge[-1] - setup.corrupted).abs().max() < 1e-9


def test_shared_keys_are_those_of_a_model_with_repeated_ones() -> None:
    grouped = tiny("llama-gqa")
    config = copy.deepcopy(grouped.config)
    config.num_key_value_heads = config.num_attention_heads
    repeated = type(grouped)(config).double().eval()
    weights = dict(grouped.state_dict())
    for name in list(weights):
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].unflatten(0, (2, -1)).repeat_interleave(3, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    task, found = random_task(3, 6, 60), []
    stages = (Stage("logits"), Stage("q", of=((1, 0), (1, 4))), Stage("kv", ("early", "end"), of=((1, 0),)))
    for model in (grouped, repeated):
        with workbench.attach(model, Words()) as wb:
            edges = find_circuit(wb, task, "eap", progress=False)
            found.append((edges, find_circuit(wb, task, fraction=0.2, stages=stages, progress=False)))
    (few, paths), (many, other_paths) = found
    for edge in few.graph.edges:
        source, _, target = edge.partition("->")
        if ".kv" in target:
            layer, _, rest = target.partition(".kv")
            heads = [f"{source}->{layer}.h{3 * int(rest[0]) + i}{rest[1:]}" for i in range(3)]
            assert few.score_of(edge) == pytest.approx(sum(many.score_of(name) for name in heads), abs=1e-5)
        else:
            assert few.score_of(edge) == pytest.approx(many.score_of(edge), abs=1e-5)
    for one, other in zip(paths.stages[:2], other_paths.stages[:2], strict=True):
        assert torch.allclose(one["importance"], other["importance"], atol=1e-5, equal_nan=True)
    assert paths.stages[2]["receivers"] == ("a1.kv0<k>", "a1.kv0<v>")
    assert other_paths.stages[2]["receivers"] == ("a1.h0<k>", "a1.h0<v>")


@pytest.mark.parametrize("method", ["eap", "eap_ig"])
def test_a_planted_induction_circuit_is_found(method: str) -> None:
    model, task = induction_model()
    with workbench.attach(model, Words()) as wb:
        assert task.accuracy(model, Words()) == 1
        circuit = find_circuit(wb, task, method, n_edges=3, progress=False)
        assert auroc(circuit, INDUCTION_EDGES) == 1
        assert set(circuit.edges) == set(INDUCTION_EDGES)
        assert circuit.nodes == ("input", "a0.h1", "a1.h2", "logits")
        assert auroc(circuit, ["input", "L0H1", "L1H2"]) == 1


def test_pruning_keeps_the_planted_edges_and_is_the_same_when_it_looks_ahead() -> None:
    model, task = induction_model()
    with workbench.attach(model, Words()) as wb, open_setup(wb, task) as setup:
        setup.measure_baselines()
        found = [prune_edges(setup, 0.05, ahead=ahead, progress=False) for ahead in (1, 5)]
        for kept, _ in found:
            assert set(setup.graph.edge_names(kept)) == set(INDUCTION_EDGES)
        assert torch.equal(found[0][1].isnan(), found[1][1].isnan())
        assert torch.allclose(found[0][1].nan_to_num(), found[1][1].nan_to_num(), atol=1e-9)


def test_metrics_without_a_gradient_are_refused() -> None:
    with workbench.attach(tiny("gpt2"), Words()) as wb:
        for metric in ("accuracy", "kl_divergence"):
            with pytest.raises(InterventionError, match="gradient"):
                find_circuit(wb, random_task(2, 5, 60), "eap", metric=metric, progress=False)
        assert find_circuit(wb, random_task(2, 5, 60), "eap_ig", metric="kl_divergence", progress=False).n_edges > 0
