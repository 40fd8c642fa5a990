"""Writes `mib_figures.json`: what MIB's own code says of a small model, for `test_mib_agreement.py` to compare with.

MIB's circuit track and EAP-IG need TransformerLens below version 4, so this runs in an environment of its own:

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
from eap.graph import Graph  # noqa: E402
from MIB_circuit_track.evaluation import evaluate_area_under_curve  # noqa: E402
from MIB_circuit_track.metrics import get_metric  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights  # noqa: E402

from support import mib_case as case  # noqa: E402


def lens() -> Any:
    """The model as their code takes it, with nothing folded."""
    hf = case.model()
    given = hf.config
    config = HookedTransformerConfig(
        n_layers=given.n_layer, d_model=given.n_embd, n_ctx=given.n_positions, d_head=given.n_embd // given.n_head,
        n_heads=given.n_head, d_mlp=given.n_inner, d_vocab=given.vocab_size, act_fn="gelu_new",
        normalization_type="LN", eps=given.layer_norm_epsilon, dtype=torch.float64, device="cpu",
        positional_embedding_type="standard", original_architecture="GPT2LMHeadModel",
    )  # fmt: skip
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf, config), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False, refactor_factored_attn_matrices=False,
    )  # fmt: skip
    for name in ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in", "ungroup_grouped_query_attention"):
        setattr(model.cfg, name, True)
    ids = case.prompts()[0]
    with torch.no_grad():
        off = float((hf(ids).logits - model(ids)).abs().max())
    if off > 1e-10:
        raise SystemExit(f"the two models differ by {off}")
    return model


def tokens(model: Any, rows: Any, max_length: Any = None) -> Any:
    """Ids, mask, lengths and the longest, of prompts that are ids already."""
    ids = torch.stack(list(rows))
    return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]


def main() -> None:
    """Score, choose and evaluate, all by their code."""
    eap.attribute.tokenize_plus = eap.evaluate.tokenize_plus = tokens
    model = lens()
    ids, twins, right, wrong = case.prompts()
    labels = torch.stack([right, wrong], 1).tolist()
    batches = [
        (ids[i : i + case.BATCH], twins[i : i + case.BATCH], labels[i : i + case.BATCH])
        for i in range(0, len(ids), case.BATCH)
    ]
    metric = get_metric("logit_diff", "ioi", None, model)
    found: dict[str, Any] = {}
    for method in ("EAP", "EAP-IG-inputs"):
        graph = Graph.from_model(model)
        loss = partial(metric, mean=True, loss=True)
        eap.attribute.attribute(model, graph, batches, loss, method, "patching", ig_steps=case.STEPS, quiet=True)
        own: dict[str, Any] = {"scores": {name: float(edge.score) for name, edge in graph.edges.items()}}
        for which, absolute in (("absolute", True), ("signed", False)):
            plain = partial(metric, mean=False, loss=False)
            _, cpr, cmd, _, f = evaluate_area_under_curve(model, graph, batches, plain, quiet=True, absolute=absolute)
            sets = []
            for share in case.FRACTIONS:
                graph.apply_topn(int(share * len(graph.edges)), absolute, level="edge", prune=True)
                graph.prune()
                sets.append([i for i, edge in enumerate(graph.edges.values()) if edge.in_graph])
            own[which] = {"cpr": float(cpr), "cmd": float(cmd), "f": [float(x) for x in f], "sets": sets}
        found[method] = own
        if method == "EAP":
            graph.to_json(str(Path(__file__).with_name("mib_graph.json")))
    about = {"MIB-circuit-track": "b759df3", "EAP-IG": "7af394a", "transformer-lens": "3.2.1", "torch": "2.13.0"}
    path = Path(__file__).with_name("mib_figures.json")
    path.write_text(json.dumps({"made_with": about, **found}), encoding="utf-8")


if __name__ == "__main__":
    main()
