"""The probe on trained models: what it measures is what their own projections give, head by head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import workbench
from workbench.analysis.conditioning.capacity import Capacity
from workbench.analysis.conditioning.curves import MEASURES, measures
from workbench.hooks.sites import Site

TOP1 = MEASURES.index("top1")
PROJECTIONS = {"q": ("query", "q_proj"), "k": ("key", "k_proj"), "v": ("value", "v_proj")}


def projected(model: torch.nn.Module, site: Site, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v [head, token, d] in float64, as the site's own projections gave them for one row of inputs."""
    found: dict[str, Tensor] = {}
    module, handles = model.get_submodule(site.name), []
    for part, names in PROJECTIONS.items():
        (own,) = (getattr(module, name) for name in names if hasattr(module, name))

        def keep(_: object, __: object, output: Tensor, part: str = part) -> None:
            found[part] = output[0].detach().double()

        handles.append(own.register_forward_hook(keep))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert site.n_heads is not None
    return {part: x.unflatten(-1, (site.n_heads, -1)).transpose(0, 1) for part, x in found.items()}


def naive(x: dict[str, Tensor], head: int, rule: str) -> Tensor:
    """[measure] of asking with every stored key once all tokens are stored, from the definitions.

    The softmax is asked with keys at the length of queries: the same whether a model scales those before or after.
    """
    k, v, sums = x["k"][head], x["v"][head], torch.zeros(6, dtype=torch.float64)
    unit = k / k.norm(dim=-1, keepdim=True)
    longer = ((x["q"] ** 2).sum(-1).mean() / (x["k"] ** 2).sum(-1).mean()).sqrt()
    weights = unit @ unit.T if rule == "hebb" else (longer * k @ k.T * k.shape[-1] ** -0.5).softmax(-1)
    for i, r in enumerate(weights @ v):
        likeness = (v @ r) / v.norm(dim=-1)
        hit = float(likeness[i] >= likeness.max() - 1e-5 * r.norm())
        cosine = (r @ v[i] / (r.norm() * v[i].norm())).item()
        sums += torch.tensor([r @ v[i], r @ r, v[i] @ v[i], cosine, hit, 1.0], dtype=torch.float64)
    return measures(sums)


def check(found: Capacity, model: torch.nn.Module, sites: list[Site], inputs: dict[str, Tensor], n: int) -> None:
    """Geometry, load and curves at the largest n of a few heads of each site against the definitions."""
    for site in sites:
        x = projected(model, site, inputs)
        assert x["k"].shape[1] == n
        for head in (0, x["k"].shape[0] - 1):
            row = found.row(site.name, head)
            unit = x["k"][head] / x["k"][head].norm(dim=-1, keepdim=True)
            cosines = (unit @ unit.T)[~torch.eye(n, dtype=torch.bool)]
            assert found.overlap[row].item() == pytest.approx((cosines**2).mean().item(), rel=1e-4)
            weights = x["q"][head] @ x["k"][head].T * x["k"].shape[-1] ** -0.5
            if site.kind == "self" and site.tower == "decoder":
                weights = weights.masked_fill(torch.ones_like(weights, dtype=torch.bool).triu(1), -torch.inf)
            load = (1 / (weights.softmax(-1) ** 2).sum(-1)).mean()
            assert found.effective_keys[row].item() == pytest.approx(load.item(), rel=1e-3)
            for rule in ("hebb", "softmax"):
                curve = found.curves[:, row, found.rules.index(rule), 0, -1].clone()
                wanted = naive(x, head, rule)
                near = 1.5 / n  # one identification may hang on rounding
                assert curve[TOP1].item() == pytest.approx(wanted[TOP1].item(), abs=near)
                curve[TOP1] = wanted[TOP1]
                torch.testing.assert_close(curve, wanted, rtol=2e-3, atol=1e-3)


def assert_a_map(found: Capacity, n_heads: int) -> None:
    """Numbers everywhere, intervals around their curves, and the heads' own softmax above Hebb's rule on the whole."""
    assert len(found.heads) == n_heads
    assert len(found.table) == n_heads * len(found.rules) * len(found.queries)
    for name in ("curves", "low", "high", "n_star", "dimension", "overlap", "theory_snr_db", "headroom"):
        assert getattr(found, name).isfinite().all(), name
    assert (found.overlap * found.d_k >= 0.9).all()  # no head's keys overlap less than random ones
    top1, _, _ = found.curve("top1", "softmax")
    assert top1[:, -1].median() > found.curve("top1", "hebb")[0][:, -1].median()


SETTINGS = {"rules": ("hebb", "delta", "softmax"), "repeats": 2, "progress": False}


def test_minilm(minilm) -> None:
    model, tokenizer = workbench.models.load(minilm)
    with workbench.attach(model, tokenizer) as wb:
        inputs = wb.tokenize(["Attention heads of a sentence encoder, looked at one by one, are a strange crowd."])
        n = inputs["input_ids"].shape[1]
        found = workbench.capacity(wb, inputs, sizes=(1, n // 2, n), n_queries=n, **SETTINGS)
        wb_sites = list(wb.sites)
    assert set(found.sites) == {site.name for site in wb_sites}
    assert_a_map(found, 72)
    check(found, model, [wb_sites[0], wb_sites[5]], inputs, n)


@pytest.mark.slow
def test_whisper_decoder(whisper_base) -> None:
    model, _ = workbench.models.load(whisper_base)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_features": torch.randn(1, 80, 3000, generator=generator),
        "decoder_input_ids": torch.tensor([[50258, 50259, 50359, 50363, *range(1000, 1036)]]),
    }
    with workbench.attach(model) as wb:
        sites = [site for site in wb.sites if site.tower == "decoder"]
        decoder = workbench.capacity(wb, inputs, sites=sites, sizes=(1, 20, 40), n_queries=8, **SETTINGS)
        own = [site for site in sites if site.kind == "self"][3:4]
        cross = [site for site in sites if site.kind == "cross"][3:4]
        self_all = workbench.capacity(wb, inputs, sites=own, sizes=(1, 40), n_queries=40, **SETTINGS)
        cross_all = workbench.capacity(
            wb,
            inputs,
            sites=cross,
            sizes=(1, 1500),
            n_queries=1500,
            **SETTINGS | {"rules": ("hebb", "softmax"), "repeats": 1},
        )
    assert_a_map(decoder, 96)
    assert {site.kind for site in sites} == {"self", "cross"}
    assert len(set(decoder.labels)) == 96  # self and cross of one layer are told apart
    check(self_all, model, own, inputs, 40)
    check(cross_all, model, cross, inputs, 1500)
