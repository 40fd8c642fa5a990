"""A head's page says what results say of the head, and follows the head that is chosen anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import workbench
from support.browser import WatchedPage
from support.every_view import capture, circuit, head_page
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.nodes import Layer
from workbench.errors import ReportError
from workbench.storage import disk
from workbench.views import head, head_atlas
from workbench.views import page as pages


def test_rows_are_those_with_the_largest_weight_beyond_the_first_key() -> None:
    cap = capture(batch=2)
    blocks = head(cap, "L1H2", n_rows=4).spec.blocks
    weights = cap[1].pattern.dense()[:, 2].clone()  # [batch, query, key]
    weights[:, :, 0] = -1
    by_row = weights.amax(-1)
    order = by_row.flatten().argsort(descending=True, stable=True)[:4]
    at = 5
    np.testing.assert_allclose(blocks["weight"][at], by_row.flatten()[order], rtol=1e-6)
    for j in range(4):
        prompt, query, key = (int(blocks[name][at, j]) for name in ("prompt", "query", "key"))
        assert float(weights[prompt, query, key]) == pytest.approx(float(blocks["weight"][at, j]), rel=1e-6)
        assert key > 0


def test_numbers_are_those_of_the_results() -> None:
    model, tokenizer = workbench.models.load("demo-lm")
    wb = workbench.attach(model, tokenizer)
    task = workbench.tasks.ioi(4, seed=0)
    roles = workbench.head_roles(wb, task, progress=False)
    share = workbench.logit_attribution(wb, task)
    importance = workbench.head_importance(
        wb, list(task.batches(tokenizer)), metric="logit_diff", methods=("gradient",), progress=False
    )
    with torch.no_grad(), wb.capture(["induction"]) as cap:
        model(**wb.tokenize(task[0].prompt))
    view = head(cap, "L1H6", roles=roles, importance=importance, attribution=share)
    row = view.data().set_index("head").loc["L1H6"]
    assert row["roles"] == ", ".join(roles.roles[roles.heads.index("L1H6")])
    assert row["role evidence: induction"] == pytest.approx(
        float(roles.evidence["induction"][roles.heads.index("L1H6")])
    )
    assert row["importance: gradient, logit_diff"] == pytest.approx(
        float(importance.score()[importance.heads.index("L1H6")])
    )
    shares = share.table.set_index("part")
    wanted = shares[(shares["layer"] == 1) & (shares["head"] == 6) & (shares["kind"] == "head")]["value"].item()
    assert row[f"what it writes: share in the {share.asked}"] == pytest.approx(wanted)
    assert view.chosen.has(1, 6)


@pytest.mark.parametrize("groups", [3, 1])
def test_circuits_tell_what_a_head_reads_and_writes(groups: int) -> None:
    graph = Graph((Layer(3, groups), Layer(3, groups)), 8)
    found = circuit(graph, 30)
    facts = head(capture(), "L0H0", circuits={"mine": found}).spec.facts["circuits"][0]
    assert sorted(facts["heads"]) == sorted(found.heads)
    group = "a1.h1" if groups == 3 else "a1.kv0"
    wanted = [
        (found.score_of(edge), edge)
        for edge in found.edges
        if edge.partition("->")[2].partition("<")[0] in ("a1.h1", group)
    ]
    mine = facts["heads"]["L1H1"]
    assert mine["n_reads"] == len(wanted)
    strongest = max(wanted, key=lambda each: abs(each[0]))
    assert mine["reads"][0][2] == strongest[0]
    assert head(capture(), "L0H0", circuits=found).spec.facts["circuits"][0]["name"] == "ioi"


def test_bad_input_is_named() -> None:
    with pytest.raises(ReportError, match="no head 'L9H9'"):
        head(capture(), "L9H9")
    with pytest.raises(ReportError, match="of another model: it has no head L0H2"):
        head(capture(), circuits=circuit(Graph((Layer(2, 2), Layer(2, 2)), 8), 4))


@pytest.mark.browser
def test_the_page_follows_the_atlas_and_leads_to_other_heads(page: WatchedPage, tmp_path: Path) -> None:
    atlas, view = head_atlas(capture()), head_page()
    path = disk.write(tmp_path / "page.html", pages.render("Two", [atlas.spec, view.spec]))
    tab = page.page
    tab.goto(path.as_uri() + "#L0H1")
    tab.wait_for_selector("html[data-ready]")
    shown = tab.locator(".head_page h3")
    assert shown.inner_text() == "L0H1"
    assert tab.locator(".head_page .role").all_inner_texts() == ["induction"]
    tab.locator(".ranking button").first.click()
    best = tab.locator(".ranking button b").first.inner_text()
    assert shown.inner_text() == best
    tab.get_by_role("button", name="Its page").click()
    assert tab.evaluate("document.activeElement.className") == "page"
    tab.keyboard.press("Home")
    assert shown.inner_text() == "L0H0"
    assert tab.evaluate("location.hash").startswith("#L0H0") or "L0H0" in tab.evaluate("location.hash")
    tab.locator(".head_page .rows button").first.click()
    assert ",q=" in tab.evaluate("location.hash")
    page.assert_clean()
