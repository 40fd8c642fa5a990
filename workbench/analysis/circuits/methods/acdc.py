"""Greedy pruning of edges from the logits back (ACDC, Conmy et al. 2304.14997)."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.engine.edges import patch_edges
from workbench.analysis.circuits.engine.recordings import Recordings
from workbench.analysis.circuits.engine.replacements import Replacements
from workbench.analysis.circuits.engine.setup import Setup
from workbench.analysis.circuits.methods.pruning import Pruning, PruningInterrupted, start
from workbench.errors import InterventionError
from workbench.storage.resumable import kept_when_stopped

_SAVE_EVERY = 30.0  # seconds


def prune_edges(
    setup: Setup,
    threshold: float,
    how: str = "counterfactual",
    ahead: int = 4,
    progress: bool = True,
    resume: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """Try each edge in turn, from the logits back, and leave it out for good where the metric changes by less.

    Several edges are tried ahead in one forward, each on top of those before it, as if all were left out; what comes
    after the first that has to stay is tried again. The result is that of trying them one by one.

    Args:
        threshold: largest change of the metric's mean for which an edge is left out, on the scale where 1 is the
            difference between prompts and twins.
        how: what edges that are left out carry; see `Replacements`.
        ahead: edges in one forward.
        resume: a file to go on from, if it is there, and to write to.

    Returns:
        [sender, receiver] bool: the edges that stay; and float64: by how much leaving each out harmed the task when it
        was tried (positive: it helps), NaN where it could not matter because its receiver led nowhere.

    Raises:
        InterventionError: a threshold that is no positive number. FormatError: the file is of another pruning.
        PruningInterrupted: on Ctrl-C, with what is done.
    """
    if not threshold > 0:
        raise InterventionError(f"the threshold is {threshold}, a positive number is needed")
    graph = setup.graph
    now = start(setup, resume, threshold=threshold, ablation=how, ahead=ahead)
    recordings = Recordings(setup, Replacements(setup, how))
    order = [(s, r) for r in reversed(range(len(graph.receivers))) for s in reversed(graph.reads[r])]
    saved = time.monotonic()

    def save() -> Pruning:
        if resume is not None:
            now.save(resume)
        return now

    with (
        tqdm(total=len(order), initial=now.place, disable=not progress, desc="pruning edges") as bar,
        kept_when_stopped(resume, save, PruningInterrupted),
        torch.no_grad(),
    ):
        while now.place < len(order):
            # Whole steps only: an interrupt leaves what the last one made.
            now = _step(setup, now, order, threshold, ahead, recordings)
            bar.update(now.place - bar.n)
            if resume is not None and time.monotonic() - saved > _SAVE_EVERY:
                now.save(resume)
                saved = time.monotonic()
    save()
    return now.kept, now.scores


def _step(
    setup: Setup, now: Pruning, order: list[tuple[int, int]], threshold: float, ahead: int, recordings: Recordings
) -> Pruning:
    """Decide the next edges."""
    kept, scores, place, present = now.kept.clone(), now.scores.clone(), now.place, now.present
    waiting = _waiting(setup, kept, order[place:], ahead)
    if not waiting:
        for edge in order[place:]:
            kept[edge] = False
        return replace(now, kept=kept, place=len(order))
    trial = kept.clone()
    stack = []
    for offset in range(waiting[-1] + 1):
        trial[order[place + offset]] = False  # those between lead nowhere
        if offset in waiting:
            stack.append(trial.clone())
    values = _means(setup, torch.stack(stack), recordings)
    for number, offset in enumerate(waiting):
        harm = (present - values[number]) / now.scale
        scores[order[place + offset]] = harm
        if abs(harm) >= threshold:
            break
        present = values[number]
    stays = abs(harm) >= threshold
    for j in range(offset + 1):
        kept[order[place + j]] = stays and j == offset
    return replace(now, kept=kept, scores=scores, place=place + offset + 1, present=present)


def _waiting(setup: Setup, kept: Tensor, order: list[tuple[int, int]], ahead: int) -> list[int]:
    """Places in the order of the next edges whose receiver still leads to the logits."""
    graph = setup.graph
    logits = len(graph.receivers) - 1
    used: dict[int, bool] = {}
    found: list[int] = []
    for offset, (_, r) in enumerate(order):
        if r not in used:
            users = graph.feeds[:, r]
            used[r] = r == logits or bool(kept[users].any())
        if used[r]:
            found.append(offset)
            # The edges of a later receiver are of use only if this one's, still to be tried, stay.
            if len(found) == ahead or (offset + 1 < len(order) and order[offset + 1][1] != r):
                break
    return found


def _means(setup: Setup, kept: Tensor, recordings: Recordings) -> list[float]:
    """Mean of the metric for each of several choices of edges."""
    totals = torch.zeros(len(kept), dtype=torch.float64)
    for pair in setup.pairs:
        seen = recordings.of(pair)
        most = setup.most(pair, tensors=3 * len(setup.graph.senders))
        for values in seen.values:
            for first in range(0, len(kept), most):
                patched = (~kept[first : first + most] & setup.graph.exists).to(seen.logits.dtype)
                out = patch_edges(setup, pair, seen.clean, values, patched)
                measured = setup.measure(out, pair, seen.logits, len(patched)).sum(1)
                totals[first : first + most] += measured / len(seen.values)
    return (totals / len(setup.task)).tolist()
