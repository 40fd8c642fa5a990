"""Whether the tokens of pictures are the patches that a layout says: pixels are changed, and features are compared."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.analysis.grounding.layouts import lay_out
from workbench.errors import WorkbenchError
from workbench.hooks.changes import Changes
from workbench.hooks.configs import read

if TYPE_CHECKING:
    from workbench.session.workbench import Workbench

PROVED = frozenset(
    {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision", "internvl", "gemma3", "idefics3"}
)
"""Types of models whose layout the tests prove, patch by patch."""
_proved_here: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_proved(wb: Workbench, inputs: Mapping[str, Any]) -> None:
    """Prove the layout of the images of a model of another type than `PROVED`, once.

    Raises:
        WorkbenchError: its features are not in the places that the layout says.
    """
    if read(read(wb.model, "config"), "model_type") in PROVED or wb.model in _proved_here:
        return
    if not hasattr(wb.model, "get_image_features") or "pixel_values" not in inputs:
        raise WorkbenchError(
            f"where the patches of a {type(wb.model).__name__} stand cannot be proved: it has no get_image_features, "
            "or was given no image"
        )
    prove(wb, inputs)
    _proved_here.add(wb.model)


@contextmanager
def unmixed(attentions: Iterable[nn.Module]) -> Iterator[None]:
    """Attention modules add nothing while this is open, so that what stands at a position stays there."""

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        return tuple(torch.zeros_like(one) if isinstance(one, Tensor) else one for one in output)

    with Changes() as changes:
        for module in attentions:
            changes.after(module, nothing)
        yield


def prove(wb: Workbench, inputs: Mapping[str, Any], probes: int = 3) -> None:
    """Change the pixels of single patches and see that the feature which the layout names changes most.

    The heads of the vision tower are switched off meanwhile, so that what a patch shows stays where it is.

    Args:
        probes: how many patches to change, spread over all; a run of the vision tower each.

    Raises:
        WorkbenchError: another feature changes more.
    """
    model: Any = wb.model
    pixels = inputs["pixel_values"].clone()
    given = {**inputs, "pixel_values": pixels}
    taken = inspect.signature(model.get_image_features).parameters
    extra = {name: value for name, value in inputs.items() if name in taken or name.startswith("image_")}
    config = read(model, "config")
    token = read(config, "image_token_id", read(config, "image_token_index"))
    laid = lay_out(model, given, "image", int((inputs["input_ids"] == token).sum()))
    inner = model.get_decoder() if hasattr(model, "get_decoder") else None
    text = next((name for name, one in model.named_modules() if one is inner), "")
    seeing = [site.name for site in wb.sites if not site.name.startswith(f"{text}.")]
    with torch.no_grad():

        def features() -> Tensor:
            found = model.get_image_features(**{**extra, "pixel_values": pixels})
            found = getattr(found, "pooler_output", found)
            several = [found] if isinstance(found, Tensor) else list(found)
            return torch.cat([one.reshape(-1, one.shape[-1]).float() for one in several])

        with unmixed(model.get_submodule(name) for name in seeing):
            before = features()
            places = [(g, r, c) for g, grid in enumerate(laid.grids) if grid.region is None
                      for r, c in (grid.features >= 0).nonzero().tolist()]  # fmt: skip
            step = max(1, (len(places) - 1) // max(1, probes - 1)) if len(places) > 1 else 1
            for g, r, c in places[::step]:
                grid = laid.grids[g]
                held = pixels.clone()
                _brighten(grid.pixels, grid.features.shape, r, c)
                change = (features() - before).norm(dim=-1)
                pixels.copy_(held)
                found, wanted = int(change.argmax()), int(grid.features[r, c])
                if found != wanted or not float(change[wanted]) > 0:
                    raise WorkbenchError(
                        f"{type(model).__name__} does not lay pictures out as was read: row {r}, column {c} of tile "
                        f"{g} changes feature {found}, and not {wanted}",
                        hint="a model of this type cannot be grounded yet",
                    )


def _brighten(pixels: Tensor, grid: torch.Size, row: int, column: int) -> None:
    """Change the pixels of one patch, in place."""
    rows, columns = grid
    if pixels.dim() == 2:  # patches in groups of one token each
        each = len(pixels) // (rows * columns)
        at = row * columns + column
        pixels[at * each : (at + 1) * each] += 1.0
        return
    high, wide = pixels.shape[1] // rows, pixels.shape[2] // columns
    pixels[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide] += 1.0
