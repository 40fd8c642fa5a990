"""The prompt generators: twins, positions, splits, determinism and refusals."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import TaskError
from workbench.tasks import Task, colored_objects, greater_than, induction, ioi, pieces
from workbench.tasks.colored_objects import COLOURS, OBJECTS
from workbench.tasks.ioi import TEMPLATES

GENERATORS: dict[str, Callable[..., Task]] = {
    "ioi": ioi,
    "colored_objects": colored_objects,
    "induction": induction,
    "greater_than": greater_than,
}


@pytest.fixture(params=sorted(GENERATORS))
def task(request: pytest.FixtureRequest) -> Task:
    return GENERATORS[request.param](60, seed=3)


def test_twin_differs_in_the_stated_pieces_only(task: Task) -> None:
    for example in task:
        prompt, twin = pieces(example.prompt), pieces(example.twin)
        assert len(prompt) == len(twin)
        differing = tuple(i for i, (a, b) in enumerate(zip(prompt, twin, strict=True)) if a != b)
        assert differing == example.changed
        assert len(differing) == 1


def test_end_is_the_last_piece_and_positions_lie_inside(task: Task) -> None:
    for example in task:
        n = len(pieces(example.prompt))
        assert example.positions["end"] == n - 1
        assert all(0 <= index < n for index in example.positions.values())


def test_answers_are_not_wrong_and_are_single_pieces(task: Task) -> None:
    for example in task:
        assert not set(example.answers) & set(example.wrong)
        assert all(answer.startswith(" ") and len(pieces(answer)) == 1 for answer in example.answers + example.wrong)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_same_seed_same_task_and_global_generator_untouched(name: str) -> None:
    make = GENERATORS[name]
    before = random.getstate()
    assert make(20, seed=5).examples == make(20, seed=5).examples
    assert make(20, seed=5).examples != make(20, seed=6).examples
    assert make(20, random.Random(5)).examples == make(20, seed=5).examples
    assert random.getstate() == before


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize("n", [0, -1])
def test_no_examples_is_refused(name: str, n: int) -> None:
    with pytest.raises(TaskError, match=f"n={n}"):
        GENERATORS[name](n, seed=0)


def test_repr_shows_prompt_twin_answer_and_seed(task: Task) -> None:
    text = repr(task)
    assert task.name in text
    assert "60 examples" in text
    assert "seed=3" in text
    assert repr(task[0].prompt) in text
    assert repr(task[0].twin) in text


def test_slice_is_a_task(task: Task) -> None:
    assert isinstance(task[:5], Task)
    assert task[:5].prompts == task.prompts[:5]


def test_unknown_position_names_the_nearest(task: Task) -> None:
    with pytest.raises(TaskError, match="end"):
        task.positions("ends")
    with pytest.raises(TaskError, match="end"):
        task[0].word_at("ends")


# Indirect object identification


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_ioi_positions_point_to_the_names(template: str, order: str) -> None:
    for example in ioi(10, seed=1, order=order, template=template):
        io, subject = example.answer.strip(), example.wrong[0].strip()
        assert example.word_at("IO") == io
        assert example.word_at("S1") == example.word_at("S2") == subject
        assert example.word_at("S2", twin=True) == io
        assert (example.positions["IO"] < example.positions["S1"]) == (order == "ABBA")
        assert example.positions["S1"] < example.positions["S2"]
        assert pieces(example.prompt).count(subject) == 2
        assert pieces(example.prompt).count(io) == 1


def test_ioi_mixes_orders_and_templates() -> None:
    task = ioi(200, seed=0)
    assert {e.positions["IO"] < e.positions["S1"] for e in task} == {True, False}
    assert len({len(pieces(p)) for p in task.prompts}) > 3


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [({"order": "ABAB"}, "AB"), ({"template": "wnt"}, "went"), ({"split": "heldout"}, "held_out")],
)
def test_ioi_refuses_unknown_choices(arguments: dict[str, str], hint: str) -> None:
    with pytest.raises(TaskError, match=hint):
        ioi(1, 0, **arguments)  # type: ignore[arg-type]


def test_ioi_splits_share_no_pair() -> None:
    pairs = [{(e.answers, e.wrong) for e in ioi(400, seed=0, split=split)} for split in ("train", "held_out")]
    assert not pairs[0] & pairs[1]


# Colored Objects


def test_colored_objects_has_the_layout_of_the_paper() -> None:
    for example in colored_objects(200, seed=0):
        words = pieces(example.prompt)
        assert len(words) == 62
        assert all(words[i] in COLOURS for i in (41, 45, 50))
        assert all(words[i] in OBJECTS for i in (42, 46, 51))
        assert words[30] in {colour.capitalize() for colour in COLOURS}
        assert words[31] == "\n"
        assert words[60:] == ["A", ":"]
        assert example.positions["shot_answer"] == 30
        assert example.positions["end"] == 61
        assert [example.positions[f"colour{i}"] for i in (1, 2, 3)] == [41, 45, 50]
        assert [example.positions[f"object{i}"] for i in (1, 2, 3)] == [42, 46, 51]


def test_colored_objects_answers_follow_from_the_scene() -> None:
    asked = set()
    for example in colored_objects(200, seed=0):
        words, twin = pieces(example.prompt), pieces(example.twin)
        colour_of = {words[i + 1]: words[i] for i in (41, 45, 50)}
        assert example.answer == f" {colour_of[example.word_at('queried')].capitalize()}"
        assert example.wrong == (f" {colour_of[twin[57]].capitalize()}",)
        assert example.word_at("object") == example.word_at("queried")
        assert example.word_at("colour") == example.answer.strip().lower()
        assert example.word_at("wrong_colour") == example.wrong[0].strip().lower()
        shot = {words[i + 1]: words[i] for i in (9, 13, 18)}
        assert words[30] == shot[words[25]].capitalize()
        asked.add(example.positions["colour"])
    assert asked == {41, 45, 50}


def test_colored_objects_shot_and_query_do_not_overlap() -> None:
    for example in colored_objects(200, seed=1):
        words = pieces(example.prompt)
        for known, places in ((COLOURS, (9, 13, 18, 41, 45, 50)), (OBJECTS, (10, 14, 19, 42, 46, 51))):
            found = [words[i] for i in places]
            assert set(found) <= set(known)
            assert len(set(found)) == 6


def test_colored_objects_article_fits_the_colour() -> None:
    for example in colored_objects(100, seed=2):
        words = pieces(example.prompt)
        for i in (9, 13, 18, 41, 45, 50):
            assert words[i - 1] == ("an" if words[i] == "orange" else "a")


def test_colored_objects_splits_share_no_query_scene() -> None:
    def scenes(split: str, places: tuple[int, ...]) -> set[frozenset[str]]:
        task = colored_objects(400, seed=0, split=split)  # type: ignore[arg-type]
        return {frozenset(pieces(p)[i] for i in places) for p in task.prompts}

    held_out = scenes("held_out", (42, 46, 51))
    assert not held_out & scenes("train", (42, 46, 51))
    assert not held_out & scenes("train", (10, 14, 19))


# Induction


@given(length=st.integers(2, 60), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_induction_points_to_the_earlier_copy(length: int, seed: int) -> None:
    example = induction(1, seed, length=length)[0]
    words = pieces(example.prompt)
    assert len(set(words)) == length
    assert example.word_at("copy") == example.word_at("end") == words[-1]
    assert example.positions["end"] - example.positions["copy"] == length
    assert example.answer == f" {example.word_at('next')}"
    assert example.wrong == (f" {example.word_at('next', twin=True)}",)
    assert example.wrong[0].strip() not in words


@pytest.mark.parametrize("length", [1, 0, 5000])
def test_induction_refuses_impossible_lengths(length: int) -> None:
    with pytest.raises(TaskError, match=str(length)):
        induction(1, seed=0, length=length)


def test_induction_takes_words_of_the_user() -> None:
    words = ["one", "two", "three", "four"]
    assert set(pieces(induction(1, 0, length=3, words=words)[0].prompt)) <= set(words)


@pytest.mark.parametrize("word", ["two words", "well-known", ""])
def test_induction_refuses_words_of_several_pieces(word: str) -> None:
    with pytest.raises(TaskError, match="single"):
        induction(1, 0, length=2, words=["one", "two", "three", word])


# Greater-than


def test_greater_than_answers_are_the_years_above() -> None:
    for example in greater_than(200, seed=0):
        year = int(example.word_at("year"))
        assert [int(answer) for answer in example.answers] == list(range(year + 1, 100))
        assert [int(answer) for answer in example.wrong] == list(range(year + 1))
        assert example.word_at("year", twin=True) == "01"
        assert example.word_at("century") == example.word_at("end")
        assert example.word_at("noun") in example.prompt


def test_greater_than_splits_share_no_prompt() -> None:
    assert not set(greater_than(2000, 0, split="train").prompts) & set(greater_than(2000, 0, split="held_out").prompts)
