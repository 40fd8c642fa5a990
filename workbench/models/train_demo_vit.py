"""Trains the demonstration ViT that ships with the package, on scikit-learn's handwritten digits.

    python -m workbench.models.train_demo_vit --out DIR --seed 0

Each digit is enlarged to 16 x 16 pixels and cut into 8 x 8 patches, so that attention has a grid with room for near and
far. In training the images are turned, scaled and moved a little, anew in every epoch: 1297 images are few.

A first setting (up to 12°, 10 % and 2 pixels, 60 epochs) had not finished learning: 97.7 % of the training images and
96.2 % of the held-out ones. The present one was then chosen on 200 of the training images, of which it named 99.0 %
rightly when trained on the other 1097. The held-out images took no part in that, but they had been measured once.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from transformers import ViTConfig, ViTForImageClassification

from workbench.models.digits import N_HELD_OUT, SIDE, SPLIT_SEED, read_counts, save_examples, split, to_pixels
from workbench.models.loading import load
from workbench.storage import disk

log = logging.getLogger(__name__)
BATCH = 64
EPOCHS = 120
RATE = 1e-3
WEIGHT_DECAY = 0.05
WARM_UP = 3  # epochs


def new_model(seed: int, *, n_layer: int = 4, n_head: int = 4, d_model: int = 64) -> ViTForImageClassification:
    """A small ViT with a CLS token and 8 x 8 patches of 2 x 2 pixels.

    Args:
        seed: of the weights.
        n_layer: blocks. n_head: heads in a block. d_model: width; the MLPs are twice as wide.
    """
    config = ViTConfig(
        image_size=SIDE, patch_size=2, num_channels=1, hidden_size=d_model, num_hidden_layers=n_layer,
        num_attention_heads=n_head, intermediate_size=2 * d_model, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification._from_config(config, attn_implementation="sdpa")


def vary(images: Tensor, random: torch.Generator) -> Tensor:
    """Images turned by up to 8°, scaled by up to 8 % and moved by up to 1 of their 16 pixels, each in its own way."""
    n = len(images)
    angle, scale, x, y = (
        (torch.rand(n, generator=random) * 2 - 1) * most for most in (math.radians(8), 0.08, 0.125, 0.125)
    )
    cos, sin = angle.cos() / (1 + scale), angle.sin() / (1 + scale)
    moves = torch.stack([torch.stack([cos, -sin, x], -1), torch.stack([sin, cos, y], -1)], 1)
    where = affine_grid(moves, list(images.shape), align_corners=False)
    return grid_sample(images + 1, where, align_corners=False) - 1  # what comes in from outside is paper, −1


def train(
    model: Any, pixels: Tensor, labels: Tensor, *, seed: int, epochs: int = EPOCHS, batch: int = BATCH
) -> list[float]:
    """Train in place with AdamW, a short warm-up and a cosine decay to 0; the mean loss of every epoch."""
    random = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(pixels) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    warm, total = WARM_UP * steps, epochs * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, s - warm) / max(1, total - warm))),
    )
    model.train()
    losses = []
    for epoch in range(epochs):
        seen = 0.0
        for rows in torch.randperm(len(pixels), generator=random).split(batch):
            logits = model(pixel_values=vary(pixels[rows], random)).logits
            loss = cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen += loss.item() * len(rows)
        losses.append(seen / len(pixels))
        log.info("epoch %d of %d: loss %.4f", epoch + 1, epochs, losses[-1])
    model.eval()
    return losses


@torch.inference_mode()
def accuracy(model: Any, pixels: Tensor, labels: Tensor) -> float:
    """Share of the images that are named rightly."""
    hits = [model(pixel_values=part).logits.argmax(-1) for part in pixels.split(100)]
    return float((torch.cat(hits) == labels).double().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save the model with examples and card, and print the accuracies measured on the saved file."""
    parser = argparse.ArgumentParser(
        prog="python -m workbench.models.train_demo_vit", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--data", type=Path, help="the data set's own file, optdigits.tes, instead of scikit-learn's copy"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    counts, labels = read_counts(args.data)
    pixels = to_pixels(counts)
    learnt, held_out = split()
    model = new_model(args.seed)
    begun = time.perf_counter()
    losses = train(model, pixels[learnt], labels[learnt], seed=args.seed, epochs=args.epochs)
    seconds = time.perf_counter() - begun

    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    model.save_pretrained(args.out)
    save_examples(args.out, counts[held_out], labels[held_out])
    saved, _ = load(args.out)
    shares = {
        "training": round(accuracy(saved, pixels[learnt], labels[learnt]), 4),
        "held_out": round(accuracy(saved, pixels[held_out], labels[held_out]), 4),
    }
    source = "scikit-learn's copy" if args.data is None else "the data set's own file, optdigits.tes"
    card = make_card(args.out, saved, shares, losses, seconds, seed=args.seed, source=source)
    print(
        f"held out {shares['held_out']:.3f}, training {shares['training']:.3f}; {card['parameters']:,} parameters, "
        f"{card['megabytes']} MB, {card['minutes']} minutes"
    )


def make_card(
    folder: Path, model: Any, shares: dict[str, float], losses: list[float], seconds: float, *, seed: int, source: str
) -> dict[str, Any]:
    """Write what a saved model is to card.json and README.md."""
    config = model.config
    card = {
        "model": "demo-vit",
        "summary": "small ViT that reads handwritten digits of 16 x 16 pixels",
        "architecture": f"ViT ({config.num_hidden_layers} layers, {config.num_attention_heads} heads, width "
        f"{config.hidden_size}, MLP {config.intermediate_size}, CLS and 8 x 8 patches of 2 x 2 pixels, one channel)",
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": round((folder / "model.safetensors").stat().st_size / 1e6, 2),
        "stored_as": "float32 safetensors",
        "seed": seed,
        "epochs": len(losses),
        "minutes": round(seconds / 60, 1),
        "machine": f"{os.cpu_count()} CPU cores ({torch.get_num_threads()} used), torch "
        f"{torch.__version__.split('+')[0]}, transformers {transformers.__version__}",
        "command": f"python -m workbench.models.train_demo_vit --out DIR --seed {seed}",
        "data": "Optical Recognition of Handwritten Digits, test set (E. Alpaydin, C. Kaynak, UCI, CC BY 4.0), as "
        f"scikit-learn bundles it; this run read {source}",
        "accuracy": shares,
        "accuracy_measured_on": f"{N_HELD_OUT} images held out at random (seed {SPLIT_SEED}), and the "
        f"{1797 - N_HELD_OUT} it was trained on, without changes, on the saved weights",
        "notes": "an earlier setting of the training, weaker, had been measured on the same held-out images (96.2 %); "
        "the present one was chosen on 200 of the training images",
        "loss_by_epoch": [round(loss, 4) for loss in losses],
    }
    disk.write(folder / "card.json", json.dumps(card, indent=2) + "\n")
    disk.write(folder / "README.md", _readme(card))
    return card


def _readme(card: dict[str, Any]) -> str:
    """The card as a page for people."""
    return f"""# {card["model"]}

{card["summary"][0].upper()}{card["summary"][1:]}. {card["architecture"]}; {card["parameters"]:,} parameters,
{card["megabytes"]} MB ({card["stored_as"]}).

| images | accuracy |
|---|---|
| held out | {card["accuracy"]["held_out"]:.3f} |
| trained on | {card["accuracy"]["training"]:.3f} |

Measured on {card["accuracy_measured_on"]}. {card["notes"][0].upper()}{card["notes"][1:]}.

Trained from scratch: {card["epochs"]} epochs in {card["minutes"]} minutes on {card["machine"]}, by

    {card["command"]}

Data: {card["data"]}. The writers are not told apart, so digits of one hand may be in both parts.

`workbench.models.examples("demo-vit")` has 40 of the held-out images. Inputs are `pixel_values` [image, 1, 16, 16] from
−1 (paper) to 1 (ink); `workbench.models.digits.to_pixels` makes them from the data set's 8 x 8 counts. Images other
than single digits were not trained, so what it says of them means nothing.
"""


if __name__ == "__main__":
    main()
