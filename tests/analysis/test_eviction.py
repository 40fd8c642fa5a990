"""Which keys caches drop and what is lost, compared with the policies written out key by key, and with kvpress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.judges import missing, part
from support.tiny import eager_twin, family, make
from support.zoo.family import ids
from workbench import CaptureError, Eviction, attach, eviction

N = 41
CASES: list[tuple[str, dict[str, int]]] = [
    ("streaming", {"sinks": 3, "recent": 6}),
    ("streaming", {"sinks": 0, "recent": 1}),
    ("h2o", {"heavy": 4, "recent": 5}),
    ("h2o", {"heavy": 7, "recent": 1}),
    ("observed", {"heavy": 6, "prompt": 20}),
]


def captured(model: nn.Module, tokens: Tensor, **inputs: Any) -> workbench.Capture:
    with attach(model) as wb, torch.no_grad(), wb.capture(()) as cap:
        model(input_ids=tokens, use_cache=False, **inputs)
    return cap


def by_hand(a: Tensor, policy: str, shared: int, **numbers: int) -> tuple[Tensor, Tensor]:
    """Lost [head, query] and kept [head, query, key], of one example's maps [head, query, key]."""
    heads, n, _ = a.shape
    weights = a.tolist()
    kept = torch.zeros(heads, n, n, dtype=torch.bool)
    for group in range(heads // shared):
        own = range(group * shared, (group + 1) * shared)
        cache: list[int] = []
        sums = [0.0] * n
        for i in range(n):
            cache.append(i)
            if policy == "streaming":
                cache = [j for j in cache if j < numbers["sinks"] or j > i - numbers["recent"]]
            if policy == "h2o" and len(cache) > numbers["heavy"] + numbers["recent"]:
                old = [j for j in cache if j <= i - numbers["recent"]]
                cache.remove(min(old, key=lambda j: sums[j]))
            if policy == "observed" and i == numbers["prompt"]:
                early = range(i)
                mean = [sum(weights[h][r][j] for h in own for r in range(j, i)) / (i - j) for j in early]
                best = sorted(early, key=lambda j: -mean[j])[: numbers["heavy"]]
                cache = [j for j in cache if j == i or j in best]
            for h in own:
                kept[h, i, cache] = True
                whole = sum(weights[h][i][j] for j in cache)
                for j in cache:
                    sums[j] += weights[h][i][j] / whole / shared
    return (a * ~kept).sum(-1), kept


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_every_policy_is_that_of_its_definition(name: str) -> None:
    model = make(family(name)).double()
    tokens = ids(2, 90)[:, :N]
    cap = captured(model, tokens)
    with torch.no_grad():
        maps = eager_twin(model)(input_ids=tokens, output_attentions=True).attentions
    n_kv_heads = getattr(model.config, "num_key_value_heads", maps[0].shape[1])
    shared = maps[0].shape[1] // n_kv_heads
    for policy, numbers in CASES:
        found = eviction(cap, policy, **numbers)  # type: ignore[arg-type]
        assert found.lost.shape == (len(maps) * maps[0].shape[1], 2, N)
        assert float(found.lost.max()) > 0.05
        for layer, each in enumerate(maps):
            for example in range(2):
                lost, kept = by_hand(each[example], policy, shared, **numbers)
                for head in range(len(lost)):
                    assert torch.equal(found.kept(layer, head, example), kept[head]), (policy, layer, head)
                at = slice(layer * len(lost), (layer + 1) * len(lost))
                torch.testing.assert_close(found.lost[at, example], lost, atol=1e-6, rtol=1e-6)
                assert torch.equal(found.keys[at, example], kept.sum(-1))


def test_its_limits_are_windows_and_everything() -> None:
    cap = captured(make(family("gpt2")), ids(1, 90)[:, :N])
    window = eviction(cap, "streaming", sinks=0, recent=9)
    assert torch.equal(eviction(cap, "h2o", heavy=0, recent=9).leaves, window.leaves)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    assert torch.equal(window.kept(0, 1), (j <= i) & (i - j < 9))
    nearly = eviction(cap, "h2o", heavy=N - 2, recent=1)
    assert int((nearly.leaves < N).sum()) == nearly.lost.shape[0]  # one key of each head, before the last query
    assert not nearly.lost[..., :-1].any()
    for policy, numbers in (("h2o", {"heavy": N - 1, "recent": 1}), ("observed", {"heavy": 20, "prompt": 20})):
        with pytest.raises(CaptureError, match=f"no query of {N} loses a key"):
            eviction(cap, policy, **numbers)  # type: ignore[arg-type]


def test_padding_is_no_key() -> None:
    model, tokens = make(family("llama-gqa")), ids(1, 90)[:, :30]
    alone = captured(model, tokens)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    behind = captured(model, padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for policy, numbers in CASES[:3]:
        want, found = (eviction(cap, policy, **numbers) for cap in (alone, behind))  # type: ignore[arg-type]
        assert bool(found.lost[..., :7].isnan().all())
        assert torch.equal(found.leaves[..., :7], torch.full_like(found.leaves[..., :7], -1))
        assert torch.equal(found.leaves[..., 7:], want.leaves + 7)
        torch.testing.assert_close(found.lost[..., 7:], want.lost, atol=1e-4, rtol=1e-4)
        assert not found.kept(0, 0)[:, :7].any()


def test_it_keeps_what_kvpress_keeps() -> None:
    """Behind a prompt: the scores of its presses, of which it keeps the largest."""
    try:
        observes = part("kvpress.presses.observed_attention_press").ObservedAttentionPress
        streams = part("kvpress.presses.streaming_llm_press").StreamingLLMPress
    except ImportError as error:
        missing(error)
    model, prompt, keep = make(family("llama-gqa")), 24, 9
    tokens = ids(1, 90)[:, :N]
    cap = captured(model, tokens)
    with torch.no_grad():
        maps = eager_twin(model)(input_ids=tokens[:, :prompt], output_attentions=True).attentions
    kv = model.config.num_key_value_heads
    keys = torch.zeros(1, kv, prompt, 4)
    module = nn.Module()
    module.config = model.config
    module.layer_idx = 0
    observed = eviction(cap, "observed", heavy=keep, prompt=prompt)
    streaming = eviction(cap, "streaming", sinks=4, recent=keep - 4)
    ratio = 1 - keep / prompt
    for layer, each in enumerate(maps):
        presses = (
            (observes(compression_ratio=ratio), observed, prompt),
            (streams(compression_ratio=ratio, n_sink=4), streaming, prompt - 1),
        )
        for press, found, query in presses:
            scores = press.score(module, torch.zeros(1, prompt, 8), keys, keys, each, {})
            best = scores.topk(keep, dim=-1).indices.sort(-1).values  # [1, kv head, kept]
            for head in range(each.shape[1]):
                ours = found.kept(layer, head)[query, :prompt].nonzero()[:, 0]
                assert torch.equal(ours, best[0, head * kv // each.shape[1]]), type(press).__name__


def test_what_is_no_cache_or_no_number_is_refused() -> None:
    cap = captured(make(family("gpt2")), ids(1, 90)[:, :N])
    for policy, numbers, said in (
        ("newest", {}, "there is no policy 'newest'"),
        (None, {}, "there is no policy None"),
        ("h2o", {"sinks": 4}, '"h2o" has no sinks'),
        ("streaming", {"recent": 0}, 'recent of "streaming" is a whole number from 1, not 0'),
        ("streaming", {"sinks": 1.5}, "whole number from 0, not 1.5"),
        ("observed", {"heavy": 4}, 'prompt of "observed" is a whole number from 1, not None'),
        ("streaming", {"sinks": 30, "recent": 11}, f"no query of {N} loses a key"),
    ):
        with pytest.raises(CaptureError, match=said):
            eviction(cap, policy, **numbers)  # type: ignore[arg-type]
    bert = make(family("bert"))
    with attach(bert) as wb, torch.no_grad(), wb.capture(()) as both:
        bert(input_ids=ids(1, 90)[:, :N])
    with pytest.raises(CaptureError, match="queries see later keys"):
        eviction(both, "streaming", sinks=1, recent=4)
    model = make(family("gpt2"))
    with attach(model) as wb, torch.no_grad(), wb.capture(()) as steps:
        model.generate(ids(1, 90)[:, :20], min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with pytest.raises(CaptureError, match="joined"):
        eviction(steps.calls[1], "streaming", sinks=1, recent=4)
    whole = eviction(steps.joined(), "streaming", sinks=1, recent=4)
    assert whole.lost.shape[-1] == 23
    with pytest.raises(CaptureError, match="no one head L9H0"):
        whole.kept(9, 0)


def test_results_stay_and_are_shown(tmp_path: Path) -> None:
    cap = captured(make(family("llama-gqa")), ids(2, 90)[:, :N])
    found = eviction(cap, heavy=4, recent=5)
    again = Eviction.load(found.save(tmp_path / "e.safetensors"))
    assert again.table.equals(found.table)
    assert torch.equal(again.leaves, found.leaves)
    assert torch.equal(again.seen_by, found.seen_by)
    assert "h2o, the 4 heaviest keys and 5 recent ones" in repr(found)
    assert list(found.table["lost"]) == sorted(found.table["lost"], reverse=True)
    assert float(found.table["keys"].iloc[0]) == 9
    first = found.table.iloc[0]
    assert first["worst"] >= first["lost"]
    assert first["high"] >= first["lost"] >= first["low"]
    assert len(found.to_png()) > 1000
    page = str(found.to_html())
    assert "weight lost" in page
    assert "query by query" in page
