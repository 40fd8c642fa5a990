"""The parts of models: found in every kind of block, and refused with a name where the stream is no sum."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.circuits import ENCODER_DECODERS, SlotModel, task_for, tiny
from support.tiny import family
from support.zoo.family import ids
from workbench.analysis.circuits.model.anatomy import find_anatomy
from workbench.analysis.circuits.model.branches import find_branches
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.nodes import Layer
from workbench.errors import AttachError, FormatError, InterventionError, WorkbenchError

KINDS = {
    "gpt2": (4, 4, False),
    "llama-gqa": (6, 2, False),
    "gpt-neox": (4, 4, True),
    "falcon": (4, 1, True),
    "qwen3": (6, 2, False),
    "falcon-alibi-eager": (4, 1, True),
}


@pytest.mark.parametrize("name", KINDS)
def test_parts_are_found_and_their_sum_is_the_stream(name: str) -> None:
    heads, kv, parallel = KINDS[name]
    with workbench.attach(tiny(name)) as wb:
        found = find_anatomy(wb, family(name).inputs())
    assert {(x.n_heads, x.n_kv_heads, x.parallel, x.mlp) for x in found.graph.layers} == {(heads, kv, parallel, True)}
    assert found.error < 1e-12
    assert found.head is not None


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_has_two_streams(name: str) -> None:
    with workbench.attach(tiny(name)) as wb:
        given = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 5)}
        if name in ("whisper", "captioner"):
            del given["input_ids"]
            given |= {name: value for name, value in task_for(name, 2).inputs.items() if name != "decoder_input_ids"}
        found = find_anatomy(wb, given)
    graph = found.graph
    assert found.error < 1e-12
    assert found.head is not None
    assert graph.streams == ("encoder", "decoder")
    assert [(x.stream, x.kind, x.mlp) for x in graph.layers] == [
        ("encoder", "self", True), ("encoder", "self", True), ("decoder", "self", False), ("decoder", "cross", True),
        ("decoder", "self", False), ("decoder", "cross", True),
    ]  # fmt: skip
    assert found.blocks(1)[1] == found.layers[4].block == found.layers[5].block
    assert found.lengths == ({"whisper": 20, "captioner": 5}.get(name, 9), 5)
    norm = found.layers[5].projections["k"].norm
    assert norm is not None
    assert "encoder" in norm
    assert norm == found.layers[3].projections["v"].norm


def test_two_towers_without_cross_attention_are_refused() -> None:
    with workbench.attach(tiny("clip", torch.float32)) as wb, pytest.raises(AttachError, match="joined by cross-atten"):
        find_anatomy(wb, family("clip").inputs())


def test_names_in_two_streams() -> None:
    layers = (
        Layer(2, 2, stream="encoder"), Layer(4, 2, mlp=False, stream="decoder"),
        Layer(4, 2, kind="cross", stream="decoder"),
    )  # fmt: skip
    graph = Graph(layers, d_model=8)
    assert Graph.of(graph.facts) == graph
    for given in (("decoder.0.cross_attn", 3), "decoder.0.cross_attn.H3", "decoder.x0.h3"):
        assert graph.head_name(given) == "decoder.x0.h3"
    assert graph.head_name("decoder.0.self_attn.H1") == "decoder.a0.h1"
    assert graph.receiver("decoder.x0.h3", "k") == "decoder.x0.kv1<k>"
    assert graph.layer_of("decoder.x0.kv1") == graph.layer_of("decoder.m0") == 2
    with pytest.raises(InterventionError, match="no node"):
        graph.head_name((0, 1))  # of which stream?
    path = ["encoder.input->encoder.a0.h0<v>", "encoder.a0.h0->decoder.x0.kv1<v>", "decoder.x0.h2->logits"]
    chosen = torch.zeros_like(graph.exists)
    for name in (*path, "decoder.input->decoder.a0.h0<q>", "encoder.m0->decoder.x0.kv0<k>"):
        chosen[graph.edge(name)] = True
    assert graph.edge_names(graph.pruned(chosen)) == path
    with pytest.raises(FormatError, match="does not read"):
        graph.edge("encoder.a0.h0->decoder.x0.h0<q>")
    with pytest.raises(FormatError, match="does not read"):
        graph.edge("encoder.a0.h0->logits")


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gpt-neox", "qwen3"])
def test_columns_are_those_of_each_head(name: str) -> None:
    """Changing the columns of one head's queries, keys or values changes that head's output and no other's."""
    model = tiny(name)
    with workbench.attach(model) as wb:
        inputs = family(name).inputs()
        layer = find_anatomy(wb, inputs).layers[1]
        for part in "qkv":
            reader = layer.projections[part]
            many = len(reader.columns)
            group = layer.n_heads // many

            def change(
                module: object, args: object, output: torch.Tensor, columns: torch.Tensor = reader.columns[1]
            ) -> torch.Tensor:
                noise = torch.randn(columns.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
                return output.index_add(-1, columns, noise.expand(*output.shape[:-1], -1))

            with wb.capture(z=True) as before:
                model(**inputs)
            handle = reader.module.register_forward_hook(change)
            with wb.capture(z=True) as after:
                model(**inputs)
            handle.remove()
            moved = (before[layer.site.name].z != after[layer.site.name].z).any(-1).any(1).any(0)
            assert moved.nonzero()[:, 0].tolist() == list(range(group, 2 * group))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gemma2", r"goes through model\.layers\.0\.post_attention_layernorm first(?s:.*)wb\.patch"),
        ("deepseek-v3", "low-rank"),
        ("bart", r"the stream itself goes through model\.encoder\.layers\.0\.final_layer_norm"),
    ],
)
def test_models_whose_stream_is_no_sum_are_refused(name: str, says: str) -> None:
    model = tiny(name, torch.float32)
    with workbench.attach(model) as wb, pytest.raises(AttachError, match=says):
        find_anatomy(wb, family(name).inputs())


def test_a_norm_over_all_heads_is_refused_by_name() -> None:
    config = hf.Olmo2Config(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    says = r"same columns of model\.layers\.0\.self_attn\.q_proj: a norm over all heads"
    for dtype in (torch.float32, torch.bfloat16):
        model = hf.Olmo2ForCausalLM(config).eval().to(dtype)
        with workbench.attach(model) as wb, pytest.raises(AttachError, match=says):
            find_anatomy(wb, {"input_ids": torch.tensor([[5, 9, 3, 8]])})


def test_a_scaled_stream_is_refused_by_name() -> None:
    model = SlotModel()
    model.blocks[0].register_forward_hook(lambda module, args, output: 2 * output)
    with workbench.attach(model) as wb, pytest.raises(AttachError, match=r"blocks\.0"):
        find_anatomy(wb, {"input_ids": torch.tensor([[1, 2, 3]])})


@pytest.mark.parametrize(("where", "value"), [("model.layers.1.self_attn.v_proj", torch.nan), ("lm_head", torch.inf)])
def test_numbers_that_are_not_finite_are_named(where: str, value: float) -> None:
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.get_submodule(where).weight[0, 0] = value  # type: ignore[index, operator]
    with (
        workbench.attach(model, check=False) as wb,
        pytest.raises(WorkbenchError, match=rf"^{where} gives numbers that are not finite"),
    ):
        find_anatomy(wb, family("llama-gqa").inputs())


def test_what_was_found_is_kept_while_it_holds() -> None:
    model = tiny("gpt2", torch.float32)
    inputs = family("gpt2").inputs()
    other = {"input_ids": inputs["input_ids"].flip(1)}
    with workbench.attach(model) as wb:
        found = find_anatomy(wb, inputs)
        assert found is not find_anatomy(wb, other)
        again = {"input_ids": inputs["input_ids"].clone()}
        assert found is find_anatomy(wb, again) is find_branches(wb, again)
        with torch.autocast("cpu", torch.bfloat16):
            assert "bfloat16" in find_anatomy(wb, inputs).precision
        kept = find_anatomy(wb, inputs)
        assert kept.precision == "float32"
        handle = model.transformer.h[0].register_forward_hook(lambda module, args, output: 2 * output)
        with pytest.raises(AttachError, match=r"h\.0"):
            find_anatomy(wb, inputs)
        handle.remove()
        assert find_anatomy(wb, inputs) is kept
        model.transformer.h[1].attn.c_attn.weight.data[0, 0] += 1  # no version tells of it
        changed = find_anatomy(wb, inputs)
        assert changed is not kept
        model.transformer.h[1].mlp = copy.deepcopy(model.transformer.h[1].mlp)
        replaced = find_anatomy(wb, inputs)
        assert replaced.modules["transformer.h.1.mlp"] is model.transformer.h[1].mlp
        model.transformer.h[0].compile()
        with pytest.raises(WorkbenchError, match="compiled"):
            find_anatomy(wb, inputs)
    gone = weakref.ref(model)
    del model, wb, found, kept, changed, replaced, handle
    gc.collect()
    assert gone() is None


def test_a_graph_prunes_what_leads_nowhere() -> None:
    graph = Graph((Layer(2, 1), Layer(2, 1)), d_model=8)
    chosen = torch.zeros(len(graph.senders), len(graph.receivers), dtype=torch.bool)
    path = ["input->a0.kv0<v>", "a0.h1->m1", "m1->logits"]
    for name in (*path, "input->a1.h0<q>", "m0->logits", "a0.h0->a1.kv0<k>"):
        chosen[graph.edge(name)] = True
    assert graph.edge_names(graph.pruned(chosen)) == path
    assert graph.nodes_of(graph.pruned(chosen)) == ("input", "a0.h1", "m1", "a0.kv0", "logits")


def test_names_that_are_none() -> None:
    graph = Graph((Layer(4, 2),), d_model=8)
    assert graph.receiver("L0H3", "k") == "a0.kv1<k>"
    assert graph.head_name("0.3") == graph.head_name((0, 3)) == "a0.h3"
    for bad in ("a0.h4", (1, 0), "banana"):
        with pytest.raises(InterventionError, match="no node"):
            graph.head_name(bad)
    for edge in ("input", "a0.h1->a0.h2<q>", "logits->m0"):
        with pytest.raises(FormatError, match="edge"):
            graph.edge(edge)


class Tied(nn.Module):
    """A GPT-2 whose logits no module gives, and whose MLPs are as wide as its vocabulary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.model.transformer(input_ids).last_hidden_state
        return nn.functional.linear(states, self.model.transformer.wte.weight)


def test_a_module_as_wide_as_the_logits_is_no_head() -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_inner=12, vocab_size=12, n_positions=8)
    plain = hf.GPT2LMHeadModel(config).eval()
    words = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    task = workbench.tasks.from_inputs({"input_ids": words}, {"input_ids": words.flip(0)}, [1, 2], [3, 4])
    with workbench.attach(plain) as wb:
        want = workbench.find_circuit(wb, task, "eap", progress=False)
    tied = Tied(plain)
    with workbench.attach(tied) as wb:
        assert find_anatomy(wb, {"input_ids": words}).head is None
        found = workbench.find_circuit(wb, task, "eap", progress=False)
    torch.testing.assert_close(found.edge_scores, want.edge_scores, atol=1e-6, rtol=1e-4, equal_nan=True)
