"""Trains one small model with a mechanism in every layer: on text, images, pairs to recall, or strings to copy.

    python -m workbench.mechanisms.training text --layers moh moh moh --out moh.safetensors
    python -m workbench.mechanisms.training images --layers agent --out agent.safetensors
    python -m workbench.mechanisms.training mqar --layers aaren --out aaren.safetensors
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

from workbench.mechanisms.deconstructed import LAYOUTS, laid_out
from workbench.mechanisms.training.files import TrainedModel
from workbench.mechanisms.training.work import LAYERS, PLACES, ROWS, run_work, width_for

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> TrainedModel:
    """The command."""
    parser = argparse.ArgumentParser(description="Train one small model with a mechanism in every layer.")
    parser.add_argument("work", choices=sorted(PLACES))
    parser.add_argument("--layers", nargs="+", default=["sqa:mha"], help="mechanism of each layer, or of all")
    parser.add_argument("--layout", choices=LAYOUTS, default="uniform", help="which layers stay standard attention")
    parser.add_argument("--depth", type=int, help="layers, where one mechanism is named: 3 of text, 2 of others")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--hidden", type=int, help="width of the MLPs, 0 for none; by default as the parameters allow")
    size.add_argument("--parameters", type=int, help="of the whole model: its MLPs are as wide as that leaves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="by default 1,200 for text, 1,600 for images, else 300")
    parser.add_argument("--rows", type=int, default=ROWS, help="of each step")
    parser.add_argument("--rate", type=float, default=1.0, help="a factor on the learning rates")
    parser.add_argument(
        "--split", default="held out", choices=["held out", "tuning"], help="what scores of text are of"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of a few rows, to see that it runs")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)

    layers = args.layers
    if len(layers) == 1:
        layers = laid_out(layers[0], args.layout, args.depth or LAYERS[args.work], "sqa:mha")
    elif args.layout != "uniform" or args.depth:
        parser.error("a layout and a depth are of one mechanism: name one, or each layer's")
    found = run_work(
        args.work, layers, hidden=width_for(args.work, layers, args.parameters) if args.parameters else args.hidden,
        seed=args.seed, steps=args.steps, rows=args.rows, rate=args.rate, split=args.split, quick=args.quick,
        told=lambda step, loss: log.info("step %5d  loss %.3f", step, loss),
    )  # fmt: skip
    found.save(args.out)
    for name, value in found.scores.items():
        log.info("%-10s %.3f", name, value)
    return found


if __name__ == "__main__":
    main()
