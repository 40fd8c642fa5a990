"""Run timeline: what a run wrote in JSON lines, while it goes on."""

from workbench.views.base.kinds import register_kind
from workbench.views.run_timeline.view import RunTimeline, run_timeline

__all__ = ["RunTimeline", "run_timeline"]

register_kind("run_timeline", __package__)
