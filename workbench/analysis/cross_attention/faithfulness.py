"""Deletion and insertion: what removing or keeping the cells that a map ranks highest does to the output; and size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.saliency.decoding import decode, special_ids
from workbench.analysis.saliency.explained_input import ExplainedInput, grid_of
from workbench.analysis.saliency.segments import patches
from workbench.errors import WorkbenchError

_WORD = re.compile(r"[^\w\s']")


def curves(
    subject: ExplainedInput,
    ranking: Tensor,
    fractions: Sequence[float],
    *,
    baseline: Any = "zero",
    decode_again: bool = True,
    decoding: dict[str, Any] | None = None,
    tokenizer: Any = None,
    batch_size: int = 4,
) -> Tensor:
    """[2, step, 3]: deletion and insertion; per step log-probability, probability (means over tokens) and WER.

    At fraction f the ⌊f · n⌋ highest of the n cells are put to the baseline (deletion), or all others (insertion).

    Args:
        ranking: [time, frequency], [token] or [patch]; equal cells keep their order.
        decode_again: decode each perturbed input and compare with the hypothesis; else NaN.
        tokenizer: to make words; without one each id is a word.

    Raises:
        WorkbenchError: a fraction that is none, or jiwer is not installed.
    """
    if not fractions or min(fractions) < 0 or max(fractions) > 1:
        raise WorkbenchError("fractions lie between 0 and 1")
    if not ranking.isfinite().all():
        raise WorkbenchError("the map to rank cells by is not finite", shape=ranking.shape)
    order = ranking.flatten().argsort(descending=True, stable=True)
    n = len(order)
    hidden = torch.zeros(2 * len(fractions), n, dtype=torch.bool)
    for i, fraction in enumerate(fractions):
        highest = order[: int(n * fraction + 1e-9)]
        hidden[i, highest] = True
        hidden[len(fractions) + i] = True
        hidden[len(fractions) + i, highest] = False
    cells = hidden.view(-1, *ranking.shape)
    picture = subject.picture()
    if subject.kind == "image" and ranking.dim() == 1 and picture is not None:
        rows, columns, _ = grid_of(subject)
        cells = hidden[:, patches(rows, columns, *picture.shape[1:])[0]]
    start = subject.baseline_of(baseline)
    said = words(subject, subject.targets, tokenizer)
    found = []
    with torch.inference_mode():
        for part in cells.split(batch_size):
            states = subject.encode(subject.masked(part, start))
            log_p = subject.log_probs_of_states(states)
            index = subject.targets[None, :, None].expand(len(part), -1, 1)
            own = log_p.gather(2, index)[..., 0].double()
            rates = [float("nan")] * len(part)
            if decode_again:
                limits = {"max_new_tokens": 2 * len(subject.targets) + 8} | dict(decoding or {})
                rates = [
                    word_error_rate(said, words(subject, row, tokenizer)) for row in decode(subject, states, **limits)
                ]
            found.append(
                torch.stack([own.mean(1), own.exp().mean(1), torch.tensor(rates, dtype=torch.float64)], 1).cpu()
            )
    return torch.cat(found).view(2, len(fractions), 3)


def words(subject: ExplainedInput, ids: Tensor, tokenizer: Any) -> str:
    """The text of a hypothesis without special tokens, in lower case and without punctuation."""
    odd = special_ids(subject.model, tokenizer)
    plain = [int(i) for i in ids.tolist() if int(i) not in odd]
    if not hasattr(tokenizer, "decode"):
        return " ".join(str(i) for i in plain)
    return " ".join(_WORD.sub(" ", tokenizer.decode(plain).lower()).split())


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Percent of words that are wrong, at most 100; of an empty reference 0 or 100.

    Raises:
        WorkbenchError: jiwer is not installed.
    """
    try:
        import jiwer
    except ModuleNotFoundError as error:
        raise WorkbenchError("word error rates need jiwer", hint="pip install jiwer, or decode_again=False") from error
    if not reference.strip():
        return 100.0 if hypothesis.strip() else 0.0
    return min(100.0, 100.0 * float(jiwer.wer(reference, hypothesis)))


def size(ranking: Tensor, thresholds: Tensor) -> Tensor:
    """[threshold] percent of cells whose value, scaled to 0 … 1, is at least the threshold.

    A constant map is 0 everywhere: 100 at threshold 0, 0 above.
    """
    low, high = ranking.min(), ranking.max()
    scaled = (ranking - low) / (high - low) if high > low else torch.zeros_like(ranking)
    return torch.stack([100 * (scaled >= t).double().mean() for t in thresholds.tolist()])
