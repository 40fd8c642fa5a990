"""Every view once, small, for the tests that hold of all of them.

A new kind of view goes into `VIEWS`, a kind that shows other things than there into `FORMS`, a figure of a result into
`FIGURES`, and what can be chosen and set in the first two into `CHOOSING` and `SETTING`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import workbench
from support.hybrid_models import hybrid
from workbench import Capacity, Eviction, GateProfile, SpikeActivity, attach
from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.nodes import Layer
from workbench.analysis.circuits.roles import HeadRoles
from workbench.capture.capture import Capture
from workbench.storage import disk
from workbench.views import Playground, View
from workbench.views import page as pages

ROWS = ("entropy", "effective_keys", "distance", "sink", "current", "previous", "peak", "received")
WORDS = tuple(f" word{i}" for i in range(64))


class _Words:
    """Decodes ids into given tokens; every text is all of them."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens

    def decode(self, ids: Sequence[int], **_: bool) -> str:
        return "".join(self.tokens[i] for i in ids)

    def __call__(self, texts: Sequence[str], **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(len(self.tokens)).repeat(len(texts), 1)}


def _gpt2(layers: int, heads: int, n: int) -> GPT2LMHeadModel:
    """A random GPT-2 of at least n tokens, whose patterns have peaks, as those of trained models have."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=8 * heads, vocab_size=max(n, 8), n_positions=max(n, 16))
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name:
                parameter.mul_(20)
    return model


@cache
def capture(layers: int = 2, heads: int = 3, tokens: Sequence[str] = WORDS[:12], batch: int = 1) -> Capture:
    """A capture of a random GPT-2 over these tokens."""
    n = len(tokens)
    model = _gpt2(layers, heads, n)
    with attach(model, _Words(tokens)) as wb, torch.inference_mode(), wb.capture(ROWS, values=True) as found:
        model(torch.arange(n).repeat(batch, 1))
    return found


def _token_strip(tokens: Sequence[str] = WORDS[:12]) -> View:
    from workbench import views

    ramp = torch.linspace(0, 0.9, len(tokens)).tolist()
    return views.token_strip(tokens, {"received": ramp, "effect": [v - 0.4 for v in ramp]}, title="Token strip")


def _head_atlas() -> View:
    from workbench import views

    return views.head_atlas(capture())


def _attention_pattern(tokens: Sequence[str] = WORDS[:12]) -> View:
    from workbench import views

    return views.attention_pattern(capture(tokens=tuple(tokens)))


def _compare(tokens: Sequence[str] = WORDS[:12]) -> View:
    from workbench import views

    found = capture(heads=2, tokens=tuple(tokens))  # a model of its own: a pair that is picked chooses a head
    return views.compare(*(views.attention_pattern(found, site=site) for site in (0, 1)), labels=("one", "two"))


def _figure() -> View:
    import plotly.graph_objects as go

    from workbench import views

    lines = go.Figure(go.Scatter(x=[1, 2, 3], y=[0.5, 0.25, 0.2], name="loss"))
    lines.data[0].update(customdata=[[0, 1], [1, 2], [1, 0]], meta={"select": ["layer", "heads"]})
    lines.update_layout(xaxis_title="epoch", yaxis_title="loss, nats")
    return views.figure(lines, title="Loss", caption="Loss by epoch.")


def _figure_of_tokens(tokens: Sequence[str]) -> View:
    import plotly.graph_objects as go

    from workbench import views
    from workbench.tokens import plotly_text

    shown = [plotly_text(token) for token in tokens]
    bars = go.Bar(x=shown, y=torch.linspace(0.1, 0.9, len(tokens)).tolist(), name="received")
    axes = {"type": "category"}  # plotly would read some texts as numbers or dates
    return views.figure(go.Figure(bars, {"xaxis": axes}), title="Figure", caption="A bar per token.")


def _run_timeline() -> View:
    from workbench import views

    return views.run_timeline(capture())


def _table(named: Sequence[str] = ("softmax", "agents", "no attention")) -> View:
    from workbench import views

    ramp = [0.5 * i for i in range(len(named))]
    columns = [
        views.Column("what it is", [f"row {i}" for i in range(len(named))]),
        views.Column("loss", ramp[::-1], "quality", "low", said=[f"of {i} seeds" for i in range(len(named))]),
        views.Column("recall", [*ramp[1:], float("nan")], "quality", "high"),
        views.Column("distance", ramp),
    ]
    return views.table(named, columns, of="mechanism", title="Table", caption="A row per mechanism.")


def _tensor_peek() -> View:
    from workbench import views

    return views.tensor_peek(torch.linspace(-1, 1, 60).reshape(3, 4, 5), title="Tensor peek")


def _saliency_map(tokens: Sequence[str] = WORDS[:6]) -> View:
    from workbench import views

    random = torch.Generator().manual_seed(0)
    n, frames, bins = len(tokens), 80, 16
    middles = torch.linspace(6, 34, n)[:, None]
    bumps = torch.exp(-((torch.arange(40) - middles) ** 2) / 8)
    cells = bumps.repeat_interleave(2, 1)[..., None] * torch.rand(bins, generator=random)
    noise = torch.rand(2, 3, n, 40, generator=random)
    return views.saliency_map(
        {"input saliency": cells + 0.2, "encoder-output saliency": bumps + 0.1},
        tokens,
        spectrogram=torch.rand(frames, bins, generator=random),
        errors={"encoder-output saliency": torch.full((n, 40), 0.02)},
        attention=(bumps + 0.4 * noise) / (bumps + 0.4 * noise).sum(-1, keepdim=True),
        alignment_heads=[(1, 0)],
        special=[False] * (n - 1) + [True],
        seconds=0.01,
        spans={
            "attention": torch.cat([middles - 2, middles + 2], 1) * 0.02,
            "said": torch.cat([middles - 3, middles + 1], 1) * 0.02,
        },
        audio=torch.sin(torch.arange(6400) / 8),
        sampling_rate=8000,
        unit="nats",
        title="Saliency map",
    )  # fmt: skip


def causal_map(tokens: Sequence[str] = WORDS[:6]) -> View:
    """A saliency map of a text whose last tokens depend on those before them."""
    from workbench import views

    n = len(tokens)
    scores = torch.randn(max(1, n // 2), n, generator=torch.Generator().manual_seed(0))
    visible = [n - len(scores) + 1 + i for i in range(len(scores))]
    said = [*tokens[n - len(scores) + 1 :], "end"]
    return views.saliency_map({"saliency": scores}, said, visible=visible, position_texts=tokens, title="Causal map")


def _what_if() -> View:
    from workbench import views

    return views.what_if(d_k=48, n=20, heads=4, needed=2)


@cache
def capacity() -> Capacity:
    """A capacity probe of a random GPT-2."""
    config = GPT2Config(n_layer=2, n_head=3, n_embd=24, vocab_size=32, n_positions=32)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with attach(model) as wb:
        importance = {(0, 0): 0.3, (0, 1): -0.1, (1, 0): 0.2, (1, 2): 0.5}
        batch = {"input_ids": torch.arange(64).view(2, 32) % 32}
        return workbench.capacity(wb, batch, repeats=4, importance=importance, progress=False)


def _capacity_curves() -> View:
    from workbench import views

    return views.capacity_curves(capacity())


def _conditioning_curves() -> View:
    from workbench import views

    some = {"experiments": ["blocking", "latent_inhibition"], "rules": ("hebb", "delta")}
    return views.conditioning_curves(workbench.conditioning(**some, trials=3, repeats=4, d=16, progress=False))


@cache
def image_capture(images: int = 3, heads: int = 2, side: int = 3) -> tuple[Capture, torch.Tensor]:
    """A capture of a random ViT with CLS and side x side patches, and the images that it saw."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=2, num_attention_heads=heads, hidden_size=8 * heads, intermediate_size=16,
        image_size=4 * side, patch_size=4, num_channels=1,
    )  # fmt: skip
    model = ViTModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query" in name or "key" in name or "q_proj" in name or "k_proj" in name:
                parameter.mul_(30)  # patterns with peaks
    pixels = torch.linspace(-1, 1, images * (4 * side) ** 2).reshape(images, 1, 4 * side, 4 * side)
    with attach(model) as wb, torch.inference_mode(), wb.capture() as found:
        model(pixel_values=pixels)
    return found, pixels


def _image_attention(labels: Sequence[str] = ("one", "two", "three")) -> View:
    from workbench import views

    return views.image_attention(*image_capture(len(labels)), labels=labels)


def _grounding(tokens: Sequence[str] = WORDS[:3]) -> View:
    """Two pictures, the first with a whole view and two tiles; three heads in each of two layers."""
    from workbench import Grounding, views

    shown = torch.Generator().manual_seed(0)
    grids = torch.tensor([[2, 4], [2, 2], [2, 2], [3, 3]])
    n = int(grids.prod(1).sum())
    frames = torch.tensor([[0.0, 0, 40, 20], [0, 0, 20, 20], [20, 0, 40, 20], [0, 0, 30, 30]])
    cells = [torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in grids.tolist()]
    boxes = []
    for (rows, columns), (x0, y0, x1, y1), at in zip(grids.tolist(), frames.tolist(), cells, strict=True):
        wide, high = (x1 - x0) / columns, (y1 - y0) / rows
        left, top = x0 + at[:, 1] * wide, y0 + at[:, 0] * high
        boxes.append(torch.stack([left, top, left + wide, top + high], 1))
    weights = torch.rand(len(tokens), 6, n, generator=shown) ** 4
    weights = 0.7 * weights / weights.sum(-1, keepdim=True)
    sinks = torch.zeros(6, n, dtype=torch.bool)
    sinks[2, 5] = True
    rest = torch.tensor([0.02, 0.18, 0.1]).expand(len(tokens), 6, 3)
    heads = [(layer, head) for layer in range(2) for head in range(3)]
    return views.grounding(
        Grounding(
            positions=tuple(range(30, 30 + len(tokens))), tokens=tuple(tokens), writes=(*tokens[1:], ""),
            labels=tuple(f"L{layer}H{head}" for layer, head in heads), sites=tuple(f"layers.{i}" for i, _ in heads),
            layers=tuple(i for i, _ in heads), heads=tuple(h for _, h in heads), weights=weights, sinks=sinks,
            parts=("the pictures", "other image tokens", "the first token", "other text"),
            masses=torch.cat([weights.sum(-1, keepdim=True), rest], -1), sink_rule="one was given",
            places=torch.arange(n) + 4, tile=tuple(t for t, at in enumerate(cells) for _ in at), cells=torch.cat(cells),
            boxes=torch.cat(boxes), tile_names=("one, tile 0", "one, tile 1", "one, tile 2", "two"),
            tile_pictures=(0, 0, 0, 1), grids=grids, names=("one", "two"), sizes=torch.tensor([[20, 40], [30, 30]]),
            pictures=tuple(torch.randint(0, 256, size, generator=shown).byte() for size in ((20, 40, 3), (30, 30, 3))),
            calls=1, provenance={},
        )
    )  # fmt: skip


def _head_gallery(labels: Sequence[str] = WORDS[:6]) -> View:
    from workbench import views

    n = len(labels)
    maps = torch.linspace(0, 1, n * 25).reshape(n, 5, 5).sqrt()
    return views.head_gallery(
        maps,
        [(i // 3, i % 3) for i in range(n)],
        labels=labels,
        axes=views.Axes("rows down", "columns to the right", -2, -2),
        groups=[views.Group("first", range(0, n, 2), maps[2]), views.Group(labels[0], range(1, n, 2))],
        numbers={"distance": torch.arange(float(n))},
        said=labels,
    )


def head_wall(tokens: Sequence[str] = WORDS[:12]) -> View:
    """A gallery of every head's pattern, whose cells are named by tokens."""
    from workbench import views

    return views.head_gallery(capture(tokens=tuple(tokens)))


def head_page(tokens: Sequence[str] = WORDS[:12]) -> View:
    """The page of a head, with numbers of every kind and a circuit."""
    from workbench import views

    found = capture(tokens=tuple(tokens))
    roles = HeadRoles(
        ("L0H1", "L1H2"), (("induction",), ()), {"induction": torch.tensor([0.9, 0.1])}, {}, 0.3, "ioi", {}
    )
    graph = Graph((Layer(3, 1), Layer(3, 3)), 8)
    return views.head(found, "L1H0", roles=roles, circuits=[circuit(graph, 20)])


def playground(tokens: Sequence[str] = WORDS[:12]) -> Playground:
    """A playground of a random GPT-2, with a head, a row and an edge ablated; the same model for all.

    The edge is of the head that `head_page` is of: on a page with both, the playground begins with it and has its map.
    """
    return copy(_playground(tuple(tokens)))


@cache
def _playground(tokens: tuple[str, ...]) -> Playground:
    from workbench import views

    wb = attach(_gpt2(2, 3, len(tokens)), _Words(tokens))
    text = "".join(tokens).encode(errors="replace").decode()  # has whole characters only, unlike tokens
    return views.playground(wb, text).ablate("L1H2").ablate("L0H1", 5).ablate("L1H0", 6, 2)


def circuit(graph: Graph, kept: int, level: str = "edge", *, task: str = "ioi", seed: int = 0) -> Circuit:
    """A circuit of the `kept` strongest of edges with random scores, as they are: some may lead nowhere."""
    scores = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[~graph.exists] = torch.nan
    inside = torch.zeros_like(graph.exists)
    order = scores.nan_to_num(0.0).abs().flatten().argsort(descending=True)[:kept]
    inside.view(-1)[order] = True
    senders = inside.any(1)
    return Circuit(
        model=graph.facts, task=task, method="eap", metric="logit_diff", direction="noising", sign="positive helps",
        level=level, senders_in=senders, edges_in=inside if level == "edge" else torch.zeros_like(inside),
        node_scores=scores.nan_to_num(0.0).abs().sum(1), edge_scores=scores, threshold={"kind": "top", "value": kept},
        stages=(), examples=None, clean=torch.ones(3), corrupted=torch.zeros(3), settings={}, provenance={},
    )  # fmt: skip


def _roles(named: Sequence[str]) -> HeadRoles:
    return HeadRoles(
        heads=("L0H0", "L1H2"), roles=(tuple(named), ("mover",)), evidence={}, errors={}, threshold=0.3, task="ioi",
        provenance={},
    )  # fmt: skip


def _circuit_graph(named: Sequence[str] = ("induction",)) -> View:
    from workbench import views

    graph = Graph((Layer(4, 2), Layer(4, 4), Layer(4, 2, parallel=True)), 8)
    return views.circuit_graph(circuit(graph, 60, seed=2).top(60), roles=_roles(named))


def _overlap_matrix(named: Sequence[str] = ("one", "two", "three")) -> View:
    from workbench import views

    graph = Graph.gpt2(3, 4, 8)
    several = [circuit(graph, 20 + i % 5, seed=i) for i in range(len(named))]
    return views.overlap_matrix(dict(zip(named, several, strict=True)), n_null=50)


@cache
def hybrid_capture() -> Capture:
    """A capture of a tiny hybrid: a gated delta rule below, attention above."""
    with attach(hybrid("qwen3-next")) as wb, torch.inference_mode(), wb.capture(ROWS, values=True) as found:
        wb.model(torch.arange(3, 16)[None], use_cache=False)
    return found


def _half_lives() -> View:
    from workbench import views

    return views.half_lives(hybrid_capture())


def _states() -> View:
    from workbench import views

    return views.states(hybrid_capture(), 0)


def _content_and_decay() -> View:
    from workbench import views

    return views.attention_pattern(hybrid_capture(), apart=True)


def _mechanisms() -> View:
    from workbench import views

    return views.compare(*(views.attention_pattern(hybrid_capture(), site=site) for site in (0, 1)))


def _atlases() -> View:
    from workbench import views

    several = (capture(layers=3, tokens=WORDS[:n]) for n in (12, 9))
    return views.compare(*map(views.head_atlas, several), labels=("twelve", "nine"))


def _overlap_graph() -> View:
    from workbench import views

    graph = Graph.gpt2(3, 4, 8)
    pair = {name: circuit(graph, 20, seed=seed, task=name) for name, seed in (("one", 0), ("two", 1))}
    return views.overlap_graph(workbench.circuit_overlap(*pair.values(), n_null=20), *pair.values())


@cache
def windows_capture() -> tuple[Capture, torch.Tensor]:
    """A capture of a random Swin, whose windows of 3 x 3 patches are shifted in its second layer, and its images."""
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    model = SwinModel(SwinConfig(image_size=24, embed_dim=16, depths=[2], num_heads=[2], window_size=3)).eval()
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with attach(model) as wb, torch.inference_mode(), wb.capture([], values=True) as found:
        model(pixels)
    return found, pixels


def _windows() -> View:
    from workbench import views

    return views.image_attention(*windows_capture(), windows=views.Windows())


@cache
def gates() -> GateProfile:
    """What the gates of a random VAN let through."""
    from workbench.mechanisms import Place, get

    torch.manual_seed(0)
    module = get("van").build(Place(4, 2, 12, causal=False, grid=(3, 4))).eval()
    x = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0))
    with attach(module) as wb, torch.inference_mode(), wb.capture() as found:
        module(x)
    return workbench.gate_profile(found, (3, 4))


@cache
def evicted() -> Eviction:
    """What a streaming cache drops."""
    return workbench.eviction(capture(), "streaming", sinks=1, recent=4)


@cache
def spikes() -> SpikeActivity:
    """What the neurons of a random Spikformer do."""
    from workbench.mechanisms import Place
    from workbench.mechanisms.spikformer import Spikformer

    torch.manual_seed(0)
    place = Place(16, 2, 12, causal=False, grid=(3, 4))
    model = Spikformer(place, n_classes=5, layers=1, steps=3).eval()
    images = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    return workbench.spike_activity(model, [images], shown=8)


def _exhibit() -> View:
    """What a study shows, with a panel of each sort."""
    from workbench.mechanisms.studies import Atoms, Bars, Exhibit, Heat, Lines

    ramp = torch.linspace(0, 1, 6)
    panels = (
        Heat("map", ramp.outer(ramp), "head", "key", boxes=[(1, 1, 2, 2)]),
        Lines("lines", range(6), {"one": ramp, "other": 1 - ramp}, "step", "share", [(1, 3, "shaded")]),
        Bars("bars", ["a", "b"], {"before": [0.2, 0.4], "after": [0.3, 0.1]}, "share"),
        Atoms("atoms", torch.eye(3), ("Fe", "O", "O"), ramp[:3], torch.ones(3, 3) / 3),
    )
    return workbench.views.of(Exhibit("Exhibit", "What a study shows.", panels))


@cache
def reads_memory() -> workbench.MemoryReading:
    """What a random tracker reads of the frames that it remembers."""
    from support.trackers import session, tracker

    with attach(tracker()) as wb:
        return workbench.memory_reading(wb, session(6))


@cache
def memory_tree() -> workbench.MemoryTree:
    """Three pathways of which one goes on being sure."""
    from workbench.analysis.memory import Seen, grow_memory_tree

    def track(frame: int, history: Sequence[Any]) -> Seen:
        draw = torch.Generator().manual_seed(100 * frame + sum(node.mask for node in history))
        return Seen(torch.rand(3, generator=draw).clamp(0.2).tolist(), 3.0 if frame % 2 else 0.5)

    return grow_memory_tree(track, 6)


def _shown(result: Callable[[], Any], at: int) -> Callable[[], View]:
    """One of the views of a result."""

    def make() -> View:
        from workbench import views

        return views.all_of(result())[at]

    return make


VIEWS: dict[str, Callable[[], View]] = {
    "saliency_map": _saliency_map,
    "capacity_curves": _capacity_curves,
    "conditioning_curves": _conditioning_curves,
    "what_if": _what_if,
    "table": _table,
    "tensor_peek": _tensor_peek,
    "figure": _figure,
    "run_timeline": _run_timeline,
    "compare": _compare,
    "attention_pattern": _attention_pattern,
    "head_atlas": _head_atlas,
    "head_gallery": _head_gallery,
    "head_page": head_page,
    "image_attention": _image_attention,
    "grounding": _grounding,
    "token_strip": _token_strip,
    "circuit_graph": _circuit_graph,
    "overlap_matrix": _overlap_matrix,
    "playground": playground,
}
"""Kind of view -> one of it."""

FORMS: dict[str, Callable[[], View]] = {
    "half-lives": _half_lives,
    "states": _states,
    "content and decay": _content_and_decay,
    "two mechanisms": _mechanisms,
    "two atlases": _atlases,
    "head wall": head_wall,
    "causal map": causal_map,
    "overlap graph": _overlap_graph,
    "windows": _windows,
    "gates": _shown(gates, 0),
    "eviction": _shown(evicted, 0),
}
"""What these kinds show besides."""

FIGURES: dict[str, Callable[[], View]] = {
    "memory timeline": _shown(reads_memory, 0),
    "memory tree": _shown(memory_tree, 0),
    "gates over positions": _shown(gates, 1),
    "eviction by query": _shown(evicted, 1),
    "spikes": _shown(spikes, 0),
    "spike raster": _shown(spikes, 1),
    "energy": _shown(spikes, 2),
    "exhibit": _exhibit,
}
"""What results show as figures, in which nothing is chosen or set."""


@cache
def made(name: str) -> View:
    """One view of a kind or a form, to be looked at and left as it is."""
    return (VIEWS | FORMS | FIGURES)[name]()


def page_of(names: Iterable[str], path: Path) -> Path:
    """A page with views of these kinds and forms."""
    return disk.write(path, pages.render("Every view", [made(name).current for name in names]))


WITH_TOKENS: dict[str, Callable[[Sequence[str]], View]] = {
    "attention_pattern": _attention_pattern,
    "compare": _compare,
    "figure": _figure_of_tokens,
    "saliency_map": _saliency_map,
    "causal map": causal_map,
    "head_gallery": _head_gallery,
    "head wall": head_wall,
    "head_page": head_page,
    "image_attention": _image_attention,
    "grounding": _grounding,
    "token_strip": _token_strip,
    "circuit_graph": _circuit_graph,
    "playground": playground,
}
"""Kinds of views that show tokens -> one of these tokens."""

CHOOSING: dict[str, dict[str, Any]] = {
    "saliency_map": {"layer": 1, "heads": (2,), "token": 3},
    "capacity_curves": {"layer": 1, "heads": (2,)},
    "compare": {"layer": 1, "heads": (1,), "query": 4, "key": 2},
    "attention_pattern": {"layer": 1, "heads": (2,), "query": 5},
    "head_atlas": {"layer": 1, "heads": (2,)},
    "head_gallery": {"layer": 1, "heads": (2,)},
    "head_page": {"layer": 1, "heads": (2,)},
    "figure": {"layer": 1, "heads": (2,)},
    "run_timeline": {"layer": 1, "heads": (), "site": "transformer.h.1.attn"},
    "circuit_graph": {"layer": 1, "heads": (2,)},
    "overlap_matrix": {"layer": 1, "heads": (2,)},
    "image_attention": {"layer": 1, "heads": (1,), "query": 3, "example": 1},
    "grounding": {"layer": 1, "heads": (1,), "query": 31, "key": 22, "example": 1},
    "token_strip": {"token": 6},
    "playground": {"layer": 1, "heads": (2,), "query": 5},
    "half-lives": {"layer": 0, "heads": (3,)},
    "states": {"layer": 0, "heads": (3,)},
    "content and decay": {"layer": 0, "heads": (3,), "query": 7},
    "two mechanisms": {"layer": 0, "heads": (3,), "query": 7},
    "two atlases": {"layer": 2, "heads": (1,)},
    "head wall": {"layer": 1, "heads": (2,)},
    "causal map": {"token": 2},
    "overlap graph": {"layer": 1, "heads": (2,)},
    "windows": {"layer": 1, "heads": (1,), "query": 3, "example": 1},
    "gates": {"layer": 0, "heads": (3,)},
    "eviction": {"layer": 1, "heads": (2,)},
}
"""Kind or form -> what can be chosen in it, other than what it begins with."""

SETTING: dict[str, dict[str, Any]] = {
    "saliency_map": {"map": "encoder-output saliency", "over": "attention", "scale": "z", "heads": "alignment"},
    "capacity_curves": {"query": "noisy keys"},
    "conditioning_curves": {"experiment": "latent inhibition", "off": ["hebb"]},
    "what_if": {"settings": {"n": 40, "heads": 2}},
    "table": {"sort": "loss", "rising": True},
    "tensor_peek": {"index": [2, 0, 0], "counts": "log"},
    "compare": {"scale": "linear", "pair": "1"},
    "attention_pattern": {"scale": "log", "range": "one", "hide": True},
    "head_atlas": {"metric": "Sink"},
    "head_gallery": {"shared": True},
    "image_attention": {"received": True, "shared": True},
    "grounding": {"show": "weights", "tiles": "one"},
    "token_strip": {"channel": "effect"},
    "circuit_graph": {"by": "absolute", "n": 7},
    "overlap_matrix": {"measure": "share", "pair": [1, 2]},
    "playground": {"metric": "Sink", "after": True},
    "half-lives": {"metric": "half-life"},
    "states": {"shared": True},
    "content and decay": {"weights": "decay", "scale": "linear"},
    "two mechanisms": {"scale": "linear", "pair": "3"},
    "two atlases": {"scale": "linear"},
    "head wall": {"roots": False},
    "causal map": {"scale": "all"},
    "overlap graph": {"hidden": ["a"], "n": 9},
    "windows": {"shared": True},
    "gates": {"metric": "spread over inputs"},
    "eviction": {"metric": "of the worst query"},
}
"""Kind or form -> what can be set in it."""
