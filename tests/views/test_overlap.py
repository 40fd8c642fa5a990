"""Overlap as a graph and as a matrix: classes are Python's sets, a cell of the matrix shows its pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Page

import workbench
from support.browser import WatchedPage
from support.every_view import circuit
from views.test_results import shown
from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.overlap_result import CircuitOverlap
from workbench.errors import InterventionError, ReportError, WorkbenchError
from workbench.report import check
from workbench.views import View, all_of, overlap_chance, overlap_graph, overlap_matrix

HOSTILE = "<img src=x onerror=alert(1)>"
GRAPH = Graph.gpt2(3, 4, 8)
CLASSES = """[...document.querySelectorAll('.node')].map(node => [node.dataset.node,
               ['shared', 'a', 'b'].find(kind => node.classList.contains(`is-${kind}`))])"""


def several() -> dict[str, Circuit]:
    """Three circuits of random scores, the second half like the first."""
    first, second, third = (circuit(GRAPH, 30, task=f"task {seed}", seed=seed) for seed in range(3))
    mixed = torch.where(torch.arange(len(GRAPH.senders))[:, None] < 6, first.edge_scores, second.edge_scores)
    order = mixed.nan_to_num(0.0).abs().flatten().argsort(descending=True)[:30]
    inside = torch.zeros_like(first.edges_in)
    inside.view(-1)[order] = True
    alike = Circuit(**{**vars(second), "edge_scores": mixed, "edges_in": inside, "senders_in": inside.any(1)})
    return {"one": first, "two": alike, HOSTILE: third}


def opened(page: WatchedPage, view: View, folder: Path) -> Page:
    tab = page.open(Path(view.to_html(folder / "overlap.html")))
    tab.wait_for_selector("html[data-ready]")
    return tab


def counts(tab: Page) -> tuple[int, ...]:
    found = tab.locator(".summary").evaluate("({dataset: {shared, a, b}}) => [shared, a, b].map(Number)")
    return tuple(found)


def classes_of(a: Circuit, b: Circuit) -> dict[str, str]:
    inside = [set(one.graph.nodes_of(one.edges_in)) for one in (a, b)]
    kinds = {(True, True): "shared", (True, False): "a", (False, True): "b"}
    return {name: kinds[name in inside[0], name in inside[1]] for name in inside[0] | inside[1]}


def by_hand() -> CircuitOverlap:
    return CircuitOverlap(
        a="", b="", tasks=("ioi", HOSTILE), unit="edges", shared=("input->a0.h1<q>", "a0.h1->logits", "a0.h1->m0"),
        only_a=("m0->logits",), only_b=("a0.h0->m0",),
        values={"jaccard": 0.6, "of_a": 0.75, "of_b": 0.75, "rank_biased": 0.5, "weighted": 0.4},
        intervals={"jaccard": (0.4, 0.8)},
        null=torch.tensor([0.1, 0.2, 0.2]), p_value=0.25, stages=(), sizes=(2, 4), fractions=(0.1, 0.2),
        curve={"jaccard": (0.5, 0.6), "expected": (0.1, 0.2), "low": (0.4, 0.5), "high": (0.6, 0.7),
               "expected_low": (0.0, 0.1), "expected_high": (0.2, 0.3)},
        cross_faithfulness=(), ablation="mean", model=Graph.gpt2(1, 2, 8).facts, provenance={},
    )  # fmt: skip


def test_an_overlap_is_a_graph_and_its_chance(tmp_path: Path) -> None:
    found = by_hand()
    graph, chance = all_of(found)
    blocks = graph.spec.blocks
    assert blocks["shared"].tolist() == [[4, 3], [3, 4]]
    assert (blocks["members"].sum(0) == 2).sum() == 3
    assert "p 0.25" in graph.spec.caption
    assert "3 shared edges; Jaccard 0.600" in chance.spec.caption
    drawn = {trace.get("name"): trace for trace in chance._whole["data"]}  # type: ignore[attr-defined]
    assert np.asarray(drawn["random"]["y"]).sum() == 3
    np.testing.assert_allclose(np.asarray(drawn["by chance"]["y"]), [0.1, 0.2])
    shown(found, tmp_path)


def test_names_that_the_model_has_not_are_an_error() -> None:
    odd = CircuitOverlap(**{**vars(by_hand()), "shared": ("somewhere->else",), "only_a": (), "only_b": ()})
    with pytest.raises(WorkbenchError, match="no edge"):
        overlap_graph(odd)


def test_the_circuits_must_be_those_of_the_overlap() -> None:
    one, two, three = several().values()
    found = workbench.circuit_overlap(one, two, n_bootstrap=0, n_null=10)
    assert not np.isnan(overlap_graph(found, one, two).spec.blocks["scores"]).any()
    with pytest.raises(ReportError, match="not of these circuits"):
        overlap_graph(found, one, three)
    with pytest.raises(ReportError, match="one of the two circuits is missing"):
        overlap_graph(found, one)


@pytest.mark.browser
@pytest.mark.parametrize("unit", ["edges", "nodes", "heads"])
@pytest.mark.parametrize("given", [True, False])
def test_classes_are_the_sets_of_python(unit: str, given: bool, page: WatchedPage, tmp_path: Path) -> None:
    one, two, _ = several().values()
    found = workbench.circuit_overlap(one, two, unit=unit, n_bootstrap=0, n_null=10)
    view = overlap_graph(found, one, two) if given else overlap_graph(found)
    tab = opened(page, view, tmp_path)
    assert counts(tab) == (len(found.shared), len(found.only_a), len(found.only_b))
    kinds = dict(tab.evaluate(CLASSES))
    wanted: dict[str, str] = classes_of(one, two)
    if unit != "edges":
        wanted = {
            **dict.fromkeys(found.shared, "shared"), **dict.fromkeys(found.only_a, "a"),
            **dict.fromkeys(found.only_b, "b"),
        }  # fmt: skip
    assert kinds == wanted
    for kind, name in (("shared", "shared"), ("a", f"only {one.task}")):
        tab.get_by_role("checkbox", name=name).uncheck()
        kinds = dict(tab.evaluate(CLASSES))
        if unit != "edges":
            assert kind not in kinds.values()
    if unit == "edges":
        ends = {end.partition("<")[0] for edge in found.only_b for end in edge.split("->")}
        assert set(kinds) == ends
    assert view.set_state(hidden=["a"]).to_png()
    page.assert_clean()


@pytest.mark.browser
def test_a_threshold_draws_the_strongest_edges_of_either(page: WatchedPage, tmp_path: Path) -> None:
    one, two, _ = several().values()
    found = workbench.circuit_overlap(one, two, n_bootstrap=0, n_null=10)
    tab = opened(page, overlap_graph(found, one, two), tmp_path)
    number = tab.get_by_role("spinbutton")
    number.fill("4")
    number.press("Enter")
    assert "4 edges drawn" in tab.locator(".summary").inner_text()
    names = [*found.shared, *found.only_a, *found.only_b]
    top = [float(each.edge_scores.nan_to_num(0.0)[each.edges_in].abs().max()) for each in (one, two)]

    def strength(name: str) -> float:
        return max(abs(each.score_of(name)) / t for each, t in zip((one, two), top, strict=True))

    strongest = sorted(names, key=strength, reverse=True)[:4]
    ends = {end.partition("<")[0] for edge in strongest for end in edge.split("->")}
    assert {name for name, _ in tab.evaluate(CLASSES)} == ends
    assert counts(tab) == (len(found.shared), len(found.only_a), len(found.only_b))  # of the circuits, as before
    page.assert_clean()


def test_the_matrix_holds_the_measures_of_every_pair(tmp_path: Path) -> None:
    circuits = several()
    view = overlap_matrix(circuits, n_null=50)
    measures = [each["name"] for each in view.spec.facts["measures"]]
    values = view.spec.blocks["measures"]
    named = list(circuits.values())
    table = view.data()
    row = 0
    for i in range(3):
        for j in range(i + 1, 3):
            found = workbench.circuit_overlap(named[i], named[j], n_bootstrap=0, n_null=50)
            for name in ("jaccard", "weighted"):
                at = values[measures.index(name)]
                assert at[i, j] == at[j, i] == found.values[name]
            share = values[measures.index("share")]
            assert (share[i, j], share[j, i]) == (found.values["of_a"], found.values["of_b"])
            assert table["p"][row] == found.p_value
            assert table["shared"][row] == len(found.shared)
            row += 1
    assert view.to_png() != view.set_state(pair=[1, 2], measure="share").to_png()
    assert check(Path(view.to_html(tmp_path / "matrix.html"))) == []
    assert overlap_matrix(named[:2], n_null=10).spec.facts["circuits"] == ["task 0", "task 1"]
    assert overlap_matrix([named[0]] * 2, n_null=10).spec.facts["circuits"] == ["task 0 (1)", "task 0 (2)"]


def test_what_makes_no_matrix_is_refused() -> None:
    one, two, _ = several().values()
    with pytest.raises(ReportError, match="2 to 24 circuits, not of 1"):
        overlap_matrix([one])
    with pytest.raises(InterventionError, match="another model"):
        overlap_matrix([one, circuit(Graph.gpt2(2, 4, 8), 9)])
    view = overlap_matrix([one, two], n_null=10)
    for wrong in ([0, 0], [0, 2], [-1, 0]):
        with pytest.raises(ReportError, match="no pair"):
            view.set_state(pair=wrong)
    with pytest.raises(ReportError, match="no measure"):
        view.set_state(measure="cosine")


@pytest.mark.browser
def test_a_cell_shows_what_its_pair_shares(page: WatchedPage, tmp_path: Path) -> None:
    circuits = several()
    tab = opened(page, overlap_matrix(circuits, n_null=50), tmp_path)
    named = list(circuits.values())

    def check_pair(i: int, j: int) -> None:
        found = workbench.circuit_overlap(named[i], named[j], n_bootstrap=0, n_null=10)
        assert counts(tab) == (len(found.shared), len(found.only_a), len(found.only_b))
        assert dict(tab.evaluate(CLASSES)) == classes_of(named[i], named[j])
        assert tab.locator(".overlaps [aria-pressed=true]").get_attribute("data-pair") == f"{i},{j}"
        assert tab.locator(f"[data-pair='{i},{j}']").inner_text() == f"{found.values['jaccard']:.2f}"

    check_pair(0, 1)
    tab.locator("[data-pair='2,0']").click()
    check_pair(2, 0)
    assert HOSTILE in tab.locator(".controls").inner_text()
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("ArrowRight")  # over the diagonal
    assert tab.evaluate("document.activeElement.dataset.pair") == "1,2"
    tab.keyboard.press("Enter")
    check_pair(1, 2)
    tab.get_by_label("Measure").select_option("share")
    share = overlap_matrix(circuits, n_null=50).spec.blocks["measures"][2]
    assert tab.locator("[data-pair='1,0']").inner_text() == f"{share[1, 0]:.2f}"
    tab.wait_for_function("() => decodeURIComponent(location.hash).includes('share')")  # it is written after a pause
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator(".overlaps [aria-pressed=true]").get_attribute("data-pair") == "1,2"
    page.assert_clean()


@pytest.mark.browser
@pytest.mark.parametrize("pair", ["[0,0]", "[7,1]", '["0","1"]', "{}", "null"])
def test_a_wrong_pair_in_an_address_does_no_harm(pair: str, page: WatchedPage, tmp_path: Path) -> None:
    file = Path(overlap_matrix(several(), n_null=5).to_html(tmp_path / "matrix.html"))
    page.page.goto(f"{file.as_uri()}#view-0=%7B%22pair%22%3A{pair}%2C%22measure%22%3A4%7D")
    page.page.wait_for_selector("html[data-ready]")
    assert page.page.locator(".overlaps [aria-pressed=true]").get_attribute("data-pair") == "0,1"
    page.assert_clean()


def test_chance_can_be_had_alone() -> None:
    found: Any = overlap_chance(by_hand())
    assert found.spec.title.endswith("against chance")
