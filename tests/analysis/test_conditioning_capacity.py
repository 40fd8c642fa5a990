"""The probe of heads on keys that are known, on tiny models, and on the demonstration model."""

from __future__ import annotations

import pytest
import torch

import workbench
from workbench.analysis.conditioning.capacity import Capacity, summarise
from workbench.analysis.conditioning.curves import CEILING_DB, crossing
from workbench.analysis.conditioning.memories import RULES
from workbench.analysis.conditioning.pairs import SitePairs
from workbench.analysis.conditioning.probe import Plan, probe
from workbench.errors import CaptureError, WorkbenchError
from workbench.hooks.sites import Site


def site(k: torch.Tensor, v: torch.Tensor | None = None) -> SitePairs:
    """Keys [head, token, d] as a captured site."""
    generator = torch.Generator().manual_seed(9)
    v = torch.randn(*k.shape[:2], 32, generator=generator, dtype=k.dtype) if v is None else v
    q = torch.randn(k.shape, generator=generator, dtype=k.dtype)
    sink = torch.zeros(k.shape[1], dtype=torch.bool)
    return SitePairs(Site("attn", 0, "self", len(k)), k, v, q, sink, 0.3, None, torch.full((len(k),), 3.0), k.shape[1])


def random_keys(heads: int, tokens: int, d: int) -> torch.Tensor:
    return torch.randn(heads, tokens, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_random_keys_have_the_capacity_of_the_theory():
    plan = Plan((1, 9, 17, 25, 33, 41, 60), ("hebb", "delta"), ("stored",), repeats=64)
    found = summarise([site(random_keys(2, 600, 32))], plan, ("snr_db", 0.0))
    assert found.theory_n_star[:, 0].tolist() == [33.0, 33.0]
    assert found.n_star[:, 0, 0].tolist() == pytest.approx([33, 33], rel=0.15)
    assert bool((found.n_low <= found.n_star).all() and (found.n_star <= found.n_high).all())
    curve, low, high = found.curve("snr_db", "hebb")
    assert (curve[:, 1:] - found.theory_snr_db[:, 0, 1:]).abs().max() < 1.0
    assert curve[:, 0].min() > 100  # one pair has no interference
    assert bool((low <= curve + 1e-9).all() and (curve <= high + 1e-9).all())


def test_orthonormal_keys_never_fail():
    k = torch.linalg.qr(random_keys(1, 24, 24)[0])[0][None]
    plan = Plan((1, 12, 24), ("hebb", "delta"), ("stored",), repeats=4)
    found = summarise([site(k)], plan)
    assert found.censored.all()
    assert (found.n_star == 24).all()
    assert found.curve("snr_db", "hebb")[0].min() >= CEILING_DB - 1
    assert found.curve("top1", "hebb")[0].min() == 1
    assert found.dimension[0, 0].item() == pytest.approx(24.0)


def test_the_probe_does_not_depend_on_how_heads_are_split():
    pairs = site(random_keys(3, 40, 8))
    small, large = (probe(pairs, Plan((1, 7, 20), tuple(RULES), options={"oja": {"rate": 0.05}}, repeats=3, memory=m))
                    for m in (1, 1 << 29))  # fmt: skip
    torch.testing.assert_close(small, large, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["identical", "zero values", "zero keys", "d_k = 1"])
def test_degenerate_heads_give_limits(kind):
    k = random_keys(1, 30, 1 if kind == "d_k = 1" else 6)
    v = None
    if kind == "identical":
        k = k[:, :1].expand(1, 30, 6).clone()
    if kind == "zero keys":
        k = torch.zeros_like(k)
    if kind == "zero values":
        v = torch.zeros(1, 30, 4, dtype=torch.float64)
    plan = Plan((1, 4, 16), tuple(RULES), options={"oja": {"rate": 0.01}}, repeats=16)
    found = summarise([site(k, v)], plan)
    for name in ("curves", "low", "high", "n_star", "n_low", "n_high", "dimension", "overlap", "theory_snr_db"):
        assert getattr(found, name).isfinite().all(), name
    hebb = {measure: found.curve(measure, "hebb")[0][0] for measure in found.measures}
    if kind in ("identical", "d_k = 1"):
        assert found.dimension[0, 0].item() == pytest.approx(1.0)
        assert found.theory_n_star[0, 1].item() == pytest.approx(2.0)
    if kind == "identical":
        assert hebb["top1"][2] < 0.3  # one of sixteen, by chance
    if kind in ("zero values", "zero keys"):
        assert (hebb["cosine"] == 0).all()
        assert (hebb["relative_error"] == 1).all()
        assert (hebb["top1"] == 0).all()
        assert (hebb["snr_db"] == -CEILING_DB).all()
        assert found.n_star[0, 0, 0] == 0


def test_crossing():
    values = torch.tensor([[0.0, -1.0, -3.0], [-5.0, -6.0, -7.0], [0.0, 0.0, 0.0]])
    n, never = crossing(values, [1, 3, 5], -2.0)
    assert n.tolist() == [4.0, 0.0, 5.0]
    assert never.tolist() == [False, False, True]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(16, 4, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
    ).eval()


def test_a_model_in_one_call(encoder, tmp_path):
    scores = {(layer, head): float(layer + head) for layer in range(2) for head in range(4)}
    batches = [{"src": torch.randn(2, 15, 16)}, {"src": torch.randn(1, 9, 16)}]
    with workbench.attach(encoder) as wb:
        found = workbench.capacity(wb, batches, importance=scores, repeats=5, progress=False)
        with wb.capture(("effective_keys",)) as cap:
            encoder(**batches[0])
            encoder(**batches[1])
    assert found.labels[:2] == ("L0H0", "L0H1")
    assert found.sizes[-1] == 39
    assert found.curves.shape == (4, 8, 3, 3, len(found.sizes))
    rows = [call[0].effective_keys.transpose(0, 1).flatten(1) for call in cap.calls]
    torch.testing.assert_close(found.effective_keys[:4], torch.cat(rows, 1).double().mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.headroom, found.n_star - found.effective_keys[:, None, None])
    assert set(found.correlation) >= {"load", "effective dimension", "n* hebb"}
    assert len(found.table) == 8 * 3 * 3
    again = Capacity.load(found.save(tmp_path / "capacity.safetensors"))
    assert torch.equal(again.curves, found.curves)
    assert again.labels == found.labels


def test_bad_input(encoder):
    batch = {"src": torch.randn(1, 10, 16)}
    with workbench.attach(encoder) as wb:
        with pytest.raises(CaptureError, match="11 pairs cannot be stored: the site has seen 10 tokens"):
            workbench.capacity(wb, batch, sizes=(1, 11), progress=False)
        with pytest.raises(WorkbenchError, match=r"reaches 3.* below 2"):
            workbench.capacity(wb, batch, options={"delta": {"rate": 3.0}}, progress=False)
        with pytest.raises(WorkbenchError, match='did you mean "delta"'):
            workbench.capacity(wb, batch, rules=("deltas",), progress=False)
        with pytest.raises(WorkbenchError, match="no measure"):
            workbench.capacity(wb, batch, criterion=("snr", 0.0), progress=False)
        with pytest.raises(CaptureError, match="no batch"):
            workbench.capacity(wb, [], progress=False)
        with pytest.raises(WorkbenchError, match="none of the importance scores"):
            workbench.capacity(wb, batch, importance={(9, 9): 1.0}, progress=False)
