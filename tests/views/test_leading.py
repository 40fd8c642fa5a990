"""Views of a capture begin with the head that its statistics make most worth seeing, unless one is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import workbench
from support.browser import WatchedPage
from support.every_view import capture
from workbench import views
from workbench.capture.capture import Capture
from workbench.capture.site_capture import Forward, SiteCapture
from workbench.hooks.sites import Site, Sites
from workbench.kernels.patterns import DensePattern
from workbench.views.head_atlas.leading import leading

NAMES = ("induction", "previous", "peak", "sink", "current")
IDS = torch.tensor([[5, 6, 7, 5, 6, 7]])


def filled(maps: Tensor, names: tuple[str, ...] = NAMES, provenance: Any = None) -> Capture:
    """A capture of one layer per row of [layer, head, query, key]."""
    sites, held = [], {}
    for layer, weights in enumerate(maps):
        site = Site(f"h.{layer}", layer, "self", len(weights), len(weights), 8)
        found = DensePattern(weights[None]).statistics(names, tokens=IDS) if names else {}
        held[site.name] = SiteCapture(site, tuple(weights[None].shape), found, "none", weights=weights[None])
        sites.append(site)
    tokens = {"input": [[f" t{i}" for i in IDS[0].tolist()]]}
    return Capture([Forward(0, held, {"input": IDS}, tokens)], Sites(sites), provenance or {})


def rows_to(keys: list[int], weight: float = 0.9) -> Tensor:
    """A causal map whose rows give so much weight to these keys, and the rest to the first one."""
    made = torch.zeros(6, 6)
    for row, key in enumerate(keys):
        made[row, key] += weight
        made[row, 0] += 1 - weight
    return made


FIRST, ITSELF, BEFORE = rows_to([0] * 6), rows_to(list(range(6))), rows_to([0, 0, 1, 2, 3, 4])
INDUCTION = rows_to([0, 0, 0, 1, 2, 3], 0.6)
ELSEWHERE = rows_to([0, 1, 0, 1, 1, 1], 0.8)


@pytest.mark.parametrize(
    ("heads", "label", "said"),
    [
        ([FIRST, BEFORE, INDUCTION], "L0H2", "L0H2 gives 0.60 of its weight to what followed the earlier copy"),
        (
            [FIRST, BEFORE, ITSELF],
            "L0H1",
            "L0H1 gives 0.92 of its weight to the token before, more than the other heads",
        ),
        ([FIRST, ELSEWHERE, ITSELF], "L0H1", "In L0H1 rows look hardest at one key that is neither the first nor"),
    ],
)
def test_the_first_role_that_some_head_has_decides(heads: list[Tensor], label: str, said: str) -> None:
    cap = filled(torch.stack(heads)[None])
    found = leading(cap)
    assert found is not None
    assert f"L0H{found.head[1]}" == label
    assert said in found.why
    assert found.selection == {"layer": 0, "heads": [found.head[1]], "site": None}


def test_rows_that_rest_on_the_first_key_or_on_their_own_do_not_count() -> None:
    assert leading(filled(torch.stack([FIRST, ITSELF])[None])) is None
    assert leading(filled(torch.stack([FIRST, ELSEWHERE])[None], ("entropy",))) is None
    found = leading(filled(torch.stack([FIRST, ELSEWHERE])[None], ("peak", "sink", "current")))
    assert found is not None
    assert "0.40 on average" in found.why  # 0.8 in three rows of six


def test_a_role_in_one_or_two_rows_says_little() -> None:
    cap = filled(torch.stack([INDUCTION, BEFORE])[None])
    cap[0].statistics["induction"][:, :, 4:] = torch.nan
    found = leading(cap)
    assert found is not None
    assert "the token before" in found.why


def test_among_some_heads_the_first_of_them_leads() -> None:
    cap = filled(torch.stack([torch.stack([FIRST, INDUCTION]), torch.stack([BEFORE, FIRST])]))
    sites = list(cap.sites)
    found = leading(cap, [(sites[1], 0), (sites[1], 1)])
    assert found is not None
    assert found.selection["layer"] == 1
    assert views.attention_pattern(cap, site=1).spec.selection["heads"] == [0]
    assert views.attention_pattern(cap, site=1, heads=[1]).spec.selection == {}  # there is nothing to choose


def test_unknown_and_infinite_numbers_do_not_lead() -> None:
    cap = filled(torch.stack([FIRST, BEFORE, FIRST])[None])
    cap[0].statistics["previous"][0, 2] = torch.nan
    cap[0].statistics["previous"][0, 0, 3] = torch.inf
    found = leading(cap)
    assert found is not None
    assert found.head[1] == 1


def test_the_views_of_a_capture_begin_alike_and_say_why() -> None:
    cap = filled(torch.stack([torch.stack([FIRST, ITSELF]), torch.stack([BEFORE, INDUCTION])]))
    for view in (*views.overview(cap), views.head(cap)):
        chosen = view.spec.selection
        assert (chosen["layer"], chosen["heads"]) == (1, [1]), view.spec.kind
        assert view.spec.kind == "head_page" or "L1H1 gives 0.60 of its weight" in view.spec.caption
    assert views.head_atlas({"score": np.eye(2)}).spec.selection == {}
    bare = filled(torch.stack([FIRST, ELSEWHERE])[None], ())
    assert views.attention_pattern(bare).spec.selection["heads"] == [1]  # by its rows alone


def test_in_the_shipped_model_an_induction_head_leads() -> None:
    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb, torch.no_grad(), wb.capture(["induction", "previous"]) as cap:
        model(**wb.tokenize(workbench.tasks.induction(1, seed=0)[0].prompt))
    found = leading(cap)
    assert found is not None
    assert found.selection == {"layer": 1, "heads": [6], "site": None}


@pytest.mark.browser
def test_a_page_begins_there_unless_another_head_is_chosen(page: WatchedPage, tmp_path: Path) -> None:
    cap = filled(torch.stack([torch.stack([FIRST, ITSELF]), torch.stack([BEFORE, INDUCTION])]))
    path = workbench.Report("t").add(cap).write(tmp_path / "report.html")
    shown = page.page.locator(".attention_pattern .panel figcaption")
    for address, head in (("", "L1H1"), ("#L0H1", "L0H1")):
        page.page.goto("about:blank")
        page.page.goto(path.as_uri() + address)
        page.page.wait_for_selector("html[data-ready]")
        assert shown.inner_text().startswith(head)
        assert page.page.evaluate("location.hash") == address
    pattern = views.attention_pattern(capture()).select(layer=0, heads=(1,))
    page.open(Path(pattern.to_html(tmp_path / "pattern.html"))).wait_for_selector("html[data-ready]")
    assert shown.inner_text().startswith("L0H1")
    views.SHARED.value = views.Selection()
    page.assert_clean()


@pytest.mark.browser
def test_figures_that_belong_together_stand_beside_each_other_on_a_wide_screen(
    page: WatchedPage, tmp_path: Path
) -> None:
    report = workbench.Report("t").add(capture(), title="One").add(capture(), title="Two")
    for path in (report.write(tmp_path / "report.html"), Path(views.page_of(capture(), tmp_path / "views.html"))):
        tab = page.open(path)
        tab.wait_for_selector("html[data-ready]")
        for width, columns in ((1280, 1), (1800, 2)):
            tab.set_viewport_size({"width": width, "height": 900})
            tab.wait_for_function("() => document.documentElement.scrollWidth <= innerWidth")
            boxes = tab.locator(".figures").first.evaluate(
                "box => [...box.children].map(e => e.getBoundingClientRect()).map(({ x, y, width }) => [x, y, width])"
            )
            beside = [other for other in boxes[1:] if other[1] == boxes[0][1]]
            assert len(beside) == columns - 1, path.name
            assert all(other[0] > boxes[0][0] + boxes[0][2] for other in beside)
    page.assert_clean()
