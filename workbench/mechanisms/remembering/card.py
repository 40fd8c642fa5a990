"""What SAM2Act's memory and SAM2Long's tree are, and where their claims stand on a toy and on generated videos."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from workbench.mechanisms.frame import Card, Claim
from workbench.mechanisms.screens.card import compared, measured, scores

RESULTS = Path(__file__).parent / "results.json"
_TABLE = "benchmarks/seeing.py, a toy of putting a block back, paired by seed, Student's t over {} seeds, 95 %"
_VIDEOS = "benchmarks/seeing.py, 100 generated videos a seed and a scripted tracker, Student's t over {} seeds, 95 %"


@cache
def sam2act_card() -> Card:
    """SAM2Act's memory."""

    def claim(says: str, other: str, name: str, what: str) -> Claim:
        runs = measured(RESULTS)
        return compared(
            says, what, scores(runs, "sam2act", "memory", name), scores(runs, "sam2act", other, name), _TABLE
        )

    return Card(
        title="SAM2Act+: a bank of frames, and heat maps that are made finer",
        arxiv="2501.18564",
        equation="x ← x + softmax(q kᵀ/√d) v, k and v of all cells of the last m frames; heat = Up₂(Up₂(x) + skip)",
        map="Weights of each cell of the frame on every cell of every remembered frame.",
        kind="memory",
        grade="exact",
        cost="O(n · n m) for n cells and m frames, at each key frame.",
        causal="always",
        code="sam2act/SAM2Act has no licence at its top: unused. One view from above, three key frames, no language.",
        claims=(
            claim(
                "With memory it does tasks that the last picture does not show.", "no memory", "put back", "put back"
            ),
            claim("Features of the picture make finer heat maps better.", "no skips", "all", "all three goals hit"),
        ),
    )


@cache
def sam2long_card() -> Card:
    """SAM2Long's tree."""

    def claim(says: str, tracker: str, other: str) -> Claim:
        runs = measured(RESULTS)
        pair = scores(runs, "sam2long", tracker, "frames"), scores(runs, "sam2long", other, "frames")
        return compared(says, "frames on which it has what is followed:", *pair, _VIDEOS)

    return Card(
        title="SAM2Long: a tree of memories",
        arxiv="2410.16268",
        equation="C_{p,j} = C_p + ln(overlap_{p,j} + 10⁻⁵); the best go on, where none is sure the best that differ",
        map="What each pathway reads of the frames that it remembers; keys are multiplied by how sure each frame was.",
        kind="memory",
        grade="exact",
        cost="The decoder and the memory once for each pathway, the picture once.",
        causal="always",
        code="Mark12Ding/SAM2Long, CC-BY-NC 4.0: unused. `workbench.track_long` puts it around `Sam2Video`.",
        claims=(
            claim("It keeps what is followed better than greedy memory where that is hidden for a while.", "tree",
                  "greedy"),
            claim("Several pathways are better than one with the same rule for what is remembered.", "tree",
                  "greedy, good frames"),
        ),
    )  # fmt: skip
