"""Section of the demo: which heads of demo-vit matter, how far they look, and which patterns they have."""

from __future__ import annotations

import torch

from workbench import attach, attention_profile, head_importance, models, pattern_atlas, views
from workbench.report import Report

_IMAGES = 20  # two of each digit


def add(report: Report, seed: int) -> None:
    """Add what the heads look at on images, their importance and that of their parts, a profile and an atlas."""
    model, _ = models.load("demo-vit")
    digits = models.examples("demo-vit")
    pixels, labels = digits.pixel_values[:_IMAGES], digits.labels[:_IMAGES]
    with attach(model) as wb:
        with torch.no_grad(), wb.capture() as cap:
            model(pixel_values=pixels)
        importance = head_importance(
            wb,
            [{"pixel_values": pixels, "labels": labels}],
            methods=("zero", "gradient_magnitude"),
            partial_pruning=["cls", "patches", ("inside", 1), ("outside", 1)],
            seed=seed,
            progress=False,
        )
    report.add(
        views.image_attention(cap, pixels, labels=labels.tolist()),
        title="A small ViT: what heads look at",
        note="`demo-vit` reads handwritten digits of 8 x 8 patches. Choose an image to see all heads on it, a head to "
        "see it on all images, a patch to look from there.",
    )
    report.add(
        importance,
        title="A small ViT: which heads matter",
        note="What the loss gains without each head, and without parts of it: the CLS row, the patches' rows, and what "
        "patches read within one hop or beyond.",
    )
    report.add(
        attention_profile(cap),
        title="A small ViT: how far heads look",
        note="Hops are rings of patches around the query.",
    )
    report.add(
        pattern_atlas(cap, n_clusters=5, epochs=10, seed=seed, progress=False),
        title="A small ViT: which patterns heads have",
        note="An autoencoder draws all patterns from a few numbers each; heads with like numbers are a cluster.",
    )
