"""Structured trace dropping: how much of a search trace a model is taught, drawn anew for each example."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.errors import TaskError
from workbench.mechanisms.dualformer.mazes import Cell, Clause
from workbench.mechanisms.dualformer.tokens import Vocabulary

LEVELS = (0, 1, 2, 3, 4)
Third = Literal["paper", "repo_maze"]
_SHARE = 0.3  # of the create clauses that level 3 leaves out


@dataclass(frozen=True)
class Mixture:
    """How often each level is drawn; what is left is the whole trace.

    Attributes:
        close: level 1, without close clauses. cost: level 2, without costs either. create: level 3, without some of the
            create clauses either. trace: level 4, the plan alone.

    Raises:
        TaskError: a share below 0, or shares that sum to more than 1.

    >>> Mixture(close=0.1, cost=0.1, create=0.1, trace=0.3).shares
    (0.4, 0.1, 0.1, 0.1, 0.3)
    """

    close: float = 0.0
    cost: float = 0.0
    create: float = 0.0
    trace: float = 0.0

    def __post_init__(self) -> None:
        given = (self.close, self.cost, self.create, self.trace)
        if not all(share >= 0 for share in given) or not sum(given) <= 1 + 1e-9:
            raise TaskError(f"shares of levels are at least 0 and sum to at most 1, unlike {given}")

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the levels 0 to 4."""
        dropped = (self.close, self.cost, self.create, self.trace)
        return (round(max(0.0, 1 - sum(dropped)), 12), *dropped)

    def draw(self, random: random.Random) -> int:
        """A level."""
        return random.choices(LEVELS, self.shares)[0]


FULL, SOLUTION = Mixture(), Mixture(trace=1.0)
"""Searchformer's training on whole traces, and on plans alone."""
DUAL = Mixture(close=0.15, cost=0.15, create=0.15, trace=0.3)
"""What the shipped model was trained with; the shares of the paper's models are not published with its code."""
MIXTURES = {"dual": DUAL, "full": FULL, "solution": SOLUTION}


def drop(
    words: Vocabulary,
    trace: Sequence[Clause],
    plan: Sequence[Cell],
    level: int,
    random: random.Random,
    third: Third = "paper",
) -> list[str]:
    """The tokens of a trace at a level, and the plan behind them; `bos` and `eos` are not among them.

    Args:
        level: 0, everything; 1, no close clauses; 2, no costs either; 3, besides each create clause is left out with
            probability 0.3; 4, no trace.
        random: of level 3.
        third: level 3 as the paper tells it, or as its code does it for mazes ("repo_maze"): 10 to 40 % of the create
            clauses are left out, and costs are kept.

    Raises:
        TaskError: an unknown level or form of level 3.
    """
    if level not in LEVELS:
        raise TaskError(f"there is no level {level!r} of dropping", hint=f"levels are {LEVELS[0]} to {LEVELS[-1]}")
    if third not in ("paper", "repo_maze"):
        raise TaskError(f"there is no form {third!r} of level 3", hint='"paper" or "repo_maze"')
    kept = [clause for clause in trace if level == 0 or clause.do == "create"]
    if level == 3 and third == "paper":
        kept = [clause for clause in kept if random.random() >= _SHARE]
    elif level == 3:
        gone = set(random.sample(range(len(kept)), round(random.uniform(0.1, 0.4) * len(kept))))
        kept = [clause for i, clause in enumerate(kept) if i not in gone]
    kept = [] if level == 4 else kept
    costs = level < 2 or (level == 3 and third == "repo_maze")
    return [*words.trace(kept, costs=costs), *words.plan(plan)]
