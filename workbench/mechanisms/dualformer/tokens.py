"""Mazes as tokens, `start x y goal x y (wall x y)*`, and answers to them: clauses of a trace before a plan's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from workbench.errors import TaskError
from workbench.mechanisms.dualformer.mazes import Cell, Clause, Maze

PAD, BOS, EOS = "pad", "bos", "eos"
WORDS = ("start", "goal", "wall", "create", "close", "plan")


@dataclass(frozen=True)
class Answer:
    """What stands behind `bos`: a trace, whole or with parts left out, and a plan.

    Attributes:
        trace: clauses (do, x, y, cost, left); cost and left are None where costs are left out.
        plan: cells. n_trace: tokens of the trace.
    """

    trace: tuple[tuple[str, int, int, int | None, int | None], ...]
    plan: tuple[Cell, ...]
    n_trace: int


@dataclass(frozen=True)
class Vocabulary:
    """The tokens for mazes of up to width x height cells: words, cells, and costs c0, c1, …

    Attributes:
        whole: a cell is one token, "2,1", where the paper has two integers. In prompts it is one with the word before
            it, "wall:2,1": a maze is then a set of tokens, in which nothing has to be put together first.

    >>> words = Vocabulary(3, 2)
    >>> maze = Maze(3, 2, frozenset({(1, 0)}), (0, 0), (2, 0))
    >>> " ".join(words.prompt(maze))
    'start 0 0 goal 2 0 wall 1 0'
    >>> words.read_prompt(words.prompt(maze)) == maze
    True
    >>> " ".join(Vocabulary(3, 2, whole=True).prompt(maze))
    'start:0,0 goal:2,0 wall:1,0'
    """

    width: int
    height: int
    whole: bool = False

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """All tokens, in the order of their ids."""
        costs = (f"c{i}" for i in range(self.width * self.height))
        if not self.whole:
            integers = (str(i) for i in range(max(self.width, self.height)))
            return (PAD, BOS, EOS, *WORDS, *integers, *costs)
        cells = [f"{x},{y}" for y in range(self.height) for x in range(self.width)]
        return (PAD, BOS, EOS, *WORDS[3:], *cells, *costs, *(f"{word}:{cell}" for word in WORDS[:3] for cell in cells))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids by token."""
        return {token: i for i, token in enumerate(self.tokens)}

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """Ids of tokens.

        Raises:
            TaskError: a token that there is not.
        """
        unknown = next((token for token in tokens if token not in self.ids), None)
        if unknown is not None:
            raise TaskError(f"there is no token {unknown!r} for mazes of up to {self.width} x {self.height} cells")
        return [self.ids[token] for token in tokens]

    def decode(self, ids: Sequence[int]) -> list[str]:
        """Tokens of ids."""
        return [self.tokens[i] for i in ids]

    def prompt(self, maze: Maze) -> list[str]:
        """A maze; its walls in the order of their cells."""
        parts = [("start", maze.start), ("goal", maze.goal), *(("wall", wall) for wall in sorted(maze.walls))]
        if self.whole:
            return [f"{word}:{x},{y}" for word, (x, y) in parts]
        return [token for word, cell in parts for token in (word, *self.cell(cell))]

    def cell(self, cell: Cell) -> list[str]:
        """A cell, of one token or two."""
        x, y = map(str, cell)
        return [f"{x},{y}"] if self.whole else [x, y]

    def read_prompt(self, tokens: Sequence[str]) -> Maze:
        """The maze of a prompt.

        Raises:
            TaskError: the tokens do not parse, or make no maze.
        """
        read = _Reader([part for token in tokens for part in token.split(":", 1)] if self.whole else tokens)
        read.word("start")
        start = read.cell()
        read.word("goal")
        goal = read.cell()
        walls = []
        while read.more:
            read.word("wall")
            walls.append(read.cell())
        if len(set(walls)) < len(walls):
            raise TaskError("a wall stands twice in the prompt")
        return Maze(self.width, self.height, frozenset(walls), start, goal)

    def trace(self, clauses: Sequence[Clause], *, costs: bool = True) -> list[str]:
        """Clauses of a word, a cell and two costs, or without these."""
        found = []
        for do, x, y, cost, left in clauses:
            found += [do, *self.cell((x, y)), *((f"c{cost}", f"c{left}") if costs else ())]
        return found

    def plan(self, cells: Sequence[Cell]) -> list[str]:
        """The steps of a plan."""
        return [token for cell in cells for token in ("plan", *self.cell(cell))]

    def read_answer(self, tokens: Sequence[str]) -> Answer:
        """The trace and plan that tokens say, from `bos` or what comes behind it to `eos`.

        Raises:
            TaskError: the tokens do not parse: a clause or a step is not whole, a clause stands behind the plan, there
                is no plan or no end.
        """
        read = _Reader(tokens)
        if read.next in (BOS,):
            read.take()
        trace: list[tuple[str, int, int, int | None, int | None]] = []
        began = read.at
        while read.next in ("create", "close"):
            do = read.take()
            x, y = read.cell()
            costs = (
                (read.cost(), read.cost()) if read.next.startswith("c") and read.next[1:].isdecimal() else (None,) * 2
            )
            trace.append((do, x, y, *costs))
        n_trace, plan = read.at - began, []
        while read.next == "plan":
            read.take()
            plan.append(read.cell())
        if not plan:
            raise TaskError(f"there is no plan: {read.here}")
        read.word(EOS)
        if read.more:
            raise TaskError(f"tokens stand behind the end: {read.here}")
        return Answer(tuple(trace), tuple(plan), n_trace)


class _Reader:
    """Tokens that are taken one after another."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.at = tokens, 0

    @property
    def more(self) -> bool:
        return self.at < len(self.tokens)

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.more else ""

    @property
    def here(self) -> str:
        return f"token {self.at} is {self.next!r}" if self.more else f"the tokens end after {self.at}"

    def take(self) -> str:
        token = self.next
        self.at += 1
        return token

    def word(self, wanted: str) -> None:
        if self.next != wanted:
            raise TaskError(f"{wanted!r} is expected, but {self.here}")
        self.at += 1

    def cell(self) -> Cell:
        x, comma, y = self.next.partition(",")
        if not comma:
            return self._integer(), self._integer()
        if not (x.isdecimal() and y.isdecimal()):
            raise TaskError(f"a cell is expected, but {self.here}")
        self.at += 1
        return int(x), int(y)

    def cost(self) -> int:
        if not (self.next.startswith("c") and self.next[1:].isdecimal()):
            raise TaskError(f"a cost is expected, but {self.here}")
        return int(self.take()[1:])

    def _integer(self) -> int:
        if not self.next.isdecimal():
            raise TaskError(f"a coordinate is expected, but {self.here}")
        return int(self.take())
