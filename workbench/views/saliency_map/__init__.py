"""Saliency map: what output tokens depend on, beside cross-attention and over the spectrogram."""

from workbench.views.base.kinds import register_kind
from workbench.views.saliency_map.view import SaliencyMap, saliency_map

__all__ = ["SaliencyMap", "saliency_map"]

register_kind("saliency_map", __package__)
