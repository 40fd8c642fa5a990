"""Mazes, their searches as tokens, and how traces are thinned."""

import random
from collections import Counter, deque

import pytest

from workbench import TaskError
from workbench.mechanisms.dualformer import DUAL, FULL, SOLUTION, Maze, Mixture, Vocabulary, draw, drop, search

PAPER = Vocabulary(5, 5)
SIZES = [(2, 2), (5, 5), (7, 4), (3, 9)]


def drawn(n: int = 40, width: int = 5, height: int = 5) -> list[Maze]:
    source = random.Random(0)
    return [draw(source, width, height) for _ in range(n)]


def by_hand(maze: Maze) -> int:
    """Cells of a shortest plan, by a search of its own."""
    seen, waiting = {maze.start}, deque([(maze.start, 1)])
    while waiting:
        (x, y), n = waiting.popleft()
        if (x, y) == maze.goal:
            return n
        for cell in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            inside = 0 <= cell[0] < maze.width and 0 <= cell[1] < maze.height
            if inside and cell not in maze.walls and cell not in seen:
                seen.add(cell)
                waiting.append((cell, n + 1))
    raise AssertionError


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_plan_of_the_search_is_a_shortest_one_and_reads_back(width: int, height: int, whole: bool) -> None:
    source, words = random.Random(1), Vocabulary(width, height, whole)
    for maze in drawn(25, width, height):
        for given in (None, source):
            trace, plan = search(maze, given)
            assert len(plan) == len(maze.shortest()) == by_hand(maze) >= max(width, height)
            assert maze.is_optimal(plan)
            answer = words.read_answer(["bos", *words.trace(trace), *words.plan(plan), "eos"])
            assert answer.plan == tuple(plan)
            assert answer.trace == tuple(map(tuple, trace))
            assert answer.n_trace == (5 - whole) * len(trace)
        assert words.read_prompt(words.prompt(maze)) == maze
        assert words.decode(words.encode(words.prompt(maze))) == words.prompt(maze)


def test_walls_are_from_30_to_50_percent() -> None:
    assert {len(maze.walls) for maze in drawn(300)} == set(range(8, 13))
    assert len(draw(random.Random(0), 5, 5, n_walls=3).walls) == 3


def test_costs_of_a_trace_are_steps_and_distances() -> None:
    for maze in drawn(10):
        trace, plan = search(maze, random.Random(2))
        assert trace[0] == (
            "create",
            *maze.start,
            0,
            abs(maze.start[0] - maze.goal[0]) + abs(maze.start[1] - maze.goal[1]),
        )
        assert trace[-1][:4] == ("close", *maze.goal, len(plan) - 1)
        created = {clause[1:3] for clause in trace if clause.do == "create"}
        assert {clause[1:3] for clause in trace if clause.do == "close"} <= created


def test_what_each_level_leaves() -> None:
    for maze in drawn(10):
        trace, plan = search(maze, random.Random(3))
        steps = 3 * len(plan)
        n_c = sum(clause.do == "create" for clause in trace)
        tokens = {level: drop(PAPER, trace, plan, level, random.Random(level)) for level in range(5)}
        assert len(tokens[0]) - steps == 5 * len(trace)
        assert len(tokens[1]) - steps == 5 * n_c
        assert len(tokens[2]) - steps == 3 * n_c
        assert len(tokens[4]) == steps
        whole = [tuple(tokens[2][i : i + 3]) for i in range(0, 3 * n_c, 3)]
        some = [tuple(tokens[3][i : i + 3]) for i in range(0, len(tokens[3]) - steps, 3)]
        rest = iter(whole)
        assert all(clause in rest for clause in some)  # a part of them, in their order
        code = drop(PAPER, trace, plan, 3, random.Random(0), "repo_maze")
        gone = n_c - (len(code) - steps) // 5
        assert round(0.1 * n_c) <= gone <= round(0.4 * n_c)
        assert (len(code) - steps) % 5 == 0


def test_level_3_drops_three_of_ten_in_the_mean() -> None:
    source, before, after = random.Random(4), 0, 0
    for maze in drawn(200):
        trace, plan = search(maze, source)
        before += sum(clause.do == "create" for clause in trace)
        after += (len(drop(PAPER, trace, plan, 3, source)) - 3 * len(plan)) // 3
    assert 0.27 < 1 - after / before < 0.33


def test_levels_are_drawn_as_often_as_the_mixture_says() -> None:
    source, n = random.Random(5), 4000
    counts = Counter(DUAL.draw(source) for _ in range(n))
    squares = sum((counts[level] - n * share) ** 2 / (n * share) for level, share in enumerate(DUAL.shares))
    assert squares < 18.5  # chi-square of 4 degrees, p 0.001
    assert FULL.shares == (1.0, 0.0, 0.0, 0.0, 0.0)
    assert {SOLUTION.draw(source) for _ in range(50)} == {4}
    assert {FULL.draw(source) for _ in range(50)} == {0}


@pytest.mark.parametrize("shares", [{"close": 0.6, "trace": 0.5}, {"cost": -0.1}, {"create": float("nan")}])
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(TaskError, match="sum to at most 1"):
        Mixture(**shares)


def test_a_maze_without_a_way_is_refused_with_a_reason() -> None:
    maze = Maze(3, 3, frozenset({(1, 0), (1, 1), (1, 2)}), (0, 0), (2, 2))
    for solve in (maze.shortest, lambda: search(maze)):
        with pytest.raises(TaskError, match="no way leads from"):
            solve()
    with pytest.raises(TaskError, match="no maze of 5 x 5 cells with 24 walls"):
        draw(random.Random(0), 5, 5, n_walls=24)
    with pytest.raises(TaskError, match="is a wall"):
        Maze(3, 3, frozenset({(0, 0)}), (0, 0), (2, 2))
    with pytest.raises(TaskError, match="outside"):
        Maze(3, 3, frozenset(), (0, 3), (2, 2))
    with pytest.raises(TaskError, match="no level 5"):
        drop(PAPER, [], [], 5, random.Random(0))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([], "begin at the start"),
        ([(0, 0), (1, 1)], "no step leads"),
        ([(0, 0), (1, 0)], "no step leads"),
        ([(0, 0), (0, 1)], "end at the goal"),
        ([(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)], ""),
    ],
)
def test_what_is_wrong_with_a_plan(plan: list[tuple[int, int]], said: str) -> None:
    maze = Maze(3, 3, frozenset({(1, 0)}), (0, 0), (2, 2))
    assert said in maze.fault_of(plan)
    assert bool(maze.fault_of(plan)) == bool(said)
    assert not maze.is_optimal(plan) or len(plan) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bos create 0 0 c0 c4 plan 0 0", "'eos' is expected, but the tokens end"),
        ("bos create 0 c0 c4 plan 0 0 eos", "coordinate"),
        ("bos create 0 0 c0 plan 0 0 eos", "a cost is expected"),
        ("bos create 0 0 c0 c4 eos", "there is no plan"),
        ("bos plan 0 0 create 0 0 eos", "'eos' is expected"),
        ("bos plan 0 0 eos plan", "behind the end"),
        ("", "there is no plan"),
    ],
)
def test_answers_that_do_not_parse_say_where(text: str, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        PAPER.read_answer(text.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("start 0 0 goal 1", "coordinate"),
        ("start 0 0 goal 1 1 door 2 2", "'wall' is expected"),
        ("start 0 0 goal 1 1 wall 0 0", "is a wall"),
        ("start 0 0 goal 1 1 wall 2 2 wall 2 2", "twice"),
        ("start 0 0 goal 9 1", "outside"),
        ("start:0,0 goal:4,4 wall:5,1", "outside"),
        ("start:0,0 goal:1", "coordinate"),
        ("start:0,0 goal:x,1", "a cell is expected"),
    ],
)
def test_prompts_that_do_not_parse_say_where(text: str, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        Vocabulary(5, 5, ":" in text).read_prompt(text.split())
    with pytest.raises(TaskError, match="no token 'door'"):
        PAPER.encode(["door"])
