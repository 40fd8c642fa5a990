"""`attention_profile`: how far heads look, over all forwards and batch rows of a capture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from workbench.analysis.profile.places import Places, bins, find_places
from workbench.analysis.profile.result import MEASURES, AttentionProfile
from workbench.analysis.profile.sums import Sums, collect
from workbench.capture.capture import Capture
from workbench.errors import CaptureError, WorkbenchError, expect
from workbench.hooks.sites import Site

_SINKS = ("separate", "keep", "drop")
_NO_DISTANCE = ("cross", "state", "window", "halo", "channel", "pooled", "memory", "gate")
_SHOWN = 64  # tokens on either side in the offset map of text


def attention_profile(
    cap: Capture,
    grid: tuple[int, int] | Literal["tokens"] | None = None,
    sink: Literal["separate", "keep", "drop"] = "separate",
    *,
    prefix: int | None = None,
    sites: Sequence[str | int | Site] | None = None,
    level: float = 0.95,
) -> AttentionProfile:
    """Profile every head: weight by hop, mean distance, entropy, CLS and sink, offset maps, and indicators.

    A is one head's pattern on one example. Queries i are the patches of an image, or the tokens of a text that are no
    padding; L is their number. The sink is the prefix tokens of an image, the first token that is no padding of a text.
    A hop is max(|dy|, |dx|) on the grid, a ring; in text |j − i|. What A counts as weight depends on `sink`:

    * "separate": A without the sink's columns, not renormalised, so that mass and sink together make 1.
    * "keep": A as it is. Only for text and for images without prefix: a CLS token has no place on the grid.
    * "drop": A without the sink's columns, each row scaled to sum 1; rows with nothing left count as empty.

    Of the weight W so counted:

    * mass at hop k: (1/L) Σ_i Σ_{j at k hops} W_ij. density: Σ W over the pairs at k hops, per pair that may be seen.
    * mean_distance: Σ W_ij d_ij / Σ W_ij, with Euclidean d in patches or tokens. distance_spread: the standard
      deviation of d under the same weights.
    * entropy: mean over rows of −Σ_j A_ij ln A_ij in nats, of the whole row; of W's row with "drop".
      normalised_entropy: each row's over ln of the number of keys it sees, a mean over rows that see two or more.

    Always of A as it is, over those L rows and all keys (Xue et al. 2025, arXiv 2510.11602, for causal text):

    * total_entropy: −Σ_ij A_ij ln A_ij. concentration: the Frobenius norm √Σ A².
    * head_diversity: standard deviation across the site's heads (÷ H), a mean over the visible cells; one per site.
    * sink: (1/L) Σ_i of A_i's weight on the sink.
    * local_n, n = 0 to 3: Σ_i A_i,i−n / (L − n), in the order of tokens; of images in raster order, patches only.
    * patches_to_cls: mean over patches of A_i,CLS. cls_to_patches: Σ_j A_CLS,j over patches. CLS is the first prefix
      token; both are NaN without one.

    Patterns that are no distributions are profiled as |A| normalised per row, as their statistics are. They are walked
    in tiles; memory grows with the number of tokens. All numbers are first taken per example, that is per batch row of
    every forward; means, spread and intervals are over examples.

    Args:
        cap: any number of forwards; patterns must have been kept (queries_keys=True).
        grid: rows and columns of patches, "tokens" to count distance in tokens, or None: the model's patches if it has
            any, else tokens.
        sink: see above.
        prefix: number of tokens before the patches; None for as many as the model has, or as there are too many.
        sites: sites to profile, all with tokens or patches of one kind; None for all self-attention.
        level: of the t intervals of means over examples.

    Raises:
        CaptureError: no self-attention, patterns that were not kept, or queries and keys of different length, as in the
            steps of a generation (take `cap.joined()`).
        WorkbenchError: a grid that does not match the tokens, or an argument that is none.

    >>> import workbench
    >>> from workbench.models import examples, load
    >>> model, _ = load("demo-vit")
    >>> with workbench.attach(model) as wb, wb.capture() as cap:
    ...     _ = model(pixel_values=examples().pixel_values[:4])
    >>> workbench.attention_profile(cap)
    AttentionProfile(16 heads, 4 examples, 8 x 8 patches, sink separate)
    """
    expect(Capture, cap=cap)
    if sink not in _SINKS:
        raise WorkbenchError(f"sink is one of {', '.join(_SINKS)}, not {sink!r}")
    if not 0 < level < 1:
        raise WorkbenchError(f"level lies between 0 and 1, and is not {level}")
    calls = cap.calls
    chosen, skipped = choose_sites(cap, sites)
    places = locate(cap, chosen, grid, prefix)
    if sink == "keep" and places.prefix:
        raise WorkbenchError("prefix tokens have no place on the grid", hint='use sink="separate" or "drop"')

    ranges = bins(places.farthest, places.text)
    per_site = []
    for site in chosen:
        parts = [_examples(collect(call[site].pattern, places, sink), places, ranges) for call in calls]
        per_site.append([torch.cat([part[k] for part in parts]) for k in range(4)])
    mass, numbers, maps, densities = (torch.cat([found[k] for found in per_site], 1) for k in range(4))
    rows = [(s, h) for s, found in zip(chosen, per_site, strict=True) for h in range(found[0].shape[1])]
    return AttentionProfile(
        sites=tuple(s.name for s, _ in rows),
        layers=tuple(s.layer for s, _ in rows),
        heads=tuple(h for _, h in rows),
        labels=labels_of(rows),
        kind="text" if places.text else "image",
        grid=(places.rows, places.columns),
        prefix=places.prefix,
        sink=sink,
        bins=ranges,
        mass_examples=mass,
        density=densities.nanmean(0),
        measures=MEASURES,
        examples=numbers,
        offsets=maps.mean(0),
        level=level,
        skipped=skipped,
        provenance=dict(cap.provenance),
    )


def choose_sites(cap: Capture, sites: Sequence[str | int | Site] | None) -> tuple[list[Site], tuple[str, ...]]:
    """The sites of an analysis over distances, and the names of those that have none, or are not asked for.

    Linear and recurrent layers, of the kind "state", are taken where they are asked for: their maps have signs, and the
    analysis is then of |A| normalised per row.
    """
    if sites is not None:
        asked = [sites] if isinstance(sites, (str, int, Site)) else list(sites)
        chosen = [cap.sites[s.name if isinstance(s, Site) else s] for s in asked]
        bad = [s for s in chosen if s.kind in _NO_DISTANCE and s.kind != "state"]
        if bad:
            raise CaptureError(f"attention of kind {bad[0].kind} has no distance between its tokens", site=bad[0].name)
        skipped: tuple[str, ...] = ()
    else:
        chosen = [s for s in cap.sites if s.kind not in _NO_DISTANCE]
        skipped = tuple(s.name for s in cap.sites if s.kind in _NO_DISTANCE)
    if not chosen:
        raise CaptureError("the capture has no self-attention to profile")
    return chosen, skipped


def locate(cap: Capture, chosen: Sequence[Site], grid: tuple[int, int] | str | None, prefix: int | None) -> Places:
    """Where the tokens of these sites stand.

    Raises:
        CaptureError: a forward lacks one of them, or one has queries and keys of different length.
        WorkbenchError: a grid that is none, or that does not match the tokens.
    """
    lengths = []
    for n, call in enumerate(cap.calls):
        for site in chosen:
            if site not in call.sites:
                raise CaptureError(
                    f"forward {n} has no such site", site=site.name, hint="analyse such forwards one by one"
                )
            shape = call[site].shape
            if shape[2] != shape[3]:
                raise CaptureError(
                    "a distance needs as many queries as keys",
                    site=site.name,
                    shape=shape,
                    hint="of a generation, take cap.joined()",
                )
            lengths.append((site.name, shape[2]))
    return find_places(lengths, grid, prefix, cap.provenance.get("patches"))


def labels_of(rows: Sequence[tuple[Site, int]]) -> tuple[str, ...]:
    """Short labels of heads; with the site's name where two sites would share one."""
    short = tuple(f"L{site.layer}H{head}" for site, head in rows)
    return short if len(set(short)) == len(short) else tuple(f"{site.name}:H{head}" for site, head in rows)


def _examples(sums: Sums, places: Places, ranges: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mass [example, row, bin], measures [example, row, measure], offset maps, density [example, row, bin]."""
    rows, hops = sums.rows.clamp(min=1), places.hops()
    by_hop = torch.stack([(hops >= low) & (hops <= high) for low, high in ranges], 1).double()
    mass, pairs = sums.counted @ by_hop, sums.pairs @ by_hop
    weight, far = sums.counted.sum(-1), places.distances()
    some = weight > 0
    mean = (sums.counted @ far) / weight
    spread = ((sums.counted @ far**2) / weight - mean**2).clamp(min=0).sqrt()
    local = []
    for back in range(4):
        on = sums.whole[..., places.diagonal(back)].sum(-1)
        local.append(torch.where(sums.rows > back, on / (rows - back).clamp(min=1), torch.nan))
    nothing = torch.full_like(mean, torch.nan)
    found = {
        "mean_distance": torch.where(some, mean, torch.nan),
        "distance_spread": torch.where(some, spread, torch.nan),
        "entropy": sums.entropy / rows,
        "normalised_entropy": torch.where(sums.shares > 0, sums.share / sums.shares.clamp(min=1), torch.nan),
        "total_entropy": sums.total,
        "concentration": sums.squares.sqrt(),
        "head_diversity": sums.diversity[:, None].expand_as(mean),
        "sink": sums.sink / rows,
        **{f"local_{back}": values for back, values in enumerate(local)},
        "cls_to_patches": sums.cls_to_patches,
        "patches_to_cls": sums.first / rows if places.prefix else nothing,
    }
    maps = (sums.counted / rows[..., None]).unflatten(-1, places.map_shape)
    if places.text:
        middle, shown = places.columns - 1, min(_SHOWN, places.columns - 1)
        maps = maps[..., middle - shown : middle + shown + 1]
    density = torch.where(pairs > 0, mass / pairs.clamp(min=1), torch.nan)
    return mass / rows[..., None], torch.stack([found[name] for name in MEASURES], -1), maps, density
