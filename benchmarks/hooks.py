"""What hooks and interventions cost, against the plain forward and against nnsight and TransformerLens.

A random model of the shape of GPT-2 small (12 layers, 12 heads of 64) on one sequence of N tokens; all arms in one
process, interleaved. Each tool makes the same edits: ten heads switched off, and one head's pattern made uniform over
all keys. The peers' times are over the plain forward on SDPA too; to edit patterns they leave it for eager attention.
Only ratios mean anything. Writes its section of docs/benchmarks.md.

    python benchmarks/hooks.py [--lengths 512 2048] [--rounds 7]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from shared import peers
from shared.measuring import interleaved, machine, say, table, write_section
from transformers import GPT2Config, GPT2LMHeadModel

import workbench

HEADING = "What hooks and interventions cost"
HEADS = [(layer, (5 * layer) % 12) for layer in range(1, 11)]
EDITED = (3, 5)
ARMS = {
    "plain": "forward on SDPA",
    "attached": "ours, attached and nothing open",
    "ablate": "ours, ten heads switched off",
    "edit": "ours, one head's pattern edited",
    "nnsight ablate": "nnsight, ten heads switched off, on SDPA",
    "lens ablate": "TransformerLens, ten heads switched off (it forces eager attention)",
    "nnsight edit": "nnsight, one head's pattern edited, on eager attention",
    "lens edit": "TransformerLens, one head's pattern edited, on eager attention",
}


def uniform(rows: torch.Tensor, site: str, head: int) -> torch.Tensor:
    """The edit: every key weighs the same."""
    return torch.full_like(rows, 1 / rows.shape[-1])


def arms(length: int) -> dict[str, Callable[[], torch.Tensor]]:
    """One function per arm, each on weights of its own that are equal; all give the logits."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=length, attn_implementation="sdpa")).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, length))

    def twin(backend: str) -> Any:
        config = copy.deepcopy(model.config)
        made = GPT2LMHeadModel._from_config(config, attn_implementation=backend).eval()
        made.load_state_dict(model.state_dict())
        return made

    bare = twin("sdpa")
    wb = workbench.attach(model)
    traced, traced_eager = peers.nnsight(twin("sdpa")), peers.nnsight(twin("eager"))
    bridge = peers.bridge(twin("eager"))

    def ablate() -> torch.Tensor:
        with wb.ablate(HEADS):
            return model(ids).logits

    def edit() -> torch.Tensor:
        with wb.edit_pattern(EDITED, uniform):
            return model(ids).logits

    def nnsight_ablate() -> torch.Tensor:
        with traced.trace(ids):
            for layer, head in HEADS:
                traced.transformer.h[layer].attn.c_proj.input[:, :, 64 * head : 64 * (head + 1)] = 0
            out = traced.lm_head.output.save()
        return out

    def nnsight_edit() -> torch.Tensor:
        layer, head = EDITED
        with traced_eager.trace(ids):
            inside = traced_eager.transformer.h[layer].attn.source.attention_interface_1.source
            inside.nn_functional_dropout_0.output[:, head] = 1 / length
            out = traced_eager.lm_head.output.save()
        return out

    def switch_off(head: int) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        def hook(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z[:, :, head] = 0
            return z

        return hook

    def make_uniform(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        pattern[:, EDITED[1]] = 1 / length
        return pattern

    off = [(f"blocks.{layer}.attn.hook_z", switch_off(head)) for layer, head in HEADS]
    changed = [(f"blocks.{EDITED[0]}.attn.hook_pattern", make_uniform)]
    return {
        "plain": lambda: bare(ids).logits,
        "attached": lambda: model(ids).logits,
        "ablate": ablate,
        "edit": edit,
        "nnsight ablate": nnsight_ablate,
        "lens ablate": lambda: bridge.run_with_hooks(ids, fwd_hooks=off),
        "nnsight edit": nnsight_edit,
        "lens edit": lambda: bridge.run_with_hooks(ids, fwd_hooks=changed),
    }


def check(made: dict[str, Callable[[], torch.Tensor]]) -> None:
    """All tools must make the same edit."""
    logits = {name: run() for name, run in made.items()}
    for kind in ("ablate", "edit"):
        for name in (f"nnsight {kind}", f"lens {kind}"):
            off = (logits[name] - logits[kind]).abs().max().item()
            if off > 1e-3 or torch.equal(logits[kind], logits["plain"]):
                raise SystemExit(f"{name} is {off:.1e} off from ours")


@torch.no_grad()
def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = []
    for length in options.lengths:
        made = arms(length)
        check(made)
        found = interleaved(made, options.rounds)
        rows.append([str(length), *(f"{found[arm] / found['plain']:.2f}" for arm in ARMS)])
        say(" ".join(rows[-1]))
    meaning = "\n".join(f"- `{arm}`: {text}" for arm, text in ARMS.items())
    about = machine("torch", "transformers", "transformer-lens", "nnsight")
    write_section(
        HEADING,
        f"""`python benchmarks/hooks.py`: a random model of GPT-2 small's shape (12 layers, 12 heads of 64, float32) on
one sequence of N tokens; time over that of the plain forward.

{meaning}

{table(["N", *ARMS], rows)}

Median of {options.rounds}, interleaved in both orders. {about}""",
    )


if __name__ == "__main__":
    main()
