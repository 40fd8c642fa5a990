"""What logit attribution costs: every head's, MLP's and embedding's share in a logit, ours against TransformerLens.

A random model of GPT-2 small's shape on prompts of N tokens, and the difference of two logits at the last one. Ours is
one forward on the kernel that the model has; TransformerLens keeps a cache of the parts, stacks them and projects them
(`stack_head_results`, `decompose_resid`, `logit_attrs`), in an eager model. Both give the same shares of heads, which
is checked. Writes its section of docs/benchmarks.md.

    python benchmarks/logits.py [--lengths 16 64 256] [--batch 4] [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from shared import peers
from shared.measuring import interleaved, machine, peak_above, say, table, write_section

import workbench

HEADING = "What logit attribution costs"
RIGHT, WRONG = 7, 9


def model_of(options: argparse.Namespace, length: int) -> Any:
    """A random GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 100} if options.quick else {}
    return GPT2LMHeadModel(GPT2Config(n_positions=length, bos_token_id=0, eos_token_id=0, **small)).eval()


def theirs(bridge: Any, ids: torch.Tensor) -> torch.Tensor:
    """[head, example] shares, and those of the other parts, by TransformerLens; the heads are returned."""
    _, cache = bridge.run_with_cache(ids)
    right, wrong = (torch.full((len(ids),), token) for token in (RIGHT, WRONG))
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    parts = cache.decompose_resid(layer=-1, pos_slice=-1, mode="mlp")
    cache.logit_attrs(parts, tokens=right, incorrect_tokens=wrong, pos_slice=-1)
    found: torch.Tensor = cache.logit_attrs(heads, tokens=right, incorrect_tokens=wrong, pos_slice=-1)
    return found


def measure(options: argparse.Namespace) -> list[list[str]]:
    """Rows: N, their time over ours, their memory over ours, largest difference over the largest share."""
    rows = []
    for length in options.lengths:
        ids = torch.randint(0, 100, (options.batch, length), generator=torch.Generator().manual_seed(0))
        bridge = peers.bridge(model_of(options, length))
        with workbench.attach(model_of(options, length)) as wb, torch.no_grad():

            def ours(ids: torch.Tensor = ids, wb: workbench.Workbench = wb) -> workbench.LogitAttribution:
                return workbench.logit_attribution(wb, {"input_ids": ids}, RIGHT, contrast=WRONG, batch_size=len(ids))

            found, truth = ours(), theirs(bridge, ids)
            heads = found.values[[i for i, kind in enumerate(found.kinds) if kind == "head"]]
            off = float((heads - truth).abs().max() / truth.abs().max())
            if off > 1e-3:
                raise SystemExit(f"the shares differ: {off}")
            lens = partial(theirs, bridge, ids)
            seconds = interleaved({"ours": ours, "theirs": lens}, options.rounds)
            peaks = [peak_above(work)[0] for work in (ours, lens)]
        ratio = f"{peaks[1] / peaks[0]:.1f}" if peaks[0] > 1 << 20 else "–"
        rows.append([str(length), f"{seconds['theirs'] / seconds['ours']:.1f}", ratio, f"{off:.0e}"])
        say(" ".join(rows[-1]))
    return rows


def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.rounds = [16, 32], 1
    rows = measure(options)
    header = ["N", "their time over ours", "their memory over ours", "difference"]
    text = f"""`python benchmarks/logits.py`: a random model of GPT-2 small's shape, {options.batch} prompts of N
tokens; shares of all heads, MLPs and embeddings in the difference of two logits at the last token. Memory is the peak
above what was held before. The difference is the largest between the heads' shares, over the largest share.

{table(header, rows)}

Median of {options.rounds} rounds, interleaved in both orders. {machine("torch", "transformers", "transformer-lens")}
"""
    if options.quick:
        print(text)
    else:
        write_section(HEADING, text)


if __name__ == "__main__":
    main()
