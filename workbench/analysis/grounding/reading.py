"""`grounding`: the rows of a language model's heads at an answer's tokens, on the patches of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from workbench.analysis.grounding.places import image_places
from workbench.analysis.grounding.result import PARTS, Grounding
from workbench.analysis.grounding.tiles import ImagePlaces
from workbench.analysis.profile.measuring import labels_of
from workbench.errors import CaptureError, WorkbenchError, expect
from workbench.hooks.sites import Site
from workbench.kernels.patterns import DENSE_LIMIT, Pattern
from workbench.session.workbench import Workbench
from workbench.tokens import piece

if TYPE_CHECKING:
    from workbench.capture.capture import Capture

Sinks = Literal["found", "kept"] | Sequence[int]
_OTHER_ROWS = 16  # rows of other tokens that a sink has to draw
_FEWEST = 3  # of them, below which no sink is told
_DRAWN = 10.0  # times the median patch
_SHORT = 0.5  # of the median length of a value


def grounding(
    wb: Workbench,
    inputs: Mapping[str, Any],
    images: Sequence[Any] | None = None,
    processor: Any = None,
    *,
    at: int | Sequence[int] = -1,
    new_tokens: int = 0,
    example: int = 0,
    sites: Sequence[str | int | Site] | None = None,
    sinks: Sinks = "found",
    limit: int | None = DENSE_LIMIT,
    **settings: Any,
) -> Grounding:
    """Which picture, tile and patch the heads of a vision-language model read where it writes an answer.

    Of an encoder-decoder that reads a picture by cross-attention, rows are those of the decoder's tokens, and keys the
    patches as the encoder gives them.

    The model stays on its kernel and is run once. A row of attention is that of the token at a position, and writes the
    token after it: the row at the prompt's last token writes the first token of the answer.

    Weight on patches is the model's own. A patch is a sink of a head where the median row of up to 16 other text tokens
    behind the pictures gives it more than 10 times what it gives the median patch, and its value is shorter than half
    of the median value: it draws weight and gives nothing (Gu et al. 2024, arXiv 2410.10781; Kang et al. 2025,
    arXiv 2503.03321, on pictures). Sinks are left out of maps and shares, and the weight that they had is `removed`.

    Args:
        wb: the model, attached.
        inputs: what the processor made of text and pictures; see `workbench.image_places`, which also explains
            `images`, `processor`, `example` and `settings`.
        at: position of one token, or of several, of the prompt (negative: from its end); of the whole sequence with
            `new_tokens`.
        new_tokens: tokens that the model writes first, greedily; rows are then those that wrote them, where `at` is -1.
        sites: attentions of the language model; None for all whose keys are the prompt.
        sinks: "found" by the rule above, "kept" (none is left out), or positions in the prompt.
        limit: most bytes that the capture may keep.

    Raises:
        WorkbenchError: pictures that cannot be placed, or a position that is none. CaptureError: as `wb.capture`.
    """
    expect(Workbench, wb=wb)
    expect(Mapping, inputs=inputs)
    places = image_places(wb, inputs, images, processor, example=example, **settings)
    names = [site.name for site in choose(wb, places, sites)]
    with torch.no_grad(), wb.capture((), names, values=sinks == "found", limit=limit) as cap:
        if new_tokens:
            wb.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[operator]
        else:
            wb.model(**inputs)
    cap = cap.joined() if new_tokens else cap
    if new_tokens and at == -1:
        n = cap.calls[0][names[0]].shape[2]
        at = list(range(places.length - 1, n)) if not places.crossed else list(range(n))
    return grounding_of(cap, places, at=at, sites=names, sinks=sinks, tokenizer=wb.tokenizer)


def choose(wb: Workbench, places: ImagePlaces, sites: Sequence[str | int | Site] | None) -> list[Site]:
    """The attentions of the language model."""
    if sites is not None:
        asked = [sites] if isinstance(sites, (str, int, Site)) else list(sites)
        return [wb.sites.find(one.name) if isinstance(one, Site) else wb.sites[one] for one in asked]
    found = [site for site in wb.sites if _reads(site, places)]
    if not found:
        raise CaptureError(f"no attention was found in {places.stack or 'the model'}", hint="choose them with sites=")
    return found


def _reads(site: Site, places: ImagePlaces) -> bool:
    """Whether a site has the pictures among its keys."""
    inside = site.name.startswith(f"{places.stack}." if places.stack else "")
    return inside and (site.kind == "cross") == places.crossed and site.kind in ("self", "window", "cross")


def grounding_of(
    cap: Capture,
    places: ImagePlaces,
    *,
    at: int | Sequence[int] = -1,
    sites: Sequence[str | int | Site] | None = None,
    sinks: Sinks = "found",
    tokenizer: Any = None,
) -> Grounding:
    """`grounding` of a capture of one forward, or of a generation that was joined (`cap.joined()`).

    Args:
        places: where the pictures stand in the prompt, as `workbench.image_places` gives it.

    Raises:
        CaptureError: several forwards, patterns that were not kept, or a prompt of another length.
        WorkbenchError: a position that is none, or sinks that are no patches.
    """
    chosen = _sites_of(cap, places, sites)
    n = cap[chosen[0]].shape[2]
    rows = _rows(at, n)
    columns = places.positions
    others = _others(places, n, rows)
    kept, rules, masses, flags = [], set(), [], []
    image = torch.zeros(cap[chosen[0]].shape[3], dtype=torch.bool)
    image[columns] = True
    image[torch.tensor(places.others, dtype=torch.long)] = True
    for site in chosen:
        pattern = cap[site].pattern
        whole = _read(pattern, rows, places.example)  # [head, row, key]
        kept.append(whole[:, :, columns])
        masses.append(_parts(whole, columns, places, image))
        flag, rule = _sinks(pattern, places, others, columns, sinks)
        flags.append(flag)
        rules.add(rule)
    heads = [(site, h) for site in chosen for h in range(cap[site].shape[1])]
    tiles = places.tiles
    placed = [tile.positions.flatten() >= 0 for tile in tiles]
    cells = [torch.cartesian_prod(torch.arange(t.grid[0]), torch.arange(t.grid[1])).view(-1, 2) for t in tiles]
    texts = _texts(cap, places, tokenizer, n)
    return Grounding(
        positions=tuple(rows),
        tokens=tuple(texts[i] for i in rows),
        writes=tuple(texts[i + 1] if i + 1 < len(texts) else "" for i in rows),
        labels=labels_of(heads),
        sites=tuple(site.name for site, _ in heads),
        layers=tuple(site.layer for site, _ in heads),
        heads=tuple(h for _, h in heads),
        weights=torch.cat(kept).transpose(0, 1).contiguous(),
        sinks=torch.cat(flags),
        parts=PARTS,
        masses=torch.cat(masses).transpose(0, 1).contiguous(),
        sink_rule="; ".join(sorted(rules)),
        places=columns.clone(),
        tile=tuple(t for t, here in enumerate(placed) for _ in range(int(here.sum()))),
        cells=torch.cat([cell[here] for cell, here in zip(cells, placed, strict=True)]),
        boxes=torch.cat([t.boxes().flatten(0, 1)[here] for t, here in zip(tiles, placed, strict=True)]).float(),
        tile_names=tuple(tile.name for tile in tiles),
        tile_pictures=tuple(tile.picture for tile in tiles),
        grids=torch.tensor([tile.grid for tile in tiles]),
        names=tuple(picture.name for picture in places.pictures),
        sizes=torch.tensor([picture.size for picture in places.pictures]),
        pictures=tuple(picture.pixels for picture in places.pictures),
        calls=1,
        provenance=dict(cap.provenance),
    )


def _sites_of(cap: Capture, places: ImagePlaces, sites: Sequence[str | int | Site] | None) -> list[Site]:
    if len(cap.calls) != 1:
        raise CaptureError(
            f"the capture holds {len(cap.calls)} forwards",
            hint="of a generation take cap.joined(); of several prompts, capture each by itself",
        )
    if sites is None:
        chosen = [site for site in cap.sites if _reads(site, places)]
    else:
        chosen = [cap.sites[one.name if isinstance(one, Site) else one] for one in sites]
    if not chosen:
        raise CaptureError(f"the capture has no attention of {places.stack or 'the language model'}")
    lengths = {cap[site].shape[3] for site in chosen}
    bad = next((site for site in chosen if not places.crossed and cap[site].shape[2] != cap[site].shape[3]), None)
    if (
        bad is not None
        or len(lengths) > 1
        or min(lengths) < places.length
        or (places.crossed and lengths != {places.length})
    ):
        one = bad or min(chosen, key=lambda site: cap[site].shape[3])
        raise CaptureError(
            f"the prompt has {places.length} tokens, and the attention other keys",
            site=one.name, shape=cap[one].shape,
            hint="capture the prompt that the places are of; of a generation take cap.joined()",
        )  # fmt: skip
    if cap[chosen[0]].shape[0] <= places.example:
        raise CaptureError(f"the capture has no example {places.example}", shape=cap[chosen[0]].shape)
    ids = None if places.crossed else cap.forwards[0].ids.get("input")
    if ids is not None and not torch.equal(ids[places.example, : places.length].cpu(), places.ids):
        raise CaptureError("the capture is of another prompt than the places of its pictures")
    return chosen


def _rows(at: int | Sequence[int], n: int) -> list[int]:
    asked = [at] if isinstance(at, int) else list(at)
    bad = [one for one in asked if isinstance(one, bool) or not isinstance(one, int) or not -n <= one < n]
    if bad or not asked:
        raise WorkbenchError(
            f"position {bad[0]} lies beyond the {n} tokens" if bad else "no position is given",
            hint="positions count from 0, or from -1 at the end",
        )
    return [one % n for one in asked]


def _read(pattern: Pattern, rows: Sequence[int], example: int) -> Tensor:
    """[head, row, key] of one example."""
    if pattern.by_magnitude:
        raise CaptureError(f"a {type(pattern).__name__} has no shares of a row", hint="leave the site out: sites=")
    return pattern.rows(rows)[example].detach().float().cpu()


def _parts(whole: Tensor, columns: Tensor, places: ImagePlaces, image: Tensor) -> Tensor:
    """[head, row, part] what the weights lie on."""
    on_patches = whole[:, :, columns].sum(-1)
    on_images = whole[:, :, image].sum(-1)
    first = torch.zeros_like(on_images) if bool(image[places.first]) else whole[:, :, places.first]
    return torch.stack([on_patches, on_images - on_patches, first, whole.sum(-1) - on_images - first], -1)


def _others(places: ImagePlaces, n: int, rows: Sequence[int]) -> list[int]:
    """Text tokens behind the pictures whose rows are not asked for, spread evenly."""
    taken = {*places.positions.tolist(), *places.others, *rows}
    start = 0 if places.crossed else int(places.positions.max()) + 1
    taken = set(rows) if places.crossed else taken
    behind = [i for i in range(start, n) if i not in taken]
    if len(behind) <= _OTHER_ROWS:
        return behind
    return [behind[round(i * (len(behind) - 1) / (_OTHER_ROWS - 1))] for i in range(_OTHER_ROWS)]


def _sinks(
    pattern: Pattern, places: ImagePlaces, others: Sequence[int], columns: Tensor, asked: Sinks
) -> tuple[Tensor, str]:
    """[head, patch] which are sinks, and how they were told."""
    none = torch.zeros(pattern.n_heads, len(columns), dtype=torch.bool)
    if asked == "kept":
        return none, "none are taken out"
    if isinstance(asked, str):
        if asked != "found":
            raise WorkbenchError(f'sinks is "found", "kept" or positions, not {asked!r}')
        if len(others) < _FEWEST:
            return none, f"none are told: {len(others)} other text tokens behind the pictures are fewer than {_FEWEST}"
        if pattern.values is None:
            return none, "none are told: values were not kept (values=True)"
        drawn = _read(pattern, others, places.example)[:, :, columns].median(1).values
        long = pattern.value_norms()[places.example].float().cpu()[:, columns]
        middle = drawn.median(-1, keepdim=True).values
        short = long < _SHORT * long.median(-1, keepdim=True).values
        rule = (
            f"more than {_DRAWN:g} times the weight of the median patch in the median of {len(others)} other rows, and "
            f"a value shorter than {_SHORT:g} of the median"
        )
        return (drawn > _DRAWN * middle) & short, rule
    wanted = torch.tensor(list(asked), dtype=torch.long)
    known = torch.isin(wanted, columns)
    if not bool(known.all()):
        raise WorkbenchError(f"position {int(wanted[~known][0])} is no patch of a picture", hint="see places.positions")
    return none | torch.isin(columns, wanted), "as they were given"


def _texts(cap: Capture, places: ImagePlaces, tokenizer: Any, n: int) -> list[str]:
    stream = "decoder" if places.crossed else "input"
    known = cap.forwards[0].tokens.get(stream)
    if known is not None and len(known) > places.example:
        return list(known[places.example])
    ids = cap.forwards[0].ids.get(stream)
    row = places.ids.tolist() if ids is None else ids[places.example].tolist()
    texts = [str(one) if tokenizer is None else piece(tokenizer, one) for one in row]
    return texts + [f"{i}" for i in range(len(texts), n)]
