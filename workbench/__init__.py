"""Attach to a PyTorch model, leave it on the fast attention kernel it already uses, and look at every head.

Everything public is here; a name is imported when it is first used, so that `import workbench` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from workbench.errors import (
    AttachError,
    CaptureError,
    FileError,
    FormatError,
    InterventionError,
    ReportError,
    TaskError,
    WorkbenchError,
)
from workbench.storage import rendering

if TYPE_CHECKING:
    from workbench import mechanisms, metrics, models, tasks, views
    from workbench.analysis.atlas import PatternAtlas, pattern_atlas
    from workbench.analysis.circuits.circuit import Circuit
    from workbench.analysis.circuits.faithfulness import Faithfulness, circuit_faithfulness
    from workbench.analysis.circuits.faithfulness_curve import FaithfulnessCurve, faithfulness_curve
    from workbench.analysis.circuits.find import Stage, find_circuit
    from workbench.analysis.circuits.methods.pruning import Pruning, PruningInterrupted
    from workbench.analysis.circuits.overlap import circuit_overlap
    from workbench.analysis.circuits.overlap_result import CircuitOverlap
    from workbench.analysis.circuits.patching import (
        HeadPatching,
        LayerPatching,
        Patching,
        PatchingInterrupted,
        ablate_heads,
        patch_heads,
        patch_layers,
    )
    from workbench.analysis.circuits.repair import Repair, repair
    from workbench.analysis.circuits.roles import HeadRoles, head_roles
    from workbench.analysis.circuits.stability import Stability, circuit_stability
    from workbench.analysis.conditioning.capacity import Capacity, capacity
    from workbench.analysis.conditioning.experiments import Conditioning, conditioning
    from workbench.analysis.corpus import CorpusAtlas, CorpusAtlasInterrupted, head_atlas_over
    from workbench.analysis.cross_attention import (
        CrossAttention,
        CrossAttentionSaliency,
        cross_attention,
        cross_attention_saliency,
    )
    from workbench.analysis.eviction import Eviction, eviction
    from workbench.analysis.gates import GateProfile, gate_profile
    from workbench.analysis.grounding import (
        Grounding,
        ImagePlaces,
        Pointing,
        grounding,
        image_places,
        pointing,
        word_grounding,
    )
    from workbench.analysis.head_scores import (
        RetrievalScores,
        StreamingScores,
        retrieval_scores,
        streaming_scores,
    )
    from workbench.analysis.importance import HeadImportance, PruningCurve, head_importance
    from workbench.analysis.logits import LogitAttribution, LogitLens, logit_attribution, logit_lens
    from workbench.analysis.memory import MemoryReading, MemoryTree, memory_reading, track_long
    from workbench.analysis.profile import AttentionProfile, attention_profile
    from workbench.analysis.pruning.prune import prune_heads
    from workbench.analysis.rollout import AttentionRollout, attention_rollout
    from workbench.analysis.saliency import PrecisionError, Saliency, saliency
    from workbench.analysis.spikes import SpikeActivity, spike_activity
    from workbench.analysis.weights import (
        CompositionScores,
        OVCopying,
        SingularVectors,
        composition_scores,
        ov_copying,
        singular_vectors,
    )
    from workbench.capture.capture import Capture
    from workbench.capture.loading import load_capture
    from workbench.capture.site_capture import SiteCapture
    from workbench.hooks.heads import KVGroup
    from workbench.hooks.readers import Mixing, ModuleRun, gating, reader
    from workbench.hooks.split_models import split_over
    from workbench.investigator import Investigation, InvestigationInterrupted, Memory, investigate
    from workbench.kernels.functions import attention_function
    from workbench.kernels.statistics import statistic
    from workbench.metrics import Metric
    from workbench.report import Report
    from workbench.session.attaching import attach
    from workbench.session.workbench import Workbench
    from workbench.sweep.result import Sweep, SweepInterrupted
    from workbench.sweep.run import run_sweep
    from workbench.sweep.variants import Variant
    from workbench.workers.ray_workers import RayWorkers

__version__ = "0.1.0"

_LAZY = {
    "Workbench": "workbench.session.workbench",
    "attach": "workbench.session.attaching",
    "AttentionProfile": "workbench.analysis.profile",
    "attention_profile": "workbench.analysis.profile",
    "AttentionRollout": "workbench.analysis.rollout",
    "attention_rollout": "workbench.analysis.rollout",
    "PatternAtlas": "workbench.analysis.atlas",
    "pattern_atlas": "workbench.analysis.atlas",
    "Capacity": "workbench.analysis.conditioning.capacity",
    "capacity": "workbench.analysis.conditioning.capacity",
    "Circuit": "workbench.analysis.circuits.circuit",
    "Faithfulness": "workbench.analysis.circuits.faithfulness",
    "FaithfulnessCurve": "workbench.analysis.circuits.faithfulness_curve",
    "circuit_faithfulness": "workbench.analysis.circuits.faithfulness",
    "faithfulness_curve": "workbench.analysis.circuits.faithfulness_curve",
    "Stage": "workbench.analysis.circuits.find",
    "find_circuit": "workbench.analysis.circuits.find",
    "CircuitOverlap": "workbench.analysis.circuits.overlap_result",
    "circuit_overlap": "workbench.analysis.circuits.overlap",
    "HeadPatching": "workbench.analysis.circuits.patching",
    "ablate_heads": "workbench.analysis.circuits.patching",
    "LayerPatching": "workbench.analysis.circuits.patching",
    "Patching": "workbench.analysis.circuits.patching",
    "PatchingInterrupted": "workbench.analysis.circuits.patching",
    "patch_heads": "workbench.analysis.circuits.patching",
    "patch_layers": "workbench.analysis.circuits.patching",
    "Pruning": "workbench.analysis.circuits.methods.pruning",
    "PruningInterrupted": "workbench.analysis.circuits.methods.pruning",
    "Repair": "workbench.analysis.circuits.repair",
    "repair": "workbench.analysis.circuits.repair",
    "HeadRoles": "workbench.analysis.circuits.roles",
    "head_roles": "workbench.analysis.circuits.roles",
    "Stability": "workbench.analysis.circuits.stability",
    "circuit_stability": "workbench.analysis.circuits.stability",
    "Conditioning": "workbench.analysis.conditioning.experiments",
    "conditioning": "workbench.analysis.conditioning.experiments",
    "CrossAttention": "workbench.analysis.cross_attention",
    "CrossAttentionSaliency": "workbench.analysis.cross_attention",
    "cross_attention": "workbench.analysis.cross_attention",
    "cross_attention_saliency": "workbench.analysis.cross_attention",
    "Eviction": "workbench.analysis.eviction",
    "eviction": "workbench.analysis.eviction",
    "Capture": "workbench.capture.capture",
    "SiteCapture": "workbench.capture.site_capture",
    "load_capture": "workbench.capture.loading",
    "LogitAttribution": "workbench.analysis.logits",
    "LogitLens": "workbench.analysis.logits",
    "logit_attribution": "workbench.analysis.logits",
    "logit_lens": "workbench.analysis.logits",
    "KVGroup": "workbench.hooks.heads",
    "attention_function": "workbench.kernels.functions",
    "statistic": "workbench.kernels.statistics",
    "Investigation": "workbench.investigator",
    "InvestigationInterrupted": "workbench.investigator",
    "investigate": "workbench.investigator",
    "Memory": "workbench.investigator",
    "Metric": "workbench.metrics",
    "Mixing": "workbench.hooks.readers",
    "ModuleRun": "workbench.hooks.readers",
    "gating": "workbench.hooks.readers",
    "reader": "workbench.hooks.readers",
    "Report": "workbench.report",
    "GateProfile": "workbench.analysis.gates",
    "gate_profile": "workbench.analysis.gates",
    "Grounding": "workbench.analysis.grounding",
    "ImagePlaces": "workbench.analysis.grounding",
    "grounding": "workbench.analysis.grounding",
    "Pointing": "workbench.analysis.grounding",
    "image_places": "workbench.analysis.grounding",
    "pointing": "workbench.analysis.grounding",
    "word_grounding": "workbench.analysis.grounding",
    "MemoryReading": "workbench.analysis.memory",
    "MemoryTree": "workbench.analysis.memory",
    "memory_reading": "workbench.analysis.memory",
    "track_long": "workbench.analysis.memory",
    "HeadImportance": "workbench.analysis.importance",
    "PruningCurve": "workbench.analysis.importance",
    "head_importance": "workbench.analysis.importance",
    "prune_heads": "workbench.analysis.pruning.prune",
    "PrecisionError": "workbench.analysis.saliency",
    "Saliency": "workbench.analysis.saliency",
    "saliency": "workbench.analysis.saliency",
    "SpikeActivity": "workbench.analysis.spikes",
    "spike_activity": "workbench.analysis.spikes",
    "CompositionScores": "workbench.analysis.weights",
    "OVCopying": "workbench.analysis.weights",
    "SingularVectors": "workbench.analysis.weights",
    "composition_scores": "workbench.analysis.weights",
    "ov_copying": "workbench.analysis.weights",
    "singular_vectors": "workbench.analysis.weights",
    "RetrievalScores": "workbench.analysis.head_scores",
    "StreamingScores": "workbench.analysis.head_scores",
    "CorpusAtlas": "workbench.analysis.corpus",
    "CorpusAtlasInterrupted": "workbench.analysis.corpus",
    "head_atlas_over": "workbench.analysis.corpus",
    "retrieval_scores": "workbench.analysis.head_scores",
    "streaming_scores": "workbench.analysis.head_scores",
    "Sweep": "workbench.sweep.result",
    "SweepInterrupted": "workbench.sweep.result",
    "Variant": "workbench.sweep.variants",
    "RayWorkers": "workbench.workers.ray_workers",
    "split_over": "workbench.hooks.split_models",
    "run_sweep": "workbench.sweep.run",
}
_LAZY_MODULES = ("mechanisms", "metrics", "models", "tasks", "views")

__all__ = [
    "AttachError",
    "AttentionProfile",
    "AttentionRollout",
    "Capacity",
    "Capture",
    "CaptureError",
    "Circuit",
    "CircuitOverlap",
    "CompositionScores",
    "Conditioning",
    "CorpusAtlas",
    "CorpusAtlasInterrupted",
    "CrossAttention",
    "CrossAttentionSaliency",
    "Eviction",
    "Faithfulness",
    "FaithfulnessCurve",
    "FileError",
    "FormatError",
    "GateProfile",
    "Grounding",
    "HeadImportance",
    "HeadPatching",
    "HeadRoles",
    "ImagePlaces",
    "InterventionError",
    "Investigation",
    "InvestigationInterrupted",
    "KVGroup",
    "LayerPatching",
    "LogitAttribution",
    "LogitLens",
    "Memory",
    "MemoryReading",
    "MemoryTree",
    "Metric",
    "Mixing",
    "ModuleRun",
    "OVCopying",
    "Patching",
    "PatchingInterrupted",
    "PatternAtlas",
    "Pointing",
    "PrecisionError",
    "Pruning",
    "PruningCurve",
    "PruningInterrupted",
    "RayWorkers",
    "Repair",
    "Report",
    "ReportError",
    "RetrievalScores",
    "Saliency",
    "SingularVectors",
    "SiteCapture",
    "SpikeActivity",
    "Stability",
    "Stage",
    "StreamingScores",
    "Sweep",
    "SweepInterrupted",
    "TaskError",
    "Variant",
    "Workbench",
    "WorkbenchError",
    "ablate_heads",
    "attach",
    "attention_function",
    "attention_profile",
    "attention_rollout",
    "capacity",
    "circuit_faithfulness",
    "circuit_overlap",
    "circuit_stability",
    "composition_scores",
    "conditioning",
    "cross_attention",
    "cross_attention_saliency",
    "eviction",
    "faithfulness_curve",
    "find_circuit",
    "gate_profile",
    "gating",
    "grounding",
    "head_atlas_over",
    "head_importance",
    "head_roles",
    "image_places",
    "investigate",
    "load_capture",
    "logit_attribution",
    "logit_lens",
    "mechanisms",
    "memory_reading",
    "metrics",
    "models",
    "ov_copying",
    "patch_heads",
    "patch_layers",
    "pattern_atlas",
    "pointing",
    "prune_heads",
    "reader",
    "repair",
    "retrieval_scores",
    "run_sweep",
    "saliency",
    "singular_vectors",
    "spike_activity",
    "split_over",
    "statistic",
    "streaming_scores",
    "tasks",
    "track_long",
    "views",
    "word_grounding",
]


def _views() -> rendering.Renderer:
    from workbench import views

    return views


rendering.provide(_views)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"workbench.{name}")
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
