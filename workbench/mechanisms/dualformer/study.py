"""What the modes of a maze transformer cost and give, and tasks by which their circuits can be found and compared."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.statistics.intervals import mean_t, proportions
from workbench.errors import TaskError
from workbench.mechanisms.dualformer.mazes import Cell, Clause, Maze, search
from workbench.mechanisms.dualformer.model import WORDS, Thought, prompts
from workbench.mechanisms.dualformer.tokens import BOS
from workbench.tasks import InputTask, from_inputs

N_WALLS, N_CREATES = 10, 10
"""Of the mazes of the tasks: as many tokens in all prompts, and in all traces."""
_TRIES = 400  # mazes with the same start and goal, among which twins are looked for


@dataclass(frozen=True)
class Scores:
    """What a mode gave on some mazes, with 95 % intervals over mazes.

    Attributes:
        optimal, solved: shares of plans that are shortest, and that lead to the goal. n_trace: tokens of the trace, in
            the mean. fast: share that was answered without a trace. unparsed: share that says nothing. n: mazes.
    """

    optimal: tuple[float, float, float]
    solved: tuple[float, float, float]
    n_trace: tuple[float, float, float]
    fast: float
    unparsed: float
    n: int


def scores(thoughts: Sequence[Thought]) -> Scores:
    """Measure what a model made of mazes: exact intervals of shares (Clopper and Pearson), t intervals of lengths.

    Raises:
        TaskError: there is nothing to measure.
    """
    if not thoughts:
        raise TaskError("there is no thought to measure")
    length = torch.tensor([one.n_trace for one in thoughts], dtype=torch.float64)
    return Scores(
        optimal=_share([one.optimal for one in thoughts]), solved=_share([one.solved for one in thoughts]),
        n_trace=(float(length.mean()), *mean_t(length)), fast=_mean([one.went_fast for one in thoughts]),
        unparsed=_mean([one.answer is None for one in thoughts]), n=len(thoughts),
    )  # fmt: skip


def _share(values: Sequence[bool]) -> tuple[float, float, float]:
    right = torch.tensor(values, dtype=torch.float64)
    low, high = proportions(right).tolist()
    return float(right.mean()), low, high


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def step_task(mode: str, n: int = 32, seed: int = 0) -> InputTask:
    """The first step of a plan: fast, from the maze alone, or slow, behind the create clauses of its search.

    The encoder reads the maze; the decoder has written `plan x,y plan` of the start, behind `bos`, or behind a trace
    of level 2. The next token is the plan's second cell. The twin has the same start and goal, as many walls and
    clauses, and its only shortest plan has another second cell. Both modes have the same mazes.

    Args:
        mode: "fast" or "slow". n: mazes. seed: of the mazes.

    Raises:
        TaskError: another mode.
    """
    if mode not in ("fast", "slow"):
        raise TaskError(f'the first step is asked for "fast" or "slow", not {mode!r}')
    pairs, source = list[tuple[_Drawn, _Drawn]](), random.Random(f"steps {seed}")
    while len(pairs) < n:
        pairs += list(_twins(source))[: n - len(pairs)]
    inputs, twins = (_inputs([pair[i] for pair in pairs], mode) for i in (0, 1))
    right, wrong = ([WORDS.encode(WORDS.cell(pair[i].second))[0] for pair in pairs] for i in (0, 1))
    return from_inputs(
        inputs,
        twins,
        right,
        wrong,
        name=f"first step, {mode}",
        source="random mazes",
        positions={"start": 0, "goal": 1},
    )


def mode_task(n: int = 32, seed: int = 0) -> InputTask:
    """What comes behind the start's cell when the first token was `plan`; in the twin it was `create`.

    Both have the same maze, so that only the control token says which mode it is.
    """
    source, mazes = random.Random(f"modes {seed}"), list[Maze]()
    while len(mazes) < n:
        mazes += [one.maze for pair in _twins(source) for one in pair][: n - len(mazes)]
    ids, _ = prompts(mazes)
    written = [
        torch.tensor([WORDS.encode([BOS, word, *WORDS.cell(maze.start)]) for maze in mazes])
        for word in ("plan", "create")
    ]
    slow = [WORDS.ids["create"], WORDS.ids["close"], WORDS.ids["c0"]]
    inputs, twins = ({"input_ids": ids, "decoder_input_ids": each} for each in written)
    return from_inputs(inputs, twins, [WORDS.ids["plan"]] * n, [slow] * n, name="mode", source="random mazes")


@dataclass(frozen=True)
class _Drawn:
    """A maze, the create clauses of its search, and the second cell of its only shortest plan's beginning."""

    maze: Maze
    creates: tuple[Clause, ...]
    second: Cell


def _twins(source: random.Random) -> Iterator[tuple[_Drawn, _Drawn]]:
    """Pairs of mazes of one start and goal whose plans begin with different steps; none or one."""
    cells = [(x, y) for x in range(WORDS.width) for y in range(WORDS.height)]
    start, goal = source.sample(cells, 2)
    others = [cell for cell in cells if cell not in (start, goal)]
    found: dict[Cell, _Drawn] = {}
    for _ in range(_TRIES):
        maze = Maze(WORDS.width, WORDS.height, frozenset(source.sample(others, N_WALLS)), start, goal)
        left = maze.distances()
        if left.get(start, 0) + 1 < max(WORDS.width, WORDS.height):
            continue
        best = [cell for cell in maze.neighbours(start) if left.get(cell) == left[start] - 1]
        if len(best) != 1:
            continue
        creates = tuple(clause for clause in search(maze)[0] if clause.do == "create")
        if len(creates) != N_CREATES:
            continue
        one = _Drawn(maze, creates, best[0])
        other = next((each for second, each in found.items() if second != one.second), None)
        if other is not None:
            yield other, one
            return
        found.setdefault(one.second, one)


def _inputs(drawn: Sequence[_Drawn], mode: str) -> dict[str, Tensor]:
    ids, _ = prompts([one.maze for one in drawn])
    rows = []
    for one in drawn:
        trace = WORDS.trace(one.creates, costs=False) if mode == "slow" else []
        rows.append(WORDS.encode([BOS, *trace, "plan", *WORDS.cell(one.maze.start), "plan"]))
    return {"input_ids": ids, "decoder_input_ids": torch.tensor(rows)}


def token_flow(weights: Tensor, queries: Sequence[str], keys: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    """Mean weight from each class of tokens to each: words by themselves, coordinates "cell", costs "cost".

    Args:
        weights: [head, query, key] of one example.

    Returns:
        (from, to) -> [head], the sum over the keys of a class, in the mean over the queries of one.
    """
    of_queries, of_keys = ([_class(token) for token in tokens] for tokens in (queries, keys))
    found = {}
    for one in dict.fromkeys(of_queries):
        rows = weights[:, [i for i, name in enumerate(of_queries) if name == one]]
        for other in dict.fromkeys(of_keys):
            found[one, other] = rows[..., [i for i, name in enumerate(of_keys) if name == other]].sum(-1).mean(-1)
    return found


def _class(token: str) -> str:
    if token[0].isdecimal():
        return "cell"
    return "cost" if token.startswith("c") and token[1:].isdecimal() else token


def to_json(found: Scores) -> dict[str, Any]:
    """As the benchmark keeps them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(found).items()}
