"""Mazes of cells, their shortest plans, and the trace of the A* search that finds one."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from workbench.errors import TaskError

Cell = tuple[int, int]


class Clause(NamedTuple):
    """One line of a search trace: a cell that was put into the frontier, or taken out of it.

    Attributes:
        do: "create" or "close". x, y: the cell. cost: steps from the start. left: Manhattan distance to the goal.
    """

    do: str
    x: int
    y: int
    cost: int
    left: int


@dataclass(frozen=True)
class Maze:
    """A grid of cells with walls, in which unit steps lead up, down, left and right.

    Attributes:
        width, height: in cells. walls: cells that nobody enters. start, goal: (x, y).

    Raises:
        TaskError: a start, goal or wall outside of the grid, or a start or goal in a wall.

    >>> maze = Maze(3, 2, frozenset({(1, 0)}), (0, 0), (2, 0))
    >>> maze.shortest()
    [(0, 0), (0, 1), (1, 1), (2, 1), (2, 0)]
    >>> print(maze)
    S#G
    ...
    """

    width: int
    height: int
    walls: frozenset[Cell]
    start: Cell
    goal: Cell

    def __post_init__(self) -> None:
        for what, cell in (("start", self.start), ("goal", self.goal), *(("wall", wall) for wall in self.walls)):
            if not (0 <= cell[0] < self.width and 0 <= cell[1] < self.height):
                raise TaskError(f"the {what} {cell} lies outside of a maze of {self.width} x {self.height} cells")
        for what, cell in (("start", self.start), ("goal", self.goal)):
            if cell in self.walls:
                raise TaskError(f"the {what} {cell} is a wall")

    def neighbours(self, cell: Cell) -> Iterator[Cell]:
        """The free cells one step away."""
        for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1)):
            x, y = cell[0] + dx, cell[1] + dy
            if 0 <= x < self.width and 0 <= y < self.height and (x, y) not in self.walls:
                yield x, y

    def distances(self) -> dict[Cell, int]:
        """Steps from each cell to the goal, of the cells from which it can be reached; breadth first."""
        found, waiting = {self.goal: 0}, deque([self.goal])
        while waiting:
            cell = waiting.popleft()
            for other in self.neighbours(cell):
                if other not in found:
                    found[other] = found[cell] + 1
                    waiting.append(other)
        return found

    def shortest(self) -> list[Cell]:
        """A shortest plan: the cells from start to goal, both included.

        Raises:
            TaskError: the goal cannot be reached.
        """
        left = self.distances()
        if self.start not in left:
            raise TaskError(f"no way leads from {self.start} to {self.goal}", hint="draw(random) gives solvable mazes")
        plan = [self.start]
        while plan[-1] != self.goal:
            plan.append(next(cell for cell in self.neighbours(plan[-1]) if left.get(cell, -1) == left[plan[-1]] - 1))
        return plan

    def fault_of(self, plan: Sequence[Cell]) -> str:
        """What is wrong with a plan: a wall, a leap, another start or end; "" if it leads to the goal."""
        if not plan or plan[0] != self.start:
            return "it does not begin at the start"
        for before, cell in pairwise(plan):
            if cell not in self.neighbours(before):
                return f"no step leads from {before} to {cell}"
        return "" if plan[-1] == self.goal else "it does not end at the goal"

    def is_optimal(self, plan: Sequence[Cell]) -> bool:
        """Whether a plan leads to the goal in as few steps as there can be."""
        return not self.fault_of(plan) and len(plan) == self.distances()[self.start] + 1

    def __str__(self) -> str:
        marks = {self.start: "S", self.goal: "G", **dict.fromkeys(self.walls, "#")}
        return "\n".join("".join(marks.get((x, y), ".") for x in range(self.width)) for y in range(self.height))


def search(maze: Maze, random: random.Random | None = None) -> tuple[list[Clause], list[Cell]]:
    """A* with the Manhattan distance: its trace, and the plan that it finds, which is a shortest one.

    Args:
        random: shuffles children and breaks ties, as in the training data of the paper; without it both keep an order.

    Raises:
        TaskError: the goal cannot be reached.
    """

    def left(cell: Cell) -> int:
        return abs(cell[0] - maze.goal[0]) + abs(cell[1] - maze.goal[1])

    cost, parent, closed = {maze.start: 0}, dict[Cell, Cell](), set[Cell]()
    trace = [Clause("create", *maze.start, 0, left(maze.start))]
    frontier = [(left(maze.start), 0.0, maze.start)]
    while frontier:
        _, _, cell = heapq.heappop(frontier)
        if cell in closed:
            continue
        closed.add(cell)
        trace.append(Clause("close", *cell, cost[cell], left(cell)))
        if cell == maze.goal:
            plan = [cell]
            while plan[-1] != maze.start:
                plan.append(parent[plan[-1]])
            return trace, plan[::-1]
        children = list(maze.neighbours(cell))
        if random is not None:
            random.shuffle(children)
        for child in children:
            if child not in closed and cost[cell] + 1 < cost.get(child, 1 << 30):
                cost[child], parent[child] = cost[cell] + 1, cell
                trace.append(Clause("create", *child, cost[child], left(child)))
                tie = float(len(trace)) if random is None else random.random()
                heapq.heappush(frontier, (cost[child] + left(child), tie, child))
    raise TaskError(f"no way leads from {maze.start} to {maze.goal}", hint="draw(random) gives solvable mazes")


def draw(random: random.Random, width: int = 4, height: int = 4, *, n_walls: int | None = None) -> Maze:
    """A random maze that can be solved, and not in a few steps: its plan has at least max(width, height) cells.

    Args:
        n_walls: how many cells are walls; from 30 to 50 % of them by default.

    Raises:
        TaskError: a grid of fewer than four cells, or so many walls that no such maze is found.
    """
    if width < 2 or height < 2:
        raise TaskError(f"a maze has at least 2 x 2 cells, not {width} x {height}")
    cells = [(x, y) for x in range(width) for y in range(height)]
    for _ in range(10_000):
        n = random.randint(-(-3 * len(cells) // 10), len(cells) // 2) if n_walls is None else n_walls
        if not 0 <= n <= len(cells) - 2:
            break
        start, goal, *walls = random.sample(cells, n + 2)
        maze = Maze(width, height, frozenset(walls), start, goal)
        if maze.distances().get(start, 0) + 1 >= max(width, height):
            return maze
    raise TaskError(f"no maze of {width} x {height} cells with {n_walls} walls has a plan that is long enough")
