"""Views of captures and of what analyses return; each file registers those of one analysis."""

from workbench.views.results import (
    circuits,
    corpus,
    eviction,
    exhibits,
    gates,
    grounding,
    head_scores,
    hybrids,
    importance,
    logits,
    mechanisms,
    memory,
    pattern_atlas,
    profile,
    rollout,
    spikes,
    weights,
)
from workbench.views.results.capture import overview
from workbench.views.results.circuit_overlap import overlap_chance
from workbench.views.results.conditioning import capacity_correlation
from workbench.views.results.cross_attention import cross_attention
from workbench.views.results.recurrences import half_lives, states

__all__ = [
    "capacity_correlation",
    "circuits",
    "corpus",
    "cross_attention",
    "eviction",
    "exhibits",
    "gates",
    "grounding",
    "half_lives",
    "head_scores",
    "hybrids",
    "importance",
    "logits",
    "mechanisms",
    "memory",
    "overlap_chance",
    "overview",
    "pattern_atlas",
    "profile",
    "rollout",
    "spikes",
    "states",
    "weights",
]
