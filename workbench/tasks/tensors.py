"""A task whose prompts are no text: spectrograms, images, or token ids, as a model takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from workbench.counting import count
from workbench.errors import TaskError
from workbench.metrics import Scored, TaskBatch, last_places
from workbench.tasks.base import Example, Task


@dataclass(frozen=True, repr=False)
class InputTask(Task):
    """A task made by `from_inputs`; its examples are numbered, and no tokenizer is needed.

    Attributes:
        inputs, twin_inputs: model inputs by name, [example, …].
        answer_ids, wrong_ids: token ids, one tuple for each example.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    twin_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    answer_ids: tuple[tuple[int, ...], ...] = ()
    wrong_ids: tuple[tuple[int, ...], ...] = ()

    of_text: ClassVar[bool] = False

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Task: ...
    def __getitem__(self, index: int | slice) -> Example | Task:
        if not isinstance(index, slice):
            return self.examples[index]
        return replace(
            self, examples=self.examples[index], answer_ids=self.answer_ids[index], wrong_ids=self.wrong_ids[index],
            inputs={name: value[index] for name, value in self.inputs.items()},
            twin_inputs={name: value[index] for name, value in self.twin_inputs.items()},
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"InputTask {self.name}: {count(len(self), 'example')}"

    def using(self, *, prepend_bos: bool | None = None, measured_at: str | None = None) -> Task:
        """The same inputs, measured at another position.

        Raises:
            TaskError: no position of that name, or another beginning, which ids that are given do not have.
        """
        if prepend_bos is not None:
            raise TaskError("the inputs of this task are given as they are", hint="put the token into input_ids")
        return super().using(measured_at=measured_at)

    def positions(self, name: str, tokenizer: Any = None) -> list[int]:
        """Index of a named position in every example.

        Raises:
            TaskError: no position of that name.
        """
        return super().positions(name)

    def batches(
        self,
        tokenizer: Any = None,
        size: int = 64,
        *,
        twins: bool = False,
        device: str | torch.device | None = None,
        start_token: int | None = None,
        padding_side: str | None = None,
    ) -> Iterator[TaskBatch]:
        """Model inputs in batches, as in `Task.batches`; a decoder that was given no ids begins with the start token.

        They are given as they are, whatever side is asked for.

        Raises:
            TaskError: a size below 1.
        """
        if size < 1:
            raise TaskError(f"a batch needs at least 1 example, not {size}")
        given = dict(self.twin_inputs if twins else self.inputs)
        if start_token is not None and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = torch.full((len(self), 1), start_token)
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            batch = TaskBatch(
                {name: value[rows].to(device) for name, value in given.items()},
                answers=[list(one) for one in self.answer_ids[rows]], wrong=[list(one) for one in self.wrong_ids[rows]],
                start=start,
            )  # fmt: skip
            if self.measured_at != "end":
                batch.scored = self._measured_at(batch, rows)
            yield batch

    def _measured_at(self, batch: TaskBatch, rows: slice) -> Scored:
        """Where a batch is measured: at a named column.

        Raises:
            TaskError: the answer comes from a decoder.
        """
        if "decoder_input_ids" in batch or "input_ids" not in batch:
            raise TaskError(
                f"the answer is measured at {self.measured_at!r}, a place that no ids of a decoder have",
                hint='measured_at="end"',
            )
        device = batch["input_ids"].device
        places = torch.tensor(self[rows].positions(self.measured_at), device=device) % batch["input_ids"].shape[1]
        right, wrong = ([[one] for one in sets] for sets in (batch.answers, batch.wrong))
        return Scored(places[:, None], last_places(batch).to(device).expand(len(places)), right, wrong)


def from_inputs(
    inputs: Mapping[str, Tensor],
    twins: Mapping[str, Tensor],
    answers: Sequence[int | Sequence[int]],
    wrong: Sequence[int | Sequence[int]],
    *,
    name: str = "custom",
    positions: Mapping[str, int | Sequence[int]] | None = None,
    source: str = "given by the user",
) -> InputTask:
    """A task from model inputs and counterfactual twins, such as two spoken sentences that differ in a word.

    Args:
        inputs: what the model takes, [example, …] each: `input_features`, `pixel_values`, `input_ids`; and
            `decoder_input_ids`, what a decoder has written when the answer comes (its start token if they are missing).
        twins: the same of other content, in the same shapes.
        answers: token ids of what is right; several where any of them is.
        wrong: token ids that the logit difference compares with, mostly the twin's answer.
        name: of the task.
        positions: indices by name, for all examples or one for each, in what the first stream reads: of a spectrogram
            in the positions of the encoder.
        source: where the inputs come from.

    Raises:
        TaskError: other names, shapes or numbers of examples; a twin that does not differ; an answer that is wrong too.

    >>> ids = torch.tensor([[5, 6, 7], [5, 8, 7]])
    >>> task = from_inputs({"input_ids": ids}, {"input_ids": ids.flip(0)}, [1, 2], [2, 1], positions={"word": 1})
    >>> len(task), task.positions("word"), task[1:].answer_ids
    (2, [1, 1], ((2,),))
    """
    if not inputs or set(inputs) != set(twins):
        raise TaskError(f"the inputs are {sorted(inputs)}, those of the twins {sorted(twins)}; the same are needed")
    n = len(next(iter(inputs.values())))
    for key, value in inputs.items():
        if len(value) != n or not n:
            raise TaskError(f"{key} holds {len(value)} examples, {n or 'at least one'} are needed", shape=value.shape)
        if value.shape != twins[key].shape:
            raise TaskError(f"{key} of the twins has another shape: {list(twins[key].shape)}", shape=value.shape)
    for what, given in {"answers": answers, "wrong": wrong}.items():
        if len(given) != n:
            raise TaskError(f"there are {n} examples and {len(given)} {what}")
    for key, where in (positions or {}).items():
        if not isinstance(where, int) and len(where) != n:
            raise TaskError(f"the position {key!r} is given for {len(where)} of {n} examples")
    right, other = _ids(answers), _ids(wrong)
    differ = torch.stack([(inputs[key] != twins[key]).reshape(n, -1).any(1) for key in inputs]).any(0)
    made = []
    for i in range(n):
        if not bool(differ[i]):
            raise TaskError(f"the twin of example {i} does not differ from it")
        if not right[i] or not other[i] or set(right[i]) & set(other[i]):
            raise TaskError(f"example {i} has the answers {right[i]} and the wrong ones {other[i]}")
        own = {key: where if isinstance(where, int) else where[i] for key, where in (positions or {}).items()}
        made.append(Example(f"input {i}", f"twin {i}", tuple(map(str, right[i])), tuple(map(str, other[i])), own, ()))
    return InputTask(
        name, tuple(made), source, {"inputs": n}, inputs=dict(inputs), twin_inputs=dict(twins), answer_ids=right,
        wrong_ids=other,
    )  # fmt: skip


def _ids(given: Sequence[int | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple((int(one),) if isinstance(one, int) else tuple(dict.fromkeys(map(int, one))) for one in given)
