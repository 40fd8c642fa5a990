"""Deletion and insertion: what removing or keeping the cells that a map ranks highest does to the output; and size."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.saliency.decoding import decode
from workbench.analysis.saliency.encoder_decoder import EncoderDecoderInput
from workbench.analysis.saliency.explained_input import grid_of
from workbench.analysis.saliency.segments import patches
from workbench.analysis.saliency.token_names import special_ids
from workbench.errors import WorkbenchError

_WORD = re.compile(r"[^\w\s']")


def curves(
    subject: EncoderDecoderInput,
    ranking: Tensor,
    fractions: Sequence[float],
    *,
    baseline: Any = "zero",
    decode_again: bool = True,
    decoding: dict[str, Any] | None = None,
    tokenizer: Any = None,
    batch_size: int = 4,
    reference: str | None = None,
    progress: bool = False,
    label: str = "curves",
) -> Tensor:
    """[2, step, 4]: deletion and insertion; per step log-probability and probability (means over tokens), the word
    error rate against the hypothesis, and the number of word errors against a reference.

    At fraction f the ⌊f · n⌋ highest of the n cells are put to the baseline (deletion), or all others (insertion).

    Args:
        ranking: [time, frequency], [token] or [patch]; equal cells keep their order.
        decode_again: decode each perturbed input and compare with the hypothesis; else NaN.
        tokenizer: to make words; without one each id is a word, and a reference has nothing to be compared with.
        reference: what was said; its errors are NaN without it. progress, label: of a progress bar.

    Raises:
        WorkbenchError: a fraction that is none, or jiwer is not installed.
    """
    check_curves(fractions, decode_again)
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
    truth = None if reference is None or _decoder(tokenizer) is None else plain_text(reference)
    found = []
    with torch.inference_mode(), tqdm(total=len(cells), desc=label, disable=not progress) as bar:
        for part in cells.split(batch_size):
            states = subject.encode(subject.masked(part, start))
            log_p = subject.log_probs_of_states(states)
            index = subject.targets[None, :, None].expand(len(part), -1, 1)
            own = log_p.gather(2, index)[..., 0].double()
            rates = torch.full((len(part), 2), torch.nan, dtype=torch.float64)
            if decode_again:
                limits = {"max_new_tokens": 2 * len(subject.targets) + 8} | dict(decoding or {})
                texts = [words(subject, row, tokenizer) for row in decode(subject, states, **limits)]
                rates[:, 0] = torch.tensor([word_error_rate(said, text) for text in texts])
                if truth is not None:
                    rates[:, 1] = torch.tensor([word_errors(truth, text) for text in texts])
            found.append(torch.cat([own.mean(1)[:, None], own.exp().mean(1)[:, None], rates.to(own.device)], 1).cpu())
            bar.update(len(part))
    return torch.cat(found).view(2, len(fractions), 4)


def check_curves(fractions: Sequence[float], decode_again: bool) -> None:
    """Refuse fractions that are none, and word error rates without jiwer."""
    if not fractions or min(fractions) < 0 or max(fractions) > 1:
        raise WorkbenchError("fractions lie between 0 and 1")
    if decode_again and importlib.util.find_spec("jiwer") is None:
        raise WorkbenchError("word error rates need jiwer", hint="pip install jiwer, or decode_again=False")


def words(subject: EncoderDecoderInput, ids: Tensor, tokenizer: Any) -> str:
    """The text of a hypothesis without special tokens, in lower case and without punctuation."""
    odd = special_ids(subject.model, tokenizer)
    plain = [int(i) for i in ids.tolist() if int(i) not in odd]
    decoder = _decoder(tokenizer)
    return " ".join(str(i) for i in plain) if decoder is None else plain_text(decoder.decode(plain))


def plain_text(text: str) -> str:
    """A text in lower case and without punctuation, its words between single spaces.

    >>> plain_text("It's 5 o'clock, Ann!")
    "it's 5 o'clock ann"
    """
    return " ".join(_WORD.sub(" ", text.lower()).split())


def _decoder(tokenizer: Any) -> Any:
    own = getattr(tokenizer, "tokenizer", None) or tokenizer
    return own if hasattr(own, "decode") else None


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Percent of words that are wrong, at most 100; of an empty reference 0 or 100."""
    if not reference.strip():
        return 100.0 if hypothesis.strip() else 0.0
    return min(100.0, 100.0 * word_errors(reference, hypothesis) / len(reference.split()))


def word_errors(reference: str, hypothesis: str) -> int:
    """Words that are put in, left out or replaced between two texts.

    >>> word_errors("one two three", "one too three four")
    2
    """
    if not reference.strip():
        return len(hypothesis.split())
    import jiwer

    found = jiwer.process_words(reference, hypothesis)
    return int(found.substitutions + found.deletions + found.insertions)


def size(maps: Tensor, thresholds: Tensor, token_maps: Tensor | None = None) -> Tensor:
    """[threshold] percent of cells, of the maps of all output tokens together, whose value is at least the threshold.

    As SPES (Fucci et al. 2024, arXiv 2411.01710) measures how compact maps are.

    Args:
        maps: [token, position...] normalised to 0 … 1, as `Saliency.normalised` gives them.
        token_maps: [token, token] those of previous output tokens, of which the strictly lower triangle counts.

    >>> size(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([0.0, 0.5])).tolist()
    [100.0, 25.0]
    """
    cells = maps.flatten()
    if token_maps is not None:
        below = torch.ones_like(token_maps, dtype=torch.bool).tril(-1)
        cells = torch.cat([cells, token_maps[below]])
    return torch.stack([100 * (cells >= t).double().mean() for t in thresholds.to(cells).tolist()])
