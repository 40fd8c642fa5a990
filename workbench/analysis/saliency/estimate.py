"""The loop over masks: any-time estimates, budgets, a stop at a precision, interruption, and going on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from workbench.analysis.saliency.masks import Draw, Masks
from workbench.analysis.saliency.sums import Sums, seen
from workbench.session.workbench import Workbench
from workbench.workers.engine import LOCAL, Engine
from workbench.workers.protocol import Job

_SAVE_EVERY = 30.0  # seconds
_CHECK_EVERY = 64  # masks between two looks at the precision
_FEWEST = 128  # masks before a standard error is believed


@dataclass(frozen=True)
class Budget:
    """When to stop.

    Attributes:
        n_masks: masks in all, those of a resumed run with them. seconds: of this run; None for no limit.
        precision: bound on `noise`; None for none.
    """

    n_masks: int
    seconds: float | None = None
    precision: float | None = None


def run(
    sums: Sums,
    masks: Masks,
    score: Callable[[Draw], Tensor],
    segments: Sequence[Tensor],
    budget: Budget,
    *,
    batch_size: int,
    progress: bool,
    visible: Sequence[int] = (),
    save: Callable[[], object] | None = None,
    wb: Workbench | None = None,
    workers: Engine = LOCAL,
) -> str:
    """Add masks to the sums until the budget ends; says why it stopped.

    Args:
        visible: see `Sums.maps`.
        save: called now and then, and before an error goes on.
        wb, workers: whose model is scored, and by whom.

    Returns:
        "enumerated", "budget", "seconds", "precision" or "interrupted" (by Ctrl-C, after at least one batch).
    """
    from tqdm.auto import tqdm

    total = masks.enumerated if masks.exact else budget.n_masks
    began, start, looked = time.monotonic(), sums.done, sums.done
    saved = began
    if budget.precision is not None and not masks.exact and precise(sums, segments, budget.precision, visible):
        return "precision"
    with tqdm(total=total, initial=start, desc="masks", disable=not progress) as bar, torch.inference_mode():
        try:
            each = partial(_scored, score)  # all of a batch or nothing, should it be interrupted
            batches = masks.chunks(start, total, batch_size)
            for draws, scores in workers.over(Job(wb, each, batches)):
                for draw, found in zip(draws, scores, strict=True):
                    sums.add(draw, found)
                    bar.update(len(found))
                if save is not None and time.monotonic() - saved > _SAVE_EVERY:
                    save()
                    saved = time.monotonic()
                if masks.exact or sums.done >= total:
                    continue
                if budget.seconds is not None and time.monotonic() - began >= budget.seconds:
                    return "seconds"
                if budget.precision is not None and sums.done - looked >= _CHECK_EVERY:
                    looked = sums.done
                    if precise(sums, segments, budget.precision, visible):
                        return "precision"
        except KeyboardInterrupt:
            if sums.done == start and not start:
                raise
            return "interrupted"
        except Exception:
            if save is not None and sums.done:
                save()
            raise
    if budget.precision is not None and not masks.exact and precise(sums, segments, budget.precision, visible):
        return "precision"
    return "enumerated" if masks.exact else "budget"


def _scored(score: Callable[[Draw], Tensor], draws: Sequence[Draw]) -> list[Tensor]:
    return [score(draw) for draw in draws]


def noise(mean: Tensor, error: Tensor, visible: Sequence[int] = ()) -> Tensor:
    """[output token] root mean square of the standard error over the standard deviation of the map.

    Only cells count that the output can depend on.
    """
    kept = seen(visible, mean).flatten(1).double()
    n = kept.sum(1).clamp(min=1)
    cells = mean.flatten(1)
    middle = (cells * kept).sum(1) / n
    spread = (((cells - middle[:, None]) * kept).square().sum(1) / n).sqrt()
    size = ((error.flatten(1) * kept).square().sum(1) / n).sqrt()
    return torch.where(size == 0, 0.0, size / spread)


def precise(sums: Sums, segments: Sequence[Tensor], precision: float, visible: Sequence[int] = ()) -> bool:
    """Whether every output token's map is known to this precision; never before `_FEWEST` masks."""
    if sums.done < _FEWEST:
        return False
    return bool((noise(*sums.maps(segments, exact=False, visible=visible), visible) <= precision).all())
