"""`retrieval_scores`: which heads look at what they make the model copy from far away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.head_scores.prompts import HeadNames, Ids, ids_of, is_one, one_row, self_attention
from workbench.analysis.logits.asked import check_model
from workbench.analysis.statistics.intervals import means_t, without_interval
from workbench.errors import CaptureError, expect
from workbench.metrics.logits import logits_of
from workbench.session.workbench import Workbench
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class RetrievalScores(Result):
    """Retrieval scores of heads.

    Attributes:
        layers, numbers, sites: of each head.
        scores: [head, prompt] share of the needle's tokens that the head copied, from 0 to 1.
        needles: [prompt] tokens of the needle. lengths: [prompt] tokens of the prompt. answers: [prompt] tokens of what
            is written behind it. right: [prompt] share of these that the model itself puts first.
    """

    form = "workbench.retrieval_scores"
    filled = ("head", "prompt")

    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    scores: Float[Tensor, "head prompt"]
    needles: Annotated[tuple[int, ...], "prompt"]
    lengths: Annotated[tuple[int, ...], "prompt"]
    answers: Annotated[tuple[int, ...], "prompt"]
    right: Annotated[tuple[float, ...], "prompt"]
    provenance: dict[str, Any]

    @property
    def interval(self) -> Tensor:
        """[head, 2] 95 % t intervals of the means over prompts; NaN of one prompt, and where few carry a mean."""
        return means_t(self.scores)

    @property
    def table(self) -> pd.DataFrame:
        """One row per head, the largest mean score first, with its interval over prompts."""
        import pandas as pd

        ends = self.interval
        frame = pd.DataFrame(
            {
                "layer": self.layers, "head": self.numbers, "site": self.sites,
                "score": self.scores.double().mean(1).numpy(), "low": ends[:, 0].numpy(), "high": ends[:, 1].numpy(),
            }
        )  # fmt: skip
        return frame.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        best = ", ".join(f"L{row.layer}H{row.head} {row.score:.2f}" for row in self.table.head(4).itertuples())
        without = without_interval(self.interval, len(self.needles))
        return f"RetrievalScores({len(self.layers)} heads, {len(self.needles)} prompts; {best}{without})"


def retrieval_scores(
    wb: Workbench,
    prompt: Ids | Sequence[Ids],
    answer: Ids | Sequence[Ids],
    *,
    needle: Ids | Sequence[Ids] | None = None,
) -> RetrievalScores:
    """How much of a needle each head copies: |tokens of the needle that it copied| / |tokens of the needle|.

    A head copies the needle's token at j when the token x is written, if j is the key of its largest weight at the
    position that x is written from, and the token at j is x. Wu et al. 2024, "Retrieval Head Mechanistically Explains
    Long-Context Factuality" (arXiv 2404.15574), section 2; heads above 0.1 are their retrieval heads. They let the
    model write; here the answer is given and the model run once over both, which is the same where the model writes it
    (`right` says so). A random sequence and its repetition are a prompt and an answer too: then these are induction
    heads. Largest weights are streamed, in memory that grows with the length alone.

    Args:
        prompt: the context with the needle in it and the question, as text or ids; or a list of several.
        answer: what is written behind it, with the needle's words; one for each prompt.
        needle: a part of the prompt; None: the answer, if that stands in the prompt. Of several places, the last.

    Raises:
        CaptureError: a needle that is not in the prompt, an answer that joins the prompt's last token, or prompts and
            answers that are not as many.
    """
    expect(Workbench, wb=wb)
    check_model(wb)
    several = _several(prompt)
    answers, needles = _as_many(answer, several, "answer"), _as_many(needle, several, "needle")
    scores, sizes, right, names, heads = [], [], [], None, None
    with torch.inference_mode(mode=False), torch.no_grad():
        for i, one in enumerate(several):
            before, ids = _joined(wb, one, answers[i], i)
            start, stop = _place(wb, one, before, ids, answers[i] if needles[i] is None else needles[i], i)
            names = names or self_attention(wb, ids)
            with wb.capture(("peak_key",), names, queries_keys=False, limit=None) as cap:
                output = wb.model(**one_row(wb, ids))
            steps = torch.arange(before, len(ids), device=ids.device)  # places of what is written
            keys = torch.cat([site.peak_key[0][:, steps - 1] for site in cap])  # [head, step]
            inside = (keys >= start) & (keys < stop) & (ids[keys.clamp_min(0)] == ids[steps])
            found = torch.zeros(len(keys), len(ids), dtype=torch.bool, device=ids.device)
            head, step = inside.nonzero(as_tuple=True)
            found[head, keys[head, step]] = True  # a token that is copied twice counts once
            scores.append(found.sum(1).double() / (stop - start))
            said = logits_of(output)[0, steps - 1].argmax(-1).to(ids.device) == ids[steps]
            sizes.append((stop - start, before, len(steps)))
            right.append(float(said.double().mean()))
            heads = heads or HeadNames.of(list(cap))
    assert heads is not None
    return RetrievalScores(
        layers=heads.layers, numbers=heads.numbers, sites=heads.sites, scores=torch.stack(scores, 1).cpu(),
        needles=tuple(size[0] for size in sizes), lengths=tuple(size[1] for size in sizes),
        answers=tuple(size[2] for size in sizes), right=tuple(right), provenance=wb.provenance(),
    )  # fmt: skip


def _several(prompt: Any) -> list[Any]:
    expect(Iterable, prompt=prompt)
    found = [prompt] if is_one(prompt) else list(prompt)
    if not found:
        raise CaptureError("there are no prompts")
    return found


def _as_many(given: Any, several: Sequence[Any], what: str) -> list[Any]:
    found = [None] * len(several) if given is None else _several(given)
    if len(found) != len(several):
        raise CaptureError(f"{len(found)} {what}s for {len(several)} prompts", hint="give one for each")
    return found


def _joined(wb: Workbench, prompt: Any, answer: Any, i: int) -> tuple[int, Tensor]:
    """How many tokens the prompt has, and the ids of prompt and answer."""
    if isinstance(prompt, str) != isinstance(answer, str):
        raise CaptureError("prompt and answer are both texts, or both ids")
    first = ids_of(wb, prompt)
    if not isinstance(prompt, str):
        return len(first), torch.cat([first, ids_of(wb, answer)])
    both = ids_of(wb, prompt + answer)
    if len(both) <= len(first) or not torch.equal(both[: len(first)], first):
        raise CaptureError(
            f"the answer of prompt {i} changes the tokens of the prompt, or adds none: {answer!r}",
            hint="begin it with a space, or give ids (is there an end-of-text token behind the prompt?)",
        )
    return len(first), both


def _place(wb: Workbench, prompt: Any, n: int, ids: Tensor, needle: Any, i: int) -> tuple[int, int]:
    """First token of the needle, and one past its last.

    Raises:
        CaptureError: it is not in the prompt.
    """
    if isinstance(needle, str):
        if not isinstance(prompt, str):
            raise CaptureError("a needle for ids is ids, too")
        at = prompt.rfind(needle) if needle else -1
        if at >= 0:
            return _tokens_at(wb, prompt, at, at + len(needle))
    else:
        part = ids_of(wb, needle)
        for start in range(n - len(part), -1, -1):
            if torch.equal(ids[start : start + len(part)], part):
                return start, start + len(part)
    raise CaptureError(f"the needle of prompt {i} is not in it: {needle!r}", hint="give needle=, as it stands there")


def _tokens_at(wb: Workbench, prompt: str, start: int, stop: int) -> tuple[int, int]:
    """The tokens that have characters of a part of a text; white space before it does not count."""
    while start < stop and prompt[start].isspace():
        start += 1
    try:
        spans = wb.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    except (NotImplementedError, TypeError, KeyError):
        raise CaptureError("this tokenizer does not say where its tokens stand", hint="give ids") from None
    inside = [at for at, (low, high) in enumerate(spans) if low < stop and high > start and high > low]
    if not inside:
        raise CaptureError("no token has characters of the needle")
    return inside[0], inside[-1] + 1
