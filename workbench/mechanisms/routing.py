"""Routing Transformer: some heads attend inside clusters of tokens found by k-means, the others nearby."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.grouped import GroupedPattern, clusters_of, local_attention, routing_attention
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, register

_DECAY = 0.999


class LocalHeads(nn.Module):
    """Softmax attention inside a block and the blocks beside it; causal: the block before it."""

    def __init__(self, block: int, causal: bool) -> None:
        super().__init__()
        self.block, self.causal = block, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[batch, head, token, d] to A·V."""
        return local_attention(q, k, v, block=self.block, causal=self.causal)


class RoutedHeads(nn.Module):
    """Softmax attention inside clusters around centroids that follow the tokens.

    Attributes:
        means: [head, cluster, d] of length one; the first forward in training draws them from its tokens, and each
            moves them a little towards the tokens that lie nearest.
    """

    def __init__(self, n_heads: int, n_clusters: int, size: int, d_head: int, causal: bool) -> None:
        super().__init__()
        self.size, self.causal = size, causal
        self.register_buffer("means", F.normalize(torch.randn(n_heads, n_clusters, d_head), dim=-1))
        self.register_buffer("drawn", torch.tensor(False))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[batch, head, token, d] to A·V, inside the clusters of q and those of k."""
        means, size = self.get_buffer("means").to(q), min(self.size, q.shape[2])
        of_queries, of_keys = (clusters_of(F.normalize(t, dim=-1), means, size) for t in (q, k))
        return routing_attention(q, k, v, of_queries, of_keys, causal=self.causal)

    def commitment(self, x: Tensor) -> Tensor:
        """Mean squared distance of x [batch, head, token, d] from the nearest centroids; moves x, not them."""
        unit, means = F.normalize(x, dim=-1), self.get_buffer("means").detach().to(x)
        nearest = torch.einsum("bhnd,hcd->bhnc", unit, means).argmax(-1)
        chosen = means.gather(1, nearest.transpose(0, 1).flatten(1)[..., None].expand(-1, -1, means.shape[2]))
        return F.mse_loss(unit, chosen.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1))

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        """Move the centroids towards x [batch, head, token, d]: one step of spherical k-means, averaged over steps."""
        means = self.get_buffer("means")
        unit = F.normalize(x, dim=-1).transpose(0, 1).flatten(1, 2).to(means)  # [head, tokens, d]
        if not self.get_buffer("drawn"):
            places = torch.linspace(0, unit.shape[1] - 1, means.shape[1]).long()
            means.copy_(unit[:, places])
            self.get_buffer("drawn").fill_(True)
        nearest = (unit @ means.mT).argmax(-1)
        sums = torch.zeros_like(means).scatter_add_(1, nearest[..., None].expand_as(unit), unit)
        met = sums.norm(dim=-1, keepdim=True) > 0
        means.copy_(torch.where(met, _DECAY * means + (1 - _DECAY) * F.normalize(sums, dim=-1), means))


class RoutingAttention(Mixer):
    """Half of the heads attend nearby, half inside clusters of tokens that point the same way.

    Args:
        place: a sequence.
        n_clusters: about √length if None. size: tokens in a cluster; length / clusters, rounded up, if None.
        routed: the share of the heads that route, rounded.
        shared: routed queries are the keys too, as in decoders; by default where the place is causal.

    Raises:
        WorkbenchError: more clusters than tokens, clusters larger than the sequence, or a share that is none.
    """

    def __init__(
        self,
        place: Place,
        n_clusters: int | None = None,
        size: int | None = None,
        routed: float = 0.5,
        shared: bool | None = None,
    ) -> None:
        super().__init__(place)
        n = place.length
        clusters = max(1, isqrt(n)) if n_clusters is None else n_clusters
        if not 1 <= clusters <= n:
            raise WorkbenchError(
                f"n_clusters={clusters} is not one of 1 to {n}, the tokens", hint="about √tokens if it is left out"
            )
        size = -(-n // clusters) if size is None else size
        if not 1 <= size <= n:
            raise WorkbenchError(
                f"clusters of {size} tokens do not fit a sequence of {n}",
                hint=f"size=1 to {n}; tokens / clusters, rounded up, if it is left out",
            )
        if not 0 <= routed <= 1:
            raise WorkbenchError(f"routed={routed} is no share of the heads", hint="from 0 to 1")
        self.shared = place.causal if shared is None else shared
        self.n_routed = round(self.n_heads * routed)
        self.n_local = self.n_heads - self.n_routed
        if self.shared:
            self.k = nn.Linear(place.d_model, self.n_local * self.d_head) if self.n_local else nn.Identity()
        self.local = LocalHeads(size, place.causal) if self.n_local else None
        self.routed = RoutedHeads(self.n_routed, clusters, size, self.d_head, place.causal) if self.n_routed else None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; where routed queries are the keys, these are as long as √d."""
        if not self.shared:
            return super().heads(x)
        q, v = self.turned(self.split(self.q(x))), self.split(self.v(x))
        near = [self.turned(self.split(self.k(x)))] if self.n_local else []
        return q, torch.cat([*near, F.normalize(q[:, self.n_local :], dim=-1) * self.d_head**0.5], dim=1), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Local heads first, then those that route."""
        near = self.n_local
        parts = [] if self.local is None else [self.local(q[:, :near], k[:, :near], v[:, :near])]
        if self.routed is not None:
            q, k, v = (t[:, near:] for t in (q, k, v))
            self.extra_loss = None
            if self.training and len(q):
                both = q if self.shared else torch.cat((q, k), dim=2)
                self.keep_loss(1e-4 * self.routed.commitment(both))
                self.routed.follow(both)
            parts.append(self.routed(q, k, v))
        return torch.cat(parts, dim=1)


def _clusters(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """Which tokens each cluster of a routed head holds; local heads have none."""
    assert isinstance(pattern, GroupedPattern)
    if not pattern.chosen:
        return {}
    rows = pattern.rows_of[0]  # [head, cluster, place]
    received = pattern.dense()[0].sum(1)[:, None].expand(-1, rows.shape[1], -1)
    held = torch.zeros_like(received).scatter_(2, rows, 1.0)
    return {"clusters": received.masked_fill(held == 0, torch.nan)}


ROUTING = register(
    Mechanism(
        "routing",
        Card(
            title="Routing Transformer",
            arxiv="2003.05997",
            equation="A[i, j] = 1/(nᵢ + ε) Σ over clusters that hold i and j of softmax(qᵢ·k/√d) inside the cluster",
            map="The mean of a token's clusters; a token in none has a row of zeros. Local heads are a site apart.",
            kind="self",
            grade="exact",
            cost="O(n²/clusters + n·clusters): O(n^1.5) for √n clusters",
            causal="either",
            leaks="Which tokens a cluster holds depends on all tokens, later ones too: weights see the past alone, "
            "their choice does not.",
            code="google-research (Apache-2.0), routing-transformer of PyPI (MIT); the latter is read, and agrees.",
            claims=(
                Claim("Clusters chosen by content beat windows of the same cost on text."),
                Claim("Its cost grows no faster than n^1.5."),
            ),
        ),
        RoutingAttention,
        variants={"routed alone": {"routed": 1.0}, "local alone": {"routed": 0.0}},
        signature=Signature(
            "Which tokens a cluster holds",
            "A row is a cluster of a routed head, and grey where it does not hold the token; elsewhere the colour "
            "is the weight that the token receives in all.",
            _clusters,
            rows="cluster",
            value="weight received",
        ),
    )
)
