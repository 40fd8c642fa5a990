"""MaTVLM (arXiv 2503.13440): Mamba-2 layers that begin as attention, distilled from it, and compared with it."""

from workbench.mechanisms.matvlm.card import MATVLM
from workbench.mechanisms.matvlm.distil import Distillation, Losses, distil, losses
from workbench.mechanisms.matvlm.layer import Mamba2
from workbench.mechanisms.matvlm.maps import HybridMaps, hybrid_maps
from workbench.mechanisms.matvlm.seed import AttentionWeights, attention_weights, seed_mamba2
from workbench.mechanisms.matvlm.student import Student, evenly_spaced, student

__all__ = [
    "MATVLM",
    "AttentionWeights",
    "Distillation",
    "HybridMaps",
    "Losses",
    "Mamba2",
    "Student",
    "attention_weights",
    "distil",
    "evenly_spaced",
    "hybrid_maps",
    "losses",
    "seed_mamba2",
    "student",
]
