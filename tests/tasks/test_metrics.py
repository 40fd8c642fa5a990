"""Batches, positions in tokens, and the metrics, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import TaskError
from workbench.metrics import accuracy, logit_diff
from workbench.models.training.vocabulary import build_tokenizer
from workbench.tasks import (
    Task,
    TaskBatch,
    colored_objects,
    greater_than,
    induction,
    ioi,
    pieces,
    token_positions,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(128)


class Oracle(torch.nn.Module):
    """Gives logit 2 to one token at every row's last position and 0 elsewhere; padding gets nonsense."""

    def __init__(self, says: list[int], vocab: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.says: Iterator[int] = iter(says)
        self.vocab = vocab

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.randn(*input_ids.shape, self.vocab)
        for row, length in enumerate(attention_mask.sum(1).tolist()):
            logits[row, length - 1] = 0
            logits[row, length - 1, next(self.says)] = 2
        return SimpleNamespace(logits=logits)


def _ids(tokenizer: Any, answers: list[str]) -> list[int]:
    return [tokenizer(answer)["input_ids"][0] for answer in answers]


def test_accuracy_counts_right_answers_over_batches_of_odd_size(tokenizer: Any) -> None:
    task = ioi(7, seed=0)
    says = _ids(tokenizer, [e.answer for e in task[:4]] + [e.wrong[0] for e in task[4:]])
    assert task.accuracy(Oracle(says, len(tokenizer)), tokenizer, size=3) == pytest.approx(4 / 7)


def test_logit_diff_has_the_sign_of_the_answer(tokenizer: Any) -> None:
    task = ioi(5, seed=0)
    says = _ids(tokenizer, [e.answer for e in task[:2]] + [e.wrong[0] for e in task[2:]])
    diff = task.logit_diff(Oracle(says, len(tokenizer)), tokenizer, size=2)
    assert diff.tolist() == [2, 2, -2, -2, -2]


def test_any_year_above_is_right(tokenizer: Any) -> None:
    task = greater_than(6, seed=0)
    model = Oracle(_ids(tokenizer, [e.answers[-1] for e in task]), len(tokenizer))
    assert task.accuracy(model, tokenizer) == 1.0


def test_logit_diff_of_sets_is_the_log_of_the_ratio_of_probabilities() -> None:
    logits = torch.randn(1, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = TaskBatch({}, answers=[[1, 4, 5]], wrong=[[0, 2]])
    p = logits[0, 0].softmax(-1)
    expected = torch.log(p[[1, 4, 5]].sum() / p[[0, 2]].sum())
    torch.testing.assert_close(logit_diff(logits, batch)[0], expected)


def test_last_position_is_found_with_padding_on_either_side() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, 1, 2] = logits[1, 2, 3] = 5
    batch = TaskBatch({"attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]])}, answers=[[2], [3]], wrong=[[0], [0]])
    assert accuracy(logits, batch).tolist() == [1, 1]


def test_batches_keep_the_answers_of_the_prompts_for_the_twins(tokenizer: Any) -> None:
    task = ioi(4, seed=0)
    clean, twins = next(task.batches(tokenizer)), next(task.batches(tokenizer, twins=True))
    assert clean.answers == twins.answers
    assert ((clean["input_ids"] != twins["input_ids"]).sum(1) == 1).all()
    assert (clean["attention_mask"] == twins["attention_mask"]).all()


def test_batch_moves_with_its_answers(tokenizer: Any) -> None:
    batch = next(ioi(2, seed=0).batches(tokenizer)).to("cpu")
    assert isinstance(batch, TaskBatch)
    assert len(batch.answers) == 2


def test_metric_refuses_a_plain_dict() -> None:
    with pytest.raises(TaskError, match=r"task\.batches"):
        accuracy(torch.zeros(1, 1, 3), {"input_ids": torch.zeros(1, 1)})


def test_batches_refuse_size_zero(tokenizer: Any) -> None:
    with pytest.raises(TaskError, match="not 0"):
        next(ioi(2, seed=0).batches(tokenizer, 0))


def test_empty_task_has_no_accuracy(tokenizer: Any) -> None:
    with pytest.raises(TaskError, match="no examples"):
        Task("ioi", (), "nowhere").accuracy(Oracle([], 3), tokenizer)


@pytest.mark.parametrize("answer", [" Zanzibar", " Mary Zanzibar"])
def test_answers_the_tokenizer_cannot_say_are_refused(tokenizer: Any, answer: str) -> None:
    example = ioi(1, seed=0)[0]
    task = Task("odd", (type(example)(example.prompt, example.twin, (answer,), example.wrong, {}, ()),), "here")
    with pytest.raises(TaskError, match=answer.strip()):
        next(task.batches(tokenizer))


def test_word_level_positions_are_piece_positions(tokenizer: Any) -> None:
    for task in (ioi(20, seed=0), colored_objects(5, seed=0), induction(5, seed=0), greater_than(5, seed=0)):
        assert task.positions("end", tokenizer) == task.positions("end")


def test_positions_of_a_tokenizer_that_splits_words() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S"), behavior="removed", invert=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>")
    assert token_positions(fast, "ab, cde", [0, 1, 2]) == [1, 2, 5]


def test_position_outside_the_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TaskError, match="piece 9"):
        token_positions(tokenizer, "the cup", [9])


@given(st.text(alphabet="ab1 ,.?:\n\t", max_size=40))
def test_pieces_lose_white_space_only(text: str) -> None:
    assert "".join(pieces(text)) == text.replace(" ", "").replace("\t", "")
