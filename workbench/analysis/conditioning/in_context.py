"""The same experiments in the context of a language model: cues and outcomes are tokens, a trial is a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.analysis.conditioning.schedules import CUES, NOTHING, OUTCOME, Trial
from workbench.errors import CaptureError
from workbench.hooks.split_models import check_unsplit
from workbench.inputs import context_length

if TYPE_CHECKING:
    from workbench.session.workbench import Workbench


def vocabulary(wb: Workbench) -> list[int]:
    """Token ids to draw cues from where none are given: all but special ones.

    Raises:
        CaptureError: the model has no table of tokens.
    """
    embedding = getattr(wb.model, "get_input_embeddings", lambda: None)()
    count = getattr(embedding, "num_embeddings", None)
    if count is None:
        raise CaptureError("the model has no table of tokens to draw cues from", hint="pass cues= and outcomes= ids")
    special = set(getattr(wb.tokenizer, "all_special_ids", None) or [])
    return [i for i in range(count) if i not in special]


def run_model(
    wb: Workbench, trials: tuple[Trial, ...], test: str, cues: Sequence[int], outcomes: Sequence[int], *,
    repeats: int, seed: int, batch: int,
) -> Tensor:  # fmt: skip
    """[repeat, trial + 1] probability of the outcome's token after the test cue, before the first trial and after each.

    Each repeat draws tokens of its own for the cues, the outcome, and the outcome "nothing". A compound's cues stand
    one after the other, in random order.

    Raises:
        CaptureError: too few tokens to draw from, a context that is too short, or an output without logits.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    wanted: list[int] = []
    for _ in range(repeats):
        names = dict(zip(CUES, _pick(cues, len(CUES), generator), strict=True))
        free = [i for i in outcomes if i not in set(names.values())]
        names |= dict(zip((OUTCOME, NOTHING), _pick(free, 2, generator), strict=True))
        said: list[int] = []
        for trial in (None, *trials):
            if trial is not None:
                order = torch.randperm(len(trial.cues), generator=generator).tolist()
                said += [names[trial.cues[i]] for i in order] + [names[trial.outcome]]
            rows.append([*said, names[test]])
            wanted.append(names[OUTCOME])
    limit, longest = context_length(wb.model), max(map(len, rows))
    if limit is not None and longest > limit:
        raise CaptureError(
            f"the experiment needs {longest} tokens, the model's context has {limit}", hint="use fewer trials="
        )
    found = []
    for start in range(0, len(rows), batch):
        found.append(_probabilities(wb, rows[start : start + batch], wanted[start : start + batch]))
    return torch.cat(found).view(repeats, len(trials) + 1)


def _pick(ids: Sequence[int], n: int, generator: torch.Generator) -> list[int]:
    if len(set(ids)) < n:
        raise CaptureError(f"{n} different tokens cannot be drawn from {len(set(ids))}", hint="pass more ids")
    known = list(dict.fromkeys(ids))
    return [known[i] for i in torch.randperm(len(known), generator=generator)[:n].tolist()]


def check_model(wb: Workbench, cues: Sequence[int]) -> None:
    """Refuse a model that is no causal language model.

    Raises:
        CaptureError: an encoder-decoder, an output without logits, or predictions that change with later tokens.
    """
    if getattr(getattr(wb.model, "config", None), "is_encoder_decoder", False):
        raise CaptureError(
            "experiments in context need a model that is a decoder alone: this one's encoder would be given nothing"
        )
    check_unsplit()
    first, second, third, _ = _pick(cues, len(CUES), torch.Generator().manual_seed(0))
    logits = _logits(wb, torch.tensor([[first, first, second], [first, first, third]]))
    rounding = 32 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if (logits[0, :2] - logits[1, :2]).abs().max() > rounding:
        raise CaptureError(
            "experiments in context need a causal language model: this one's predictions change with later tokens"
        )


def _probabilities(wb: Workbench, rows: list[list[int]], wanted: list[int]) -> Tensor:
    """[row] probability of a token after each row; rows are filled up on the right, which a causal model ignores."""
    longest = max(map(len, rows))
    logits = _logits(wb, torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows]))
    index = torch.arange(len(rows), device=logits.device)
    last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
    chance = logits[index, last].double().softmax(-1)
    return chance[index, torch.tensor(wanted, device=logits.device)].cpu()


def _logits(wb: Workbench, ids: Tensor) -> Tensor:
    """[row, position, token] for ids [row, position]."""
    first = next(wb.model.parameters(), None)
    with torch.no_grad():
        output: Any = wb.model(input_ids=ids if first is None else ids.to(first.device))
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise CaptureError("experiments in context need a language model, with logits [batch, position, token]")
    return logits
