"""`word_grounding`: where in a picture a diffusion model's patches read a word, averaged over steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.analysis.grounding.places import picture_of
from workbench.analysis.grounding.proof import unmixed
from workbench.analysis.grounding.result import Grounding
from workbench.analysis.grounding.tiles import Picture, Tile
from workbench.analysis.profile.measuring import labels_of
from workbench.errors import CaptureError, WorkbenchError, expect
from workbench.hooks.configs import read
from workbench.hooks.sites import Site
from workbench.kernels.patterns import DENSE_LIMIT, Pattern
from workbench.session.workbench import Workbench

if TYPE_CHECKING:
    from workbench.capture.capture import Capture

Words = Mapping[str, int | Sequence[int]]
PARTS = ("the word", "patches", "the first token", "other text")
"""What the rows of patches lie on; together 1."""
_PIXELS = 8  # of a picture for each latent, where no picture is given


def word_grounding(
    wb: Workbench,
    inputs: Mapping[str, Any],
    words: Words,
    image: Any = None,
    *,
    run: Callable[[], Any] | None = None,
    grid: tuple[int, int] | None = None,
    example: int = -1,
    sites: Sequence[str | int | Site] | None = None,
    limit: int | None = DENSE_LIMIT,
) -> Grounding:
    """How much the patches of a picture read each word of the text that a diffusion model draws by (Tang et al. 2023,
    arXiv 2210.04885, without their smoothing).

    Of each head: `weights[word, head, patch]` is the weight that the patch's row has on the word's tokens, over the
    number of patches; they sum to the mean weight of the head's rows on the word, `masses[…, 0]`. The other masses are
    the mean weight on patches (in joint attention), on the first token of the text and on the rest of it. All are means
    over the forwards that ran. Heads at several resolutions have a grid each, and their maps add up on the pixels.

    Cross-attention to the text is read as it is. In joint attention, text and picture stand in one sequence; which is
    which is found by changing the text while attention is switched off: what changes is text.

    Args:
        wb: the denoiser, attached: a U-Net or a transformer of diffusers.
        inputs: of one step: `sample` or `hidden_states`, `encoder_hidden_states`, and what else it takes.
        words: by name, the positions of each word's tokens in the text.
        image: the picture that was drawn, [row, column, 3] or PIL; None for an empty one.
        run: runs the denoiser, as a pipeline does, any number of times; None: once, on `inputs`.
        grid: rows and columns of the picture's tokens where the inputs hold them in one row without `img_ids`.
        example: which row of the batch; −1 is the one with the prompt where guidance puts that without it first.
        sites: None for all attention to the text.

    Raises:
        WorkbenchError: words that are none, a grid that is none or is not the model's. CaptureError: as `wb.capture`.
    """
    expect(Workbench, wb=wb)
    expect(Mapping, inputs=inputs)
    text = inputs.get("encoder_hidden_states")
    if not isinstance(text, Tensor) or text.dim() != 3:
        raise WorkbenchError("the inputs hold no encoder_hidden_states [batch, token, width]")
    n_text = text.shape[1]
    asked = _asked(words, n_text)
    shape = _grid(wb.model, inputs) if grid is None else grid
    chosen = None if sites is None else [wb.sites[s if isinstance(s, (str, int)) else s.name].name for s in sites]
    where = _texts_of(wb, inputs, n_text, chosen, limit)
    with torch.no_grad(), wb.capture((), list(where), limit=limit) as cap:
        wb.model(**inputs) if run is None else run()
    return _gathered(cap, where, asked, shape, image, example, n_text)


def _asked(words: Words, n_text: int) -> dict[str, list[int]]:
    asked = {name: [at] if isinstance(at, int) else list(at) for name, at in words.items()}
    for name, positions in asked.items():
        bad = [p for p in positions if not 0 <= p < n_text]
        if bad or not positions:
            raise WorkbenchError(f"{name!r} stands at {positions}, and the text has {n_text} tokens")
    if not asked:
        raise WorkbenchError("no word is given", hint='words={"cat": [5]}, positions in the text')
    return asked


def _grid(model: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the picture's tokens, as the model makes them of its inputs."""
    ids = inputs.get("img_ids")
    if isinstance(ids, Tensor):
        at = ids.flatten(0, -2)[:, -2:].long()
        rows, columns = (int(n) + 1 for n in at.amax(0))
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        if not torch.equal(at.cpu(), torch.stack([y, x], -1).flatten(0, 1)):
            raise WorkbenchError("img_ids are no rows and columns of one picture", shape=ids.shape, hint="give grid=")
        return rows, columns
    latent = inputs.get("sample", inputs.get("hidden_states"))
    if not isinstance(latent, Tensor) or latent.dim() != 4:
        raise WorkbenchError("the inputs tell of no rows and columns of the picture", hint="give grid=(rows, columns)")
    patch = int(read(read(model, "config"), "patch_size", 1) or 1)
    if latent.shape[-2] % patch or latent.shape[-1] % patch:
        raise WorkbenchError(f"latents are not cut into patches of {patch}", shape=latent.shape)
    return latent.shape[-2] // patch, latent.shape[-1] // patch


@dataclass(frozen=True)
class _Where:
    """Which keys of a site are text, and which queries are the picture's; None for all."""

    text: list[int]
    picture: list[int] | None


def _texts_of(
    wb: Workbench, inputs: Mapping[str, Any], n_text: int, chosen: Sequence[str] | None, limit: int | None
) -> dict[str, _Where]:
    """The sites that read the text, by a forward each on the text and on a changed one, attention switched off."""
    changed = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1.0}
    names = [site.name for site in wb.sites if chosen is None or site.name in chosen]
    modules = [wb.model.get_submodule(name) for name in names]
    seen = []
    with torch.no_grad(), unmixed(modules):
        for given in (inputs, changed):
            with wb.capture((), chosen, limit=limit) as cap:
                wb.model(**given)
            seen.append(cap)
    found = {}
    for site in seen[0].sites:
        first, second = (cap.calls[0][site].pattern for cap in seen)
        keys = _different(first, second, "k")
        if keys is None or not any(keys):
            continue
        if all(keys) and len(keys) == n_text and site.kind == "cross":
            found[site.name] = _Where(list(range(n_text)), None)
        elif len(keys) > n_text and sum(keys) == n_text and _different(first, second, "q") == keys:
            found[site.name] = _Where([i for i, x in enumerate(keys) if x], [i for i, x in enumerate(keys) if not x])
        elif chosen is not None:
            raise CaptureError(
                f"which of its {len(keys)} keys are the {n_text} of the text is not clear", site=site.name
            )
    if not found:
        raise CaptureError("no attention reads the text", hint="are encoder_hidden_states among the inputs it needs?")
    return found


def _different(a: Pattern, b: Pattern, name: str) -> list[bool] | None:
    """Which positions of queries or keys differ; None of patterns without them."""
    one, other = getattr(a, name, None), getattr(b, name, None)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return None
    return [bool(x) for x in (one != other).any(-1).any(1).any(0)]


def _gathered(
    cap: Capture, where: Mapping[str, _Where], asked: Mapping[str, list[int]], grid: tuple[int, int], image: Any,
    example: int, n_text: int,
) -> Grounding:  # fmt: skip
    picture = _picture(image, grid)
    chosen = [site for site in cap.sites if site.name in where]
    shapes, parts = [], []
    for site in chosen:
        runs = [call[site].pattern for call in cap.calls if site in call.sites]
        place = where[site.name]
        n = runs[0].n_queries if place.picture is None else len(place.picture)
        shapes.append(_resolution(n, grid, site))
        if not -runs[0].n_batch <= example < runs[0].n_batch:
            raise WorkbenchError(f"the batch has {runs[0].n_batch} examples, and no example {example}")
        parts.append(torch.stack([_read(one, place, asked, example) for one in runs]).mean(0))
    grids = list(dict.fromkeys(shapes))
    tiles = [_tile(i, grid_, picture) for i, grid_ in enumerate(grids)]
    starts = [sum(r * c for r, c in grids[:i]) for i in range(len(grids) + 1)]
    heads = [(site, h) for site in chosen for h in range(cap.calls[0][site].shape[1])]
    weights = torch.zeros(len(asked), len(heads), starts[-1])
    masses = torch.zeros(len(asked), len(heads), 4)
    done = 0
    for shape, part in zip(shapes, parts, strict=True):
        at, n = grids.index(shape), part.shape[1]
        size = shape[0] * shape[1]
        weights[:, done : done + n, starts[at] : starts[at] + size] = part[..., :size] / size
        means = part[..., size:]  # on the picture, on the first token, on all of the text
        word = part[..., :size].mean(-1)
        first = means[..., 1] * torch.tensor([[0 not in where_] for where_ in asked.values()]).float()
        masses[:, done : done + n] = torch.stack([word, means[..., 0], first, means[..., 2] - word - first], -1)
        done += n
    cells = [torch.cartesian_prod(torch.arange(r), torch.arange(c)).view(-1, 2) for r, c in grids]
    return Grounding(
        positions=tuple(at[0] for at in asked.values()), tokens=tuple(asked), writes=("",) * len(asked),
        labels=labels_of(heads), sites=tuple(site.name for site, _ in heads),
        layers=tuple(site.layer for site, _ in heads), heads=tuple(h for _, h in heads),
        weights=weights, sinks=torch.zeros(len(heads), starts[-1], dtype=torch.bool), parts=PARTS, masses=masses,
        sink_rule="none are taken out", places=torch.cat([torch.arange(r * c) for r, c in grids]),
        tile=tuple(i for i, (r, c) in enumerate(grids) for _ in range(r * c)), cells=torch.cat(cells),
        boxes=torch.cat([tile.boxes().flatten(0, 1) for tile in tiles]).float(),
        tile_names=tuple(tile.name for tile in tiles), tile_pictures=(0,) * len(tiles), grids=torch.tensor(grids),
        names=(picture.name,), sizes=torch.tensor([picture.size]), pictures=(picture.pixels,),
        calls=len(cap.calls), provenance=dict(cap.provenance),
    )  # fmt: skip


def _picture(image: Any, grid: tuple[int, int]) -> Picture:
    if image is not None:
        return picture_of(image, 0)
    size = (grid[0] * _PIXELS, grid[1] * _PIXELS)
    return Picture("no picture was given", size, torch.full((*size, 3), 96, dtype=torch.uint8))


def _resolution(n: int, grid: tuple[int, int], site: Site) -> tuple[int, int]:
    """Rows and columns of a site's patches: those of the picture's tokens, halved so and so often."""
    rows, columns = grid
    while rows * columns > n and rows * columns > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != n:
        raise WorkbenchError(
            f"{n} patches are no {grid[0]} x {grid[1]}, nor halves of it",
            hint="give grid=(rows, columns)",
            site=site.name,
        )
    return rows, columns


def _tile(number: int, grid: tuple[int, int], picture: Picture) -> Tile:
    box = (0.0, 0.0, float(picture.size[1]), float(picture.size[0]))
    return Tile(0, f"{grid[0]} x {grid[1]} patches", torch.arange(grid[0] * grid[1]).view(grid), box)


def _read(pattern: Pattern, where: _Where, asked: Mapping[str, list[int]], example: int) -> Tensor:
    """[word, head, patch and 3]: weight of each patch on each word; then means on picture, first token and text."""
    rows = slice(0, pattern.n_queries)
    picture = torch.arange(pattern.n_queries) if where.picture is None else torch.tensor(where.picture)
    low, high = min(where.text), max(where.text) + 1
    if where.text != list(range(low, high)):
        raise CaptureError("the tokens of the text do not stand together")
    made = []
    for head in range(pattern.n_heads):
        on_text = pattern.tile(rows, slice(low, high), [head])[example, 0].detach().float().cpu()[picture]
        whole = float(on_text.sum(-1).mean())
        rest = torch.tensor([0.0 if where.picture is None else 1 - whole, float(on_text[:, 0].mean()), whole])
        made.append(torch.stack([torch.cat([on_text[:, at].sum(-1), rest]) for at in asked.values()]))
    return torch.stack(made, 1)
