"""Views of saliency, and of cross-attention beside it: maps, heads, curves, and where tokens are aligned to."""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.analysis.cross_attention.maps_result import CrossAttention
from workbench.analysis.cross_attention.result import CURVES, CrossAttentionSaliency
from workbench.analysis.saliency.result import Saliency
from workbench.counting import count
from workbench.errors import ReportError
from workbench.tokens import plotly_text, visible
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import register
from workbench.views.base.selection import SharedSelection
from workbench.views.base.view import View
from workbench.views.figure import Figure, figure
from workbench.views.head_atlas import HeadAtlas, head_atlas
from workbench.views.saliency_map import SaliencyMap, saliency_map

_NAMES = {"input": "input saliency", "encoder_output": "encoder-output saliency"}
_SHOWN = 12  # tokens of an image
_MANY, _BEST = 16, 8  # heads above which only the best stand beside the averages


def cross_attention(
    found: CrossAttentionSaliency,
    *,
    utterance: int = 0,
    spans: Any = None,
    selection: SharedSelection | None = None,
) -> list[View]:
    """The views of a comparison, linked: the maps of one utterance, the heads, averages of heads, and the curves.

    Args:
        utterance: whose maps. spans: {name: [token, 2]} in seconds, such as when each word was really said.

    Raises:
        ReportError: the maps of this utterance were not kept.
    """
    return [maps(found, utterance=utterance, spans=spans, selection=selection), *_rest(found, selection)]


def _rest(found: CrossAttentionSaliency, selection: SharedSelection | None = None) -> list[View]:
    views: list[View] = [atlas(found, selection=selection), averages(found, selection=selection)]
    return [*views, curves(found, selection=selection)] if found.orders else views


def maps(
    found: CrossAttentionSaliency,
    *,
    utterance: int = 0,
    spans: Any = None,
    selection: SharedSelection | None = None,
) -> SaliencyMap:
    """Attention of any heads beside saliency and their difference, over the spectrogram of one utterance."""
    if not 0 <= utterance < len(found.maps):
        kept = "no maps were kept" if not found.maps else f"the maps of utterances 0 to {len(found.maps) - 1} were kept"
        raise ReportError(f"there are no maps of utterance {utterance}: {kept}", hint="raise keep= of the analysis")
    held, aligned = found.maps[utterance], found.alignments[utterance]
    speech = held["kind"] == "spectrogram"
    step = held["seconds_per_position"] if speech else None
    own, theirs = _NAMES["input"], _NAMES["encoder_output"]
    per = 1 if not speech else -(-len(held["picture"]) // held["attention"].shape[3])
    width = per if step is None else float(step)
    n = len(held["target_texts"])
    every = {"attention": _spans(aligned, "attention", n, width), own: _spans(aligned, "saliency", n, width)}
    moved = _nan_mean(np.asarray(aligned["disagreement"], dtype=float)) * width
    unit = "s" if step is not None else "frames" if speech else "positions"
    words = "" if not len(held["position_texts"]) else " The input's tokens stand below."
    return saliency_map(
        {own: held["input_saliency"] if speech else held["pooled_input_saliency"], theirs: held["encoder_saliency"]},
        held["target_texts"],
        spectrogram=held["picture"] if speech else None,
        strips={own: held["pooled_input_saliency"]},
        errors={theirs: held["encoder_error"]},
        attention=held["attention"],
        layers=held["layers"],
        alignment_heads=found.alignment_heads,
        special=held["special"],
        seconds=held["seconds_per_input_position"] if speech else None,
        position_texts=held["position_texts"],
        spans={**every, **(spans or {})},
        audio=held["audio"],
        sampling_rate=held["sampling_rate"],
        unit="nats" if found.method == "spes" else "",
        title=f"Cross-attention beside saliency: {held['name']}",
        caption=(
            f"“{found.hypotheses[utterance]}”: cross-attention, {_method(found.method)} saliency (pooled to encoder "
            f"positions by {found.pooling}), and their difference, one row per output token. Thin frames: where "
            "dynamic time warping places each token by attention and by input saliency, "
            f"{moved:.2g} {unit} apart on average.{words}"
        ),
        notes=_undefined(found),
        provenance=found.provenance,
        selection=selection,
    )  # fmt: skip


def atlas(found: CrossAttentionSaliency, *, selection: SharedSelection | None = None) -> HeadAtlas:
    """How far each head's attention correlates with either saliency; intervals are over utterances."""
    table = found.table[found.table["kind"] == "head"].rename(columns={"mean": "value"})
    columns = ["layer", "head", "value", "low", "high"]
    scores = {
        f"{measure.capitalize()} r, {_NAMES[saliency]}": table[
            (table["saliency"] == saliency) & (table["measure"] == measure)
        ][columns].astype(float)
        for saliency in found.saliencies
        for measure in found.measures
    }
    marked = ", ".join(f"L{layer}H{head}" for layer, head in found.alignment_heads)
    return head_atlas(
        scores,
        title="Correlation per head",
        caption=(
            "Mean correlation of each head's cross-attention with saliency over "
            f"{count(found.n_utterances, 'utterance')}{_interval(found)}."
            f"{f' Alignment heads of the model: {marked}.' if marked else ''}"
        ),
        signed=True,
        kind="cross",
        provenance=found.provenance,
        selection=selection,
    )


def averages(found: CrossAttentionSaliency, *, selection: SharedSelection | None = None) -> Figure:
    """Pearson's r of single heads (the best where they are many), layers and all heads, with either saliency."""
    import plotly.graph_objects as go

    table = found.table[found.table["measure"] == "pearson"]
    heads = table[(table["kind"] == "head") & (table["saliency"] == "input")]
    best = heads.sort_values("mean", ascending=False)["aggregate"].head(_BEST) if len(heads) > _MANY else None
    table = table[table["kind"] != "head index"]
    if best is not None:
        table = table[(table["kind"] != "head") | table["aggregate"].isin(best)]
    which = "single heads" if best is None else f"of {len(heads)} heads the {_BEST} best with input saliency"
    fig = go.Figure()
    for s, saliency in enumerate(found.saliencies):
        rows = table[table["saliency"] == saliency]
        value, low, high = (rows[name].to_numpy(float) for name in ("mean", "low", "high"))
        where = rows[["layer", "head"]].astype(float).fillna(-1).astype(int)
        fig.add_trace(
            go.Bar(
                x=[plotly_text(name) for name in rows["aggregate"]],
                y=value,
                error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low},
                name=_NAMES[saliency],
                marker_color=SERIES[s],
                customdata=where.to_numpy().tolist(),
                meta={"select": ["layer", "heads"]},
            )
        )
    fig.update_layout(barmode="group", xaxis={"type": "category"})
    fig.update_yaxes(title_text="Pearson r")
    return figure(
        fig,
        title="Correlation of heads and of their averages",
        caption=(
            f"Attention against saliency over {count(found.n_utterances, 'utterance')}{_interval(found)}: {which} "
            "(LxHy), the mean of a layer's heads (Lx), of all heads, and of the alignment heads where the model names "
            "some."
        ),
        table=table,
        notes=_undefined(found),
        provenance=found.provenance,
        selection=selection,
    )


def curves(
    found: CrossAttentionSaliency, *, score: str = "log_probability", selection: SharedSelection | None = None
) -> Figure:
    """Deletion and insertion curves: the score as the cells that each map ranks highest are removed, or alone kept.

    Args:
        score: "log_probability", "probability" or "wer".

    Raises:
        ReportError: no curves were drawn, or not this score.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not found.orders:
        raise ReportError("the analysis drew no curves", hint="pass orders= to it")
    if score not in found.scores or bool(found.curves[..., found.scores.index(score)].isnan().all()):
        raise ReportError(f"there is no score {score!r}", hint=f"one of {', '.join(found.scores)}")
    s = found.scores.index(score)
    percent = (100 * found.fractions).tolist()
    label = {"log_probability": "log-probability of a token", "probability": "probability of a token", "wer": "WER, %"}
    fig = make_subplots(rows=1, cols=2, subplot_titles=["Deletion", "Insertion"], shared_yaxes=True)
    rows: dict[str, list[Any]] = {"curve": [], "order": [], "percent": [], score: []}
    for c, curve in enumerate(CURVES):
        for o, order in enumerate(found.orders):
            mean = found.curves[:, o, c, :, s].nanmean(0)
            random = order == "random"
            fig.add_trace(
                go.Scatter(
                    x=percent,
                    y=mean.numpy(),
                    name=order,
                    mode="lines+markers",
                    line={"width": 1.5 if random else 2.5, "dash": "dot" if random else "solid",
                          "color": "#7b8794" if random else SERIES[o % len(SERIES)]},
                    legendgroup=order,
                    showlegend=c == 0,
                ),
                row=1,
                col=c + 1,
            )  # fmt: skip
            rows["curve"] += [curve] * len(percent)
            rows["order"] += [order] * len(percent)
            rows["percent"] += percent
            rows[score] += mean.tolist()
        fig.update_xaxes(title_text=f"% of the input {'removed' if c == 0 else 'kept'}", row=1, col=c + 1)
    fig.update_yaxes(title_text=label[score], row=1, col=1)
    better = "Up and fast" if score == "wer" else "Down and fast"
    other = "down" if score == "wer" else "up"
    return figure(
        fig,
        title="Deletion and insertion",
        caption=(
            f"Mean over {count(found.n_utterances, 'utterance')} as the cells of the input that each map ranks highest "
            f"are removed, or alone kept. {better} in deletion, and {other} and fast in insertion, is more faithful."
        ),
        table=rows,
        provenance=found.provenance,
        selection=selection,
    )


def _view_of_cross_attention_saliency(found: CrossAttentionSaliency) -> View:
    """The maps of the first utterance; the heads where no maps were kept."""
    return maps(found) if found.maps else atlas(found)


def _more_of_cross_attention_saliency(found: CrossAttentionSaliency) -> list[View]:
    """The heads, averages of heads, and the curves."""
    return _rest(found)[0 if found.maps else 1 :]


def _view_of_cross_attention(found: CrossAttention) -> View:
    """Attention of any heads, beside the mean of all."""
    n = len(found.kept_positions)
    left = "" if n == found.length else f", {found.length - n:,} positions of padding or special tokens left out"
    means = "rollout through the encoder" if found.rollout else f"{found.weighting.replace('_', ' ')} weights"
    return saliency_map(
        {"mean of all heads": found.mean()},
        found.target_texts,
        attention=found.maps,
        layers=found.layers,
        alignment_heads=found.alignment_heads,
        special=found.special,
        seconds=found.seconds_per_position,
        position_texts=found.position_texts,
        title="Cross-attention",
        caption=f"Cross-attention by output token over {n:,} encoder positions, {means}{left}.",
        provenance=found.provenance,
    )


def _view_of_saliency(found: Saliency) -> View:
    """Rows of output tokens over positions, above them the spectrogram; of images a map per token."""
    said = (
        f"{_method(found.method)} at the {'input' if found.at == 'input' else 'output of the encoder'}: "
        f"{'all masks' if found.exact else f'{found.n_masks:,} masks' if found.p is not None else 'no masks'}"
        f"{', ended early' if found.partial else ''}."
        f"{' Each token depends on those before it alone.' if found.visible else ''}"
        f"{_rather(found)}{_completeness(found)}"
    )
    if found.kind in ("image", "patches") and found.at == "input":
        return _image(found, said)
    speech = found.kind == "spectrogram"
    scores = found.scores
    error = found.standard_error
    options: dict[str, Any] = {}
    if speech:
        best = scores.flatten(0, 1).argmax(1, keepdim=True)  # the error is that of the cell that is shown
        error = error.flatten(0, 1).gather(1, best).view(scores.shape[:2])
        options = {"spectrogram": found.picture}
    if found.kind == "frames" and found.seconds_per_position is None:
        options["notes"] = ("How long a position lasts is not known.",)
    spec = saliency_map(
        {"saliency": scores},
        found.target_texts,
        errors={"saliency": error} if bool(found.standard_error.any()) else None,
        special=found.special,
        visible=found.visible,
        seconds=found.seconds_per_position,
        position_texts=found.position_texts,
        unit="nats" if found.score == "kl" else "",
        title="Saliency",
        caption=f"What each output token depends on. {said}",
        provenance=found.provenance,
        **options,
    )
    return spec


def _rather(found: Saliency) -> str:
    """What outputs are held against."""
    pairs = [
        f"“{visible(a)}” rather than “{visible(b)}”"
        for a, b in zip(found.target_texts, found.contrast_texts, strict=False)
    ]
    return f" Scores are those of {', '.join(pairs[:6])}{' …' if len(pairs) > 6 else ''}." if pairs else ""


def _completeness(found: Saliency) -> str:
    gap = found.details.get("completeness_gap")
    if gap is None:
        return ""
    return f" Rows should sum to the change of the log-probability from the baseline, and miss {gap:.1%} of it."


def _image(found: Saliency, said: str) -> Figure:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    grid = found.scores
    if found.kind == "patches":
        if found.grid is None:
            raise ReportError("the model tells of no grid of patches")
        grid = grid.view(len(grid), *found.grid)
    shown = grid[:_SHOWN]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    names = [plotly_text(text) for text in found.target_texts[:_SHOWN]]
    fig = make_subplots(rows=rows, cols=columns, subplot_titles=names)
    top = float(shown.abs().max()) or 1.0
    for i, part in enumerate(shown):
        trace = go.Heatmap(
            z=part.numpy(), coloraxis=None, zmin=-top if found.signed else 0, zmax=top, showscale=i == 0, name=names[i]
        )
        fig.add_trace(trace, row=i // columns + 1, col=i % columns + 1)
    fig.update_yaxes(autorange="reversed", showticklabels=False)
    fig.update_xaxes(showticklabels=False)
    fig.update_layout(height=90 + 220 * rows)
    left = len(grid) - len(shown)
    return figure(
        fig,
        title="Saliency",
        caption=f"What each output token depends on, {'patches' if found.kind == 'patches' else 'pixels'}. {said}",
        table=found.table,
        notes=(f"{left} more tokens are not shown.",) if left > 0 else (),
        provenance=found.provenance,
    )


def _spans(aligned: Any, name: str, n: int, width: float) -> np.ndarray:
    """[token, 2] begin and end of each token along the input; NaN for those that were not aligned."""
    spans = np.full((n, 2), np.nan)
    found = np.asarray(aligned[name], dtype=float)
    spans[list(aligned["token"])] = np.stack([found[:, 0], found[:, 1] + 1], 1) * width
    return spans


def _nan_mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if values.size else float("nan")


def _method(name: str) -> str:
    return "SPES" if name == "spes" else name.replace("_", " ")


def _interval(found: CrossAttentionSaliency) -> str:
    return f", t intervals at {found.level:.0%}" if found.n_utterances > 1 else ""


def _undefined(found: CrossAttentionSaliency) -> tuple[str, ...]:
    """At most three sentences on correlations that do not exist."""
    more = len(found.undefined) - 3
    said = tuple(f"{text[:1].upper()}{text[1:]}." for text in found.undefined[:3])
    return (*said, f"{more} more correlations are undefined.") if more > 0 else said


register(CrossAttentionSaliency, _view_of_cross_attention_saliency, _more_of_cross_attention_saliency)
register(CrossAttention, _view_of_cross_attention)
register(Saliency, _view_of_saliency)

__all__ = ["atlas", "averages", "cross_attention", "curves", "maps"]
