"""The works, and one run of any: a model is made, trained and scored.

Text and images are those that models ship of. Two more are of one thing alone, which plain attention learns in full in
less than a minute: to recall values of keys ("mqar"), and to go on with a string that comes again ("induction"). One is
text again, with twice as many heads of half the width ("heads").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from workbench.errors import WorkbenchError
from workbench.kernels.checks import check_number, check_range
from workbench.mechanisms.frame import Place
from workbench.mechanisms.training.files import TrainedModel, facts_of, halve
from workbench.mechanisms.training.images import scenes
from workbench.mechanisms.training.models import ByteLM, PatchModel
from workbench.mechanisms.training.run import Batches, train
from workbench.mechanisms.training.score import score_images, score_induction, score_mqar, score_text
from workbench.mechanisms.training.text import corpus, induction_batch, mqar_batch, text_batch

PLACES = {
    "text": Place(64, 4, 128, rotary=True),
    "images": Place(64, 4, 64, causal=False, grid=(8, 8)),
    "mqar": Place(64, 4, 128, rotary=True),
    "induction": Place(64, 4, 64, rotary=True),
    "heads": Place(64, 8, 128, rotary=True),
}
SHOWN = ("text", "images")
"""Works that models are shipped and shown of."""
OF_TEXT = ("text", "heads")
LAYERS = {"text": 3, "images": 2, "mqar": 2, "induction": 2, "heads": 3}
STEPS, ROWS = {"text": 1200, "images": 1600, "mqar": 300, "induction": 300, "heads": 1200}, 32
MADE = 0.25  # of the rows of text: recall and copying


def run_work(
    work: str,
    layers: Sequence[str],
    *,
    hidden: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    rows: int = ROWS,
    rate: float = 1.0,
    split: str = "held out",
    quick: bool = False,
    told: Callable[[int, float], None] | None = None,
) -> TrainedModel:
    """Make, train and score a model; its weights are as a file keeps them, in half precision.

    Args:
        work: "text", "images", "mqar", "induction" or "heads".
        layers: the mechanism of each layer.
        hidden: width of the MLPs, 0 for none; as `Stack` chooses if None.
        seed: of weights and data.
        steps: 1,200 for text and heads, 1,600 for images and 300 for the others if None. rows: of each step.
        rate: a factor on the learning rates.
        split: what scores of text are of, "held out" or "tuning".
        quick: a few steps of a few rows, to see that it runs; the file says so.
        told: is given step and loss, now and then.

    Raises:
        WorkbenchError: no such work or split, fewer steps or rows than one, a rate that is not above 0, and what the
            models raise.
    """
    check_work(work)
    steps, rows = (3, 4) if quick else (STEPS[work] if steps is None else steps, rows)
    for name, value in (("steps", steps), ("rows", rows)):
        check_range(name, value, 1, None)
    check_range("seed", seed, 0, 2**63 - 1)
    check_number("rate", rate, above_zero=True)
    corpus(split)  # which says what splits there are
    torch.manual_seed(seed)
    model = _made(work, layers, hidden)
    run = train(model, _batches(work, rows), steps=steps, seed=seed, rate=rate, told=told)
    halve(model)
    facts = facts_of(run, work=work, seed=seed, steps=steps, rows=rows, rate=rate, quick=quick)
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    if isinstance(model, PatchModel):
        scores = score_images(model, 16 if quick else 1024)
    elif work in OF_TEXT:
        held = corpus(split)
        facts |= {"split": split, "training_digest": corpus("training").digest, "split_digest": held.digest}
        scores = score_text(model, held, 8 if quick else 256)
    else:
        scores = (score_mqar if work == "mqar" else score_induction)(model, 8 if quick else 128)
    return TrainedModel(model, scores, facts)


def size_of(work: str, layers: Sequence[str], hidden: int | None = None) -> int:
    """How many parameters a model has.

    >>> size_of("text", ["sqa:mha"] * 3)
    140352
    """
    check_work(work)
    return sum(p.numel() for p in _made(work, layers, hidden).parameters())


def width_for(work: str, layers: Sequence[str], parameters: int) -> int:
    """Width of the MLPs with which a model has as many parameters as can be, and no more.

    Raises:
        WorkbenchError: no such work, or layers that have more by themselves.

    >>> width_for("text", ["sqa:mha"] * 3, 140_352), width_for("text", ["sqa"] * 3, 140_352)
    (192, 273)
    """
    check_range("parameters", parameters, 1, None)
    narrow = size_of(work, layers, 1)
    left = parameters - narrow
    if left < 0:
        raise WorkbenchError(
            f"{', '.join(layers)} and what is around them have {narrow:,} of {parameters:,} parameters"
        )
    return 1 + left // (2 * PLACES[work].d_model * len(layers))


def check_work(work: str) -> None:
    """Raise a WorkbenchError unless there is such a work."""
    if not isinstance(work, str) or work not in PLACES:
        raise WorkbenchError(f'work="{work}" is not known', hint=", ".join(f'"{each}"' for each in PLACES))


def _made(work: str, layers: Sequence[str], hidden: int | None) -> ByteLM | PatchModel:
    return (PatchModel if work == "images" else ByteLM)(PLACES[work], layers, hidden)


def _batches(work: str, n: int) -> Batches:
    if work == "images":
        return lambda random: scenes(n, random)[:2]
    length = PLACES[work].length
    if work == "mqar":
        return lambda random: mqar_batch(n, length, random)
    if work == "induction":
        return lambda random: induction_batch(n, length, random)
    source = corpus("training")
    return lambda random: text_batch(source, n, length, random, MADE)
