"""Activation patching: of single heads, and of the stream, attentions and MLPs, by layer and position."""

from workbench.analysis.circuits.patching.heads import ablate_heads, ablation_effects, patch_heads
from workbench.analysis.circuits.patching.layers import patch_layers
from workbench.analysis.circuits.patching.progress import Patching, PatchingInterrupted
from workbench.analysis.circuits.patching.results import HeadPatching, LayerPatching

__all__ = [
    "HeadPatching",
    "LayerPatching",
    "Patching",
    "PatchingInterrupted",
    "ablate_heads",
    "ablation_effects",
    "patch_heads",
    "patch_layers",
]
