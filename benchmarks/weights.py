"""What a look at the weights costs: Q-, K- and V-composition of all pairs of heads, ours against TransformerLens.

A random model of GPT-2 small's widths. TransformerLens' `all_composition_scores` takes the matrices as they are; ours
folds gains and centring of norms into them, so the model's are centred and without gains, and both give the same
scores, which is checked. Writes its section of docs/benchmarks.md.

    python benchmarks/weights.py [--layers 2 3] [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from shared import peers
from shared.measuring import interleaved, machine, peak_above, say, table, write_section

import workbench

HEADING = "What a look at the weights costs"


def model_of(layers: int, quick: bool) -> Any:
    """A random GPT-2 whose queries, keys and values read what is centred already, so that centring changes nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = {"n_head": 4, "n_embd": 64} if quick else {}
    config = GPT2Config(n_layer=layers, n_positions=64, vocab_size=1000, bos_token_id=0, eos_token_id=0, **small)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            weight = block.attn.c_attn.weight  # [d_model, 3 · d_model]
            weight -= weight.mean(0, keepdim=True)
    return model


def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    rows = []
    for layers in options.layers:
        model = model_of(layers, options.quick)
        bridge = peers.bridge(copy.deepcopy(model))
        with workbench.attach(model) as wb, torch.no_grad():

            def ours(wb: workbench.Workbench = wb) -> torch.Tensor:
                return workbench.composition_scores(wb).scores

            def theirs(bridge: Any = bridge) -> torch.Tensor:
                found = [bridge.all_composition_scores(kind).scores.flatten(2).flatten(0, 1) for kind in "QKV"]
                return torch.stack(found)

            a, b = ours(), theirs()
            there = ~a.isnan()
            off = float((a - b)[there].abs().max() / a[there].max())
            if off > 1e-4:
                raise SystemExit(f"the scores of {layers} layers differ by {off}")
            seconds = interleaved({"ours": ours, "theirs": theirs}, options.rounds)
            peaks = [peak_above(work)[0] for work in (ours, theirs)]
        time = f"{seconds['theirs'] / seconds['ours']:.1f}"
        rows.append(
            [str(layers), str(int(there[0].sum())), time, f"{peaks[1] / max(peaks[0], 1 << 20):.1f}", f"{off:.0e}"]
        )
        say(" ".join(rows[-1]))
    header = ["layers", "pairs", "their time over ours", "their memory over ours", "difference"]
    text = f"""`python benchmarks/weights.py`: a random model of GPT-2 small's widths; Q-, K- and V-composition of
all pairs of heads by `composition_scores` (float64, which finds the model's parts first) and by TransformerLens'
`all_composition_scores` (float32). Memory is the peak above what was held before. The difference is the largest, over
the largest score.

{table(header, rows)}

Median of {options.rounds} rounds, interleaved in both orders. {machine("torch", "transformers", "transformer-lens")}
"""
    if options.quick:
        print(text)
    else:
        write_section(HEADING, text)


if __name__ == "__main__":
    main()
