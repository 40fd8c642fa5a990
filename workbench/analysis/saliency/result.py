"""`Saliency`: what each output token depends on, position by position, with a standard error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from workbench.analysis.saliency.estimate import noise
from workbench.analysis.saliency.normalising import paired_min_max, standardised
from workbench.analysis.saliency.sums import seen
from workbench.errors import WorkbenchError
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd


class PrecisionError(WorkbenchError):
    """The budget ended before the asked precision was reached.

    Attributes:
        result: the estimate that there is; pass it as `resume=` to go on.
    """

    result: Saliency


class _Details(TypedDict, total=False):
    completeness_gap: float


@dataclass(frozen=True, repr=False)
class Saliency(Result):
    """A map of one utterance (or text, or image): output tokens by input positions. Made by `workbench.saliency`.

    Output tokens are those of the hypothesis behind the prompt, the end token with them, or the class of a model that
    classifies. Those of a decoder without an encoder are positions themselves: the map is causal, see `visible`. What
    a position is, `kind` says: "spectrogram" [time, frequency], "frames" [encoder position], "tokens" [input token],
    "words" [word], "patches" [patch, in raster order], "image" [row, column].

    Attributes:
        scores: [output token, position...]; of "spes" in nats of KL divergence. Only the first `positions` of the
            model's input are explained, its padding is not.
        standard_error: of each score, same shape; zeros for methods that draw nothing at random.
        n_masks: how many masks (or, for other methods, model evaluations) the estimate rests on.
        method: such as "spes" or "integrated_gradients". at: "input" or "encoder" (the encoder's output).
        kind: see above.
        score: what a mask is scored with: "kl", "probability", or "log_probability".
        baseline: what masked positions become. p: share masked; None where nothing is masked at random.
        exact: every mask was enumerated. signed: scores may be negative by construction.
        partial: the run ended before its budget. stopped: "budget", "seconds", "precision", "interrupted",
            "enumerated", or "computed" for methods without a budget.
        target_ids, target_texts: [output token]. special: [output token], whether it is a special token (such as the
            end).
        contrast_ids, contrast_texts: [output token] what each was held against; empty for nothing.
        visible: [output token] how many positions each can depend on; its scores at others are 0. Empty where that is
            all.
        prompt_ids: tokens before the first explained one; of a decoder its prompt.
        picture: what was explained, to draw under the map: the spectrogram [time, frequency] or image [channel, row,
            column]; None for the rest.
        position_texts: texts of input tokens; empty for other kinds. position_words: the number of each one's word;
            empty where that is not known, as without a tokenizer.
        grid: rows and columns of patches; None for other kinds.
        length: positions of the model's whole input along time, its padding included.
        seconds_per_position: duration of one position along time, where the feature extractor tells; else None.
        segments: per granularity, [position...] the number of the segment each position belongs to.
        token_scores, token_error: [output token, output token], how much a token depends on those before it (strictly
            lower triangle); None unless `p_tokens` was given.
        seed: of the masks.
        details: numbers about the run: "segments", "seconds", "evaluations", "cached" (whether the decoder read cached
            keys and values), and those of single methods, such as "completeness_gap" of gradients: the sum over output
            tokens of how far their maps' sums are from the change in log-probability, as a share of these changes.
        state: running sums from which `resume=` goes on.
        provenance: of the model, and of the inputs.
    """

    form = "workbench.saliency"

    scores: Float[Tensor, "token position *rest"]
    standard_error: Float[Tensor, "token position *rest"]
    n_masks: int
    method: str
    at: str
    kind: str
    score: str
    baseline: str
    p: float | None
    exact: bool
    signed: bool
    partial: bool
    stopped: str
    target_ids: Annotated[tuple[int, ...], "token"]
    target_texts: Annotated[tuple[str, ...], "token"]
    special: Annotated[tuple[bool, ...], "token"]
    contrast_ids: Annotated[tuple[int, ...], "?token"]
    contrast_texts: Annotated[tuple[str, ...], "?token"]
    visible: Annotated[tuple[int, ...], "?token"]
    prompt_ids: tuple[int, ...]
    picture: Shaped[Tensor, "*picture"] | None
    position_texts: Annotated[tuple[str, ...], "?position"]
    position_words: Annotated[tuple[int, ...], "?position"]
    grid: tuple[int, int] | None
    length: int
    seconds_per_position: float | None
    segments: tuple[Int[Tensor, "*segmented"], ...]
    token_scores: Float[Tensor, "token token"] | None
    token_error: Float[Tensor, "token token"] | None
    seed: int
    details: Annotated[dict[str, Any], _Details]
    state: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def n_tokens(self) -> int:
        """How many output tokens are explained."""
        return self.scores.shape[0]

    @property
    def positions(self) -> int:
        """Explained positions along the first axis: frames, tokens, patches, or rows of an image."""
        return self.scores.shape[1]

    @property
    def noise(self) -> Tensor:
        """[output token] root mean square of the standard error over the spread of the scores; what `precision` bounds.

        0 for an exact map; inf for a constant one that is not exact.
        """
        return noise(self.scores.double(), self.standard_error.double(), self.visible)

    @property
    def seen(self) -> Tensor:
        """[output token, position...] whether the output can depend on the position."""
        return seen(self.visible, self.scores)

    def normalised(self) -> tuple[Tensor, Tensor | None]:
        """The maps as SPES evaluates them: standardised per token, then a joint min-max of input and token map, 0 to 1.

        Returns:
            [output token, position...], and the token map [output token, output token] or None.
        """
        kept = self.seen
        own = standardised(self.scores, kept)
        if self.token_scores is None:
            return paired_min_max(own, None)[0].masked_fill(~kept, 0.0), None
        causal = torch.ones_like(self.token_scores, dtype=torch.bool).tril(-1)
        return paired_min_max(own, standardised(self.token_scores, causal), causal)

    def sentence(self, *, special: bool = True) -> Tensor:
        """[position...] mean of the normalised maps over the tokens that see it; without special ones if asked for."""
        kept = [i for i, odd in enumerate(self.special) if special or not odd]
        if not kept:
            raise WorkbenchError("every output token is special", hint="keep them with special=True")
        return self.normalised()[0][kept].sum(0) / self.seen[kept].sum(0).clamp(min=1)

    @property
    def table(self) -> pd.DataFrame:
        """One row per output token and position along the first axis that it sees, with the mean of other axes."""
        import pandas as pd

        mean = self.scores.flatten(2).mean(2) if self.scores.dim() > 2 else self.scores
        error = self.standard_error
        # Cells of one segment share their masks: their errors do not average out.
        error = error.flatten(2).mean(2) if error.dim() > 2 else error
        n, m = mean.shape
        names = self.position_texts or tuple("" for _ in range(m))
        frame = pd.DataFrame(
            {
                "token": [i for i in range(n) for _ in range(m)],
                "token_text": [self.target_texts[i] for i in range(n) for _ in range(m)],
                "position": [j for _ in range(n) for j in range(m)],
                "position_text": [names[j] for _ in range(n) for j in range(m)],
                "score": mean.flatten().tolist(),
                "standard_error": error.flatten().tolist(),
            }
        )
        if self.visible:
            frame = frame[seen(self.visible, mean).flatten().numpy()].reset_index(drop=True)
        if self.contrast_texts:
            frame.insert(2, "contrast_text", [self.contrast_texts[i] for i in frame["token"]])
        return frame if self.position_texts else frame.drop(columns="position_text")

    def by_word(self, how: str = "sum", *, words: Sequence[int] | None = None) -> Saliency:
        """The map over words in place of tokens: sums of what their tokens have, or means.

        A token that is a part of a word sees the tokens before it alone, of its own word too. Standard errors are added
        up, or averaged, like scores: masks are shared, and these are upper bounds.

        Args:
            how: "sum", which keeps what integrated gradients sum to, or "mean". words: [position] the number of each
                token's word, from 0 without gaps; those of the tokenizer if None.

        Raises:
            WorkbenchError: no tokens, words that are not known, or numbers that do not fit.
        """
        if self.kind != "tokens" or self.at != "input":
            raise WorkbenchError(f"words are made of input tokens, and positions are {self.kind} at the {self.at}")
        if how not in ("sum", "mean"):
            raise WorkbenchError(f"words take the sum or the mean of their tokens, not the {how!r}")
        own = self.position_words if words is None else tuple(int(one) for one in words)
        if not own:
            raise WorkbenchError(
                "the words of these tokens are not known",
                hint="attach with a tokenizer whose tokens hold no parts of two words, or pass words=",
            )
        if len(own) != self.positions or own[0] or any(b - a not in (0, 1) for a, b in pairwise(own)):
            raise WorkbenchError(
                f"words number the {self.positions} positions from 0 without gaps, each as its neighbour or one higher"
            )
        n = own[-1] + 1
        member = torch.nn.functional.one_hot(torch.tensor(own), n).to(self.scores.dtype)
        counts = self.seen.to(self.scores.dtype) @ member
        shared = counts.clamp(min=1) if how == "mean" else torch.ones_like(counts)
        texts = ["".join(self.position_texts[i] for i, one in enumerate(own) if one == word) for word in range(n)]
        return replace(
            self,
            scores=self.scores @ member / shared,
            standard_error=self.standard_error @ member / shared,
            kind="words",
            position_texts=tuple(texts),
            position_words=(),
            visible=tuple(own[limit - 1] + 1 for limit in self.visible),
            length=n,
            segments=(torch.arange(n),),
            details=self.details | {"aggregated": how},
            state={},
        )

    def __repr__(self) -> str:
        why = " rather than others" if self.contrast_ids else ""
        shape = " x ".join(str(n) for n in self.scores.shape[1:])
        how = "exact" if self.exact else f"{self.n_masks:,} masks" if self.p is not None else f"{self.n_masks:,} runs"
        marks = f", {self.stopped}" if self.partial else ""
        if "completeness_gap" in self.details:
            marks += f", sums miss {self.details['completeness_gap']:.1%} of the change from the baseline"
        return f"Saliency({self.method} at {self.at}: {self.n_tokens} tokens{why}, {self.kind} {shape}, {how}{marks})"
