"""A study's model, looked at: its maps or gates on the inputs that it is shown with, and its exhibits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workbench.analysis.gates import GateProfile, gate_profile
from workbench.capture.capture import Capture
from workbench.mechanisms.studies import Exhibit, Lines, Studied
from workbench.session.attaching import attach


@dataclass(frozen=True, eq=False)
class SeenStudy:
    """What is shown of a study.

    Attributes:
        studied: the model. capture: on the study's example.
        gates: how large its gates' factors are; None without gates. exhibits: what is the study's own.
    """

    studied: Studied
    capture: Capture
    gates: GateProfile | None
    exhibits: Sequence[Any]


def see_study(found: Studied) -> SeenStudy:
    """Look at a study's model."""
    one, model = found.study, found.model
    with attach(model) as wb, torch.no_grad(), wb.capture(("entropy", "effective_keys", "peak")) as capture:
        model(**one.example())
    capture.provenance["model_name"] = f"{one.mechanism}, {one.work}"
    gates = any(site.kind == "gate" for site in capture.sites)
    profile = gate_profile(capture, one.grid) if gates else None
    return SeenStudy(found, capture, profile, [*one.exhibits(model, capture), _training(found)])


def _training(found: Studied) -> Exhibit:
    """How its loss fell; phases stand one after the other."""
    losses, panels = found.facts["losses"], []
    phases = sorted({int(phase) for phase, _, _ in losses})
    for phase in phases:
        steps, values = zip(*((step, loss) for of, step, loss in losses if of == phase), strict=True)
        name = "loss" if len(phases) == 1 else f"loss, phase {phase + 1}"
        panels.append(Lines(name, [float(step) for step in steps], {"loss": torch.tensor(values)}, "step", "loss"))
    return Exhibit("Training", "Training loss, a mean over 25 steps.", tuple(panels))
