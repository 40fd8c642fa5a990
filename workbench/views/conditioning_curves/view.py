"""Conditioning curves: what each learning rule, and the model, expects after the test cue, trial by trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from workbench.analysis.conditioning.experiments import MODEL, Conditioning
from workbench.errors import ReportError
from workbench.tokens import visible
from workbench.views.base.drawing import SERIES
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4


class ConditioningCurves(View):
    """See `conditioning_curves`."""

    def __init__(self, spec: ViewSpec, selection: SharedSelection | None = None) -> None:
        super().__init__(spec, selection)
        n = len(spec.facts["experiments"])
        self.size = (2.0 * min(n, _COLUMNS) + 0.4, 1.8 * -(-n // _COLUMNS) + 0.6)

    def picture(self, figure: Figure) -> None:
        facts, blocks = self.spec.facts, self.spec.blocks
        off, chosen = self.state.get("off", []), self.state.get("experiment")
        numbered = list(enumerate(facts["experiments"]))
        # All of them, until one is chosen.
        experiments = [(e, about) for e, about in numbered if about["name"] == chosen] or numbered
        subjects = facts["subjects"]
        columns = min(len(experiments), _COLUMNS)
        if len(experiments) < len(numbered):
            figure.set_size_inches(5.4, 3.4)
        panels = figure.subplots(-(-len(experiments) // columns), columns, squeeze=False, sharey=True).ravel()
        for panel, (e, about) in zip(panels, experiments, strict=False):
            ink = panel.xaxis.label.get_color()
            for s, subject in enumerate(subjects):
                if subject in off:
                    continue
                colour = ink if subject == facts["model"] else SERIES[s % len(SERIES)]
                for group, style in ((0, "-"), (1, ":")):
                    n = len(about["phases"][group]) + 1
                    name = subject if group == 0 and e == experiments[0][0] else None
                    panel.plot(blocks[f"curves {e}"][s, group, :n], style, color=colour, label=name, linewidth=1.1)
            panel.set_ylim(-0.35, 1.6)
            silent = "\n(theory is silent)" if about["silent"] else ""
            panel.set_title(f"{about['name']}, cue {about['test']}{silent}", fontsize=8)
            panel.tick_params(labelsize=7)
            panel.xaxis.get_major_locator().set_params(integer=True)
        for panel in panels[len(experiments) :]:
            panel.set_axis_off()
        figure.supxlabel("trials seen; solid: experimental group, dotted: control", fontsize=9)
        figure.supylabel("outcome expected", fontsize=9)
        figure.legend(loc="outside upper left", ncols=min(6, len(subjects)), fontsize=8)


def conditioning_curves(
    found: Conditioning, *, title: str = "Conditioning curves", selection: SharedSelection | None = None
) -> ConditioningCurves:
    """One experiment at a time: strength of the outcome after the test cue, with 95 % intervals, in both groups.

    Rules and model stand in the same charts, though a strength is no probability: compare directions and shapes. Where
    the linear theory has no answer the view says so.

    Raises:
        ReportError: there is no experiment.
    """
    if not found.experiments:
        raise ReportError("the result has no experiment to show")
    rows = []
    for e, name in enumerate(found.experiments):
        for s, subject in enumerate(found.subjects):
            for group, words in zip(("experimental", "control"), found.phases[name], strict=True):
                g = 0 if group == "experimental" else 1
                for trial in range(len(words) + 1):
                    ends = (t[name][s, g, trial].item() for t in (found.curves, found.low, found.high))
                    word = words[trial - 1] if trial else "–"
                    rows.append((found.experiments[e].replace("_", " "), visible(subject), group, trial, word, *ends))
    columns = list(zip(*rows, strict=True))
    contrast = torch.stack(
        [found.contrast, found.contrast_low, found.contrast_high, found.effect.to(found.contrast)], dim=-1
    )
    blocks = {"contrast": np.ascontiguousarray(contrast.numpy(), dtype=np.float32)}
    for e, name in enumerate(found.experiments):
        for block, tensors in (("curves", found.curves), ("low", found.low), ("high", found.high)):
            blocks[f"{block} {e}"] = np.ascontiguousarray(tensors[name].numpy(), dtype=np.float32)
    spec = ViewSpec(
        kind="conditioning_curves",
        title=title,
        caption=(
            f"{len(found.experiments)} experiments; what {', '.join(map(visible, found.subjects))} expect after the "
            "test cue, from 1 for certain down to 0. Bands are 95 % intervals over choices of cues."
        ),
        facts={
            "subjects": [visible(subject) for subject in found.subjects],
            "model": MODEL,
            "experiments": [
                {
                    "name": name.replace("_", " "),
                    "test": test,
                    "what": what,
                    "silent": silent,
                    "phases": [list(words) for words in found.phases[name]],
                }
                for name, test, what, silent in zip(
                    found.experiments, found.tests, found.what, found.silent, strict=True
                )
            ],
        },
        blocks=blocks,
        table={
            "experiment": list(columns[0]),
            "subject": list(columns[1]),
            "group": list(columns[2]),
            "trial": np.array(columns[3], np.int32),
            "after": list(columns[4]),
            **{
                name: np.array(columns[i], np.float64)
                for i, name in enumerate(("expected", "low", "high"), 5)
            },
        },
        notes=found.limits,
        provenance=found.provenance,
    )  # fmt: skip
    return ConditioningCurves(spec, selection)
