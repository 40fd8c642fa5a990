"""Views of linear and recurrent layers: half-lives, content and decay apart, states, and two mechanisms compared."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

import workbench
from support.browser import WatchedPage
from support.every_view import capture
from support.hybrid_models import hybrid
from test_hybrids import HYBRIDS
from workbench import views
from workbench.capture.capture import Capture
from workbench.errors import CaptureError, ReportError
from workbench.kernels.lightning import LightningPattern
from workbench.kernels.recurrent import RecurrentPattern, naive_recurrence
from workbench.kernels.state_space import DualPattern, SelectivePattern
from workbench.views import Selection, SharedSelection

IDS = torch.randint(3, 60, (2, 13), generator=torch.Generator().manual_seed(0))


@cache
def captured(name: str) -> Capture:
    model = hybrid(name) if name in ("qwen3-next", "bamba", "recurrent-gemma") else HYBRIDS[name]().eval()
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(["entropy"], values=True) as found:
        model(IDS, use_cache=False)
    return found


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_every_map_of_a_recurrence_is_that_of_one_pattern() -> None:
    q, k = random(2, 4, 9, 3), random(2, 2, 9, 3)
    delta = random(2, 4, 9).exp()
    B, C = random(2, 2, 9, 5), random(2, 2, 9, 5)
    several = [
        LightningPattern(q, k, torch.tensor([0.5, 0.9, 1.0, 0.99]), values=random(2, 4, 9, 6)),
        DualPattern(delta, -random(4).exp(), B, C, values=random(2, 4, 9, 6)),
        SelectivePattern(delta, -random(4, 5).exp(), B, C, values=random(2, 4, 9, 1)),
    ]
    for pattern in several:
        same = pattern.as_recurrence()
        assert same is not None
        torch.testing.assert_close(same.dense(), pattern.dense().to(same.dtype), atol=1e-6, rtol=1e-5)
        assert same.values is not None
        torch.testing.assert_close(
            same.apply(same.values), pattern.apply(pattern.values).to(same.dtype), atol=1e-5, rtol=1e-5
        )
    assert capture()[0].pattern.as_recurrence() is None


@pytest.mark.parametrize("name", ["qwen3-next", "bamba", "recurrent-gemma", "kimi-linear", "minimax", "jamba"])
def test_half_lives_are_those_of_the_mean_decay(name: str) -> None:
    found = captured(name)
    shown = views.half_lives(found)
    table = shown.data()
    sites = [one for one in found if one.site.kind == "state"]
    assert len(table["head"]) == sum(one.shape[1] for one in sites)
    start = 0
    for one in sites:
        recurrence = one.pattern.as_recurrence()
        g = recurrence.log_decay.double()
        g = g if g.dim() == 4 else g[..., None]
        want = np.sort((math.log(2) / g.mean((0, 2)).abs()).numpy(), axis=-1)  # [head, channel]
        middle = want[:, round(0.5 * (want.shape[1] - 1))]
        got = table["half-life"][start : start + len(want)]
        np.testing.assert_allclose(got[np.isfinite(got)], middle[np.isfinite(got)], rtol=1e-4)
        assert np.isfinite(got).any() or np.isinf(middle).all()
        start += len(want)
    below_one = np.nanmin(table["log₂ half-life"]) < 0
    assert shown.spec.facts["metrics"][0]["signed"] == below_one  # coloured around one position
    assert ("log₂, slowest tenth of channels" in table) == (name in ("kimi-linear", "jamba"))


def test_content_and_decay_are_shown_apart() -> None:
    """Where nothing is erased, their product is the map."""
    found = captured("bamba")
    view = views.attention_pattern(found, heads=[0, 1], apart=True)
    assert view.spec.facts["variants"] == ["raw", "content", "decay"]
    assert [site["name"] for site in view.spec.facts["sites"]] == [found[0].site.name]
    blocks = view.spec.blocks
    raw, content, decay = (np.nan_to_num(blocks[f"exact:{v}:0"].astype(float)) for v in range(3))
    product = content * decay
    product /= product.sum(-1, keepdims=True)
    np.testing.assert_allclose(product, raw, atol=2e-6)
    whole = found[0].pattern.as_recurrence()
    want = whole.decay().dense(heads=[0, 1])[0].double().numpy()
    np.testing.assert_allclose(decay, want / want.sum(-1, keepdims=True), atol=1e-5)
    asked, [cells] = view.answer(
        {"ask": "tile", "site": 0, "head": 1, "variant": "decay", "rows": [3, 6], "columns": [0, 4]}
    )
    np.testing.assert_allclose(
        np.nan_to_num(np.frombuffer(cells, np.float32).reshape(asked["shape"])), decay[1, 3:6, :4], atol=1e-6
    )
    for nothing in (lambda: views.attention_pattern(capture(), apart=True), lambda: views.half_lives(capture())):
        with pytest.raises(ReportError, match="decay"):
            nothing()


@pytest.mark.parametrize("name", ["qwen3-next", "bamba"])
def test_states_are_those_of_the_recurrence_itself(name: str) -> None:
    found = captured(name)
    one = found[0]
    shown = views.states(found, one.site, batch=1)
    pattern = one.pattern.as_recurrence()
    q, k = (t.double().repeat_interleave(pattern.n_heads // t.shape[1], dim=1) for t in (pattern.q, pattern.k))
    beta = None if pattern.beta is None else pattern.beta.double()
    for stop in (1, 6, 13):
        cut = (t[:, :, :stop] for t in (q, k, pattern.values.double(), pattern.log_decay.double()))
        _, state = naive_recurrence(*cut, None if beta is None else beta[:, :, :stop])
        np.testing.assert_allclose(shown.spec.blocks["maps"][:, :, stop - 1], state[1].norm(dim=-1), rtol=2e-4)
    assert shown.spec.blocks["maps"].shape == (4, q.shape[-1], 13)
    longer = RecurrentPattern(random(1, 2, 200, 3), random(1, 2, 200, 3), values=random(1, 2, 200, 4))
    assert longer.states(every=3).shape[2] == 66
    with pytest.raises(CaptureError, match="no state of a fixed size"):
        views.states(found, found[1].site)
    with pytest.raises(ReportError, match="no head 9"):
        views.states(found, one.site, heads=[9])


def test_a_state_from_before_the_capture_is_refused() -> None:
    model = hybrid("bamba")
    with workbench.attach(model) as wb, torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        with wb.capture([], values=True) as late:
            model(IDS[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(CaptureError, match="before the capture"):
        views.states(late, 0)


def test_captures_and_reports_offer_them() -> None:
    found = captured("qwen3-next")
    titles = [view.spec.title for view in views.overview(found)]
    assert titles[-3:] == ["Half-lives", "Content and decay of recurrent layers", "States"]
    assert "Half-lives" not in [view.spec.title for view in views.overview(capture())]
    html = workbench.Report("A hybrid").add(found).to_html()
    assert "Half-lives" in html
    assert "Content and decay of recurrent layers" in html


def test_two_mechanisms_are_compared_head_by_head() -> None:
    found = captured("qwen3-next")
    one, other = (views.attention_pattern(found, site=site) for site in (0, 1))
    shown = views.compare(one, other, labels=("delta rule", "softmax"))
    pairs = shown.spec.facts["pairs"]
    assert [[head["label"] for head in pair["of"]] for pair in pairs] == [[f"L0H{i}", f"L1H{i}"] for i in range(4)]
    for i, pair in enumerate(pairs):
        a = found[0].pattern.magnitude().dense(heads=[i])[0, 0].double()
        b = found[1].pattern.dense(heads=[i])[0, 0].double()
        assert pair["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-5)
        np.testing.assert_allclose(np.nan_to_num(shown.spec.blocks["a"][i]), a, atol=1e-6)
    assert set(shown.data()["head of B"]) <= {f"L1H{i}" for i in range(4)}
    chosen = SharedSelection()
    chosen.value = Selection(layer=1, heads=(2,))
    assert views.compare(one, other, selection=chosen)._pair() == 2
    few = views.compare(views.attention_pattern(found, site=0, heads=[3]), other)
    assert few.spec.facts["pairs"][0]["of"][0]["label"] == "L0H3"
    assert any("make no pairs" in note for note in few.spec.notes)


@pytest.mark.browser
def test_a_chosen_head_is_that_of_the_pair(page: WatchedPage, tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = captured("qwen3-next")
    one, other = (views.attention_pattern(found, site=site) for site in (0, 1))
    path = views.compare(one, other, labels=("A", "B")).to_html(tmp_path / "compare.html")
    tab = page.open(path)
    tab.wait_for_selector("html[data-ready]")
    titles = tab.locator("figcaption")
    assert titles.all_inner_texts() == ["A L0H0", "B L1H0", "A L0H0 − B L1H0"]
    tab.locator(".compare .field", has_text="Heads").locator("select").select_option(index=2)
    assert titles.all_inner_texts() == ["A L0H2", "B L1H2", "A L0H2 − B L1H2"]
    address = tab.evaluate("location.hash")
    assert address.startswith("#L0H2")
    tab.goto("about:blank")
    tab.goto(path.as_uri() + address)
    tab.wait_for_selector("html[data-ready]")
    assert titles.all_inner_texts() == ["A L0H2", "B L1H2", "A L0H2 − B L1H2"]
    page.assert_clean()
