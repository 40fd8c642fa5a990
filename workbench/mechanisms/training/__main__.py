"""Trains one language model with a mechanism in every layer.

    python -m workbench.mechanisms.training --layers moh moh moh --out moh.safetensors
    python -m workbench.mechanisms.training --layers sqa:mha --quick --out quick.safetensors

One name stands for all layers. On two cores a model takes two to five minutes; --quick takes seconds, learns nothing
much, and is marked so in the file.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from workbench.mechanisms.frame import Place
from workbench.mechanisms.training.files import TrainedModel, facts_of, halved
from workbench.mechanisms.training.language import ByteLM
from workbench.mechanisms.training.run import train
from workbench.mechanisms.training.score import score
from workbench.mechanisms.training.text import corpus

log = logging.getLogger(__name__)
PLACE = Place(64, 4, 128, rotary=True)


def main(arguments: Sequence[str] | None = None) -> TrainedModel:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", nargs="+", default=["sqa:mha"], help="mechanism of each layer, or of all three")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=1.0, help="a factor on the learning rates")
    parser.add_argument("--split", default="held out", choices=["held out", "tuning"], help="what the scores are of")
    parser.add_argument("--quick", action="store_true", help="a few steps of a few rows, to see that it runs")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)

    layers = args.layers * 3 if len(args.layers) == 1 else args.layers
    steps, n, n_held = (3, 4, 8) if args.quick else (args.steps, 32, 256)
    source, held = corpus("training"), corpus(args.split)
    torch.manual_seed(args.seed)
    model = ByteLM(PLACE, layers)
    run = train(
        model, source, steps=steps, n=n, seed=args.seed, rate=args.rate,
        told=lambda step, loss: log.info("step %5d  loss %.3f", step, loss),
    )  # fmt: skip
    facts = facts_of(
        source, held, run, seed=args.seed, steps=steps, rows=n, rate=args.rate, split=args.split, quick=args.quick,
        parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    found = TrainedModel(model, score(halved(model), held, n_held), facts)
    found.save(args.out)
    for name, value in found.scores.items():
        log.info("%-10s %.3f", name, value)
    return found


if __name__ == "__main__":
    main()
