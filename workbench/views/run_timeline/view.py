"""Run timeline: when each site's attention ran, on which kernel, what recording took and how much is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.capture.capture import Capture
from workbench.counting import count
from workbench.errors import ReportError, expect
from workbench.views.base.drawing import SERIES
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OTHERS = "other kernels"
_NOTE = (
    "Times are the host's: a bar runs from the moment its site's module began, projections included, until the "
    "attention call was seen to have returned."
)
_GPU_NOTE = "The model ran on a GPU, where kernels go on after their call has returned: no bar is a kernel's time."


class RunTimeline(View):
    """See `run_timeline`."""

    def __init__(self, spec: ViewSpec, selection: SharedSelection | None = None) -> None:
        super().__init__(spec, selection)
        self.size = (10.0, 1.6 + 1.1 * (int(spec.blocks["threads"].max()) + 1))

    def picture(self, figure: Figure) -> None:
        from matplotlib.patches import Patch

        facts, blocks = self.spec.facts, self.spec.blocks
        threads = int(blocks["threads"].max()) + 1
        axes = figure.add_subplot()
        muted = axes.xaxis.label.get_color()
        starts, ends = blocks["spans"]
        entered, seen, took = blocks["times"]
        lanes = blocks["threads"][blocks["forward"]]
        names = [site["name"] for site in facts["sites"]]
        here = self.chosen.site in names
        chosen = blocks["site"] == names.index(self.chosen.site) if here else np.ones(len(seen), bool)
        for thread in range(threads):
            mine = blocks["threads"] == thread
            spans = list(zip(1e3 * starts[mine], 1e3 * (ends - starts)[mine], strict=True))
            axes.broken_barh(spans, (3 * thread, 0.5), facecolor="none", edgecolor=muted, linewidth=0.8)
            calls = lanes == thread
            for kernel in range(len(facts["kernels"])):
                colour = _colour(facts, kernel)
                for group, alpha in ((chosen, 1.0), (~chosen, 0.35)):
                    these = calls & (blocks["kernel"] == kernel) & group
                    begins = np.where(np.isnan(entered), seen, entered)[these]
                    bars = list(zip(1e3 * begins, 1e3 * (seen[these] - begins), strict=True))
                    look: dict[str, Any] = {"facecolor": colour, "edgecolor": colour, "linewidth": 0.3, "alpha": alpha}
                    axes.broken_barh(bars, (3 * thread + 0.7, 1.0), **look)
            ours = list(zip(1e3 * seen[calls], 1e3 * took[calls], strict=True))
            axes.broken_barh(ours, (3 * thread + 1.8, 0.6), facecolor=muted, alpha=0.45, edgecolor="none")
        axes.set_yticks([3 * thread + 1.2 for thread in range(threads)], [f"thread {t}" for t in range(threads)])
        axes.invert_yaxis()
        axes.set_xlabel("host time since the capture began, ms")
        handles = [Patch(color=_colour(facts, i), label=name) for i, name in enumerate(facts["kernels"])]
        handles += [Patch(facecolor="none", edgecolor=muted, label="forward")]
        handles += [Patch(color=muted, alpha=0.45, label="our statistics")]
        columns = min(4, len(handles))
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=8)

    def chrome_trace(self) -> dict[str, Any]:
        """The run in the Trace Event Format that Perfetto and chrome://tracing read; `json.dump` writes it."""
        facts, blocks = self.spec.facts, self.spec.blocks
        events: list[dict[str, Any]] = []
        for thread in range(int(blocks["threads"].max()) + 1):
            name = {"name": f"thread {thread}"}
            events.append({"ph": "M", "pid": 1, "tid": thread, "name": "thread_name", "args": name})
        for i, (start, end) in enumerate(blocks["spans"].T.tolist()):
            events.append(
                _event(f"forward {facts['forwards'][i]}", "forward", int(blocks["threads"][i]), start, end, {})
            )
        entered, seen, took = blocks["times"].tolist()
        for i, site in enumerate(blocks["site"].tolist()):
            thread = int(blocks["threads"][int(blocks["forward"][i])])
            known = entered[i] == entered[i]
            kernel = facts["kernels"][int(blocks["kernel"][i])]
            about = {"kernel": kernel, "bytes": int(blocks["bytes"][i]), "entered": "seen" if known else "not known"}
            name = facts["sites"][site]["name"]
            events.append(_event(name, kernel, thread, entered[i] if known else seen[i], seen[i], about))
            events.append(_event(f"{name}: statistics", "statistics", thread, seen[i], seen[i] + took[i], {}))
        return {"displayTimeUnit": "ms", "otherData": {"clock": "host", "note": _NOTE}, "traceEvents": events}


def _event(name: str, kind: str, thread: int, start: float, end: float, about: dict[str, Any]) -> dict[str, Any]:
    """A complete event; microseconds."""
    times = {"ts": round(1e6 * start, 3), "dur": round(1e6 * (end - start), 3)}
    return {"ph": "X", "pid": 1, "tid": thread, "name": name, "cat": kind, **times, "args": about}


def _colour(facts: Mapping[str, Any], kernel: int) -> str:
    colours: list[str] = facts["colours"]
    return colours[kernel] if kernel < len(colours) else "#808890"


def run_timeline(
    capture: Capture,
    *,
    title: str = "Run timeline",
    caption: str = "",
    selection: SharedSelection | None = None,
) -> RunTimeline:
    """The attention calls of a capture in time: one lane per thread, one bar per call, coloured by kernel.

    Raises:
        ReportError: the capture holds no times: it was joined, pooled, or comes from a file without them.
    """
    expect(Capture, capture=capture)
    calls: list[dict[str, Any]] = []
    spans: list[tuple[float, float]] = []
    threads: list[int] = []
    numbers: list[int] = []
    missing = 0
    for forward in capture.forwards:
        timed = [(site, site.times) for site in forward.sites.values() if site.times is not None]
        missing += len(forward.sites) - len(timed)
        if forward.span is None or not timed:
            continue
        for site, times in timed:
            calls.append(
                {
                    "forward": len(spans),
                    "site": site.site.name,
                    "layer": site.site.layer,
                    "kernel": site.kernel,
                    "entered": np.nan if times.entered is None else times.entered,
                    "seen": times.seen,
                    "took": times.took,
                    "bytes": times.nbytes,
                }
            )
        spans.append(forward.span)
        threads.append(forward.thread)
        numbers.append(forward.index)
    if not calls:
        raise ReportError(
            "the capture does not tell when its calls were seen",
            hint="joined and pooled captures and older files have no times: show cap itself, or capture again",
        )
    frame = pd.DataFrame(calls)
    kernels = list(frame["kernel"].value_counts().index)
    shown = kernels if len(kernels) <= len(SERIES) else [*kernels[: len(SERIES) - 1], _OTHERS]
    kernel = frame["kernel"].map(lambda name: shown.index(name if name in shown else _OTHERS))
    sites = frame.drop_duplicates("site")[["site", "layer"]]
    order = {name: i for i, name in enumerate(sites["site"])}
    device = str(capture.provenance.get("device", ""))
    notes = [_NOTE]
    if device not in ("", "cpu"):
        notes.append(_GPU_NOTE)
    unknown = int(frame["entered"].isna().sum())
    if unknown:
        marked = count(unknown, "call is a thin mark", "calls are thin marks")
        notes.append(f"{marked}: where the module began was not seen.")
    if missing:
        notes.append(f"{count(missing, 'call has no times and is', 'calls have no times and are')} left out.")
    if _OTHERS in shown:
        notes.append(f"{len(kernels) - len(SERIES) + 1} kernels with few calls share a colour.")
    total = max(end for _, end in spans) - min(start for start, _ in spans)
    spec = ViewSpec(
        kind="run_timeline",
        title=title,
        caption=caption
        or f"{count(len(calls), 'attention call')} of {count(len(sites), 'site')} in {count(len(spans), 'forward')}, "
        f"{1e3 * total:,.1f} ms by the host's clock, {int(frame['bytes'].sum()):,} bytes kept.",
        facts={
            "sites": [{"name": name, "layer": layer} for name, layer in sites.to_numpy().tolist()],
            "kernels": shown,
            "colours": list(SERIES),
            "forwards": numbers,
            "note": _NOTE,
        },
        blocks={
            "spans": np.asarray(spans, dtype=np.float64).T.copy(),
            "threads": np.asarray(threads, dtype=np.int32),
            "times": frame[["entered", "seen", "took"]].to_numpy(dtype=np.float64).T.copy(),
            "bytes": frame["bytes"].to_numpy(dtype=np.float64).copy(),
            "forward": frame["forward"].to_numpy(dtype=np.int32).copy(),
            "site": frame["site"].map(order).to_numpy(dtype=np.int32).copy(),
            "kernel": kernel.to_numpy(dtype=np.int32).copy(),
        },
        table=_summary(frame),
        notes=tuple(notes),
        provenance=capture.provenance,
    )
    return RunTimeline(spec, selection)


def _summary(frame: pd.DataFrame) -> dict[str, Any]:
    """One row per site, in the order in which they were first seen."""
    frame = frame.assign(model=1e3 * (frame["seen"] - frame["entered"]), took=1e3 * frame["took"])
    groups = frame.groupby("site", sort=False)
    return {
        "site": list(groups.groups),
        "layer": groups["layer"].first().to_numpy(dtype=np.int32).copy(),
        "kernel": [", ".join(dict.fromkeys(names)) for _, names in groups["kernel"]],
        "calls": groups.size().to_numpy(dtype=np.int32).copy(),
        "until seen, ms": groups["model"].sum(min_count=1).to_numpy(dtype=np.float64).copy(),
        "statistics took, ms": groups["took"].sum().to_numpy(dtype=np.float64).copy(),
        "bytes": groups["bytes"].sum().to_numpy(dtype=np.float64).copy(),
    }
