"""How fast circuits are found: path patching against a loop over heads, edge attribution against counted forwards.

A random model of the shape of GPT-2 small (12 layers, 12 heads of 64, float32), on random prompts with twins. The loop
is the algorithm as it is written: for each head one forward with all others frozen and one with the receivers patched,
by plain PyTorch hooks on the same model; and, as the least that any loop over heads can take, one bare forward for each
head. Edge attribution is compared with the forwards and backwards that it needs at
least, each taken at the time of a bare one that computes the last token's logits only. Only ratios mean anything.
Writes its section of docs/benchmarks.md.

    python benchmarks/circuits.py [--length 32] [--prompts 4] [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from shared.measuring import interleaved, machine, peak_above, say, table, write_section
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import workbench
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.analysis.circuits.methods.attribution import attribute_edges
from workbench.analysis.circuits.methods.path_patching import Paths, run_paths
from workbench.tasks import Task, from_prompts

HEADING = "How fast circuits are found"


class Words:
    """A tokenizer that knows the words w0, w1, … and gives them these numbers."""

    is_fast, unk_token_id = False, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


def random_task(prompts: int, length: int, vocabulary: int) -> Task:
    """Random words; the twin has another word in the middle."""
    ids = torch.randint(1, vocabulary, (prompts, length + 3), generator=torch.Generator().manual_seed(0))
    ids[:, -2:] = torch.tensor([5, 7])
    rows = [[f"w{i}" for i in row] for row in ids.tolist()]
    middle = length // 2
    twins = [[*row[:middle], "w0", *row[middle + 1 : length]] for row in rows]
    return from_prompts(
        [" ".join(row[:length]) for row in rows], [" ".join(row) for row in twins], [" w5"] * prompts, [" w7"] * prompts
    )


def written_out(model: Any, clean: Tensor, twin: Tensor, heads: list[tuple[int, int]], receivers: Any) -> Tensor:
    """[head, example] of the logit difference: the algorithm with two forwards per head."""
    blocks, width = model.transformer.h, model.config.n_embd // model.config.n_head
    rows = []

    def keep(into: dict[Any, Tensor], key: Any) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            into[key] = args[0].detach().clone()

        return hook

    def run(ids: Tensor, hooks: list[tuple[Any, Any, bool]]) -> Tensor:
        with ExitStack() as stack:
            for module, hook, before in hooks:
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(register(hook).remove)
            logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits[:, 5] - logits[:, 7]

    z: list[dict[Any, Tensor]] = [{}, {}]
    for into, ids in zip(z, (clean, twin), strict=True):
        run(ids, [(block.attn.c_proj, keep(into, i), True) for i, block in enumerate(blocks)])
    for layer, head in heads:
        columns = slice(head * width, (head + 1) * width)
        got: dict[Any, Tensor] = {}

        def freeze(i: int, layer: int = layer, columns: slice = columns) -> Callable[..., Any]:
            def hook(module: Any, args: Any) -> Any:
                new = args[0].clone()
                new[:, -1] = z[0][i][:, -1]
                if i == layer:
                    new[:, -1, columns] = z[1][i][:, -1, columns]
                return (new,)

            return hook

        def record(module: Any, args: Any, output: Any, got: dict[Any, Tensor] = got) -> None:
            got[module] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        reading = [blocks[-1]] if receivers == "logits" else [blocks[i].attn.c_attn for i, _ in receivers]
        hooks = [(block.attn.c_proj, freeze(i), True) for i, block in enumerate(blocks)]
        run(clean, [*hooks, *((module, record, False) for module in dict.fromkeys(reading))])

        def put(module: Any, args: Any, output: Any, got: dict[Any, Tensor] = got) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            new = first.clone()
            if receivers == "logits":
                new[:, -1] = got[module][:, -1]
            else:
                for i, one in receivers:
                    if blocks[i].attn.c_attn is module:
                        mine = slice(one * width, (one + 1) * width)
                        new[:, -1, mine] = got[module][:, -1, mine]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        rows.append(run(clean, [(module, put, False) for module in dict.fromkeys(reading)]))
    return torch.stack(rows)


def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model, one round, nothing written: does it work?")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    small = {"n_layer": 6, "n_head": 4, "n_embd": 32, "vocab_size": 100} if options.quick else {}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=256, attn_implementation="sdpa", **small)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "wte" not in name:
                weight.mul_(3.0)  # so that heads matter
    config = model.config
    task = random_task(options.prompts, options.length, config.vocab_size)
    wb = workbench.attach(model, Words())
    clean, twin = (
        next(iter(task.batches(wb.tokenizer, options.prompts, twins=twins)))["input_ids"] for twins in (False, True)
    )

    def forward() -> None:
        with torch.no_grad():
            model(clean, use_cache=False, logits_to_keep=1)

    top = config.n_layer * 3 // 4
    receivers = [(top, 0), (top, 1), (top + 1, 2)]
    heads = [(i, head) for i in range(config.n_layer) for head in range(config.n_head)]
    below = [one for one in heads if one[0] < top + 1 and one not in receivers]
    stages: list[list[str]] = []
    for label, read, several in (("logits", "logits", heads), ("queries of 3 heads", receivers, below)):
        names = ("logits",) if read == "logits" else tuple(f"a{i}.h{h}<q>" for i, h in receivers)
        paths = Paths(names, tuple((f"a{i}.h{h}",) for i, h in several))

        def ours(paths: Paths = paths) -> Tensor:
            with open_setup(wb, task, batch_size=options.prompts) as setup:
                return run_paths(setup, paths, progress=False)

        def loop(read: Any = read, several: Any = several) -> Tensor:
            with torch.no_grad():
                return written_out(model, clean, twin, several, read)

        peaks = [peak_above(work) for work in (ours, loop)]
        off = float((peaks[0][1].double() - peaks[1][1].double()).abs().max())  # type: ignore[attr-defined]
        spread = float(peaks[1][1].std(0).max())  # type: ignore[attr-defined]
        if off > 1e-3 * max(1.0, spread) or spread == 0:
            raise SystemExit(f"the arms differ by {off}, over heads the numbers spread by {spread}")
        found = interleaved({"ours": ours, "loop": loop, "forward": forward}, rounds)
        memory = [f"{max(0, peak[0]) / 2**20:.0f}" for peak in peaks]
        ratios = [
            f"{found[arm] * times / found['ours']:.1f}" for arm, times in (("loop", 1), ("forward", len(several)))
        ]
        stages.append([label, str(len(several)), *ratios, f"{off:.1e}", *memory])
        say(" ".join(stages[-1]))

    def both() -> None:
        embedded = model.transformer.wte(clean).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits
        torch.autograd.grad((logits[:, -1, 5] - logits[:, -1, 7]).sum(), embedded)

    def edges(steps: int) -> Callable[[], Any]:
        def work() -> Any:
            with open_setup(wb, task, batch_size=options.prompts) as setup:
                return attribute_edges(setup, steps=steps, progress=False)

        return work

    peaks = {steps: peak_above(edges(steps))[0] for steps in (1, 5)}
    found = interleaved({"forward": forward, "both": both, "1": edges(1), "5": edges(5)}, rounds)
    rows = []
    for steps, label in ((1, "EAP"), (5, "EAP-IG, 5 steps")):
        forwards, backwards = (2, 1) if steps == 1 else (2 + steps, steps)
        least = forwards * found["forward"] + backwards * (found["both"] - found["forward"])
        ratio = found[str(steps)] / least
        rows.append([label, f"{forwards} + {backwards}", f"{ratio:.2f}", f"{peaks[steps] / 2**20:.0f}"])
        say(" ".join(rows[-1]))
    if options.quick:
        return
    graph_edges = workbench.find_circuit(wb, task, "eap", progress=False).graph.n_edges
    arms = ["receivers", "heads", "two forwards / ours", "one / ours", "largest difference", "ours", "written out"]
    write_section(
        HEADING,
        f"""`python benchmarks/circuits.py`: a random model of GPT-2 small's shape (float32), {options.prompts} prompts
of {options.length} tokens and their twins.

Path patching of all heads of one stage: time of the algorithm written out (two forwards per head, by plain hooks), and
of one bare forward per head, over ours, which includes finding the model's parts; largest difference from the former;
peak memory above what was held, MiB.

{table(arms, stages)}

Scores of all {graph_edges:,} edges: time over that of the forwards and backwards that they need at least; peak memory
above what was held, MiB.

{table(["method", "forwards + backwards", "time / least", "peak"], rows)}

Median of {options.rounds}, interleaved in both orders. {machine("torch", "transformers")}""",
    )


if __name__ == "__main__":
    main()
