"""MaTVLM at our scale: what is lost as attention is replaced by Mamba-2 layers that begin as it, and what they cost.

The teacher is the shipped demo-lm (6 layers, 8 heads). Students have some of its layers replaced, evenly spaced, and
are distilled on the formats that it was trained on, new layers alone; held-out tasks and the KL of the logits tell what
is left, beside students whose new layers begin at random. Cost: one layer of each kind at growing length. Writes its
sections of docs/benchmarks.md, and workbench/mechanisms/weights/distilled.json, which cards read, after every student:
it may be stopped at any time, and goes on where it was. Rules of the claims are in benchmarks/trained/distilled.py.

    python benchmarks/matvlm.py [--steps 300] [--prompts 200] [--part quality|cost] [--no-training] [--quick] [--dry]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from shared.measuring import machine, say, table, timed, write_section
from torch import Tensor, nn
from trained.distilled import LAYERS, claims, of, ratios, slopes

import workbench
from workbench.analysis.statistics.intervals import mean_t, proportions
from workbench.mechanisms.frame.findings import DISTILLED
from workbench.mechanisms.matvlm import Mamba2, distil, evenly_spaced, hybrid_maps, losses, student
from workbench.metrics import METRICS
from workbench.models.training.formats import FORMATS, held_out, to_tensors
from workbench.storage import disk

ROWS, RATE, SEEDS, MAPPED = 8, 3e-3, 3, 3
LENGTHS = tuple(256 << i for i in range(6))
HEADING = "Attention replaced by Mamba-2"


def plan() -> list[tuple[int, bool, int]]:
    """How many layers are replaced, whether they begin as attention, and the seed: what claims need is there thrice."""
    several = [(n, seeded, seed) for seed in range(SEEDS) for n, seeded in ((1, True), (2, True), (2, False))]
    once = [(n, seeded, 0) for n in (3, LAYERS) for seeded in (True, False)]
    return [(0, True, 0), *several, *once]


def batches(n: int, seed: int, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Rows of the formats that the teacher was trained on, one format at a time."""
    ids = tokenizer.get_vocab()
    words = sorted(word for word in ids if word not in set(tokenizer.all_special_tokens))
    names = list(FORMATS)
    for i in range(n):
        rng = random.Random(f"{seed}/{i}")
        yield {"input_ids": to_tensors(FORMATS[names[i % len(names)]](ROWS, rng, words), ids)[0]}


def right(model: nn.Module, task: Any, tokenizer: Any) -> Tensor:
    """[example] whether each prompt is answered right."""
    with torch.no_grad():
        return torch.cat([METRICS["accuracy"](model(**batch), batch) for batch in task.batches(tokenizer, 100)])


def trained(n: int, seeded: bool, seed: int, steps: int, prompts: int) -> dict[str, Any]:
    """One student, as it is kept."""
    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model.float().eval(), tokenizer) as wb:
        # The evaluation is the same for all: rows of a seed that no student is trained on.
        fresh = list(batches(14, 1000, tokenizer))
        made = student(wb, evenly_spaced(LAYERS, n / LAYERS), seeded=seeded, seed=100 * seed)
        if made.replaced:
            distil(wb, made, batches(steps, seed, tokenizer), rate=RATE, progress=False)
        made.eval()
        with torch.no_grad():
            nats = [float(losses(wb.model, made, one)[0].logits) for one in fresh]
        run = {
            "replaced": n, "seeded": seeded, "seed": seed, "steps": steps, "prompts": prompts,
            "nats": [round(each, 4) for each in nats],
            "right": {
                name: float(right(made.model, task, tokenizer).double().mean())
                for name, task in held_out(prompts, 77).items()
            },
        }  # fmt: skip
        if (n, seeded, seed) == (MAPPED, True, 0):
            maps = hybrid_maps(wb, made, [{"input_ids": one["input_ids"][:1]} for one in fresh])
            run |= {"heads": len(maps.numbers), "unmatched": len(maps.unmatched), "alike": float(maps.alike.mean())}
    return run


def quality(runs: Sequence[Mapping[str, Any]]) -> str:
    """The section on what is lost."""
    rows, tasks = [], list(runs[0]["right"])
    for n, seeded in dict.fromkeys((n, seeded) for n, seeded, _ in plan()):
        found = of(runs, n, seeded)
        if not found:
            continue
        away = torch.tensor([fmean(run["nats"][i] for run in found) for i in range(len(found[0]["nats"]))])
        low, high = mean_t(away.double())
        cells = [f"{float(away.mean()):.3f} ({max(float(low), 0):.3f} to {float(high):.3f})"]
        for task in tasks:
            n_right = round(sum(run["right"][task] * run["prompts"] for run in found))
            answers = torch.arange(sum(run["prompts"] for run in found)) < n_right
            ends = proportions(answers.double())
            cells.append(f"{float(answers.double().mean()):.2f} ({float(ends[0]):.2f} to {float(ends[1]):.2f})")
        rows.append([f"{n} of {LAYERS}", "attention" if seeded else "random", str(len(found)), *cells])
    heads = ["replaced", "begins as", "seeds", "KL, nats a token", *(name.replace("_", " ") for name in tasks)]
    mapped = [run for run in of(runs, MAPPED) if "heads" in run]
    said = (
        f"""With half of the layers replaced, {mapped[0]["unmatched"]} of {mapped[0]["heads"]} heads were not
surely more like their own teacher's map than like those of the layer's other heads; the mean cosine was
{mapped[0]["alike"]:.2f}."""
        if mapped
        else ""
    )
    return f"""`python benchmarks/matvlm.py`: demo-lm ({LAYERS} layers, 8 heads) as the teacher; students with Mamba-2
layers seeded from its attention (MaTVLM, arXiv 2503.13440) or drawn at random, {runs[-1]["steps"]} steps of {ROWS}
rows, new layers alone trained. At our scale: not the paper's model, data or length of training.

{table(heads, rows)}

Accuracy on {runs[0]["prompts"]} held-out prompts of each task and seed with Clopper and Pearson's 95 % intervals, over
prompts and not over seeds; KL over {len(runs[0]["nats"])} batches with its t interval. {said}
{machine("torch", "transformers")}

{_said(runs=runs)}"""


class Attention(nn.Module):
    """One layer of causal attention of the teacher's sizes."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.qkv, self.out = n_heads, nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


def measured(lengths: Sequence[int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the processor by layer, length and round; both take turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = {"attention": Attention(128, 8), "mamba-2": Mamba2(128, 8, 16)}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in layers}
    with torch.no_grad():
        for n in lengths:
            x = torch.randn(1, n, 128)
            calls = {name: partial(layer, x) for name, layer in layers.items()}
            for name, seconds in timed(calls, rounds, clock=time.process_time).items():
                found[name][str(n)] = seconds
                say(f"{n}, {name}: {median(seconds):.4g} s")
    return found


def cost(times: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The section on what a layer costs."""
    over, grows = ratios(times), slopes(times)
    rows = [[str(n), f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"] for n, each in over.items()]
    return f"""`python benchmarks/matvlm.py --part cost`: one layer of the teacher's sizes (d_model 128, 8 heads), batch
1, float32, one thread, forward: processor time of the Mamba-2 layer over that of causal SDPA attention with its
projections.

{table(["N", "Mamba-2 / attention"], rows)}

Over the three longest, time grows as N^{grows["mamba-2"]:.2f} and N^{grows["attention"]:.2f}. Median of
{len(next(iter(over.values())))} interleaved rounds; in brackets the least and the largest. {machine("torch")}

{_said(times=times)}"""


def _said(**data: Any) -> str:
    found = claims(data)
    said = [f"- {says} {one['outcome'].capitalize()}: {one['found']}." for each in found.values()
            for says, one in each.items()]  # fmt: skip
    return "\n".join(["Claims, as they stand on the card:", "", *said]) if said else ""


def read() -> dict[str, Any]:
    """What is kept: runs, times and claims."""
    held: dict[str, Any] = json.loads(DISTILLED.read_text(encoding="utf-8")) if DISTILLED.is_file() else {}
    return {"runs": [], "times": {}} | held


def keep(data: dict[str, Any]) -> None:
    """Write it, with what follows of the claims."""
    runs = ",\n".join(json.dumps(run) for run in data["runs"])
    told = json.dumps(claims(data), ensure_ascii=False, indent=1)
    disk.write(DISTILLED, f'{{"claims": {told},\n"times": {json.dumps(data["times"])},\n"runs": [\n{runs}\n]}}\n')


def main() -> None:
    """Measure, and write the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--part", choices=["quality", "cost"], help="both if not given")
    parser.add_argument("--no-training", action="store_true", help="judge and write what is there")
    parser.add_argument("--quick", action="store_true", help="few steps and prompts, and nothing is written")
    parser.add_argument("--dry", action="store_true", help="print the sections, and write none")
    options = parser.parse_args()
    quiet = options.quick or options.dry
    put = (lambda heading, text: print(f"## {heading}\n\n{text}\n")) if quiet else write_section
    steps, prompts, rounds = (4, 20, 2) if options.quick else (options.steps, options.prompts, options.rounds)
    data = {"runs": [], "times": {}} if options.quick else read()
    if options.part != "cost" and not options.no_training:
        known = {(run["replaced"], run["seeded"], run["seed"], run["steps"], run["prompts"]) for run in data["runs"]}
        for each in [each for each in plan() if (*each, steps, prompts) not in known]:
            data["runs"].append(trained(*each, steps, prompts))
            say(json.dumps(data["runs"][-1]))
            if not options.quick:
                keep(data)
    if options.part != "quality" and not options.no_training:
        data["times"] = measured(LENGTHS[:3] if options.quick else LENGTHS, rounds)
    if not options.quick:
        keep(data)
    if data["runs"]:
        put(f"{HEADING}: quality", quality(data["runs"]))
    if data["times"]:
        put(f"{HEADING}: cost", cost(data["times"]))


if __name__ == "__main__":
    main()
