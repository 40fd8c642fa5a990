"""Capacity where heads are degenerate or sites are missing, and its correlation with importance."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

import workbench
from support.tiny import family, make
from workbench.analysis.conditioning.capacity import summarise
from workbench.analysis.conditioning.curves import CEILING_DB
from workbench.analysis.conditioning.pairs import SitePairs
from workbench.analysis.conditioning.probe import Plan
from workbench.analysis.conditioning.with_importance import correlations, scores_of
from workbench.analysis.statistics.correlation import spearman
from workbench.errors import CaptureError, WorkbenchError
from workbench.hooks.sites import Site

SIZES = (1, 2, 3, 4, 8, 16)


def site(k: torch.Tensor, v: torch.Tensor) -> SitePairs:
    """Keys [head, token, d] as a captured site."""
    q, sink = k.flip(1), torch.zeros(k.shape[1], dtype=torch.bool)
    return SitePairs(Site("attn", 0, "self", len(k)), k, v, q, sink, 0.3, None, torch.full((len(k),), 3.0), k.shape[1])


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("kind", "rules"), [("identical", ("hebb", "softmax")), ("d_k = 1", ("hebb",))])
def test_keys_on_one_line_hold_two_pairs(kind, rules):
    """Retrievals are the values' sum (or mean), with signs: an SNR of 1/(n − 1), as the theory has it for d_k = 1."""
    k = normal(1, 1, 6).expand(1, 40, 6).clone() if kind == "identical" else normal(1, 40, 1)
    found = summarise([site(k, normal(1, 40, 256))], Plan(SIZES, rules, ("stored",), repeats=32))
    assert found.excess.item() == pytest.approx(found.d_k.item())  # d_k is how far equal keys are from random ones
    assert found.theory_n_star[0, 1].item() == pytest.approx(2.0)
    n = torch.tensor(SIZES[1:], dtype=torch.float64)
    for rule in rules:
        snr = found.curve("snr_db", rule)[0][0]
        assert snr[0] >= CEILING_DB - 1  # a single pair has no interference
        torch.testing.assert_close(snr[1:], -10 * (n - 1).log10(), rtol=0, atol=0.5)
        assert found.n_star[0, found.rules.index(rule), 0].item() == pytest.approx(2.0, abs=0.1)


def test_identical_keys_under_delta_hold_the_last_value():
    """Each write at rate 1 replaces the value: of n values asked for the last is right, the others unrelated."""
    k = normal(1, 1, 6).expand(1, 40, 6).clone()
    found = summarise([site(k, normal(1, 40, 64))], Plan((1, 2, 4, 8), ("delta",), ("stored",), repeats=16))
    for measure in ("top1", "cosine"):
        shares = found.curve(measure, "delta")[0][0]
        torch.testing.assert_close(
            shares, torch.tensor([1, 1 / 2, 1 / 4, 1 / 8], dtype=torch.float64), rtol=0, atol=0.06
        )


@pytest.mark.parametrize("zero", ["keys", "values"])
@pytest.mark.parametrize("rule", ["hebb", "decay", "delta", "gated_delta", "oja", "bcm"])
def test_zeros_are_lost_from_the_first_pair_on(zero, rule):
    k, v = normal(1, 20, 5), normal(1, 20, 4)
    plan = Plan((1, 4, 16), (rule,), options={"oja": {"rate": 0.01}}, repeats=4)
    found = summarise([site(*((0 * k, v) if zero == "keys" else (k, 0 * v)))], plan)
    for measure, value in (("cosine", 0.0), ("relative_error", 1.0), ("top1", 0.0), ("snr_db", -CEILING_DB)):
        for query in ("stored", "own") if zero == "keys" else found.queries:
            assert (found.curve(measure, rule, query)[0] == value).all(), (measure, query)
    assert not found.n_star.any()
    assert not found.censored.any()
    if zero == "keys":
        assert not found.dimension.any()
        assert (found.theory_snr_db[0, 1:] == -CEILING_DB).all()
        assert not found.theory_n_star[0, 1:].any()


def test_zero_keys_of_a_softmax_give_the_mean():
    k, v = torch.zeros(1, 20, 5, dtype=torch.float64), normal(1, 20, 4)
    found = summarise([site(k, v)], Plan((20,), ("softmax",), ("stored",), repeats=1, n_queries=20))
    mean = v[0].mean(0, keepdim=True).expand(20, -1)
    wanted = torch.nn.functional.cosine_similarity(mean, v[0]).mean()
    torch.testing.assert_close(found.curve("cosine", "softmax")[0][0, 0], wanted)


@pytest.mark.parametrize("sites", [None, "first"])
def test_a_model_of_state_spaces_has_no_sites_to_probe(sites):
    model, inputs = make(family("mamba")), family("mamba").inputs()
    says = "probe what it stores with conditioning.memory" if sites is None else "choose softmax sites"
    with (
        workbench.attach(model) as wb,
        pytest.raises(CaptureError, match=f"(?s)kind state, pattern .*{says}") as caught,
    ):
        workbench.capacity(wb, inputs, sites=sites and wb.sites[0].name, progress=False)
    assert caught.value.site == "backbone.layers.0.mixer"


def test_a_hybrid_is_probed_where_it_attends_and_refused_where_it_does_not():
    model, inputs = make(family("jamba")), family("jamba").inputs()
    with workbench.attach(model) as wb:
        found = workbench.capacity(wb, inputs, sizes=(1, 9), repeats=2, progress=False)
        assert set(found.sites) == {"model.layers.1.self_attn"}
        with pytest.raises(CaptureError, match="needs queries, keys and values of a softmax"):
            workbench.capacity(wb, inputs, sites=[wb.sites[1].name, wb.sites[2].name], progress=False)
        with pytest.raises(CaptureError, match=r'there is no site "model\.layers\.9\.self_attn"'):
            workbench.capacity(wb, inputs, sites="model.layers.9.self_attn", progress=False)


def test_more_pairs_than_the_pool_keeps_and_nothing_but_padding():
    model, ids = make(family("bert")), torch.arange(5, 25)[None]
    with workbench.attach(model) as wb:
        with pytest.raises(CaptureError, match=r"9 pairs .* has seen 20 tokens, of which the pool keeps 8"):
            workbench.capacity(wb, {"input_ids": ids}, sizes=(9,), pool=8, progress=False)
        with pytest.raises(CaptureError, match="all tokens of the site are padding"):
            workbench.capacity(wb, {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, progress=False)


@pytest.fixture(scope="module")
def towers():
    """Two sites of layer 0, as an encoder and a decoder have."""
    sites = Site("e.0", 0, "self", 2, tower="encoder"), Site("d.0", 0, "cross", 2, tower="decoder")
    return [(one, head) for one in sites for head in range(2)]


def test_importance_goes_to_the_head_it_names(towers):
    found = scores_of(towers, {("e.0", 1): 1.0, ("decoder.0.cross_attn", 0): 2.0, (5, 5): 3.0})
    assert [None if math.isnan(x) else x for x in found.tolist()] == [None, 1.0, 2.0, None]
    assert scores_of(towers[:2], {(0, 0): 4.0})[0] == 4.0
    with pytest.raises(WorkbenchError, match=r"could be that of 2 heads.*\n.*'encoder.0.attn', 1"):
        scores_of(towers, {(0, 1): 1.0})
    with pytest.raises(WorkbenchError, match="none of the importance scores"):
        scores_of(towers, {("e.1", 0): 1.0})


def test_what_head_importance_found_is_taken_as_it_is():
    model = make(family("gpt2"))
    inputs = dict(family("gpt2").inputs())
    with workbench.attach(model) as wb:
        scores = workbench.head_importance(
            wb, [inputs | {"labels": inputs["input_ids"]}], methods="gradient", progress=False
        )
        found = workbench.capacity(wb, inputs, importance=scores, sizes=(1, 4, 9, 17), repeats=3, progress=False)
    torch.testing.assert_close(found.importance, scores.score().double().cpu())
    assert found.correlation["load"][0] == pytest.approx(spearman(found.effective_keys, scores.score()).item())


def test_correlation_is_spearmans():
    x, y = normal(30).round(decimals=1), normal(2, 30)[1].round(decimals=1)  # rounded: with ties
    table = pd.DataFrame({"x": x.numpy(), "y": (x + y).numpy()}).rank()
    assert spearman(x, x + y).item() == pytest.approx(table.corr().iloc[0, 1])
    scores = x.clone()
    scores[3] = torch.nan
    rises = {"same": x, "falls": -x.exp(), "flat": torch.ones(30), "noise": y}
    found = correlations(rises, scores)
    assert found["same"][0] == pytest.approx(1.0)
    assert found["same"][1] == pytest.approx(1.0)
    assert found["falls"][0] == pytest.approx(-1.0)
    assert found["flat"] == (0.0, -1.0, 1.0)
    rho, low, high = found["noise"]
    assert low < rho < high
    assert low < 0 < high
    assert correlations(rises, torch.cat([x[:2], torch.full((28,), torch.nan)]))["same"] == (0.0, -1.0, 1.0)
