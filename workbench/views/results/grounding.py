"""The view of a grounding: what an answer reads, laid over the pictures."""

from __future__ import annotations

from workbench.analysis.grounding import Grounding
from workbench.views.base.registry import register
from workbench.views.grounding import grounding

register(Grounding, grounding)
