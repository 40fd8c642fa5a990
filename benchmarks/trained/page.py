"""The sections of docs/benchmarks.md on what mechanisms learn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from shared.measuring import table

from trained.claims import MARGIN, Found, Rule, named
from trained.plan import PLAIN, ROWS, STEPS, Model, plan
from trained.runs import Runs

WORKS = {
    "text": """
bytes of Python's standard library, with eight modules held out, and a quarter of the rows recall and copying; 3 layers,
d_model 64, 4 heads, 128 tokens""",
    "images": """
generated scenes of one to three coloured digits, of which that in the square's colour is to be read; 2 layers, d_model
64, 4 heads, 8 × 8 patches""",
    "mqar": """
multi-query associative recall (arXiv 2312.04927) of 4, 8 and 16 pairs in 128 tokens, a vocabulary of 128; 2 layers,
d_model 64, 4 heads""",
    "induction": """
strings of 4 to 24 different letters again and again in 64 tokens; 2 layers, d_model 64, 4 heads""",
    "heads": """
as text, with twice as many heads of half the width; 3 layers, d_model 64, 8 heads, 128 tokens""",
}
SCORES = {
    "text": {"text": 3, "repeats": 3, "copy": 2, "recall 8": 2, "recall 26": 2, "needle": 2, "needle far": 2},
    "images": {"1 digit": 3, "3 digits": 3},
    "mqar": {"4 pairs": 2, "8 pairs": 2, "16 pairs": 2, "far": 2},
    "induction": {"copy": 2, "copy far": 2},
}
SCORES["heads"] = SCORES["text"]
MEANS = {
    "text": """Losses in nats a byte: of `text`, and of `repeats`, bytes whose last four came before. Shares of right
answers: of strings that come again (`copy`), of letters' digits in a stream of 8 or 26 letters (`recall`), and of a
letter that came once before (`needle`; in the first half: `needle far`).""",
    "images": "Shares of right answers; with three digits a model that reads without choosing has a third.",
    "mqar": """Shares of right answers of the keys that are asked for; `far`: of 8 pairs, asked for in the last quarter.
Guessing one of the values is right in 1 of 64.""",
    "induction": """Shares of right answers where a string comes again; `copy far`: of strings of more than a quarter of
the row.""",
}
MEANS["heads"] = MEANS["text"]


def section(work: str, runs: Runs) -> str:
    """What models of a work learned."""
    models = sorted(runs.models(work), key=lambda each: (each != Model(work, PLAIN), each.key))
    rows, spread = [], []
    for model in models:
        found = runs.of(model)
        cells = [f"{fmean(runs.values(model, score)):.{digits}f}" for score, digits in SCORES[work].items()]
        rows.append([named(model), f"{found[0]['parameters']:,}", str(len(found)), *cells])
    for score in SCORES[work]:
        sd, df = runs.spread(work, score)
        if df:
            spread.append(f"{score} {sd:.3f}" + (f" (df {df})" if not spread else ""))
    pooled = f"\nStandard deviation over seeds, of shares in log odds, pooled over models: {', '.join(spread)}."
    pooled = pooled if spread else ""
    first, planned = runs.of(models[0])[0], [drawn for drawn in plan() if drawn[0].work == work]
    there = sum(runs.has(model, seed, STEPS[work], ROWS[work]) for model, seed in planned)
    return f"""`python benchmarks/rooms.py`: each mechanism in every layer of the same small model, trained on the same
data for {STEPS[work]} steps of {ROWS[work]} rows:{WORKS[work]}.
MLPs are as wide as makes all models as large as that of plain attention, or as wide as its own where a mechanism alone
is larger, unless there is none. The work and the rates were chosen so that plain attention learns it, and rates were
swept for no other mechanism: this is no ranking. {there} of the plan's {len(planned)} runs are there; the script makes
the others.

{table(["model", "parameters", "seeds", *SCORES[work]], rows)}

{MEANS[work]} Means over seeds.{pooled}
Python {first["python"]}, torch {first["torch"]}."""


def claims(found: Iterable[tuple[Rule, Found]]) -> str:
    """Where claims stand."""
    rows = [[rule.mechanism, rule.says, one.outcome, one.found, one.how] for rule, one in found]
    return f"""`python benchmarks/rooms.py`: what papers claim of quality, at our scale. The rules
(benchmarks/trained/claims.py) were written down before the figures. A mechanism is as good as another where the whole
interval of how much worse it is lies below the margin, which is {MARGIN:g} unless said; where the interval holds the
margin, the claim is undecided. Intervals are over seeds, of weights and data: the held-out rows are the same for all,
and what other rows or other rates would give is in none of them. The spread is taken as the same for all models of a
work, of losses as they are and of shares in log odds.

{table(["mechanism", "claim", "at our scale", "found", "how"], rows)}"""


def reduced(runs: Runs) -> str:
    """How the heads of reduced models are like those of plain attention; empty where nothing was measured."""
    rows = []
    for model in runs.models("images"):
        found = [run for run in runs.of(model) if "alike" in run]
        if found:
            layers = range(len(found[0]["alike"]))
            others = [run for run in found if model.name != PLAIN or run["seed"]]  # not itself
            cells = [_mean(run["alike"][layer] for run in others) for layer in layers]
            cells += [_mean(run["needed"][layer] for run in others if "needed" in run) for layer in layers]
            cells += [" ".join(f"{cost:.2f}" for at, _, cost in found[0]["costs"] if at == layer) for layer in layers]
            rows.append([named(model), str(len(found)), *cells])
    if all(row[0] == "plain attention" for row in rows):
        return ""
    what = ("CKA", "needed", "costs")
    head = ["model", "seeds", *(f"{each}, layer {layer}" for each in what for layer in (0, 1))]
    return f"""`python benchmarks/rooms.py`: heads of reduced transformers against those of plain attention (seed 0) on
images of three digits, those of other seeds of plain attention beside them.

- CKA: the largest linear CKA of what a head gives with what a head of the same layer gives there.
- Needed: the largest rank correlation, over scenes, of what the loss gains without a head with what it gains there
  without a head of the same layer. Do the circuits of both models need heads for the same scenes?
- Costs: what the loss gains without each head, of the first seed.

The first two are means over heads and seeds.

{table(head, rows)}"""


def _mean(by_run: Iterable[Sequence[float]]) -> str:
    """The mean over runs of the mean over heads; empty where there are no runs."""
    means = [fmean(heads) for heads in by_run]
    return f"{fmean(means):.2f}" if means else ""
