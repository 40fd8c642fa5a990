"""A prompt run through the model, as it is and with edits: heads, and the distribution over what comes next."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.logits.asked import check_model
from workbench.capture.capture import Capture
from workbench.errors import ReportError
from workbench.hooks.configs import read
from workbench.inputs import check_inputs, decoder_start, without_cache
from workbench.metrics.logits import logits_of, reads_in_place
from workbench.session.workbench import Workbench
from workbench.views.playground.edits import Ablated, ablated

MOST_TOKENS = 2048
"""Of a prompt: the map of a head is a byte for each query and key."""
MOST_PLACES = 32
"""Masked places whose tokens are predicted."""


@dataclass(frozen=True, eq=False)
class Said:
    """What the model says at one place.

    Attributes:
        log_probabilities: [vocab], float64; NaN where `wrong` says that there is no distribution.
    """

    log_probabilities: Tensor
    wrong: str | None


@dataclass(frozen=True, eq=False)
class Ran:
    """A prompt, run as the model is and with edits.

    Attributes:
        places: positions at which tokens are predicted: the last one, or those of the masks.
        before, after: captures of one forward each, the same one where nothing is edited. said: for each place before
            and after.
    """

    prompt: str
    written: str
    edits: tuple[Ablated, ...]
    renormalise: bool
    decodes: bool
    places: tuple[int, ...]
    masked: bool
    before: Capture
    after: Capture
    tokenizer: Any
    said: tuple[tuple[Said, Said], ...]


def run(
    wb: Workbench,
    prompt: str,
    written: str = "",
    edits: Sequence[Ablated] = (),
    *,
    renormalise: bool = False,
    statistics: Sequence[str],
    fits: Callable[[Capture, Ablated], bool] = lambda capture, edit: True,
) -> Ran:
    """Run the model on the prompt, and if there are edits once more with them.

    Args:
        fits: of an edit and the forward without edits: whether it is made; others are left out.

    Raises:
        WorkbenchError: an empty or too long prompt, a model that is detached, compiled, in use or in training, one that
            predicts no tokens from text, or edits that do not fit.
    """
    check_model(wb)
    inputs, decodes = _inputs_of(wb, prompt, written)
    with torch.inference_mode(mode=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of sites that are silent or left out: the view's notes have them
        with wb.capture(statistics) as capture:
            outputs = [_called(wb, inputs)]
            edits = tuple(edit for edit in edits if fits(capture.calls[0], edit))
            if edits:
                with ablated(wb, edits, renormalise=renormalise):
                    outputs.append(_called(wb, inputs))
    forwards = capture.calls
    if len(forwards) != len(outputs):
        raise ReportError(f"the prompt made {len(forwards)} forwards of {len(outputs)} calls of the model")
    masked = reads_in_place(outputs[0])
    logits = [_logits(output) for output in outputs]
    places = _masks(wb, inputs) if masked else [logits[0].shape[0] - 1]
    said = tuple((_said(logits[0][at]), _said(logits[-1][at])) for at in places)
    return Ran(
        prompt=prompt, written=written, edits=tuple(edits), renormalise=renormalise, decodes=decodes,
        places=tuple(places), masked=masked, before=forwards[0], after=forwards[-1], tokenizer=wb.tokenizer, said=said,
    )  # fmt: skip


def _inputs_of(wb: Workbench, prompt: Any, written: Any) -> tuple[dict[str, Tensor], bool]:
    """Model inputs of a text, and whether a decoder goes on with what is written so far."""
    if not isinstance(prompt, str) or not isinstance(written, str):
        raise ReportError("a playground takes a text")
    if not prompt:
        raise ReportError("the prompt is empty", hint="write at least one word")
    if (main := read(wb.model, "main_input_name")) not in (None, "input_ids"):
        raise ReportError(f"the model reads {main}, not text", hint="a playground is of language models")
    inputs = wb.tokenize(prompt)
    start = decoder_start(wb.model)
    if start is not None:
        ids = wb.tokenizer(written, add_special_tokens=False).input_ids if written else []
        inputs["decoder_input_ids"] = torch.tensor([[start, *ids]]).to(inputs["input_ids"])
        check_inputs(wb.model, (), inputs)
    elif written:
        raise ReportError("only an encoder-decoder has written something so far", hint="put it into the prompt")
    longest = max(int(ids.shape[1]) for ids in inputs.values() if ids.dim() == 2)
    if longest > MOST_TOKENS:
        raise ReportError(
            f"the prompt has {longest:,} tokens, a playground shows {MOST_TOKENS:,}",
            hint="shorten it, or capture it and look at views.attention_pattern(cap)",
        )
    return inputs, start is not None


def _called(wb: Workbench, inputs: dict[str, Tensor]) -> Any:
    """The model's output on these inputs, by the names that its forward has."""
    names = inspect.signature(wb.model.forward).parameters
    kinds = {one.kind for one in names.values()}
    if "input_ids" not in names and inspect.Parameter.VAR_POSITIONAL not in kinds:
        return wb.model(inputs["input_ids"])
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    return wb.model(**{n: v for n, v in inputs.items() if takes_all or n in names}, **without_cache(wb.model))


def _logits(output: Any) -> Tensor:
    """[position, vocab] of the only example."""
    if "TokenClassifier" in type(output).__name__:
        raise ReportError("the model gives classes of tokens, and says no next one")
    logits = logits_of(output)
    if logits.dim() != 3:
        raise ReportError("the model gives classes, and says no next token", shape=logits.shape)
    return logits[0].detach().double().cpu()


def _masks(wb: Workbench, inputs: dict[str, Tensor]) -> list[int]:
    """Positions of the mask token, which alone a masked language model predicts."""
    mask = read(wb.tokenizer, "mask_token_id")
    if mask is None:
        raise ReportError("this model predicts tokens in their place, and its tokenizer has no mask")
    found: list[int] = (inputs["input_ids"][0] == mask).nonzero()[:, 0].tolist()
    name = read(wb.tokenizer, "mask_token")
    if not found:
        raise ReportError(
            "this model predicts tokens in their place, and the prompt has no mask",
            hint=f"write {name} where a token is to be predicted",
        )
    if len(found) > MOST_PLACES:
        raise ReportError(f"the prompt has {len(found)} masks, a playground shows {MOST_PLACES}")
    return found


def _said(logits: Tensor) -> Said:
    """The distribution that logits [vocab] give."""
    nan, infinite = int(logits.isnan().sum()), int(logits.isposinf().sum())
    if nan or infinite or bool(logits.isneginf().all()):
        kinds = [f"{count:,} are {name}" for count, name in ((nan, "NaN"), (infinite, "+∞")) if count]
        wrong = " and ".join(kinds) or "all are −∞"
        wrong = f"There is no distribution: of {len(logits):,} logits {wrong}."
        return Said(torch.full_like(logits, torch.nan), wrong)
    return Said(logits.log_softmax(-1), None)


def leading(pair: tuple[Said, Said], n: int) -> list[int]:
    """The `n` likeliest tokens before and the `n` likeliest after, by what they were before (or are after)."""
    known = [one.log_probabilities for one in pair if one.wrong is None]
    if not known:
        return []
    likely = {int(token) for one in known for token in one.topk(min(n, len(one))).indices}
    return sorted(likely, key=lambda token: (-float(known[0][token]), token))


def log_odds(said: Said, tokens: Sequence[int]) -> Tensor:
    """[token] ln p / (1 − p), exact also where p is close to 1."""
    logs = said.log_probabilities
    others = logs.expand(len(tokens), -1).clone()
    others[torch.arange(len(tokens)), list(tokens)] = -torch.inf
    return logs[list(tokens)] - others.logsumexp(-1)


def divergence(pair: tuple[Said, Said]) -> float:
    """KL(before ‖ after) in nats: infinite where a token has become impossible, NaN where there is no distribution."""
    if any(one.wrong is not None for one in pair):
        return float("nan")
    before, after = (one.log_probabilities for one in pair)
    shares = before.exp()
    terms = torch.where(shares > 0, shares * (before - after), torch.zeros_like(shares))
    return float(terms.sum().clamp(min=0))
