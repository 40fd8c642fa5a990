"""The circuit graph: what a page shows at a threshold is what Python chooses; pins, names, the walk by keys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Page

import workbench
from support.browser import WatchedPage
from support.circuits import Words, task_for, tiny
from support.every_view import circuit
from views.test_circuits import curve
from views.test_results import shown
from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.nodes import Layer
from workbench.analysis.circuits.roles import HeadRoles
from workbench.errors import InterventionError, ReportError, WorkbenchError
from workbench.views import CircuitGraph, all_of, circuit_graph, of
from workbench.views.circuit_graph.places import places_of, rows_of

SMALL = Graph.gpt2(2, 3, 8)
GROUPED = Graph((Layer(4, 2), Layer(4, 4), Layer(4, 2, parallel=True)), 8)
HOSTILE = "<script>window.__pwn=1</script>"
SUMMARY = "({dataset: {edges, nodes, kept, at}}) => ({edges: +edges, nodes: +nodes, kept, at})"


def opened(page: WatchedPage, view: CircuitGraph, folder: Path, address: str = "") -> Page:
    file = Path(view.to_html(folder / "graph.html"))
    page.page.goto("about:blank")
    page.page.goto(file.as_uri() + address)
    page.page.wait_for_selector("html[data-ready]")
    return page.page


def choose(tab: Page, n: int, by: str = "absolute") -> dict[str, Any]:
    """What the page says of the n highest."""
    tab.get_by_label("Show").select_option(by)
    number = tab.get_by_role("spinbutton")
    number.fill(str(n))
    number.press("Enter")
    return said_by(tab)


def said_by(tab: Page) -> dict[str, Any]:
    return dict(tab.locator(".summary").evaluate(SUMMARY))


def nodes(tab: Page) -> set[str]:
    return set(tab.evaluate("[...document.querySelectorAll('.node')].map(node => node.dataset.node)"))


def focused(tab: Page) -> str | None:
    found = tab.evaluate("document.activeElement.dataset.node ?? null")
    return None if found is None else str(found)


def by_paths() -> Circuit:
    """A circuit of nodes as path patching leaves it: two stages, at the end and at all positions."""
    graph = SMALL
    base = circuit(graph, 0, "node")
    importance = torch.full((2, len(graph.senders)), torch.nan, dtype=torch.float64)
    importance[0, [1, 2, 3, 5, 6, 7]] = torch.tensor([0.1, -0.3, 0.05, 0.6, 0.2, -0.01]).double()
    importance[1, [1, 2, 3]] = torch.tensor([0.9, 0.02, -0.04]).double()
    edges, scores = torch.zeros_like(graph.exists), torch.full_like(base.edge_scores, torch.nan)
    stages = []
    for values, receivers, where, chosen in (
        (importance[0], ("logits",), "end", ("a1.h0",)),
        (importance[1], ("a1.h0<k>", "a1.h0<v>"), None, ("a0.h0",)),
    ):
        for name in receivers:
            column = graph.receiver_index[name]
            scores[:, column] = torch.where(graph.exists[:, column], values, scores[:, column])
            edges[[graph.sender_index[one] for one in chosen], column] = True
        stages.append({"name": "s", "receivers": receivers, "positions": where, "importance": values, "chosen": chosen})
    largest = importance.nan_to_num(0.0).abs().argmax(0)
    return replace(
        base, method="path_patching", edges_in=edges, edge_scores=scores, senders_in=edges.any(1),
        node_scores=importance.gather(0, largest[None])[0], stages=tuple(stages), threshold={"kind": "stages"},
    )  # fmt: skip


@pytest.mark.parametrize("graph", [SMALL, GROUPED])
def test_the_spec_holds_every_edge_and_node_once(graph: Graph, tmp_path: Path) -> None:
    found = circuit(graph, 12)
    view = circuit_graph(found)
    facts, blocks = view.spec.facts, view.spec.blocks
    inside = blocks["members"][0].astype(bool)
    names = [node["name"] for node in facts["nodes"]]
    held = {
        (names[s], graph.receivers[r], round(float(score), 9))
        for s, r, score in zip(
            blocks["senders"][inside], blocks["receivers"][inside], blocks["scores"][0, inside], strict=True
        )
    }
    assert held == {(*edge.split("->"), round(found.score_of(edge), 9)) for edge in found.edges}
    assert len(held) == found.n_edges == 12
    assert {names[i] for i in np.flatnonzero(blocks["node_members"][0])} == set(found.nodes)
    heads = [node["head"] for node in facts["nodes"] if node["head"] and node["name"] in found.nodes]
    assert {f"L{layer}H{head}" for layer, head in heads} == set(found.heads)
    shown(found, tmp_path)


def test_kinds_and_places_come_from_the_graph() -> None:
    places = {place.name: place for place in places_of(GROUPED)}
    assert (places["input"].kind, places["logits"].kind) == ("input", "logits")
    assert (places["a0.kv1"].kind, places["a0.kv1"].number) == ("kv", 2.5)
    assert places["a0.kv1"].feeds == ("a0.h2", "a0.h3")
    assert places["m0"].raised
    assert not places["m2"].raised  # parallel: it reads what the heads read


def test_an_encoder_decoder_is_drawn_with_both_streams(tmp_path: Path) -> None:
    with workbench.attach(tiny("mbart"), Words()) as wb:
        task = task_for("mbart", 3)
        found = workbench.find_circuit(wb, task, "eap", n_edges=0.5, progress=False)
        other = workbench.find_circuit(wb, task_for("mbart", 2), "eap", n_edges=0.5, progress=False)
        results = [
            workbench.patch_heads(wb, task, progress=False), workbench.head_roles(wb, task, progress=False),
            workbench.circuit_overlap(found, other, n_bootstrap=10),
        ]  # fmt: skip
    graph = found.graph
    assert rows_of(graph) == [
        "encoder.0.attn", "encoder.1.attn", "decoder.0.attn", "decoder.0.cross_attn", "decoder.1.attn",
        "decoder.1.cross_attn",
    ]  # fmt: skip
    assert [place.name for place in places_of(graph) if place.kind == "input"] == ["encoder.input", "decoder.input"]
    nodes = {node["name"]: node for node in circuit_graph(found).spec.facts["nodes"]}
    assert nodes["decoder.x1.h2"]["site"] == "decoder.1.cross_attn"
    assert nodes["decoder.x1.h2"]["head"] == [1, 2]
    shown(found, tmp_path)
    for result in results:
        for view in all_of(result):
            assert "decoder" in view.to_html() or view.spec.kind == "figure"
    atlas = of(results[0]).data()
    assert set(atlas["site"]) == set(rows_of(graph))
    assert len(atlas) == len(graph.head_names)


def test_edges_beyond_the_most_are_left_out_and_said() -> None:
    view = circuit_graph(circuit(SMALL, 20), most=5)
    assert view.spec.blocks["members"].sum() == 5
    assert "The 5 strongest edges are drawn, of 20" in " ".join(view.spec.notes)
    assert f"holds the 5 strongest of {SMALL.n_edges} scored edges" in " ".join(view.spec.notes)
    scores = view.spec.blocks["scores"][0]
    signed = scores[view.spec.blocks["signed_rank"]]
    wanted = circuit(SMALL, 20).edge_scores.nan_to_num(-torch.inf).flatten().sort(descending=True).values
    np.testing.assert_array_equal(signed, wanted[: len(signed)])  # only as far as the page can know


def test_the_caption_says_what_a_circuit_of_this_size_keeps() -> None:
    found = circuit(SMALL, 12)
    measured = replace(curve((6, 12, SMALL.n_edges)), task=found.task, circuit=repr(found))
    assert "size, 12, keeps 60%" in circuit_graph(found, curve=measured).spec.caption
    with pytest.raises(ReportError, match="the curve is of"):
        circuit_graph(circuit(SMALL, 5), curve=measured)


def test_an_empty_circuit_is_refused() -> None:
    with pytest.raises(InterventionError, match="empty"):
        circuit_graph(circuit(SMALL, 0))


def test_pins_are_given_changed_and_given_again() -> None:
    view = circuit_graph(circuit(SMALL, 12), names={(0, 1): "early", "L1H2": "mover", "m0": ""})
    assert view.pins == {"a0.h1": "early", "a1.h2": "mover", "m0": ""}
    view.pin("a1.h2", "copier").unpin("L0H1")
    assert view.pins == {"a1.h2": "copier", "m0": ""}
    assert circuit_graph(circuit(SMALL, 12), names=view.pins).pins == view.pins
    assert view.widget.state["pins"] == view.pins
    view.widget.state = {"pins": {"m1": "x"}}  # as the browser does
    assert view.pins == {"m1": "x"}
    assert view.spec.to_static()["state"] == {"pins": {"m1": "x"}}
    with pytest.raises(ReportError, match="no node 'zz'"):
        view.set_state(pins={"zz": ""})
    with pytest.raises(ReportError, match="wrong at state"):
        view.set_state(layout="circles")
    with pytest.raises(InterventionError, match="no node"):
        view.pin("L7H0")
    with pytest.raises(WorkbenchError):
        view.widget.state = {"pins": {"zz": ""}}
    assert view.widget.state == view.state == {"pins": {"m1": "x"}}


def test_the_threshold_is_that_of_python_and_of_the_picture() -> None:
    found = circuit(SMALL, 12)
    view = circuit_graph(found)
    assert view.shown is found
    before = view.to_png()
    view.set_state(by="absolute", n=5)
    assert view.shown.edges == found.top(5).edges
    assert view.to_png() != before
    assert circuit_graph(by_paths()).set_state(by="signed", n=3).to_png()


@pytest.mark.browser
@pytest.mark.parametrize("graph", [SMALL, GROUPED])
def test_the_page_chooses_the_edges_that_python_does(graph: Graph, page: WatchedPage, tmp_path: Path) -> None:
    found = circuit(graph, 12, seed=2)
    tab = opened(page, circuit_graph(found), tmp_path)
    assert said_by(tab)["edges"] == 12
    pruned = 0
    for by in ("absolute", "signed"):
        for n in (1, 2, 5, 9, 14, 20, graph.n_edges - 3, graph.n_edges):
            wanted = found.top(n, absolute=by == "absolute")
            said = choose(tab, n, by)
            assert (said["edges"], said["nodes"]) == (wanted.n_edges, len(wanted.nodes)), (by, n)
            assert nodes(tab) == set(wanted.nodes)
            pruned += wanted.n_edges < n
    assert pruned > 3
    assert "not measured: curve=" in tab.locator(".summary").inner_text()
    page.assert_clean()


@pytest.mark.browser
def test_the_slider_moves_by_keys_and_stops_at_measured_sizes(page: WatchedPage, tmp_path: Path) -> None:
    found = circuit(SMALL, 12, seed=2).top(12)
    sizes = (3, 12, SMALL.n_edges)
    measured = replace(curve(sizes), task=found.task, circuit=repr(found))
    tab = opened(page, circuit_graph(found, curve=measured), tmp_path)
    for by, shares in (("absolute", measured.absolute), ("signed", measured.signed)):
        for size, share in zip(sizes, shares, strict=True):
            said = choose(tab, size, by)
            assert said["at"] == "measured"
            assert float(said["kept"]) == pytest.approx(share)
    said = choose(tab, 6)
    way = np.log(6 / 3) / np.log(12 / 3)
    assert said["at"] == "between"
    assert float(said["kept"]) == pytest.approx(
        measured.absolute[0] + way * (measured.absolute[1] - measured.absolute[0])
    )
    assert "not measured, but between the measured sizes 3 and 12" in tab.locator(".summary").inner_text()
    said = choose(tab, 2)
    assert (said["at"], said["kept"]) == ("outside", "")
    tab.get_by_label("Show").select_option("found")
    said = said_by(tab)
    assert (said["edges"], said["at"]) == (found.n_edges, "measured")  # it is the top 12
    slider = tab.get_by_role("slider")
    slider.focus()
    slider.press("Home")
    assert slider.get_attribute("aria-valuetext") == "1"
    slider.press("End")
    assert slider.get_attribute("aria-valuetext") == f"{SMALL.n_edges}, measured"
    assert tab.locator(".marks i").count() == 3
    page.assert_clean()


@pytest.mark.browser
def test_a_circuit_that_is_no_top_has_no_kept_effect(page: WatchedPage, tmp_path: Path) -> None:
    found = circuit(SMALL, 12)
    others = found.with_edges(found.edges_in & (found.edge_scores.nan_to_num(0.0) > 0))
    measured = replace(curve((3, 12)), task=others.task, circuit=repr(others))
    tab = opened(page, circuit_graph(others, curve=measured), tmp_path)
    assert said_by(tab)["at"] == "unknown"
    page.assert_clean()


@pytest.mark.browser
@pytest.mark.parametrize("graph", [SMALL, GROUPED])
def test_keys_walk_along_the_strongest_edge(graph: Graph, page: WatchedPage, tmp_path: Path) -> None:
    found = circuit(graph, 40, seed=2).top(40)
    tab = opened(page, circuit_graph(found), tmp_path)
    inside = found.edges_in
    scores = found.edge_scores.abs().where(inside, torch.tensor(-1.0).double())
    groups = {head: place.name for place in places_of(graph) for head in place.feeds if place.kind == "kv"}

    def into(name: str) -> str | None:
        mine = {name, groups.get(name, name)}
        columns = [i for i, receiver in enumerate(graph.receivers) if receiver.partition("<")[0] in mine]
        if not columns:
            return None  # an input
        best = scores[:, columns].max(1).values
        return graph.senders[int(best.argmax())] if float(best.max()) > 0 else None

    walked = 0
    for name in found.nodes:
        node = tab.locator(f"[data-node='{name}']")
        node.focus()
        node.press("ArrowDown")
        wanted = into(name)
        assert focused(tab) == (wanted or name)
        node.focus()
        node.press("ArrowUp")
        if name in graph.sender_index and bool(inside[graph.sender_index[name]].any()):
            receiver = graph.receivers[int(scores[graph.sender_index[name]].argmax())]
            assert focused(tab) == receiver.partition("<")[0]
            walked += 1
        elif name in groups.values():
            assert groups[str(focused(tab))] == name  # on to a head of the group
        else:
            assert focused(tab) == name
            assert "no edge goes on" in tab.locator(".status").inner_text()
    assert walked > 4
    first = tab.locator("[data-node='a1.h0'], [data-node='a1.h1'], [data-node='a1.h2']").first
    first.press("Home")
    row = [focused(tab)]
    for _ in range(4):
        tab.locator(f"[data-node='{row[-1]}']").press("ArrowRight")
        row.append(focused(tab))
    layer = [name for name in found.nodes if graph.layer_of(name) == 1 and name in graph.sender_index]
    assert [*dict.fromkeys(row)] == layer
    page.assert_clean()


@pytest.mark.browser
def test_a_node_lists_its_edges_and_chooses_its_head(page: WatchedPage, tmp_path: Path) -> None:
    found = circuit(SMALL, 36, seed=2).top(36)
    tab = opened(page, circuit_graph(found), tmp_path)
    name = "a1.h1"
    tab.locator(f"[data-node='{name}']").hover()
    column = [SMALL.receiver_index[f"{name}<{part}>"] for part in "qkv"]
    pairs = [
        (abs(float(found.edge_scores[s, r])), SMALL.senders[s], SMALL.receivers[r][-2])
        for r in column
        for s in range(len(SMALL.senders))
        if bool(found.edges_in[s, r])
    ]
    rows = tab.locator(".side section").first.locator("li button")
    listed = [(row.get_attribute("data-to"), row.locator(".part").inner_text()) for row in rows.all()]
    assert listed == [(sender, part) for _, sender, part in sorted(pairs, reverse=True)][:10]
    assert float(rows.first.locator(".n").get_attribute("title") or 0) == pytest.approx(
        float(max(pairs)[0]) * np.sign(float(rows.first.locator(".n").inner_text())), rel=1e-5
    )
    tab.locator(f"[data-node='{name}']").click()
    assert tab.evaluate("location.hash").endswith("L1H1")
    assert tab.locator(".node.chosen").get_attribute("data-node") == name
    rows.first.click()
    assert focused(tab) == sorted(pairs, reverse=True)[0][1]
    page.assert_clean()


@pytest.mark.browser
def test_a_pin_and_its_name_stand_in_the_address(page: WatchedPage, tmp_path: Path) -> None:
    view = circuit_graph(circuit(SMALL, 60, seed=2).top(60), names={"m0": "first MLP"})
    tab = opened(page, view, tmp_path)
    assert tab.locator(".tag.pinned").all_inner_texts() == ["first MLP"]
    node = tab.locator("[data-node='a1.h1']")
    node.focus()
    node.press("p")
    assert node.get_attribute("aria-pressed") == "true"
    node.press("n")
    tab.keyboard.type(f" mover {HOSTILE}")
    tab.keyboard.press("Enter")
    assert focused(tab) == "a1.h1"
    tab.wait_for_function("() => location.hash.includes('mover')")  # it is written after a pause
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert "named mover <script>" in (node.get_attribute("aria-label") or "")
    assert node.get_attribute("aria-pressed") == "true"
    assert {text.rstrip("…") for text in tab.locator(".tag.pinned").all_inner_texts()} == {
        "first MLP",
        "mover <script>w",
    }
    assert tab.evaluate("window.__pwn") is None
    assert tab.locator(".workbench script").count() == 0
    node.press("p")
    tab.wait_for_function("() => !location.hash.includes('mover')")
    page.assert_clean()


@pytest.mark.browser
@pytest.mark.parametrize(
    "state",
    [
        {"pins": {"zz": "x", "__proto__": "y", "m0": 3}, "by": "constructor", "n": -4, "layout": "toString"},
        {"pins": [1], "by": None, "n": "9", "layout": 1, "hidden": "shared", "pair": [9, 9]},
        {"pins": {"m0": "a\u202eb" + "long" * 99}, "by": "absolute", "n": 10**9},
    ],
)
def test_a_wrong_address_does_no_harm(state: dict[str, Any], page: WatchedPage, tmp_path: Path) -> None:
    from urllib.parse import quote

    view = circuit_graph(circuit(SMALL, 12))
    tab = opened(page, view, tmp_path, f"#view-0={quote(json.dumps(state))}")
    assert tab.locator(".node").count() >= 8
    assert "\u202e" not in tab.locator(".workbench").inner_text()
    tab.locator(".node").first.press("p")
    page.assert_clean()


@pytest.mark.browser
def test_roles_are_shown_until_there_is_a_name(page: WatchedPage, tmp_path: Path) -> None:
    roles = HeadRoles(
        heads=("L0H0", "L1H2"), roles=(("induction", "mover"), ()), evidence={}, errors={}, threshold=0.3, task="ioi",
        provenance={},
    )  # fmt: skip
    tab = opened(page, circuit_graph(circuit(SMALL, 30), roles=roles), tmp_path)
    assert [text for text in tab.locator(".tag").all_inner_texts() if text] == ["induction, mover"]
    assert "suggested: induction, mover" in (tab.locator("[data-node='a0.h0']").get_attribute("aria-label") or "")
    page.assert_clean()


@pytest.mark.browser
def test_of_nodes_the_slider_goes_over_nodes_and_layouts_hold_them(page: WatchedPage, tmp_path: Path) -> None:
    found = by_paths()
    tab = opened(page, circuit_graph(found), tmp_path)
    assert nodes(tab) == set(found.nodes)
    for by in ("absolute", "signed"):
        for n in (1, 2, 4, 6):
            wanted = found.top(n, absolute=by == "absolute")
            said = choose(tab, n, by)
            assert said["nodes"] == n == len(wanted.nodes)
            assert nodes(tab) - {"logits"} == set(wanted.nodes)
    choose(tab, 6)
    for layout in ("heads", "compact", "positions"):
        tab.get_by_label("Layout").select_option(layout)
        boxes = tab.evaluate(
            """[...document.querySelectorAll('.node')].map(node => node.getBoundingClientRect())
                 .map(({left, right, top, bottom}) => [left, right, top, bottom])"""
        )
        apart = [a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2] for a in boxes for b in boxes if a != b]
        assert all(apart), layout
    x = {name: tab.locator(f"[data-node='{name}']").bounding_box()["x"] for name in nodes(tab)}  # type: ignore[index]
    assert max(x["a0.h0"], 0) < min(x["a0.h1"], x["a1.h0"], x["logits"])  # patched everywhere, before the end
    page.assert_clean()


@pytest.mark.browser
def test_a_large_circuit_has_no_element_per_edge(page: WatchedPage, tmp_path: Path) -> None:
    graph = Graph.gpt2(12, 12, 8)
    view = circuit_graph(circuit(graph, 3000))
    tab = opened(page, view, tmp_path)
    assert tab.evaluate("document.querySelectorAll('.workbench *').length") < 900
    assert choose(tab, 700)["edges"] == circuit(graph, 3000).top(700).n_edges
    page.assert_clean()


def test_a_result_is_a_graph() -> None:
    assert isinstance(of(circuit(SMALL, 12)), CircuitGraph)
