"""Models that call the kernels of `workbench.kernels` are captured, verified, saved and shown like any other."""

import json
import re

import pytest
import torch

import workbench
from support.kernel_models import KERNELS, kernel_model
from workbench.errors import CaptureError
from workbench.kernels.functions import FUNCTIONS
from workbench.kernels.statistics import dense

SIGNED = {"lightning", "gated_linear", "gated_delta_rule"}
NAMES = ("entropy", "received", "peak", "distance", "sink", "previous", "signed_mass")


@pytest.mark.parametrize("kernel", KERNELS)
def test_capture_equals_the_definition_and_changes_no_bit(kernel):
    model, ids = kernel_model(kernel, kernel)
    with torch.no_grad():
        bare = model(ids)
        wb = workbench.attach(model)
        with wb.capture(NAMES, z=True) as cap:
            seen = model(ids)
    assert torch.equal(bare, seen)
    assert [site.name for site in cap.sites] == ["layers.0", "layers.1"]
    for site in cap:
        assert (site.kernel, site.signed) == (kernel, kernel in SIGNED)
        weights = site.pattern.dense().double()
        want = dense(weights, NAMES, site.pattern.mask, by_magnitude=site.pattern.by_magnitude)
        for name, value in want.items():
            got = getattr(site, name).double()
            torch.testing.assert_close(got, value, atol=2e-4, rtol=2e-4, equal_nan=True, msg=name)
        if kernel not in SIGNED:
            assert (site.signed_mass == 1).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_verification_and_files(kernel, tmp_path):
    model, ids = kernel_model(kernel)
    wb = workbench.attach(model)
    with torch.no_grad():
        found = wb.verify(ids)
        assert found.ok, found.table
        with wb.capture(["entropy", "value_weighted_received"], values=True) as cap:
            model(ids)
    again = workbench.load_capture(cap.save(tmp_path / "run.safetensors", pattern=True))
    assert type(again["layers.0"].pattern) is type(cap["layers.0"].pattern)
    torch.testing.assert_close(again["layers.0"].pattern.dense(), cap["layers.0"].pattern.dense())
    assert again["layers.0"].marks == cap["layers.0"].marks
    names = ["value_weighted_received"]
    for name, value in again["layers.0"].pattern.statistics(names).items():
        torch.testing.assert_close(value, cap["layers.0"].statistics[name], equal_nan=True)


def test_the_page_shows_all_and_marks_their_weights():
    model, ids = kernel_model(*KERNELS)
    with torch.no_grad(), workbench.attach(model).capture(["entropy", "sink"]) as cap:
        model(ids)
    page = workbench.Report("Kernels").add(cap).to_html()
    found = re.findall(r'<script[^>]*id="view-\d+"[^>]*>(.*?)</script>', page, re.DOTALL)
    shown = [spec["facts"]["sites"] for spec in map(json.loads, found) if spec["kind"] == "attention_pattern"]
    (sites,) = [each for each in shown if len(each) == len(KERNELS)]  # beside content and decay of recurrences
    marks = ["signed" if kernel in SIGNED else "normalised" for kernel in KERNELS]
    assert [site["weights"] for site in sites] == marks
    assert all(site["mode"] != "missing" for site in sites)
    assert "statistics and maps are of |A|" in page
    assert page.count("<td>signed</td>") == len(SIGNED)
    assert page.count("<td>normalised</td>") == len(KERNELS) - len(SIGNED)


@pytest.mark.browser
def test_the_mark_is_seen_beside_the_head(page, tmp_path):
    model, ids = kernel_model("lightning")
    with torch.no_grad(), workbench.attach(model).capture() as cap:
        model(ids)
    opened = page.open(workbench.Report("Signed").add(cap).write(tmp_path / "page.html"))
    opened.wait_for_selector("canvas")
    assert "signed: |A| / Σ|A|" in opened.locator(".attention_pattern .panel").first.inner_text()
    page.assert_clean()


def test_a_state_from_before_is_read_beside_the_map():
    from support.kernel_models import Lightning
    from workbench.kernels.lightning import lightning_attention

    class Segment(Lightning):
        def forward(self, x):
            q, k, v = self.heads(x)
            state = torch.ones(len(x), 4, 8, 8)
            return self.joined(lightning_attention(q, k, v, initial_state=state))

    model, ids = kernel_model("lightning")
    model.layers[0] = Segment()
    wb = workbench.attach(model)
    with torch.no_grad():
        with wb.capture(z=True, values=True) as cap:
            model(ids)
        assert wb.verify(ids).ok
    site = cap["layers.0"]
    assert float(site.before.norm()) > 0
    read = site.pattern.outputs(site.pattern.values)
    torch.testing.assert_close(read, site.z.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_bad_numbers_are_named_with_their_site():
    model, ids = kernel_model("scan")
    model.embed.weight.data[ids[0, 5]] = torch.nan
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"(k|v|q) holds nan at \[0, 0, \d+, 0\]"),
        workbench.attach(model).capture(),
    ):
        model(ids)


def test_every_marked_function_is_known_to_the_sites():
    from workbench.kernels.lightning import lightning_attention
    from workbench.kernels.neighborhood import neighborhood_attention
    from workbench.kernels.recurrent import gated_delta_rule, gated_linear_attention
    from workbench.kernels.s2 import s2_attention
    from workbench.kernels.scan import scan_attention

    functions = (
        s2_attention, lightning_attention, neighborhood_attention, scan_attention, gated_linear_attention,
        gated_delta_rule,
    )  # fmt: skip
    assert {f.__name__ for f in functions} <= set(FUNCTIONS)
    assert all(hasattr(f, "pattern_of") for f in functions)


def test_what_a_layout_hides_from_a_head_is_not_a_small_weight():
    model, ids = kernel_model("s2")
    with torch.no_grad(), workbench.attach(model).capture() as cap:
        model(ids)
    cells = workbench.views.attention_pattern(cap, 0).spec.blocks["cells:0:0"]
    seen = cap["layers.0"].pattern.mask.visible(slice(0, 64), slice(0, 64), slice(0, 1), slice(0, 4))
    assert not torch.equal(seen[0], seen[1])  # heads differ in what they see
    assert torch.equal(torch.from_numpy(cells > 0), seen)
