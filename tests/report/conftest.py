"""Captures with known patterns: the real classes, filled by hand."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.capture.capture import Capture
from workbench.capture.site_capture import Forward, SiteCapture
from workbench.hooks.sites import Site, Sites
from workbench.kernels.patterns import DensePattern

MakeCapture = Callable[..., Capture]
METRICS = ("entropy", "effective_keys", "distance", "sink", "previous", "current", "induction", "peak", "received")


def attention(heads: int, queries: int, keys: int, *, causal: bool, seed: int = 0, batch: int = 1) -> Tensor:
    """[batch, head, query, key] of peaky random rows that sum to 1."""
    scores = 3 * torch.randn(batch, heads, queries, keys, generator=torch.Generator().manual_seed(seed))
    if causal:
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1)


def site_capture(site: Site, weights: Tensor, statistics: Sequence[str], *, keep: bool = True) -> SiteCapture:
    """A site capture whose pattern is `weights`."""
    batch, heads, queries, keys = weights.shape
    ids = torch.arange(keys).expand(batch, keys) % 5
    names = [
        name
        for name in statistics
        if queries == keys or name in ("entropy", "effective_keys", "sink", "peak", "received")
    ]
    found = DensePattern(weights).statistics(names, tokens=ids) if names else {}
    shape = (batch, heads, queries, keys)
    return SiteCapture(site, shape, found, "flash_attention_for_cpu", weights=weights if keep else None)


@pytest.fixture(scope="session")
def make_capture() -> MakeCapture:
    """make_capture(tokens=..., layers=2, heads=3, ...) gives a capture of a causal model over these tokens."""

    def make(
        tokens: Sequence[str] | None = None,
        *,
        length: int = 9,
        layers: int = 2,
        heads: int = 3,
        batch: int = 1,
        n_calls: int = 1,
        causal: bool = True,
        keep: bool = True,
        statistics: Sequence[str] = tuple(METRICS),
        provenance: dict[str, Any] | None = None,
        name: str = "model.layers.{}.self_attn",
    ) -> Capture:
        length = length if tokens is None else len(tokens)
        sites = [Site(name.format(i), i, "self", heads, heads, 16) for i in range(layers)]
        forwards = []
        for call in range(n_calls):
            captures = {}
            for site in sites:
                weights = attention(heads, length, length, causal=causal, seed=7 * call + site.layer, batch=batch)
                captures[site.name] = site_capture(site, weights, statistics, keep=keep)
            rows = {} if tokens is None else {"input": [list(tokens)] * batch}
            forwards.append(Forward(call, captures, {}, rows))
        facts = {"model_name": "small-model", "dtype": "float32", "versions": {"torch": "2.6"}}
        return Capture(forwards, Sites(sites), facts if provenance is None else provenance)

    return make


@pytest.fixture(scope="session")
def translation_capture() -> Capture:
    """A capture of an encoder and a decoder: three kinds of maps, and queries that are not the keys."""
    shapes = {
        "encoder": (Site("model.encoder.layers.{}.self_attn", 0, "self", 4, 4, 8, "encoder"), 30, 30, False),
        "decoder": (Site("model.decoder.layers.{}.self_attn", 0, "self", 4, 4, 8, "decoder"), 7, 7, True),
        "cross": (Site("model.decoder.layers.{}.encoder_attn", 0, "cross", 4, 4, 8, "decoder"), 7, 30, False),
    }
    captures: dict[str, SiteCapture] = {}
    for site, queries, keys, causal in shapes.values():
        for layer in range(2):
            each = Site(site.name.format(layer), layer, site.kind, 4, 4, 8, site.tower)
            weights = attention(4, queries, keys, causal=causal, seed=layer + queries + keys)
            captures[each.name] = site_capture(each, weights, list(METRICS))
    ids = {"input": torch.zeros(1, 30, dtype=torch.long), "decoder": torch.zeros(1, 7, dtype=torch.long)}
    tokens = {"input": [[f" in{i}" for i in range(30)]], "decoder": [[f" out{i}" for i in range(7)]]}
    forward = Forward(0, captures, ids, tokens)
    return Capture([forward], Sites([c.site for c in captures.values()]), {"model_name": "translator"})


@pytest.fixture
def verification() -> SimpleNamespace:
    """What a passed verification looks like."""
    checks = [
        {"site": f"model.layers.{i}.self_attn", "fired": True, "kernel": "flash_attention_for_cpu",
         "row_sum_error": 1e-7 * (i + 1), "output_error": 2e-6, "tolerance": 1e-4, "ok": True}
        for i in range(2)
    ]  # fmt: skip
    return SimpleNamespace(ok=True, identical=True, checks=checks)
