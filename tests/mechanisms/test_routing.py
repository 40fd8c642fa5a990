"""Clusters against the package routing-transformer, at their limits, and their centroids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import workbench
from support.judges import judges, missing
from workbench import WorkbenchError, mechanisms
from workbench.errors import CaptureError
from workbench.kernels.grouped import GroupedPattern, clusters_of, local_attention, routing_attention
from workbench.mechanisms import Place

N = 20


class _Attending(nn.Module):
    """A module that hands q, k and v on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = self.inner(q, k, v)
        return made[0] if isinstance(made, tuple) else made


def _judge(**options: Any) -> Any:
    try:
        with judges():
            from routing_transformer.routing_transformer import KmeansAttention
    except ImportError as error:
        missing(error)
    torch.manual_seed(0)
    judge = KmeansAttention(5, 6, 3, 8, **options).eval()
    judge.kmeans.means.copy_(F.normalize(torch.randn(3, 5, 8), dim=-1))
    judge.kmeans.initted.fill_(True)
    return judge


def _qkv(n: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 2, 3, n, 8, generator=torch.Generator().manual_seed(1), dtype=dtype).unbind()  # type: ignore[return-value]


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_ours_is_the_package_s(causal: bool) -> None:
    judge = _judge(causal=causal, shared_qk=True)
    q, _, v = _qkv()
    k = F.normalize(q, dim=-1)
    clusters = clusters_of(F.normalize(q, dim=-1), judge.kmeans.means, 6)
    ours = routing_attention(q, k, v, clusters, causal=causal, sees_self=False)
    torch.testing.assert_close(ours, judge(q, q, v)[0], atol=1e-5, rtol=1e-5)
    apart = _judge(causal=False)
    _, k, _ = _qkv()
    keys = clusters_of(F.normalize(k, dim=-1), apart.kmeans.means, 6)
    ours = routing_attention(q, k, v, clusters_of(F.normalize(q, dim=-1), apart.kmeans.means, 6), keys)
    torch.testing.assert_close(ours, apart(q, k, v)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "shared_qk": True},
        {"causal": True},
        {"causal": False, "num_mem_kv": 2},
        {"causal": False},
        {"receives_context": True, "context_window_size": 4},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_package_s_own_heads_are_read(options: dict[str, Any]) -> None:
    model = _Attending(_judge(**options))
    q, k, v = _qkv()
    k = q if options.get("shared_qk") else k
    with workbench.attach(model) as wb:
        report = wb.verify(q=q, k=k, v=v)
        assert report.ok, report.table
        with wb.capture(["entropy"], values=True) as cap:
            bare = model(q, k, v)
        with wb.ablate((0, 1)):
            ablated = model(q, k, v)
    assert not ablated[:, 1].any()
    torch.testing.assert_close(ablated[:, ::2], bare[:, ::2])
    (site,) = cap.sites
    learned = 5 * model.inner.num_mem_kv
    assert (site.kind, cap[0].shape) == ("self", (2, 3, N, N + learned))
    weights = cap[0].pattern.dense()
    if options.get("causal"):
        assert not weights[..., :N].triu(1).any()


@torch.no_grad()
def test_the_package_s_language_model_shows_both_kinds_of_heads() -> None:
    try:
        with judges():
            from routing_transformer import RoutingTransformerLM
    except ImportError as error:
        missing(error)
    torch.manual_seed(0)
    with judges():
        model = RoutingTransformerLM(
            num_tokens=40, dim=32, heads=4, depth=2, max_seq_len=24, window_size=6, n_local_attn_heads=2, dim_head=8,
            causal=True,
        ).eval()  # fmt: skip
    ids = torch.randint(0, 40, (2, 24))
    model(ids)  # the first forward draws the centroids
    with workbench.attach(model) as wb, wb.capture(["entropy"]) as cap:
        model(ids)
    named = [site.name.rpartition(".")[2] for site in cap.sites]
    assert named.count("global_attn") == 2


@torch.no_grad()
def test_one_cluster_of_all_is_softmax_and_so_are_clusters_that_are_alike() -> None:
    q, k, v = _qkv(dtype=torch.float64)
    whole = torch.arange(N).expand(2, 3, 1, N)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for count in (1, 4):
        clusters = whole.expand(2, 3, count, N)
        found = routing_attention(q, k, v, clusters, causal=True, eps=0.01)
        torch.testing.assert_close(found, want * count / (count + 0.01))


@torch.no_grad()
def test_rows_sum_to_the_clusters_that_a_query_is_in() -> None:
    q, k, v = _qkv(dtype=torch.float64)
    means = F.normalize(torch.randn(3, 5, 8, dtype=torch.float64), dim=-1)
    clusters = clusters_of(F.normalize(q, dim=-1), means, 6)
    assert torch.equal(clusters, clusters.sort(-1).values)
    assert bool((clusters.diff(dim=-1) > 0).all())
    count = torch.zeros(2, 3, N, dtype=torch.float64).scatter_add_(
        2, clusters.flatten(2), torch.ones(2, 3, 30).double()
    )
    pattern = routing_attention.pattern_of(q, k, v, clusters, eps=0.01)
    torch.testing.assert_close(pattern.dense().sum(-1), count / (count + 0.01))
    assert bool((count == 0).any())
    assert bool((count > 1).any())
    shuffled = clusters[:, :, torch.randperm(5)]
    torch.testing.assert_close(routing_attention(q, k, v, shuffled, eps=0.01), pattern.apply(v))
    entropy = pattern.statistics(["entropy"])["entropy"]
    assert torch.equal(entropy.isnan(), count == 0)


@torch.no_grad()
def test_local_heads_see_their_block_and_those_beside_it() -> None:
    q, k, v = _qkv(dtype=torch.float64)
    block = torch.arange(N) // 6
    for causal in (True, False):
        apart = block[:, None] - block
        mask = (apart >= 0) & (apart <= 1) if causal else apart.abs() <= 1
        mask = mask.tril() if causal else mask
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(local_attention(q, k, v, block=6, causal=causal), want)
        pattern = local_attention.pattern_of(q, k, v, block=6, causal=causal)
        assert torch.equal(pattern.dense()[0, 0] > 0, mask)
        assert torch.equal(pattern.seen.keys_per_query.expand(1, 3, -1)[0, 0], mask.sum(-1))


def test_centroids_follow_the_tokens_in_training_alone() -> None:
    torch.manual_seed(0)
    layer = mechanisms.get("routing").build(Place(24, 4, 16))
    x = torch.randn(2, 16, 24)
    layer.eval()
    start = layer.routed.means.clone()
    layer(x)
    assert torch.equal(layer.routed.means, start)
    assert layer.extra_loss is None
    layer.train()
    layer(x)
    assert bool(layer.routed.drawn)
    first = layer.routed.means.clone()
    layer(x)
    moved = (layer.routed.means - first).abs().max()
    assert 0 < moved < 0.01
    layer.extra_loss.backward()
    assert layer.q.weight.grad[12:].any()


def test_centroids_stay_where_each_is_the_mean_of_its_tokens() -> None:
    layer = mechanisms.get("routing").build(Place(8, 1, 16), n_clusters=2, routed=1.0)
    layer.routed.means.copy_(torch.eye(8)[:2])
    layer.routed.drawn.fill_(True)
    tokens = torch.eye(8)[:2].repeat(4, 1)[None, None]
    layer.routed.follow(3.0 * tokens)
    torch.testing.assert_close(layer.routed.means, torch.eye(8)[None, :2])
    assert float(layer.routed.commitment(tokens)) == 0
    x = torch.randn(1, 1, 5, 8, requires_grad=True)
    layer.routed.means.requires_grad_()
    layer.routed.commitment(x).backward()
    assert layer.routed.means.grad is None  # centroids follow tokens, and no gradient
    nearer = x.detach() - 0.01 * x.grad
    assert layer.routed.commitment(nearer) < layer.routed.commitment(x)


def test_sizes_that_do_not_fit_are_named() -> None:
    routing = mechanisms.get("routing")
    with pytest.raises(WorkbenchError, match="n_clusters=17 is not one of 1 to 16"):
        routing.build(Place(24, 4, 16), n_clusters=17)
    with pytest.raises(WorkbenchError, match="clusters of 17 tokens do not fit a sequence of 16"):
        routing.build(Place(24, 4, 16), size=17)
    with pytest.raises(WorkbenchError, match=r"routed=1\.5"):
        routing.build(Place(24, 4, 16), routed=1.5)
    q, k, v = _qkv()
    with pytest.raises(CaptureError, match="size of a cluster=21"):
        clusters_of(q, torch.ones(3, 2, 8), 21)
    with pytest.raises(CaptureError, match=r"means must be \[head 3, cluster, 8\]"):
        clusters_of(q, torch.ones(2, 2, 8), 4)
    with pytest.raises(CaptureError, match=r"clusters must be \[2, 3, cluster, size\]"):
        routing_attention(q, k, v, torch.zeros(1, 3, 2, 4, dtype=torch.long))


def test_groups_that_do_not_fit_a_map_are_refused() -> None:
    weights, rows = torch.ones(1, 1, 1, 2, 2), torch.tensor([[[[0, 1]]]])
    with pytest.raises(CaptureError, match="rows holds a position outside of the 1 of the map"):
        GroupedPattern(weights, rows, rows, 1, 2)
    with pytest.raises(CaptureError, match="rows must be whole numbers"):
        GroupedPattern(weights, rows.float(), rows, 2, 2)
    with pytest.raises(CaptureError, match="chosen=True"):
        GroupedPattern(weights.expand(2, -1, -1, -1, -1), rows.expand(2, -1, -1, -1), rows, 2, 2)
    with pytest.raises(CaptureError, match=r"weights must be \[batch, head, group, row, column\]"):
        GroupedPattern(weights[0], rows, rows, 2, 2)
