"""How fast the residual stream is patched, by layer and position: against TransformerLens and one forward per patch.

A random model of GPT-2 small's widths with fewer layers (12 heads of 64, float32), prompts of words in which one
differs from their twins, and the activation of every layer put into the twin's run at every position. TransformerLens'
own `patching` does so with a forward for each; so does a loop of bare forwards that compute the last token's logits
only. Only ratios mean anything. Writes its section of docs/benchmarks.md.

    python benchmarks/patching.py [--layers 6] [--length 24] [--prompts 1] [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from shared.measuring import interleaved, machine, say, table, write_section
from shared.peers import bridge
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import workbench
from workbench.tasks import Task, from_prompts

HEADING = "How fast the stream is patched"
ANSWER, WRONG = 5, 7


class Words:
    """A tokenizer that knows the words w0, w1, … and gives them these numbers."""

    is_fast, unk_token_id = False, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids: list[int], **settings: bool) -> str:
        return " ".join(f"w{i}" for i in ids)


def random_task(prompts: int, length: int, vocabulary: int, at: int) -> Task:
    """Random words; the twin has another one at a position."""
    ids = torch.randint(8, vocabulary, (prompts, length), generator=torch.Generator().manual_seed(0)).tolist()
    twins = [[*row[:at], 8 + (row[at] - 7) % (vocabulary - 8), *row[at + 1 :]] for row in ids]

    def text(row: list[int]) -> str:
        return " ".join(f"w{i}" for i in row)

    return from_prompts(
        [text(row) for row in ids], [text(row) for row in twins], [f" w{ANSWER}"] * prompts, [f" w{WRONG}"] * prompts
    )


def difference(logits: Tensor) -> Tensor:
    """The mean logit difference at the last token."""
    return (logits[:, -1, ANSWER] - logits[:, -1, WRONG]).mean()


def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model, one round, nothing written: does it work?")
    options = parser.parse_args()
    from transformer_lens import patching

    patching.tqdm = lambda several, **settings: several  # it has no way to leave out its bar
    small = {"n_head": 4, "n_embd": 32, "vocab_size": 100} if options.quick else {}
    length, rounds = (12, 1) if options.quick else (options.length, options.rounds)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=options.layers, n_positions=256, attn_implementation="sdpa", **small)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "wte" not in name:
                weight.mul_(3.0)  # so that what is patched matters
    peer = bridge(copy.deepcopy(model))
    wb = workbench.attach(model, Words())
    rows = []
    # A word that differs early leaves much to patch behind it; one in the middle as in a usual prompt.
    for place, at in (("first word", 0), ("middle", length // 2)):
        task = random_task(options.prompts, length, config.vocab_size, at)
        clean, twin = (
            next(iter(task.batches(wb.tokenizer, options.prompts, twins=twins)))["input_ids"] for twins in (False, True)
        )
        with torch.no_grad():
            _, cache = peer.run_with_cache(clean)
            plain = float(difference(peer(twin)))

        def forwards(twin: Tensor = twin) -> None:
            with torch.no_grad():
                for _ in range(config.n_layer * length):
                    model(twin, use_cache=False, logits_to_keep=1)

        for activation in ("resid_pre", "attn_out", "mlp_out") if at else ("resid_pre",):
            theirs = getattr(patching, f"get_act_patch_{activation}")

            def ours(task: Task = task, activation: str = activation) -> Tensor:
                found = workbench.patch_layers(wb, task, activation, batch_size=options.prompts, progress=False)
                return found.effects.mean(-1)

            def peers(theirs: Any = theirs, twin: Tensor = twin, cache: Any = cache) -> Tensor:
                with torch.no_grad():
                    found: Tensor = theirs(peer, twin, cache, difference)
                return found

            a, b = ours(), peers().double() - plain
            off, spread = float((a - b).abs().max()), float(b.abs().max())
            if off > 1e-3 * max(spread, 1e-6) or spread == 0:
                raise SystemExit(f"{activation}: the arms differ by {off}, the largest effect is {spread}")
            found = interleaved({"ours": ours, "theirs": peers, "forwards": forwards}, rounds)
            ratios = [f"{found[arm] / found['ours']:.1f}" for arm in ("theirs", "forwards")]
            rows.append([activation, place, *ratios, f"{off / spread:.1e}"])
            say(" ".join(rows[-1]))
    if options.quick:
        return
    write_section(
        HEADING,
        f"""`python benchmarks/patching.py`: a random model of GPT-2 small's widths (float32), prompts
of {length} tokens, {options.prompts} at a time, that differ from their twins in the first or the middle word;
{config.n_layer * length} patches: each layer at each position. Time of TransformerLens' `patching` on the same weights,
and of as many bare forwards that compute the last token's logits only, over ours, which includes finding the model's
parts and both runs; largest difference from TransformerLens, of the largest effect.

{table(["activation", "differs at", "TransformerLens / ours", "forwards / ours", "difference"], rows)}

Median of {options.rounds}, interleaved in both orders. {machine("torch", "transformers", "transformer-lens")}""",
    )


if __name__ == "__main__":
    main()
