"""Which heads matter: scores by ablation and by gradient, and what is left when heads are pruned."""

from workbench.analysis.importance.parts import Hops
from workbench.analysis.importance.run import METHODS, head_importance
from workbench.analysis.importance.scores import HeadImportance
from workbench.analysis.pruning.curve import PruningCurve, prune_curve

__all__ = [
    "METHODS",
    "HeadImportance",
    "Hops",
    "PruningCurve",
    "head_importance",
    "prune_curve",
]
