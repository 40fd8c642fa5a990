"""How fast all heads are switched off in turn: our sweep, one forward per head, and a TransformerLens loop.

A random model of the shape of GPT-2 small (12 layers, 12 heads of 64): each of its 144 heads is zero-ablated, and the
loss or a logit difference is measured; all arms in one process, interleaved, on equal weights and the same tokens. Also
the size and speed of copies that have really lost heads. Only ratios mean anything. Writes its section of
docs/benchmarks.md.

    python benchmarks/sweep.py [--lengths 16 128] [--batches 4] [--batch 1] [--metrics loss]
                               [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from shared import peers
from shared.measuring import interleaved, machine, say, table, write_section
from transformers import GPT2Config, GPT2LMHeadModel

import workbench

HEADING = "How fast all heads are switched off in turn"
SHARES = (0.25, 0.5, 0.75)


def loss(output: Any, batch: Any) -> torch.Tensor:
    """[batch] mean cross-entropy of the next tokens."""
    logits = output if isinstance(output, torch.Tensor) else output.logits
    ids = batch["input_ids"]
    lost = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return lost.mean(1)


def logit_diff(output: Any, batch: Any) -> torch.Tensor:
    """[batch] difference of two tokens' logits at the last position."""
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return logits[:, -1, 10] - logits[:, -1, 20]


logit_diff.reads = lambda batch: torch.tensor([batch["input_ids"].shape[1] - 1])  # type: ignore[attr-defined]
METRICS: dict[str, Any] = {"loss": loss, "logit difference": logit_diff}


def arms(
    config: GPT2Config, n_batches: int, batch: int, length: int, metric: Any
) -> dict[str, Callable[[], torch.Tensor]]:
    """One function per arm; all give the metric [head, example]."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "wte" not in name:
                weight.mul_(3.0)  # so that heads matter
    twin = GPT2LMHeadModel._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    bridge = peers.bridge(twin)
    batches = [{"input_ids": torch.randint(0, config.vocab_size, (batch, length))} for _ in range(n_batches)]
    wb = workbench.attach(model)
    heads = [(layer, head) for layer in range(config.n_layer) for head in range(config.n_head)]
    variants = [workbench.Variant(one) for one in heads]

    def sweep() -> torch.Tensor:
        found = workbench.run_sweep(wb, variants, batches, metric, progress=False)
        if found.mode != "resumed" or not found.batched:
            raise SystemExit(f"the sweep did not run as it should: {found.reason}")
        return found.values[:, 0]

    def one_by_one() -> torch.Tensor:
        rows = []
        for head in heads:
            with wb.ablate(head):
                rows.append(torch.cat([metric(model(**one, use_cache=False), one) for one in batches]))
        return torch.stack(rows)

    def lens() -> torch.Tensor:
        rows = []
        for layer, head in heads:

            def switch_off(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
                z[:, :, head] = 0
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", switch_off)]
            rows.append(
                torch.cat([metric(bridge.run_with_hooks(one["input_ids"], fwd_hooks=hooks), one) for one in batches])
            )
        return torch.stack(rows)

    return {"ours": sweep, "one by one": one_by_one, "lens": lens}


def pruned(config: GPT2Config, batch: int, length: int, rounds: int) -> list[list[str]]:
    """Rows of the table of pruned copies: share of heads gone, parameters, speed, difference from the ablated model."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    wb = workbench.attach(model)
    ids = torch.randint(0, config.vocab_size, (batch, length))
    order = torch.randperm(config.n_layer * config.n_head).tolist()
    models: dict[float, Any] = {0.0: model}
    rows = []
    for share in SHARES:
        gone = [divmod(i, config.n_head) for i in order[: round(share * len(order))]]
        models[share] = workbench.prune_heads(model, gone)
        with wb.ablate(gone):
            ablated = model(ids).logits
        off = float((models[share](ids).logits - ablated).abs().max() / ablated.abs().max())
        attention, kept = (
            sum(p.numel() for name, p in one.named_parameters() if ".attn." in name) for one in (model, models[share])
        )
        whole, left = (sum(p.numel() for p in one.parameters()) for one in (model, models[share]))
        rows.append([f"{share:.0%}", f"{kept / attention:.2f}", f"{left / whole:.2f}", f"{off:.1e}"])
    found = interleaved({str(share): (lambda one=one: one(ids)) for share, one in models.items()}, rounds)
    return [
        [*row[:3], f"{found['0.0'] / found[str(share)]:.2f}", row[3]] for share, row in zip(SHARES, rows, strict=True)
    ]


@torch.no_grad()
def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--metrics", nargs="+", choices=list(METRICS), default=list(METRICS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model, one round, nothing written: does it work?")
    options = parser.parse_args()
    lengths = [16] if options.quick else options.lengths
    rounds = 1 if options.quick else options.rounds
    small = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 100} if options.quick else {}
    rows = []
    for length, name_of_metric in itertools.product(lengths, options.metrics):
        config = GPT2Config(n_positions=max(256, length), attn_implementation="sdpa", **small)
        made = arms(config, options.batches, options.batch, length, METRICS[name_of_metric])
        results = {name: run() for name, run in made.items()}
        off = {name: float((results[name] - results["ours"]).abs().max()) for name in ("one by one", "lens")}
        spread = float(results["ours"].std())
        if max(off.values()) > 1e-3 * max(1.0, spread) or spread == 0:
            raise SystemExit(f"the arms differ: {off}")
        found = interleaved(made, rounds)
        ratios = [f"{found[name] / found['ours']:.1f}" for name in ("one by one", "lens")]
        rows.append(
            [
                str(length),
                name_of_metric,
                *ratios,
                *(f"{off[name]:.1e}" for name in ("one by one", "lens")),
                f"{spread:.1e}",
            ]
        )
        say(" ".join(rows[-1]))
    length = 64 if options.quick else 128
    config = GPT2Config(n_positions=256, attn_implementation="sdpa", **small)
    smaller = pruned(config, options.batch, length, max(rounds, 2))
    for row in smaller:
        say(" ".join(row))
    if options.quick:
        return
    header = [
        "N",
        "metric",
        "one forward per head / ours",
        "TransformerLens / ours",
        "largest difference",
        "TL's",
        "spread",
    ]
    sizes = ["heads gone", "attention weights left", "all weights left", "speed-up", "largest relative difference"]
    write_section(
        HEADING,
        f"""`python benchmarks/sweep.py`: each of the 144 heads of a random model of GPT-2 small's shape (float32) is
zero-ablated, and the loss of all tokens or the difference of two logits at the last one is measured, on
{options.batches} batches of {options.batch} sequence of N tokens. Where only the last token counts, the sweep leaves
the other logits out. Time of one forward per head (`wb.ablate`), and of a loop over TransformerLens' `run_with_hooks`
(it forces eager attention), over that of `workbench.run_sweep`, whose time includes its checks (a session hashes its
weights once). Differences are those of the metric from ours, beside its spread over heads.

{table(header, rows)}

Copies of the model that have lost randomly chosen heads (`workbench.prune_heads`), on {options.batch} sequence of
{length} tokens: what is left of the weights, the whole model's time over theirs, and the largest difference of logits
from the ablated model's over the largest logit.

{table(sizes, smaller)}

Median of {options.rounds}, interleaved in both orders. {machine("torch", "transformers", "transformer-lens")}""",
    )


if __name__ == "__main__":
    main()
