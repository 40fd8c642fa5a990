"""Writes `mib_figures.json`: what MIB's own code says of small models, for `test_mib_agreement.py` to compare with.

MIB's circuit track and EAP-IG need TransformerLens below version 4, so this runs in an environment of its own. EAP-IG
is the commit that MIB names; with later ones MIB's evaluation does not run.

    git clone --recurse-submodules https://github.com/hannamw/MIB-circuit-track   # EAP-IG is a submodule
    python -m venv mib && mib/bin/pip install 'transformer-lens<4'                  # and what their imports ask for
    export PYTHONPATH=tests:MIB-circuit-track:MIB-circuit-track/EAP-IG/src
    mib/bin/python tests/analysis/circuits/mib_figures.py
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

torch.set_default_dtype(torch.float64)
_zeros = torch.zeros
# Their code makes its scores on a GPU.
torch.zeros = lambda *size, **how: _zeros(*size, **{**how, "device": "cpu"} if how.get("device") == "cuda" else how)

import eap.attribute  # noqa: E402
import eap.evaluate  # noqa: E402
import eap.utils  # noqa: E402
from eap.graph import Graph  # noqa: E402
from MIB_circuit_track.evaluation import evaluate_area_under_curve  # noqa: E402
from MIB_circuit_track.metrics import get_metric  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402
from transformer_lens.pretrained.weight_conversions import (  # noqa: E402
    convert_gpt2_weights,
    convert_qwen2_weights,
)

from support import mib_case as case  # noqa: E402


def lens(hf: Any, accuracy: float) -> Any:
    """A model as their code takes it, with nothing folded."""
    given, common = hf.config, {"dtype": torch.float64, "device": "cpu", "d_vocab": case.VOCABULARY, "n_ctx": 16}
    if given.model_type == "gpt2":
        config = HookedTransformerConfig(
            n_layers=given.n_layer, d_model=given.n_embd, d_head=given.n_embd // given.n_head, n_heads=given.n_head,
            d_mlp=given.n_inner, act_fn="gelu_new", normalization_type="LN", eps=given.layer_norm_epsilon,
            positional_embedding_type="standard", original_architecture="GPT2LMHeadModel", **common,
        )  # fmt: skip
        weights = convert_gpt2_weights(hf, config)
    else:
        width = given.hidden_size // given.num_attention_heads
        config = HookedTransformerConfig(
            n_layers=given.num_hidden_layers, d_model=given.hidden_size, d_head=width,
            n_heads=given.num_attention_heads, n_key_value_heads=given.num_key_value_heads,
            d_mlp=given.intermediate_size, act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True,
            eps=given.rms_norm_eps, positional_embedding_type="rotary", rotary_dim=width,
            rotary_base=int(given.rope_theta), rotary_adjacent_pairs=False,
            original_architecture="Qwen2ForCausalLM", **common,
        )  # fmt: skip
        weights = convert_qwen2_weights(hf, config)
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )  # fmt: skip
    for name in ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in", "ungroup_grouped_query_attention"):
        setattr(model.cfg, name, True)
    ids = case.prompts()[0]
    with torch.no_grad():
        off = float((hf(ids).logits - model(ids)).abs().max())
    if off > accuracy:
        raise SystemExit(f"the two models differ by {off}")
    return model


def tokens(model: Any, rows: Any, max_length: Any = None) -> Any:
    """Ids, mask, lengths and the longest, of prompts that are ids already."""
    ids = torch.stack(list(rows))
    return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]


Batches = list[tuple[Any, Any, Any]]


def batched(size: int) -> Batches:
    """Prompts, twins and answers as their code takes them."""
    ids, twins, right, wrong = case.prompts()
    labels = torch.stack([right, wrong], 1).tolist()
    return [(ids[i : i + size], twins[i : i + size], labels[i : i + size]) for i in range(0, len(ids), size)]


def scored(model: Any, method: str, batches: Batches) -> Any:
    """Their graph with their scores."""
    graph = Graph.from_model(model)
    loss = partial(logit_diff, mean=True, loss=True)
    eap.attribute.attribute(model, graph, batches, loss, method, "patching", ig_steps=case.STEPS, quiet=True)
    return graph


def scores(graph: Any) -> dict[str, float]:
    """By the names of edges."""
    return {name: float(edge.score) for name, edge in graph.edges.items()}


def by_rule(model: Any, **how: Any) -> list[float]:
    """The metric of each prompt with the circuit `mib_case.chosen`, heads of a group together."""
    graph = Graph.from_model(model)
    size = model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)
    for name, edge in graph.edges.items():
        receiver = name.partition("->")[2]
        if size > 1 and edge.qkv in ("k", "v"):
            receiver = f"a{edge.child.layer}.kv{edge.child.head // size}<{edge.qkv}>"
        edge.in_graph = case.chosen(edge.parent.name, receiver)
    plain = partial(logit_diff, mean=False, loss=False)
    found = eap.evaluate.evaluate_graph(model, graph, batched(case.BATCH), plain, quiet=True, **how)
    return [float(x) for x in found]


logit_diff = get_metric("logit_diff", "ioi")


def main() -> None:
    """Score, choose and evaluate, all by their code."""
    for module in (eap.attribute, eap.evaluate, eap.utils):
        module.tokenize_plus = tokens
    model, grouped = lens(case.model(), 1e-10), lens(case.grouped_model(), 1e-5)  # rotary angles are float32
    batches = batched(case.BATCH)
    found: dict[str, Any] = {}
    for method in ("EAP", "EAP-IG-inputs"):
        graph = scored(model, method, batches)
        own: dict[str, Any] = {"scores": scores(graph)}
        for which, absolute in (("absolute", True), ("signed", False)):
            plain = partial(logit_diff, mean=False, loss=False)
            counts, cpr, cmd, _, f = evaluate_area_under_curve(
                model, graph, batches, plain, quiet=True, absolute=absolute
            )
            sets = []
            for share in case.FRACTIONS:
                graph.apply_topn(int(share * len(graph.edges)), absolute, level="edge", prune=True)
                graph.prune()  # as evaluate_graph does, after the sizes were counted
                sets.append([i for i, edge in enumerate(graph.edges.values()) if edge.in_graph])
            own[which] = {
                "cpr": float(cpr), "cmd": float(cmd), "f": [float(x) for x in f], "counts": counts, "sets": sets,
            }  # fmt: skip
        found[method] = own
        if method == "EAP":
            graph.to_json(str(Path(__file__).with_name("mib_graph.json")))
    uneven = scores(scored(model, "EAP", batched(case.UNEVEN)))
    found["EAP in uneven batches"] = {name: score for name, score in uneven.items() if name.endswith("->logits")}
    means = {"intervention": "mean-positional", "intervention_dataloader": batches}
    found["by rule"] = {"counterfactual": by_rule(model), "mean_positional": by_rule(model, **means)}
    found["grouped"] = {
        "scores": scores(scored(grouped, "EAP-IG-inputs", batches)),
        "counterfactual": by_rule(grouped),
        "zero": by_rule(grouped, intervention="zero"),
    }
    about = {"MIB-circuit-track": "b759df3", "EAP-IG": "7af394a", "transformer-lens": "3.2.1", "torch": "2.13.0"}
    path = Path(__file__).with_name("mib_figures.json")
    path.write_text(json.dumps({"made_with": about, **found}), encoding="utf-8")


if __name__ == "__main__":
    main()
