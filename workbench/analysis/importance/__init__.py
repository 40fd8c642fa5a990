"""Which heads matter: scores by ablation and by gradient, and what is left when heads are pruned."""

from workbench.analysis.importance.partial_pruning import Hops
from workbench.analysis.importance.result import HeadImportance
from workbench.analysis.importance.scoring import METHODS, head_importance
from workbench.analysis.pruning.curve import PruningCurve, prune_curve

__all__ = [
    "METHODS",
    "HeadImportance",
    "Hops",
    "PruningCurve",
    "head_importance",
    "prune_curve",
]
