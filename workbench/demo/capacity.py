"""Section of the demo: how much the heads of demo-lm can hold, and what the theory expects."""

from __future__ import annotations

from workbench import attach, capacity, conditioning, models, tasks, views
from workbench.report import Report
from workbench.tasks.induction import WORDS

_ABOUT = (
    "Keys and values of each head are stored in memories of three rules and asked for again. `hebb` and `delta` are "
    "what the head would hold if it were linear, `softmax` is the head as it is. A large n* is no large memory where "
    "the head's values point in one direction: the other measures of the curves tell."
)
_EXPERIMENTS = ("acquisition", "blocking", "overshadowing", "latent_inhibition")


def add(report: Report, seed: int) -> None:
    """Add the map of heads, their curves, four conditioning experiments in context, and the sliders."""
    model, tokenizer = models.load("demo-lm")
    with attach(model, tokenizer) as wb:
        chosen = [tasks.ioi(8, seed=seed), tasks.induction(8, seed=seed), tasks.mqar(8, seed=seed, pairs=8)]
        given = [batch for task in chosen for batch in task.batches(tokenizer)]
        batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in given]
        held = capacity(wb, batches, sizes=(1, 2, 4, 8, 16, 32, 64, 128), repeats=8, seed=seed, progress=False)
        ids = [tokenizer(f" {word}")["input_ids"][-1] for word in WORDS]
        found = conditioning(
            wb, experiments=_EXPERIMENTS, rules=("hebb", "delta", "softmax"), cues=ids[:36], outcomes=ids[36:],
            trials=6, repeats=16, seed=seed, progress=False,
        )  # fmt: skip
    report.add(held, title="How much a head can hold", note=_ABOUT)
    report.add(views.capacity_curves(held))
    report.add(
        views.conditioning_curves(found),
        title="Conditioning in context",
        note="Schedules of animal learning as words in the model's context, and on three learning rules.",
    )
    width = round(held.dimension[:, 0].median().item())
    report.add(
        views.what_if(d_k=width, n=4, heads=max(held.heads) + 1, depth=len(set(held.layers))),
        title="What if",
        note="The theory's formulas, from this model's shape and the median effective dimension of its keys on.",
    )
