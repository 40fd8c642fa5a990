"""What a question about logits is of: batches of prompts, and for each the tokens and the position."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError, InterventionError, TaskError, WorkbenchError, expect
from workbench.hooks.split_models import check_unsplit
from workbench.inputs import check_inputs, decoder_start, device_for_inputs, dropout_in_training, own_columns
from workbench.metrics.answers import TaskBatch
from workbench.session.workbench import Workbench
from workbench.tasks.base import Task
from workbench.tasks.pieces import single_token

Targets = str | int | Sequence[str | int] | None


def check_model(wb: Workbench) -> None:
    """Refuse a workbench that is detached or in use, and a model that drops out."""
    wb.check_ready()
    wb.check_idle()
    check_unsplit()
    dropping = dropout_in_training(wb.model)
    if dropping:
        raise InterventionError(
            f"the model drops out at {len(dropping)} modules ({dropping[0]} …)", hint="call model.eval()"
        )


def sites_on_tokens(wb: Workbench, inputs: Mapping[str, Any]) -> list[str]:
    """Names of the sites that fire when the model is given these few tokens alone.

    Raises:
        CaptureError: it does not run on them.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of sites that do not fire, such as those of a vision tower
            with wb.capture((), queries_keys=False) as cap:
                wb.model(**inputs)
    except WorkbenchError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model does not run on token ids alone: {type(error).__name__}: {error}",
            hint="this analysis is of language models that take input_ids",
        ) from error
    return [site.path for site in cap.sites]


def batches_of(wb: Workbench, prompts: Any, size: int) -> Iterator[dict[str, Tensor]]:
    """Model inputs for texts, a task, or inputs as they are; a decoder of texts has written its start token.

    Raises:
        CaptureError, TaskError: no prompts, or ones that do not fit the model.
    """
    start = decoder_start(wb.model)
    if isinstance(prompts, Task):
        yield from prompts.batches(wb.tokenizer, size, device=device_for_inputs(wb.model), start_token=start)
        return
    if isinstance(prompts, Mapping):
        inputs = dict(prompts)
        ids = inputs.get("decoder_input_ids" if start is not None else "input_ids")
        if start is None and not (isinstance(ids, Tensor) and ids.dim() == 2):
            raise CaptureError("the inputs have no input_ids [batch, position]")
        if start is not None and ids is None:
            first = next(value for value in inputs.values() if isinstance(value, Tensor))
            inputs["decoder_input_ids"] = torch.full((first.shape[0], 1), start, device=first.device)
        check_inputs(wb.model, (), inputs)
        yield inputs
        return
    expect(Iterable, prompts=prompts)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise CaptureError("prompts are texts, model inputs or a Task", hint="such as wb.tokenize(text)")
    for at in range(0, len(texts), size):
        inputs = wb.tokenize(texts[at : at + size])
        if start is not None:
            inputs["decoder_input_ids"] = torch.full((len(inputs["input_ids"]), 1), start).to(inputs["input_ids"])
        yield inputs


def written_ids(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids whose logits a model gives [batch, position], and bool where they are no padding."""
    prefix = "decoder_" if batch.get("decoder_input_ids") is not None else ""
    ids, mask = batch[f"{prefix}input_ids"], batch.get(f"{prefix}attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask.bool()
    return ids, real


def places_of(batch: Mapping[str, Any], position: int) -> Tensor:
    """[batch] column of a position in each prompt, counted over its own tokens; negative ones from the end.

    Of a task that is measured elsewhere than at the end: where the token is predicted in which its answers part.

    Raises:
        CaptureError: a prompt has no such position, or the task has another.
    """
    scored = getattr(batch, "scored", None)
    if scored is not None:
        if position != -1:
            raise CaptureError(
                "the task's answers have several tokens, or are measured at a position of their own",
                hint="leave position out, or give prompts, target= and contrast=",
            )
        found: Tensor = scored.apart
        return found
    _, real = written_ids(batch)
    return own_columns(real, position)


@dataclass(frozen=True)
class Tokens:
    """Sets of tokens for each example, whose mean logit counts."""

    sets: tuple[tuple[int, ...], ...]

    def weights(self, vocabulary: int, device: torch.device) -> Tensor:
        """[example, vocab] by which each logit counts."""
        found = torch.zeros(len(self.sets), vocabulary, dtype=torch.float64, device=device)
        for row, one in zip(found, self.sets, strict=True):
            row[list(one)] = 1 / len(one)
        return found


def tokens_of(wb: Workbench, given: Targets, n: int, vocabulary: int, what: str) -> Tokens:
    """One token for each of n examples, given as text or id; one alone is that of all.

    Raises:
        TaskError: outside of the vocabulary, several tokens, or not as many as examples.
    """
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * n
    if len(several) != n:
        raise TaskError(f"{len(several)} {what}s for {n} prompts", hint="give one for each, or one for all")
    found = []
    for one in several:
        if isinstance(one, str):
            if wb.tokenizer is None:
                raise TaskError(f"no tokenizer is attached that knows the {what} {one!r}", hint="give its id")
            one = single_token(wb.tokenizer, one)
        if isinstance(one, bool) or not isinstance(one, int):
            raise TaskError(f"a {what} is a token's text or id, not {one!r}")
        if not 0 <= one < vocabulary:
            raise TaskError(f"the {what} {one} lies outside of the vocabulary of {vocabulary:,} tokens")
        found.append((one,))
    return Tokens(tuple(found))


def answers_of(batch: TaskBatch, what: str) -> Tokens:
    """The right or wrong answers of a task's batch; of answers of several tokens those where they part."""
    return Tokens(tuple(tuple(one) for one in (batch.answers if what == "target" else batch.wrong)))


def check_apart(targets: Tokens, contrasts: Tokens) -> None:
    """Refuse a contrast that is its target.

    Raises:
        TaskError: it is, in an example that is named.
    """
    for i, (one, other) in enumerate(zip(targets.sets, contrasts.sets, strict=True)):
        if set(one) & set(other):
            raise TaskError(f"the contrast of example {i} is its target, token {sorted(set(one) & set(other))[0]}",
                            hint="a contrast is what the target is compared with")  # fmt: skip
