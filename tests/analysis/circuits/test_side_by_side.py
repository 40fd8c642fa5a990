"""Circuits of blocks in which a recurrence and attention read the stream beside each other, as Falcon-H1's do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from support.circuits import Words, random_task, tiny
from workbench.analysis.circuits.engine.edges import run_edges, run_nodes
from workbench.analysis.circuits.engine.setup import Setup, open_setup
from workbench.analysis.circuits.methods.path_patching import Paths, run_paths
from workbench.errors import InterventionError

CLOSE = {"atol": 1e-6, "rtol": 1e-6}
FACTORS = {"mamba.out_proj": 0.7, "self_attn.o_proj": 1.3}
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def setup() -> Iterator[Setup]:
    task = random_task(3, 5, 60, lengths=2)
    with workbench.attach(tiny("falcon-h1"), Words()) as wb, open_setup(wb, task, batch_size=2) as made:
        made.measure_baselines()
        yield made


def forward(setup: Setup, pair: Any, batch: Any, changes: dict[str, Change] | None = None) -> tuple[Tensor, dict]:
    """The metric, and what modules were given, by name within the layers; `changes` are made to that first."""
    kept: dict[str, Tensor] = {}
    handles = []
    for name, module in setup.wb.model.model.layers.named_modules():
        if not name:
            continue

        def hook(module: Any, args: Any, kwargs: Any, name: str = name) -> Any:
            inside = kwargs.get("hidden_states", args[0] if args else None)
            if not isinstance(inside, Tensor):
                return None
            kept[name] = inside.detach().clone()
            if name not in (changes or {}):
                return None
            new = changes[name](inside)
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": new}
            return (new, *args[1:]), kwargs

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        logits = setup.wb.model(**batch, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    at = logits[torch.arange(pair.size), pair.last]
    return setup.measure(at[:, None], pair, at[:, None])[0], kept


def test_two_layers_of_one_block_neither_of_which_reads_the_other(setup: Setup) -> None:
    graph, anatomy = setup.graph, setup.stream.anatomy
    assert graph.streams == ("blocks",)
    assert graph.blocks == (0, 0, 1, 1)
    assert [layer.out.rpartition("layers.")[2] for layer in anatomy.layers] == [
        "0.mamba.out_proj", "0.self_attn.o_proj", "1.mamba.out_proj", "1.self_attn.o_proj"
    ]  # fmt: skip
    found = [layer.factor for layer in anatomy.layers]
    assert found == pytest.approx([0.7, 1.3, 0.7, 1.3], abs=1e-6)
    assert anatomy.error < 1e-6
    edges = set(graph.edges)
    assert "blocks.s0.h1->blocks.m0" in edges
    assert "blocks.s0.h1->blocks.s1<x>" in edges
    assert "blocks.a0.h2->blocks.a1.h0<q>" in edges
    assert not {edge for edge in edges if edge.startswith("blocks.s0") and "->blocks.a0" in edge}
    assert graph.receiver("blocks.0.mixer.H1", "x") == "blocks.s0<x>"
    assert graph.head_name("blocks.0.self_attn.H1") == "blocks.a0.h1"
    with pytest.raises(InterventionError, match="no node"):
        graph.head_name("L0H1")  # of which of the two?


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_found_in_the_models_own_precision(dtype: torch.dtype) -> None:
    with workbench.attach(tiny("falcon-h1", dtype), Words()) as wb, open_setup(wb, random_task(2, 5, 60)) as made:
        found = [layer.factor for layer in made.stream.anatomy.layers]
    assert found == pytest.approx([0.7, 1.3, 0.7, 1.3], rel=20 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_a_circuit_of_nodes_is_what_is_left_by_hand(setup: Setup) -> None:
    graph = setup.graph
    kept = torch.ones(1, len(graph.senders), dtype=torch.bool)
    for name in ("blocks.s0.h1", "blocks.a0.h2", "blocks.s1.h0", "blocks.a1.h3"):
        kept[0, graph.sender_index[name]] = False
    found = run_nodes(setup, kept, "counterfactual", progress=False)[0]
    for pair in setup.pairs:
        _, twin = forward(setup, pair, pair.twin)

        def put(name: str, head: int, twin: dict = twin) -> Change:
            def change(now: Tensor) -> Tensor:
                new = now.unflatten(-1, (4, -1)).clone()
                new[:, :, head] = twin[name].unflatten(-1, (4, -1))[:, :, head]
                return new.flatten(-2)

            return change

        heads = {"0.mamba.out_proj": 1, "0.self_attn.o_proj": 2, "1.mamba.out_proj": 0, "1.self_attn.o_proj": 3}
        want, _ = forward(setup, pair, pair.clean, {name: put(name, head) for name, head in heads.items()})
        torch.testing.assert_close(found[setup.rows(pair)], want, **CLOSE)
    assert float((found - setup.clean).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("sender", "receiver", "norm", "reader"),
    [("blocks.s0.h1", "blocks.s1<x>", "1.input_layernorm", "1.mamba"),
     ("blocks.a0.h2", "blocks.s1<x>", "1.input_layernorm", "1.mamba"),
     ("blocks.s0.h1", "blocks.m0", "0.pre_ff_layernorm", "0.feed_forward"),
     ("blocks.a0.h2", "blocks.m0", "0.pre_ff_layernorm", "0.feed_forward")],
)  # fmt: skip
@torch.no_grad()
def test_an_edge_is_what_its_receiver_alone_reads_of_the_twin(
    setup: Setup, sender: str, receiver: str, norm: str, reader: str
) -> None:
    graph, model = setup.graph, setup.wb.model
    kept = graph.exists.clone()
    kept[graph.sender_index[sender], graph.receiver_index[receiver]] = False
    found = run_edges(setup, kept[None], progress=False)[0]
    part = "mamba.out_proj" if ".s0" in sender else "self_attn.o_proj"
    head, out = int(sender[-1]), model.model.layers[0].get_submodule(part)
    for pair in setup.pairs:
        _, clean = forward(setup, pair, pair.clean)
        _, twin = forward(setup, pair, pair.twin)
        change = (twin[f"0.{part}"] - clean[f"0.{part}"]).unflatten(-1, (4, -1))
        only = torch.zeros_like(change)
        only[:, :, head] = change[:, :, head]
        stream = clean[norm] + FACTORS[part] * only.flatten(-2) @ out.weight.T
        made = model.model.layers.get_submodule(norm).forward(stream)
        want, _ = forward(setup, pair, pair.clean, {reader: lambda now, made=made: made})
        torch.testing.assert_close(found[setup.rows(pair)], want, **CLOSE)
    assert float((found - setup.clean).abs().max()) > 1e-6
    by_paths = run_paths(setup, Paths((receiver,), ((sender,),), None, freeze_mlps=True), progress=False)[0]
    torch.testing.assert_close(by_paths, found, **CLOSE)


def test_methods_and_patching_take_them(tmp_path: Path) -> None:
    task = random_task(2, 5, 60)
    with workbench.attach(tiny("falcon-h1"), Words()) as wb:
        circuit = workbench.find_circuit(wb, task, "eap", fraction=0.2, progress=False)
        whole = circuit.top(circuit.graph.n_edges)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a random model and task: there is nothing to have a share of
            found = workbench.circuit_faithfulness(wb, whole, task, progress=False)
        torch.testing.assert_close(found.alone, found.full, **CLOSE)
        again = type(circuit).load(circuit.save(tmp_path / "circuit.safetensors"))
        assert again.edges == circuit.edges
        with wb.ablate(set(whole.heads)):  # labels are those that interventions take
            wb.model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
        assert {"blocks.0.mixer.H0", "blocks.1.attn.H3"} <= set(whole.heads)
        circuit.view().to_html(tmp_path / "graph.html")
        rows = workbench.patch_layers(wb, task, "attn_out", positions="end", progress=False).rows
        assert rows == ("blocks.0.mixer", "blocks.0.attn", "blocks.1.mixer", "blocks.1.attn")
