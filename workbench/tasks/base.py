"""The nouns of the prompt sets: an Example with its counterfactual twin, and a Task that holds many."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, ClassVar, Literal, get_args, overload

import torch

from workbench.counting import count
from workbench.errors import TaskError, nearest
from workbench.inputs import decoder_start, device_for_inputs, own_positions
from workbench.metrics import METRICS, Metric, TaskBatch
from workbench.tasks.pieces import answer_tokens, piece_spans, pieces, prompt_ids, token_positions
from workbench.tasks.scoring import Answer, answer_of, scored_of

Split = Literal["all", "train", "held_out"]


@dataclass(frozen=True)
class Example:
    """One prompt, its minimally different twin, and what counts as right.

    Attributes:
        prompt: text that ends just before the answer.
        twin: same number of pieces as the prompt; differs only at `changed`.
        answers: the right continuations of the prompt, each with its leading space; mostly one.
        wrong: the continuations that the logit difference compares with (the twin's answer, or S for IOI).
        positions: piece indices by name, 0-based, the same in prompt and twin.
        changed: piece indices at which the twin differs.
        written: what the decoder of an encoder-decoder has written when the answer comes, in prompt and twin.
    """

    prompt: str
    twin: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    positions: Mapping[str, int]
    changed: tuple[int, ...]
    written: str = ""

    @property
    def answer(self) -> str:
        """The first right answer, for tasks that have only one."""
        return self.answers[0]

    def word_at(self, name: str, *, twin: bool = False) -> str:
        """The piece at a named position of the prompt, or of the twin.

        Raises:
            TaskError: no position of that name.
        """
        if name not in self.positions:
            raise TaskError(f"no position called {name!r}", hint=nearest(name, list(self.positions), "position"))
        return pieces(self.twin if twin else self.prompt)[self.positions[name]]


@dataclass(frozen=True, repr=False)
class Task(Sequence[Example]):
    """A set of examples of one task, as a read-only sequence, with its metrics.

    Attributes:
        name: such as "ioi".
        examples: the prompts and their twins.
        source: where the task comes from.
        settings: the arguments it was made with, seed included, so that it can be made again.
        prepend_bos: whether the token for the beginning of a text stands before each; None: as the tokenizer has it.
        measured_at: name of the position behind which the answer is predicted.
    """

    name: str
    examples: tuple[Example, ...]
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepend_bos: bool | None = field(default=None, kw_only=True)
    measured_at: str = field(default="end", kw_only=True)

    of_text: ClassVar[bool] = True  # whether batches are made by a tokenizer

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Task: ...
    def __getitem__(self, index: int | slice) -> Example | Task:
        if isinstance(index, slice):
            return replace(self, examples=self.examples[index])
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __repr__(self) -> str:
        made = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        lines = [f"Task {self.name}: {count(len(self), 'example')} ({made})"]
        if self.examples:
            first = self.examples[0]
            many = f" (any of {len(first.answers)})" if len(first.answers) > 1 else ""
            where = ", ".join(f"{name}={index}" for name, index in first.positions.items())
            lines += [
                f"  prompt     {first.prompt!r}",
                f"  twin       {first.twin!r}",
                f"  answer     {first.answer!r}{many}, not {first.wrong[0]!r}",
                f"  positions  {where}",
            ]
        return "\n".join([*lines, f"  source     {self.source}"])

    @property
    def prompts(self) -> list[str]:
        """The prompts, in order."""
        return [example.prompt for example in self.examples]

    @property
    def twins(self) -> list[str]:
        """The counterfactual twins, in order."""
        return [example.twin for example in self.examples]

    def using(self, *, prepend_bos: bool | None = None, measured_at: str | None = None) -> Task:
        """The same prompts with another beginning, or measured at another position.

        Args:
            prepend_bos: put the token for the beginning of a text before each, or leave it out; None: as it is.
            measured_at: a named position; the answer is what the model predicts behind it. None: as it is.

        Raises:
            TaskError: no position of that name.
        """
        if measured_at not in (None, "end"):
            self.positions(str(measured_at))
        return replace(
            self, prepend_bos=self.prepend_bos if prepend_bos is None else prepend_bos,
            measured_at=self.measured_at if measured_at is None else measured_at,
        )  # fmt: skip

    def positions(self, name: str, tokenizer: Any = None) -> list[int]:
        """Index of a named position in every prompt: of pieces, or of tokens where a tokenizer is given.

        Raises:
            TaskError: no position of that name, or a tokenizer without offsets that splits pieces.
        """
        found = []
        for example in self.examples:
            if name not in example.positions:
                raise TaskError(f"no position called {name!r}", hint=nearest(name, list(example.positions), "position"))
            index = example.positions[name]
            found.append(index if tokenizer is None else self._token_position(tokenizer, example.prompt, index))
        return found

    def _token_position(self, tokenizer: Any, text: str, index: int) -> int:
        (found,) = token_positions(tokenizer, text, [index])
        if self.prepend_bos is None:
            return found
        plain, own = (prompt_ids(tokenizer, text, continued=False, prepend_bos=bos) for bos in (None, self.prepend_bos))
        return found + len(own) - len(plain)

    def batches(
        self,
        tokenizer: Any,
        size: int = 64,
        *,
        twins: bool = False,
        device: str | torch.device | None = None,
        start_token: int | None = None,
        padding_side: str | None = "right",
    ) -> Iterator[TaskBatch]:
        """Model inputs in batches, padded to one length; each batch carries the answers for the metrics.

        What a tokenizer puts behind a text, such as an end token, is left out where a decoder goes on from the prompt.
        Of an answer of several tokens all but the last stand behind the prompt, and behind its twin, so that each of
        them is predicted from those before it.

        Args:
            tokenizer: a Hugging Face tokenizer.
            size: examples in a batch.
            twins: feed the twins instead. The answers stay those of the prompts, so that a clean and a corrupted run
                are measured with the same pair.
            device: where to put the tensors.
            start_token: of an encoder-decoder, the id that its decoder begins with; its encoder reads the prompts, and
                the answer is what the decoder writes next. See `workbench.inputs.decoder_start`.
            padding_side: "right", where padding changes nothing in any causal model; "left", where prompts end in one
                column, and the batch has the `position_ids` that each prompt has alone; None: as the tokenizer has it.

        Raises:
            TaskError: a size below 1, answers that this tokenizer does not know or that cannot be compared, a tokenizer
                that hides where a prompt ends, no `start_token` where a decoder has written something, or padding on
                the left of what an encoder reads.
        """
        if size < 1:
            raise TaskError(f"a batch needs at least 1 example, not {size}")
        left = _pads_left(tokenizer, padding_side, start_token is not None)
        tokens_of = cache(partial(answer_tokens, tokenizer))  # sets of answers repeat from one example to the next
        for start in range(0, len(self.examples), size):
            chunk = self.examples[start : start + size]
            texts = [example.twin if twins else example.prompt for example in chunk]
            rows = [
                prompt_ids(tokenizer, text, continued=start_token is None, prepend_bos=self.prepend_bos)
                for text in texts
            ]
            answers = [
                answer_of(start + i, one, [tokens_of(text) for text in one.answers], [tokens_of(t) for t in one.wrong])
                for i, one in enumerate(chunk)
            ]
            if start_token is None:
                if any(example.written for example in chunk):
                    raise TaskError(
                        f"example {start} goes on from what a decoder wrote, and this model is no encoder-decoder",
                        hint="batches(..., start_token=decoder_start(model))",
                    )
                read = rows
                rows = [[*row, *answer.before] for row, answer in zip(rows, answers, strict=True)]
            inputs = dict(zip(("input_ids", "attention_mask"), padded(rows, left=left), strict=True))
            pads = [0] * len(rows)
            if left and not bool(inputs["attention_mask"].all()):
                inputs["position_ids"] = own_positions(inputs["attention_mask"])
                pads = (inputs["attention_mask"] == 0).sum(1).tolist()
            if start_token is not None:
                texts = [example.written for example in chunk]
                own = [tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]
                read = [[start_token, *row] for row in own]
                ids, mask = padded([[*row, *answer.before] for row, answer in zip(read, answers, strict=True)])
                inputs["decoder_input_ids"] = ids
                if not bool(mask.all()):
                    inputs["decoder_attention_mask"] = mask
            ends = [len(row) - 1 for row in read]
            first = self._measured(tokenizer, start, answers, ends, start_token)
            columns = ([pad + column for pad, column in zip(pads, each, strict=True)] for each in (ends, first))
            scored = scored_of(answers, *columns)
            yield TaskBatch(
                inputs,
                answers=[list(answer.apart[0]) for answer in answers],
                wrong=[list(answer.apart[1]) for answer in answers],
                start=start,
                continued=True,
                scored=scored,
            ).to(device or "cpu")

    def _measured(
        self, tokenizer: Any, start: int, answers: Sequence[Answer], ends: Sequence[int], start_token: int | None
    ) -> list[int]:
        """The token of each prompt, counted from its first, from which the first token of its answer is predicted.

        Raises:
            TaskError: another place than the end where that has no sense.
        """
        if self.measured_at == "end":
            return list(ends)
        if start_token is not None:
            raise TaskError(
                f"the answer is measured at {self.measured_at!r}, a place in the prompt, which the encoder reads",
                hint='in the decoder it is measured at the "end"',
            )
        several = next((i for i, answer in enumerate(answers) if len(answer.steps) > 1), None)
        if several is not None:
            raise TaskError(
                f"the answer of example {start + several} has {len(answers[several].steps)} tokens, which stand behind "
                f"the prompt, and not behind {self.measured_at!r}",
                hint="choose answers of one token, or measure at the end",
            )
        return self[start : start + len(answers)].positions(self.measured_at, tokenizer)

    def accuracy(self, model: torch.nn.Module, tokenizer: Any, size: int = 64) -> float:
        """Share of prompts whose most likely next token, over the full vocabulary, is a right answer.

        Raises:
            TaskError: an empty task, or answers that `batches` refuses.
        """
        return float(self._measure(METRICS["accuracy"], model, tokenizer, size, twins=False).mean())

    def logit_diff(
        self, model: torch.nn.Module, tokenizer: Any, size: int = 64, *, twins: bool = False
    ) -> torch.Tensor:
        """Logit of the right answers minus logit of the wrong ones at the last token: [example], natural-log units.

        See `workbench.metrics.logit_diff` for sets of answers. With `twins` the twins are run and the prompts' answers
        are compared, so a model that does the task is below zero there.

        Raises:
            TaskError: an empty task, or answers that `batches` refuses.
        """
        return self._measure(METRICS["logit_diff"], model, tokenizer, size, twins=twins)

    def _measure(
        self, metric: Metric, model: torch.nn.Module, tokenizer: Any, size: int, *, twins: bool
    ) -> torch.Tensor:
        if not self.examples:
            raise TaskError(f"task {self.name} has no examples", hint="make it with n >= 1")
        device, start = device_for_inputs(model), decoder_start(model)
        batches = self.batches(tokenizer, size, twins=twins, device=device, start_token=start)
        with torch.inference_mode():
            parts = [metric(model(**batch), batch) for batch in batches]
        return torch.cat(parts).cpu()


def padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [row, position], padded with 0 on the right, or on the left, and 1 where there is one."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if left else slice(len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids, mask


def _pads_left(tokenizer: Any, side: str | None, encoded: bool) -> bool:
    """Whether padding stands before the prompts.

    Raises:
        TaskError: an unknown side, or before prompts that an encoder reads.
    """
    if side not in ("left", "right", None):
        raise TaskError(f'padding_side is "left", "right" or None, not {side!r}')
    if encoded and side == "left":
        raise TaskError("an encoder counts its positions from the first column", hint='padding_side="right"')
    side = getattr(tokenizer, "padding_side", "right") if side is None else side
    return side == "left" and not encoded


def check_common(n: int, split: str) -> None:
    """Refuse a number of examples below 1 and an unknown split."""
    if n < 1:
        raise TaskError(f"a task needs at least 1 example, not n={n}", hint="such as 32")
    check_choice("split", split, get_args(Split))


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones, and name the nearest."""
    if value not in known:
        raise TaskError(f"unknown {what} {value!r}", hint=nearest(value, list(known), what))


def make_rng(seed: int | random.Random) -> random.Random:
    """A generator of its own for a seed, or the one that was handed over."""
    return seed if isinstance(seed, random.Random) else random.Random(seed)


def in_split(key: int, split: Split) -> bool:
    """Whether a combination with this number belongs to the split: every eighth is held out.

    >>> [in_split(16, "held_out"), in_split(16, "train"), in_split(16, "all")]
    [True, False, True]
    """
    return split == "all" or (key % 8 == 0) == (split == "held_out")


def swap_words(prompt: str, changes: Mapping[int, str]) -> str:
    """The prompt with the pieces at some indices replaced and all white space kept.

    >>> swap_words("a red cup, a jug", {2: "pen"})
    'a red pen, a jug'
    """
    spans = piece_spans(prompt)
    text, last = "", 0
    for index in sorted(changes):
        start, end = spans[index]
        text, last = text + prompt[last:start] + changes[index], end
    return text + prompt[last:]


def seed_setting(seed: int | random.Random) -> int | str:
    """What to write down for a seed: the number, or that a generator was handed over."""
    return seed if isinstance(seed, int) else "random.Random"
