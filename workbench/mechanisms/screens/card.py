"""What V2P and Agent S2's mixture of grounding are, and where their claims stand on generated screens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from workbench.analysis.statistics.intervals import mean_t
from workbench.mechanisms.frame import Card, Claim
from workbench.mechanisms.frame.card import Outcome
from workbench.storage.parts import parse

RESULTS = Path(__file__).parent / "results.json"
_HOW = "benchmarks/seeing.py, generated screens, paired by seed, Student's t over {} seeds, 95 %"


@cache
def measured(path: Path) -> tuple[dict[str, Any], ...]:
    """Runs that `benchmarks/seeing.py` wrote to a file, with arm, seed and scores; empty before it did."""
    if not path.is_file():
        return ()
    found: list[dict[str, Any]] = parse(path.read_bytes(), path.name).plain()["runs"]
    return tuple(found)


def compared(says: str, what: str, more: Sequence[float], less: Sequence[float], how: str) -> Claim:
    """A claim that one score is above another, by their differences seed by seed; not examined without three."""
    if len(more) != len(less) or len(more) < 3:
        return Claim(says)
    gaps = torch.tensor(more, dtype=torch.float64) - torch.tensor(less, dtype=torch.float64)
    low, high = (float(end) for end in mean_t(gaps))
    outcome: Outcome = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
    found = f"{what} {fmean(more):.3f} against {fmean(less):.3f}, {float(gaps.mean()):+.3f} [{low:+.3f}, {high:+.3f}]"
    return Claim(says, how.format(len(more)), found, outcome)


def scores(runs: Sequence[dict[str, Any]], paper: str, arm: str, name: str) -> list[float]:
    """A score of every seed of an arm."""
    return [one["scores"][name] for one in runs if (one["paper"], one["arm"]) == (paper, arm)]


@cache
def v2p_card() -> Card:
    """V2P."""
    runs = measured(RESULTS)

    def claim(says: str, other: str, name: str, what: str, less: bool = False) -> Claim:
        pair = scores(runs, "v2p", "v2p", name), scores(runs, "v2p", other, name)
        return compared(says, what, *(pair[::-1] if less else pair), _HOW)

    return Card(
        title="V2P: background suppression and peaks in the middle",
        arxiv="2508.13634",
        equation="α = softmax(q kᵀ/√d) over patches; loss KL(p ‖ α) + Σ α off the target, p a Gaussian over the target",
        map="Weights of a pointer on the patches of a screen; a click is the middle of their brightest region.",
        kind="cross",
        grade="exact",
        cost="One self-attention over the patches, and a row on them.",
        causal="never",
        code="inclusionAI/AWorld-RL, folder V2P, MIT: unused. The head stands on patches of pixels, and not on a "
        "vision-language model.",
        claims=(
            claim("It clicks better than a model that writes down boxes.", "boxes", "hits", "clicks in the box"),
            claim("Labels with a peak in the middle are better than labels that are even over the target.", "uniform",
                  "hits", "clicks in the box"),
            claim("Without suppression attention drifts to the background.", "without suppression",
                  "weight off the target", "weight off the target, without suppression", less=True),
            claim("Suppression makes clicks better.", "without suppression", "hits", "clicks in the box"),
        ),
    )  # fmt: skip


@cache
def agent_s2_grounding_card() -> Card:
    """Agent S2's mixture of grounding."""
    several = [one["mixture"] for one in measured(RESULTS) if "mixture" in one]

    def claim(says: str, router: str) -> Claim:
        if not several:
            return Claim(says)
        best = max(("visual", "textual", "structural"), key=lambda name: sum(one[name] for one in several))
        of = [one[router] for one in several], [one[best] for one in several]
        return compared(says, f"clicks in the box, {router} against the best expert, {best}:", *of, _HOW)

    read, seen = ([one[f"marks, {name}"] for one in several] for name in ("textual", "visual"))
    return Card(
        title="Agent S2: a mixture of grounding",
        arxiv="2504.00906",
        equation="point = E_z(request), z = router(request), E one of a visual, a textual and a structural expert",
        map="Which expert each request goes to: one-hot rows. Of the visual expert, the pointer's weights on patches.",
        kind="cross",
        grade="exact",
        cost="That of the expert that is asked.",
        causal="either",
        beside="The planner is an exhibit of its own, agent-s2.",
        code="simular-ai/Agent-S, Apache-2.0: unused. Readers and trees come with the generated screens, faults too.",
        claims=(
            claim("Requests that are routed by what they say click better than the best expert alone.",
                  "routed by action"),
            claim("A router that is trained on who was right clicks better than the best expert alone.",
                  "routed, trained"),
            compared("The textual expert marks texts better than the visual one.", "marks with both ends right",
                     read, seen, _HOW),
        ),
    )  # fmt: skip
