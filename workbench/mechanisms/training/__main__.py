"""Trains one small model with a mechanism in every layer, on text or on images.

    python -m workbench.mechanisms.training text --layers moh moh moh --out moh.safetensors
    python -m workbench.mechanisms.training images --layers agent --out agent.safetensors
    python -m workbench.mechanisms.training text --layers deconstructed:mlp --layout even --out hybrid.safetensors
    python -m workbench.mechanisms.training text --layers sqa:mha --quick --out quick.safetensors

One name stands for all layers, or with a layout for those that do not stay standard attention. On two cores a model
takes one to five minutes; --quick takes seconds, learns nothing much, and is marked so in the file.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from workbench.mechanisms.deconstructed import LAYOUTS, laid_out
from workbench.mechanisms.frame import Place
from workbench.mechanisms.training.files import TrainedModel, facts_of, halve
from workbench.mechanisms.training.images import scenes
from workbench.mechanisms.training.models import ByteLM, PatchModel
from workbench.mechanisms.training.run import Batches, train
from workbench.mechanisms.training.score import score_images, score_text
from workbench.mechanisms.training.text import corpus, text_batch

log = logging.getLogger(__name__)
PLACES = {"text": Place(64, 4, 128, rotary=True), "images": Place(64, 4, 64, causal=False, grid=(8, 8))}
LAYERS, STEPS = {"text": 3, "images": 2}, {"text": 1200, "images": 1600}
MADE = 0.25  # of the rows of text: recall and copying


def main(arguments: Sequence[str] | None = None) -> TrainedModel:
    """The command."""
    parser = argparse.ArgumentParser(description="Train one small model with a mechanism in every layer.")
    parser.add_argument("work", choices=sorted(PLACES))
    parser.add_argument("--layers", nargs="+", default=["sqa:mha"], help="mechanism of each layer, or of all")
    parser.add_argument("--layout", choices=LAYOUTS, default="uniform", help="which layers stay standard attention")
    parser.add_argument("--depth", type=int, help="layers, where one mechanism is named: 3 of text, 2 of images")
    parser.add_argument("--hidden", type=int, help="width of the MLPs, 0 for none; by default as the parameters allow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="1,200 for text and 1,600 for images by default")
    parser.add_argument("--rate", type=float, default=1.0, help="a factor on the learning rates")
    parser.add_argument(
        "--split", default="held out", choices=["held out", "tuning"], help="what scores of text are of"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of a few rows, to see that it runs")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)

    work, place, layers = args.work, PLACES[args.work], args.layers
    if len(layers) == 1:
        layers = laid_out(layers[0], args.layout, args.depth or LAYERS[work], "sqa:mha")
    elif args.layout != "uniform" or args.depth:
        parser.error("a layout and a depth are of one mechanism: name one, or each layer's")
    steps, n = (3, 4) if args.quick else (args.steps or STEPS[work], 32)
    torch.manual_seed(args.seed)
    model: ByteLM | PatchModel = (ByteLM if work == "text" else PatchModel)(place, layers, args.hidden)
    run = train(
        model, _batches(work, n), steps=steps, seed=args.seed, rate=args.rate,
        told=lambda step, loss: log.info("step %5d  loss %.3f", step, loss),
    )  # fmt: skip
    halve(model)
    facts = facts_of(run, seed=args.seed, steps=steps, rows=n, rate=args.rate, quick=args.quick)
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    if isinstance(model, ByteLM):
        held = corpus(args.split)
        facts |= {"split": args.split, "training_digest": corpus("training").digest, "split_digest": held.digest}
        scores = score_text(model, held, 8 if args.quick else 256)
    else:
        scores = score_images(model, 16 if args.quick else 1024)
    found = TrainedModel(model, scores, facts)
    found.save(args.out)
    for name, value in scores.items():
        log.info("%-10s %.3f", name, value)
    return found


def _batches(work: str, n: int) -> Batches:
    if work == "images":
        return lambda random: scenes(n, random)[:2]
    source, length = corpus("training"), PLACES[work].length
    return lambda random: text_batch(source, n, length, random, MADE)


if __name__ == "__main__":
    main()
