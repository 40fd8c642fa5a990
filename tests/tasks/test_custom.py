"""A user's own task, docstrings, and the metrics that circuits use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workbench.errors import TaskError
from workbench.metrics import kl_divergence, logit_diff, probability
from workbench.tasks import TaskBatch, docstring, from_prompts, pieces


def test_docstrings_differ_in_one_token_and_name_their_positions() -> None:
    task = docstring(50, seed=3)
    assert task.examples == docstring(50, seed=3).examples
    assert len({len(pieces(example.prompt)) for example in task}) == 1
    for example in task:
        words, others = pieces(example.prompt), pieces(example.twin)
        assert [i for i, (a, b) in enumerate(zip(words, others, strict=True)) if a != b] == list(example.changed)
        assert example.word_at("C_def") == example.answer.strip()
        assert example.word_at("C_def", twin=True) == example.wrong[0].strip()
        assert example.word_at("A_def") == example.word_at("A_doc")
        assert example.word_at("B_def") == example.word_at("B_doc")
        assert example.word_at("end") == "param"
        assert words.count(example.answer.strip()) == 1
        assert example.wrong[0].strip() not in words


def test_own_prompts_make_a_task() -> None:
    task = from_prompts(
        ["a b c", "a d c"], ["a x c", "a y c"], [" p", [" q", " r"]], [" s", " t"],
        positions={"second": 1, "own": [0, -1]},
    )  # fmt: skip
    assert task[1].answers == (" q", " r")
    assert task.positions("second") == [1, 1]
    assert task.positions("own") == [0, 2]
    assert task.positions("end") == [2, 2]
    assert task[0].changed == (1,)
    assert task[:1].name == "custom"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"twins": ["a b c"]}, "does not differ"),
        ({"twins": ["a b c d"]}, "has 3 words, its twin 4"),
        ({"twins": []}, "1 prompts and 0 twins"),
        ({"answers": " x"}, "answers is str"),
        ({"answers": [" y"]}, "right and wrong"),
        ({"answers": [[]]}, "no answer"),
        ({"wrong": [()]}, "no wrong answer"),
        ({"prompts": [3]}, "are texts"),
        ({"positions": {"far": 3}}, "has 3 words"),
        ({"positions": {"far": [1, 2]}}, "2 of 1 prompts"),
        ({"prompts": [], "twins": [], "answers": [], "wrong": []}, "no prompt"),
    ],
)
def test_lists_that_make_no_task(change: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"prompts": ["a b c"], "twins": ["a d c"], "answers": [" x"], "wrong": [" y"]}
    from_prompts(**good)
    with pytest.raises(TaskError, match=says):
        from_prompts(**{**good, **change})


def test_metrics_follow_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, clean = (torch.randn(3, 4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    answers, wrong = [[1], [2, 5], [0, 3, 6]], [[0, 4], [1], [2]]
    batch = TaskBatch({}, answers=answers, wrong=wrong)
    last, p = logits[:, -1], logits[:, -1].softmax(-1)
    for i in range(3):
        own, other = (sum(last[i, t].exp() for t in one[i]) for one in (answers, wrong))
        assert float(logit_diff(logits, batch)[i]) == pytest.approx(float(torch.log(own / other)))
        assert float(probability(logits, batch)[i]) == pytest.approx(float(sum(p[i, t] for t in answers[i])))
    q = clean[:, -1].softmax(-1)
    expected = (q * (q / p).log()).sum(-1)
    assert torch.allclose(kl_divergence(logits, batch, clean), expected)
    assert bool((kl_divergence(clean, batch, clean).abs() < 1e-12).all())
