"""Attach to a PyTorch model, leave it on the fast attention kernel it already uses, and look at every head.

Everything public is here; a name is imported when it is first used, so that `import workbench` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from workbench.errors import (
    AttachError,
    CaptureError,
    FormatError,
    InterventionError,
    ReportError,
    TaskError,
    WorkbenchError,
)

if TYPE_CHECKING:
    from workbench import models, tasks, views
    from workbench.analysis.atlas import PatternAtlas, pattern_atlas
    from workbench.analysis.conditioning.capacity import Capacity, capacity
    from workbench.analysis.conditioning.experiments import Conditioning, conditioning
    from workbench.analysis.importance import HeadImportance, PruningCurve, head_importance
    from workbench.analysis.profile import AttentionProfile, attention_profile
    from workbench.analysis.pruned import prune_heads
    from workbench.capture import Capture, load_capture
    from workbench.heads import KVGroup
    from workbench.report import Report
    from workbench.session import Workbench, attach
    from workbench.site_capture import SiteCapture
    from workbench.sweep import run_sweep
    from workbench.sweep_result import Sweep, SweepInterrupted
    from workbench.variants import Variant

__version__ = "0.1.0"

_LAZY = {
    "Workbench": "workbench.session",
    "attach": "workbench.session",
    "AttentionProfile": "workbench.analysis.profile",
    "attention_profile": "workbench.analysis.profile",
    "PatternAtlas": "workbench.analysis.atlas",
    "pattern_atlas": "workbench.analysis.atlas",
    "Capacity": "workbench.analysis.conditioning.capacity",
    "capacity": "workbench.analysis.conditioning.capacity",
    "Conditioning": "workbench.analysis.conditioning.experiments",
    "conditioning": "workbench.analysis.conditioning.experiments",
    "Capture": "workbench.capture",
    "SiteCapture": "workbench.site_capture",
    "load_capture": "workbench.capture",
    "KVGroup": "workbench.heads",
    "Report": "workbench.report",
    "HeadImportance": "workbench.analysis.importance",
    "PruningCurve": "workbench.analysis.importance",
    "head_importance": "workbench.analysis.importance",
    "prune_heads": "workbench.analysis.pruned",
    "Sweep": "workbench.sweep_result",
    "SweepInterrupted": "workbench.sweep_result",
    "Variant": "workbench.variants",
    "run_sweep": "workbench.sweep",
}
_LAZY_MODULES = ("models", "tasks", "views")

__all__ = [
    "AttachError",
    "AttentionProfile",
    "Capacity",
    "Capture",
    "CaptureError",
    "Conditioning",
    "FormatError",
    "HeadImportance",
    "InterventionError",
    "KVGroup",
    "PatternAtlas",
    "PruningCurve",
    "Report",
    "ReportError",
    "SiteCapture",
    "Sweep",
    "SweepInterrupted",
    "TaskError",
    "Variant",
    "Workbench",
    "WorkbenchError",
    "attach",
    "attention_profile",
    "capacity",
    "conditioning",
    "head_importance",
    "load_capture",
    "models",
    "pattern_atlas",
    "prune_heads",
    "run_sweep",
    "tasks",
    "views",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"workbench.{name}")
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
