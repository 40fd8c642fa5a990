"""Views of mechanisms: the matrix of all; of one its card, its heads, what is its own, its training and its cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from workbench.analysis.gates import GateProfile
from workbench.analysis.profile import AttentionProfile
from workbench.capture.capture import Capture
from workbench.errors import WorkbenchError
from workbench.mechanisms.frame.card import unmarked
from workbench.mechanisms.halo import HaloAttention
from workbench.mechanisms.rooms import Matrix, Room, Seen
from workbench.mechanisms.rooms.seen import ALONE, SignatureMaps
from workbench.mechanisms.rooms.showing import PLAIN, losses_of
from workbench.mechanisms.rooms.studied import SeenStudy
from workbench.mechanisms.studies import Studied
from workbench.mechanisms.training.work import PLACES
from workbench.tokens import plotly_text
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import all_of, register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.head_gallery import Axes, Group, head_gallery
from workbench.views.image_attention import Windows, image_attention
from workbench.views.results.profile import offsets
from workbench.views.table import Column, table

_PLAIN = "#808890"
_WHERE = {"text": "the same text", "images": "the same scenes", ALONE: "drawn vectors"}


def matrix(found: Matrix, places: Sequence[str | None] | None = None) -> View:
    """All mechanisms by quality, size, cost, and what their heads do.

    Args:
        places: of each, a section of the page that says more.
    """
    lacking = [one.name for one in found.rooms if not one.is_trained]
    unmeasured = [one.name for one in found.rooms if one.cost is None]
    notes = []
    if lacking:
        notes.append(f"No trained weights are shipped of {', '.join(lacking)}: quality and heads are not known.")
    if unmeasured:
        notes.append(f"Cost was not measured of {', '.join(unmeasured)}.")
    return table(
        [one.name for one in found.rooms],
        [
            *(Column(each.name, each.values, each.group, each.better, each.span, each.said) for each in found.columns),
            Column("claims of the paper", [one.standing for one in found.rooms], "At our scale"),
        ],
        of="mechanism",
        about=[one.title for one in found.rooms],
        places=places,
        title="All mechanisms",
        caption=(
            "Small models with each mechanism in every layer, trained on the same data for as many steps; "
            f"{PLAIN} is plain attention, and the sizes say which are larger. The darker (in a dark theme brighter) a "
            "number, the better it is in its column; what is neither good nor bad is shaded from zero up. Point at a "
            "number for how it was measured."
        ),
        notes=tuple(notes),
    )  # fmt: skip


def card(one: Room) -> View:
    """What a mechanism is, what is shown of it, and where the claims of its paper stand."""
    rows = [row for row in one.card.lines() if row[0] != "Claim"]
    rows += [("Shown", _shown(each)) for each in one.seen]
    rows += [] if one.study is None else [("Study", _about(one.study.studied))]
    rows += [(f"No {what}", f"{each.work}: {why}") for each in one.seen for what, why in each.missing.items()]
    if one.cost is None:
        rows.append(("Measured cost", "not measured"))
    rows += one.card.standing()
    return table(
        [head for head, _ in rows],
        [Column(one.name, [unmarked(text) for _, text in rows])],
        of="Card",
        title=one.title[:1].upper() + one.title[1:],
        caption="What it is, what is shown below, and where its paper’s claims stand at our scale.",
    )


def _shown(seen: Seen) -> str:
    """What its heads are those of."""
    if seen.trained is None:
        what = "the module alone" if seen.work == ALONE else f"a model for {seen.work}"
        return f"{what}, with random weights: no trained weights are shipped."
    facts, scores = seen.trained.facts, seen.trained.scores
    told = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    quick = " A trial of a few steps: it has learned nothing." if facts.get("quick") else ""
    size = sum(p.numel() for p in seen.model.parameters())
    return f"a model for {seen.work}, {size:,} parameters, {facts['steps']:,} steps: {told}.{quick}"


def _about(found: Studied) -> str:
    """What a study's model was trained on, and can do."""
    facts, told = found.facts, ", ".join(f"{name} {value:.3f}" for name, value in found.scores.items())
    form = found.study.arms[found.arm]
    return f"{found.study.about}. {facts['parameters']:,} parameters, {facts['steps']:,} steps; {form}: {told}."


def _more_of_room(one: Room) -> list[View]:
    found = [view for seen in one.seen for view in _of_seen(one, seen)]
    found += [] if one.study is None else _of_study(one.study)
    return [*found, *([] if (curves := _curves(one)) is None else [curves])]


def _of_seen(one: Room, seen: Seen) -> list[View]:
    """Maps, importance, distance, and what is its own, of one model."""
    after = f", {seen.work}" if len(one.seen) > 1 else ""
    gates = isinstance(seen.profile, GateProfile)
    found = [] if gates else _maps(seen)  # the map of a gate is its factors on the diagonal
    if gates:
        found += [_titled(view, f"{view.spec.title}{after}") for view in all_of(seen.profile)]
    if seen.importance is not None:
        found += [_titled(view, f"{view.spec.title}{after}") for view in all_of(seen.importance)[:1]]
    if isinstance(seen.profile, AttentionProfile):
        found.append(_titled(view := offsets(seen.profile), f"{view.spec.title}{after}"))
    return [*found, *(_signature(seen, each, after) for each in seen.signatures)]


def _of_study(one: SeenStudy) -> list[View]:
    """Maps of its attention, its gates, and what is its own."""
    work, found = one.studied.study.work, list[View]()
    if mixing := _mixing(one.capture):
        found.append(head_gallery(one.capture, sites=mixing, title=f"Every head, {work}", notes=_gates(one.capture)))
    if one.gates is not None:
        found += [_titled(view, f"{view.spec.title}, {work}") for view in all_of(one.gates)]
    return found + [view for each in one.exhibits for view in all_of(each)]


def _titled(view: View, title: str) -> View:
    view.spec = replace(view.spec, title=title)
    return view


def _maps(seen: Seen) -> list[View]:
    """Every head on the input that all mechanisms are shown; on images those over them that have a place there.

    The titles say which input it is.
    """
    title, weights = f"Every head on {_WHERE[seen.work]}", "" if seen.trained else " Weights are random."
    found, notes = list[View](), tuple[str, ...]()
    if seen.images is not None:
        pixels, classes = seen.images
        labels = [f"digit {label}" for label in classes.tolist()]
        windows = _windows(seen)
        laid: dict[str, Any] = {"grid": PLACES["images"].grid, "prefix": 0}
        if windows is not None:
            laid = {"windows": windows, "sites": [site.site for site in seen.capture]}
        try:
            found.append(image_attention(seen.capture, pixels, labels=labels, title=title, **laid))
        except WorkbenchError as error:  # such as maps that are not over all patches
            notes = (f"Not laid over the scenes: {error.message}.",)
    mixing = _mixing(seen.capture)
    if not found or len(found[0].spec.facts["heads"]) < sum(seen.capture[site].shape[1] for site in mixing):
        title = f"{title}, laid over them or not" if found else title
        found.append(head_gallery(seen.capture, sites=mixing, title=title, notes=(*notes, *_gates(seen.capture))))
    for view in found:
        view.spec = replace(view.spec, caption=f"{view.spec.caption}{weights}")
    return found


def _mixing(cap: Capture) -> list[str]:
    """The sites but for gates, whose maps are their factors on the diagonal."""
    return [site.name for site in cap.sites if site.kind != "gate"]


def _gates(cap: Capture) -> tuple[str, ...]:
    """A note on those that are left out."""
    n = len(cap.sites) - len(_mixing(cap))
    return (f"Gates move nothing from place to place: {n} of {len(cap.sites)} sites are left out.",) if n else ()


def _windows(seen: Seen) -> Windows | None:
    """How windows lie over the scenes, whose seams are then drawn; None where all patches are attended to alike."""
    grid = PLACES["images"].grid
    if all(site.site.kind == "window" for site in seen.capture):
        return Windows(grid)
    blocks: Any = getattr(getattr(seen.model, "stack", None), "blocks", ())
    edges = {block.mixer.block if isinstance(block.mixer, HaloAttention) else None for block in blocks}
    return Windows(grid, edges.pop()) if len(edges) == 1 and None not in edges else None


def _signature(seen: Seen, found: SignatureMaps, after: str) -> View:
    """The small maps that a room says are its own; several of a head stand together."""
    signature = found.signature
    on_grid = seen.images is not None and tuple(found.maps.shape[1:]) == PLACES["images"].grid
    rows, columns = ("row of patches", "column of patches") if on_grid else (signature.rows, signature.columns)
    labels = [f"L{layer}H{head}" for layer, head in found.heads]
    several = len(set(found.names)) > 1
    owners = labels if several else [f"Layer {layer}" for layer, _ in found.heads]
    sites_tell = len(set(found.sites)) > len({layer for layer, _ in found.heads})
    if sites_tell:
        owners = [f"{owner}, {site}" for owner, site in zip(owners, found.sites, strict=True)]
    groups = [Group(name, [i for i, own in enumerate(owners) if own == name]) for name in dict.fromkeys(owners)]
    return head_gallery(
        found.maps.numpy(),
        found.heads,
        axes=Axes(rows, columns, value=signature.value, column_texts=_texts(seen, found.maps.shape[2])),
        labels=list(found.names) if several else labels,
        said=[f"{name} of {label}" for name, label in zip(found.names, labels, strict=True)] if several else None,
        groups=groups,
        title=f"{signature.title}{after}",
        caption=signature.about + ("" if seen.trained else " Weights are random."),
        provenance=seen.capture.provenance,
    )


def _texts(seen: Seen, n: int) -> list[str] | None:
    """The tokens of the text, where a map has a column for each of them."""
    tokens = seen.capture.key_tokens(seen.capture[0].site.name) if seen.work == "text" else None
    return list(tokens[0]) if tokens is not None and len(tokens[0]) == n else None


def _curves(one: Room) -> View | None:
    """Loss against training steps beside plain attention, and time against length beside SDPA; None without either."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    trained = [seen for seen in one.seen if seen.trained is not None]
    if not trained and one.cost is None:
        return None
    titles = [f"loss, {seen.work}" for seen in trained] + (["seconds of one forward"] if one.cost else [])
    fig = make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.09)
    named: set[str] = set()

    def line(at: int, points: Iterable[tuple[float, float]], name: str, colour: str, **more: Any) -> None:
        x, y = zip(*points, strict=True)
        fig.add_trace(
            go.Scatter(x=list(x), y=list(y), name=plotly_text(name), legendgroup=name, showlegend=name not in named,
                       line={"color": colour, "width": 2}, **more),
            row=1, col=at,
        )  # fmt: skip
        named.add(name)

    for at, seen in enumerate(trained, 1):
        if one.name != PLAIN and seen.work in one.plain:
            line(at, one.plain[seen.work], "plain attention", _PLAIN, mode="lines")
        assert seen.trained is not None
        line(at, losses_of(seen.trained), one.name, SERIES[0], mode="lines")
        fig.update_xaxes(title_text="step", row=1, col=at)
        fig.update_yaxes(title_text="nats", row=1, col=at)
    said = (
        ["Training loss, a mean over 50 steps, beside plain attention of the same data and schedule."]
        if trained
        else []
    )
    if one.cost is not None:
        cost, at = one.cost, len(titles)
        if one.name != PLAIN:
            sdpa = [mine / over for mine, over in zip(cost.seconds, cost.over_sdpa, strict=True)]
            line(at, zip(cost.lengths, sdpa, strict=True), "plain attention", _PLAIN, mode="lines+markers")
        line(at, zip(cost.lengths, cost.seconds, strict=True), one.name, SERIES[0], mode="lines+markers")
        fig.update_xaxes(title_text="tokens", type="log", row=1, col=at, tickvals=list(cost.lengths))
        fig.update_yaxes(type="log", row=1, col=at)
        said.append(
            f"Of a layer without its projections {cost.growth}; at {cost.lengths[-1]:,} tokens it takes "
            f"{cost.over_sdpa[-1]:.2g} times as long as plain attention (SDPA), and {cost.mib[-1]:,.0f} MiB. "
            f"{cost.machine}"
        )
    else:
        said.append("Its cost was not measured.")
    fig.update_layout(height=320, margin={"t": 34}, legend={"orientation": "h", "y": -0.25, "x": 0})
    name = " and ".join([*(["Training"] if trained else []), *(["cost"] if one.cost else [])])
    return figure(fig, title=name[:1].upper() + name[1:], caption=" ".join(said))


register(Room, card, _more_of_room)
register(Matrix, matrix)
