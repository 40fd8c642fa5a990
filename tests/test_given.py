"""What is given in the place of something else, such as a model for its workbench, is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

import workbench
from workbench import views
from workbench.analysis.head_scores.prompts import ids_of
from workbench.tasks.base import Task

NOUNS = {each.__name__: each for each in (workbench.Workbench, workbench.Capture, workbench.Circuit, Task)}


def asked() -> Iterator[tuple[Callable[..., Any], str]]:
    """Every function of analyses and views, with each of its arguments that is one of the nouns."""
    for room in (workbench, views):
        for name in room.__all__:
            made = getattr(room, name)
            if inspect.isfunction(made):
                for parameter in inspect.signature(made).parameters.values():
                    if parameter.annotation in NOUNS and parameter.default is parameter.empty:
                        yield made, parameter.name


@pytest.mark.parametrize(
    ("function", "name"), [pytest.param(*each, id=f"{each[0].__name__}-{each[1]}") for each in asked()]
)
def test_another_noun_is_refused_by_name(function: Callable[..., Any], name: str) -> None:
    parameters = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    # Before the argument that is wrong stand things of the right kind, which nobody looks into.
    right = {each.name: object.__new__(NOUNS[each.annotation]) for each in parameters if each.annotation in NOUNS}
    given = {each.name: right.get(each.name) for each in parameters if each.kind is not each.VAR_KEYWORD}
    for wrong in (nn.Linear(1, 1), "a text", None):
        with pytest.raises(workbench.WorkbenchError, match=f"`{name}` is .*, and no .*\nHint: ."):
            function(**given | {name: wrong})


def test_the_model_of_a_workbench_is_asked_for() -> None:
    bench = object.__new__(workbench.Workbench)
    for function in (workbench.prune_heads, workbench.track_long):
        with pytest.raises(workbench.WorkbenchError, match=r"`model` is a Workbench, and no Module\nHint: .*wb\.model"):
            function(bench, None)
    with pytest.raises(workbench.WorkbenchError, match="`model` is a str, and no Module"):
        workbench.spike_activity("demo-lm", [])
    for function in (workbench.grounding, workbench.saliency, workbench.image_places, workbench.cross_attention):
        with pytest.raises(workbench.WorkbenchError, match=r"`inputs` is a str, and no Mapping\nHint: wb\.tokenize"):
            function(bench, "a text")


def test_what_is_no_prompt_is_refused() -> None:
    for given in (nn.Linear(1, 1), [["ragged"], ["rows", "of words"]]):
        with pytest.raises(workbench.CaptureError, match="a prompt is a text, or its ids, and no "):
            ids_of(object.__new__(workbench.Workbench), given)


def test_tokens_and_statistics_that_are_none_are_refused() -> None:
    for tokens in (3, None):
        with pytest.raises(workbench.WorkbenchError, match=r"`tokens` is .*, and no Iterable"):
            views.token_strip(tokens, [0.5])  # type: ignore[arg-type]
    capture = object.__new__(workbench.Capture)
    for read in (capture.stack, capture.table):
        with pytest.raises(workbench.WorkbenchError, match="`statistic` is a int, and no str"):
            read(3)  # type: ignore[arg-type]
