"""Dualformer: a maze transformer that answers at once, or thinks first, and what it learnt from thinning its traces.

Yu et al. 2410.09918. `mazes` has the mazes and their A* traces, `tokens` writes and reads them, `dropping` thins the
traces, `training` trains on two cores, `model` loads the shipped model and lets it think fast, slow or as it likes.
"""

from workbench.mechanisms.dualformer.dropping import DUAL, FULL, MIXTURES, SOLUTION, Mixture, drop
from workbench.mechanisms.dualformer.mazes import Clause, Maze, draw, search
from workbench.mechanisms.dualformer.model import Thought, load, think
from workbench.mechanisms.dualformer.tokens import Answer, Vocabulary

__all__ = [
    "DUAL",
    "FULL",
    "MIXTURES",
    "SOLUTION",
    "Answer",
    "Clause",
    "Maze",
    "Mixture",
    "Thought",
    "Vocabulary",
    "draw",
    "drop",
    "load",
    "search",
    "think",
]
