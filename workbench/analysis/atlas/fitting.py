"""`pattern_atlas`: pool all patterns of a capture, learn to draw them, map and cluster them, and name what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from workbench.analysis.atlas.clusters import assign, components, k_means
from workbench.analysis.atlas.encoder import encode, fit, scaled
from workbench.analysis.atlas.gathering import gather
from workbench.analysis.atlas.names import NAMES, content, dependence, suggest
from workbench.analysis.atlas.result import PatternAtlas
from workbench.capture.capture import Capture
from workbench.errors import WorkbenchError, expect
from workbench.hooks.sites import Site


def pattern_atlas(
    cap: Capture,
    n_clusters: int = 8,
    grid: tuple[int, int] | Literal["tokens"] | None = None,
    *,
    prefix: int | None = None,
    sites: Sequence[str | int | Site] | None = None,
    size: int = 32,
    width: int = 32,
    epochs: int = 60,
    max_samples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> PatternAtlas:
    """Which patterns a model's heads have learned.

    Every head's pattern on every example is pooled to [size, size] (`workbench.analysis.atlas.pooling.pool`). A
    convolutional autoencoder learns to draw them from `width` numbers. The principal components of these latents are
    the map; k-means on each head's mean latents makes the clusters. Names are suggested by evidence that is measured on
    the whole patterns, not on the latents (`workbench.analysis.atlas.names.suggest`). Content dependence is how much a
    head's pooled pattern varies over examples.

    The latent space is learnt anew for each atlas: distances in one say nothing about another. Only heads whose
    patterns differ after pooling can be told apart by clusters; the evidence sees single tokens.

    Args:
        cap: any number of forwards; patterns must have been kept (queries_keys=True). More than one example is needed
            for content dependence.
        n_clusters: at most; there are no more than heads.
        grid, prefix, sites: as in `attention_profile`.
        size: side of the pooled patterns, a multiple of 8.
        width: of the latents.
        epochs, max_samples: of the training; in each epoch at most that many patterns are seen.
        seed: of weights, order and clusters. progress: show a progress bar.

    Raises:
        CaptureError: as `attention_profile`.
        WorkbenchError: a grid that does not match the tokens, or an argument out of range.

    >>> import workbench
    >>> from workbench.models import examples, load
    >>> model, _ = load("demo-vit")
    >>> with workbench.attach(model) as wb, wb.capture() as cap:
    ...     _ = model(pixel_values=examples().pixel_values[:4])
    >>> atlas = workbench.pattern_atlas(cap, n_clusters=3, epochs=2, progress=False)
    >>> atlas.patterns.shape, len(atlas.head_names)
    (torch.Size([16, 32, 32]), 16)
    """
    expect(Capture, cap=cap)
    for name, value in {"n_clusters": n_clusters, "width": width, "epochs": epochs, "max_samples": max_samples}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise WorkbenchError(f"{name} is a whole number of at least 1, not {value!r}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 8 or size % 8:
        raise WorkbenchError(f"size is a multiple of 8, not {size!r}", hint="32 is the default")
    found = gather(cap, size, grid, prefix, sites)
    images = scaled(found.maps)
    weights, losses = fit(images, width, epochs, seed, max_samples, progress)
    flat, errors = encode(images, weights, width)
    samples, error = flat.unflatten(0, found.maps.shape[:2]), errors.unflatten(0, found.maps.shape[:2])
    latents = samples.mean(0)
    mean, axes, explained = components(flat)
    centres, clusters = k_means(latents, min(n_clusters, len(latents)), seed)
    varies = dependence(found.maps)
    evidence = torch.cat([found.scores.nanmean(0), content(varies)[:, None]], 1)
    patterns = found.maps.mean(0)
    which = [clusters == c for c in range(len(centres))]
    cluster_evidence = torch.stack([evidence[w].nanmean(0) for w in which])
    return PatternAtlas(
        sites=found.sites,
        layers=found.layers,
        heads=found.heads,
        labels=found.labels,
        kind="text" if found.places.text else "image",
        grid=(found.places.rows, found.places.columns),
        prefix=found.places.prefix,
        size=size,
        patterns=patterns,
        latents=latents,
        sample_latents=samples,
        xy=(latents - mean) @ axes.T,
        sample_xy=(samples - mean) @ axes.T,
        explained=explained,
        clusters=clusters,
        sample_clusters=assign(samples, centres),
        cluster_patterns=torch.stack([patterns[w].mean(0) for w in which]),
        names=NAMES,
        evidence=evidence,
        head_names=tuple(suggest(row) for row in evidence.tolist()),
        cluster_evidence=cluster_evidence,
        cluster_names=tuple(suggest(row) for row in cluster_evidence.tolist()),
        content_dependence=varies,
        error=error,
        losses=tuple(losses),
        centres=centres,
        mean=mean,
        axes=axes,
        weights=weights,
        seed=seed,
        provenance=dict(cap.provenance),
    )
