"""Grounding: which picture, tile and patch an answer's token reads, laid over the pictures."""

from workbench.views.base.kinds import register_kind
from workbench.views.grounding.view import GroundingView, grounding

__all__ = ["GroundingView", "grounding"]

register_kind("grounding", __package__)
