"""Circuits of hybrids: heads of recurrences and of gated attention are nodes; what they do is compared by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.circuits import Words, random_task, tiny
from test_hybrids import HYBRIDS
from workbench.analysis.circuits.engine.edges import run_edges, run_nodes
from workbench.analysis.circuits.engine.setup import Setup, open_setup
from workbench.analysis.circuits.methods.path_patching import Paths, run_paths
from workbench.errors import AttachError, InterventionError, WorkbenchError

# What each layer reads the stream by, its mixer, what joins its heads, how many these are; and norm and MLP behind.
LAYERS: dict[str, list[tuple[str, str, str, int, bool]]] = {
    "qwen3-next": [
        ("input_layernorm", "linear_attn", "linear_attn.out_proj", 4, True),
        ("input_layernorm", "self_attn", "self_attn.o_proj", 4, True),
    ],
    "bamba": [
        ("input_layernorm", "mamba", "mamba.out_proj", 4, True),
        ("input_layernorm", "self_attn", "self_attn.o_proj", 4, False),
    ],
    "recurrent-gemma": [
        ("temporal_pre_norm", "temporal_block", "temporal_block.linear_out", 8, True),
        ("temporal_pre_norm", "temporal_block", "temporal_block.linear_out", 8, True),
        ("temporal_pre_norm", "temporal_block", "temporal_block.o_proj", 4, False),
    ],
}  # fmt: skip
MLPS = {"qwen3-next": "mlp", "bamba": "feed_forward", "recurrent-gemma": "mlp_block"}


@pytest.fixture(scope="module", params=LAYERS)
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[str, Setup]]:
    """A hybrid with a random task of prompts of two lengths, its baselines measured."""
    task = random_task(3, 5, 60, lengths=2)
    with workbench.attach(tiny(request.param), Words()) as wb, open_setup(wb, task, batch_size=2) as setup:
        setup.measure_baselines()
        yield request.param, setup


class ByHand:
    """Plain forwards of a hybrid with hooks on its modules, by the names above."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name, self.setup, self.model = name, setup, setup.wb.model
        self.layers = LAYERS[name]

    def module(self, i: int, path: str) -> Any:
        return self.model.get_submodule(f"model.layers.{i}.{path}")

    def run(self, batch: Any, hooks: dict[tuple[str, int], Any] | None = None) -> tuple[Tensor, dict[Any, Tensor]]:
        """Logits at the last token, and what each layer's heads gave to their projection and its MLP wrote.

        A hook gives new ("heads", i) [batch, position, head, width], ("mlp", i), or ("reads", i), what a mixer reads.
        """
        kept: dict[Any, Tensor] = {}
        handles = []

        def watch(key: tuple[str, int], tensor: Tensor) -> Tensor:
            kept[key] = tensor.detach().clone()
            return (hooks or {})[key](tensor) if key in (hooks or {}) else tensor

        for i, (norm, _, out, n_heads, _) in enumerate(self.layers):

            def of_heads(module: Any, args: Any, i: int = i, n_heads: int = n_heads) -> Any:
                heads = watch(("heads", i), args[0].unflatten(-1, (n_heads, -1)))
                return (heads.flatten(-2), *args[1:])

            def of_mlp(module: Any, args: Any, output: Any, i: int = i) -> Any:
                return watch(("mlp", i), output)

            def of_reads(module: Any, args: Any, output: Any, i: int = i) -> Any:
                return watch(("reads", i), output)

            def of_stream(module: Any, args: Any, i: int = i) -> None:
                kept["stream", i] = args[0].detach().clone()

            handles += [
                self.module(i, out).register_forward_pre_hook(of_heads),
                self.module(i, MLPS[self.name]).register_forward_hook(of_mlp),
                self.module(i, norm).register_forward_hook(of_reads),
                self.module(i, norm).register_forward_pre_hook(of_stream),
            ]
        try:
            logits = self.model(**batch, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits, kept

    def metric(self, pair: Any, logits: Tensor) -> Tensor:
        at = logits[torch.arange(pair.size), pair.last]
        return self.setup.measure(at[:, None], pair, at[:, None])[0]


def test_layers_are_found_and_what_they_write_adds_up(opened: tuple[str, Setup]) -> None:
    name, setup = opened
    anatomy = setup.stream.anatomy
    assert [layer.site.name.rpartition(".")[2] for layer in anatomy.layers] == [x[1] for x in LAYERS[name]]
    assert [(x.n_heads, x.mixer) for x in setup.graph.layers] == [(x[3], x[4]) for x in LAYERS[name]]
    assert [layer.out.removeprefix(f"{layer.block}.") for layer in anatomy.layers] == [x[2] for x in LAYERS[name]]
    assert anatomy.error < 1e-6
    assert setup.graph.receiver("L0H1", "q") == setup.graph.receiver((0, 3), "v") == "a0<x>"


@torch.no_grad()
def test_a_circuit_of_nodes_is_what_is_left_when_the_rest_is_replaced_by_hand(opened: tuple[str, Setup]) -> None:
    name, setup = opened
    graph, hand = setup.graph, ByHand(name, setup)
    kept = torch.zeros(1, len(graph.senders), dtype=torch.bool)
    kept[0, ::2] = True
    found = run_nodes(setup, kept, "counterfactual", progress=False)[0]
    for pair in setup.pairs:
        _, twin = hand.run(pair.twin)
        hooks: dict[tuple[str, int], Any] = {}
        for i, layer in enumerate(graph.layers):
            first = graph.first_sender(i)
            inside = kept[0, first : first + layer.n_heads, None]
            hooks["heads", i] = lambda now, i=i, inside=inside, twin=twin: torch.where(inside, now, twin["heads", i])
            if not bool(kept[0, first + layer.n_heads]):
                hooks["mlp", i] = lambda now, i=i, twin=twin: twin["mlp", i]
        assert bool(kept[0, 0])  # the input
        want = hand.metric(pair, hand.run(pair.clean, hooks)[0])
        torch.testing.assert_close(found[setup.rows(pair)], want, atol=1e-7, rtol=1e-7)
    assert float((found - setup.clean).abs().max()) > 1e-4


@torch.no_grad()
def test_an_edge_into_a_mixer_is_what_it_reads_of_the_twin(opened: tuple[str, Setup]) -> None:
    """Layer 1 alone reads what head 1 of layer 0 writes on the twin; of plain attention, all its receivers do."""
    name, setup = opened
    graph, hand = setup.graph, ByHand(name, setup)
    into = [r for r, spot in enumerate(map(graph.receiver_spot, graph.receivers))
            if spot.layer == 1 and spot.what != "mlp"]  # fmt: skip
    assert [graph.receivers[r] for r in into] == ["a1<x>"] or name == "bamba"
    kept = graph.exists.clone()
    kept[graph.sender_index["a0.h1"], into] = False
    found = run_edges(setup, kept[None], progress=False)[0]
    norm, out = hand.module(1, LAYERS[name][1][0]), hand.module(0, LAYERS[name][0][2])
    for pair in setup.pairs:
        _, clean = hand.run(pair.clean)
        _, twin = hand.run(pair.twin)
        change = torch.zeros_like(clean["heads", 0])
        change[:, :, 1] = (twin["heads", 0] - clean["heads", 0])[:, :, 1]
        stream = clean["stream", 1] + change.flatten(-2) @ out.weight.T
        want = hand.metric(
            pair, hand.run(pair.clean, {("reads", 1): lambda now, stream=stream: norm.forward(stream)})[0]
        )
        torch.testing.assert_close(found[setup.rows(pair)], want, atol=1e-7, rtol=1e-7)
    assert float((found - setup.clean).abs().max()) > 1e-6
    paths = Paths(tuple(graph.receivers[r] for r in into), (("a0.h1",),), None, freeze_mlps=True)
    by_paths = run_paths(setup, paths, progress=False)[0]
    torch.testing.assert_close(by_paths, found, atol=1e-7, rtol=1e-7)


METHODS = [("eap", "qwen3-next"), ("path_patching", "bamba"), ("eap_ig", "recurrent-gemma")]


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_every_method_finds_a_circuit_whose_ends_are_faithful(name: str, method: str, tmp_path: Path) -> None:
    task = random_task(2, 5, 60)
    with workbench.attach(tiny(name), Words()) as wb:
        circuit = workbench.find_circuit(wb, task, method, fraction=0.2, steps=2, progress=False)
        scored = circuit.edge_scores if circuit.level == "edge" else circuit.node_scores
        assert float(scored.nan_to_num().abs().max()) > 0
        if method != "eap":
            return
        whole = circuit.top(circuit.graph.n_edges)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a random model and task: there is nothing to have a share of
            found = workbench.circuit_faithfulness(wb, whole, task, progress=False)
        torch.testing.assert_close(found.alone, found.full, atol=1e-7, rtol=1e-7)
        again = type(circuit).load(circuit.save(tmp_path / "circuit.safetensors"))
        assert again.edges == circuit.edges
        assert any("<x>" in edge for edge in whole.edges)
        with pytest.raises(WorkbenchError, match="MIB's form"):
            circuit.to_mib(tmp_path / "mib.json")


@pytest.mark.parametrize("name", ["qwen3-next", "bamba"])
@torch.no_grad()
def test_patched_heads_are_those_by_hand(name: str) -> None:
    task = random_task(3, 6, 60)
    with workbench.attach(tiny(name), Words()) as wb:
        found = workbench.patch_heads(wb, task, "z", direction="noising", positions="end", progress=False)
        assert len(found.heads) == sum(layer[3] for layer in LAYERS[name])
        with open_setup(wb, task) as setup:
            setup.measure_baselines()
            hand, [pair] = ByHand(name, setup), setup.pairs
            _, twin = hand.run(pair.twin)
            for row in (1, len(found.heads) - 1):
                layer, head = found.layers[row], found.numbers[row]

                def put(now: Tensor, layer: int = layer, head: int = head) -> Tensor:
                    new = now.clone()
                    new[:, -1, head] = twin["heads", layer][:, -1, head]
                    return new

                want = hand.metric(pair, hand.run(pair.clean, {("heads", layer): put})[0]) - setup.clean
                torch.testing.assert_close(found.effects[row, 0], want, atol=1e-7, rtol=1e-7)
        if name == "qwen3-next":
            with pytest.raises(InterventionError, match="no head of this model has q"):
                workbench.patch_heads(wb, task, "q", progress=False)
        else:
            assert {head[:2] for head in workbench.patch_heads(wb, task, "q", progress=False).heads} == {
                f"L{len(LAYERS[name]) - 1}"
            }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "minimax",
            r"the stream itself goes through model\.layers\.0\.input_layernorm before what they write is added",
        ),
        ("zamba2", r"what model\.layers\.1\.shared_transformer\.self_attn makes is no part of the stream"),
    ],
)
def test_hybrids_whose_stream_is_no_sum_are_refused_by_name(name: str, says: str) -> None:
    torch.manual_seed(0)
    model = HYBRIDS[name]().eval()
    with workbench.attach(model, Words()) as wb, pytest.raises(AttachError, match=says) as caught:
        workbench.find_circuit(wb, random_task(2, 5, 60), "eap", progress=False)
    assert "wb.patch" in str(caught.value)


def test_a_hybrid_that_scales_what_its_layers_write() -> None:
    """Granite 4: 0.22 of what a recurrence, attention and MLPs give is added; with experts two MLPs read the stream."""
    common = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}

    def made(experts: int) -> nn.Module:
        torch.manual_seed(0)
        config = hf.GraniteMoeHybridConfig(
            **common, vocab_size=60, intermediate_size=48, shared_intermediate_size=48, num_hidden_layers=2,
            layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=4, mamba_n_groups=1,
            mamba_chunk_size=8, num_local_experts=experts, num_experts_per_tok=2, residual_multiplier=0.22,
            pad_token_id=0,
        )  # fmt: skip
        return hf.GraniteMoeHybridForCausalLM(config).eval()

    with workbench.attach(made(0), Words()) as wb, open_setup(wb, random_task(2, 5, 60)) as setup:
        assert [layer.factor for layer in setup.stream.anatomy.layers] == pytest.approx([0.22, 0.22], rel=1e-5)
        assert [layer.mlp_factor for layer in setup.stream.anatomy.layers] == pytest.approx([0.22, 0.22], rel=1e-5)
        setup.measure_baselines()
        kept = setup.graph.exists.clone()
        nodes = torch.ones(1, len(setup.graph.senders), dtype=torch.bool)
        for name in ("a0.h1", "m0", "a1.h2"):
            row = setup.graph.sender_index[name]
            kept[row], nodes[0, row] = False, False
        by_edges, by_nodes = run_edges(setup, kept[None], progress=False), run_nodes(setup, nodes, progress=False)
        torch.testing.assert_close(by_edges, by_nodes, atol=1e-5, rtol=1e-5)
        assert float((by_nodes - setup.clean).abs().max()) > 1e-4
    with workbench.attach(made(4), Words()) as wb, pytest.raises(AttachError, match="two MLPs"):
        workbench.find_circuit(wb, random_task(2, 5, 60), "eap", progress=False)
