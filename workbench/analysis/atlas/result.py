"""`PatternAtlas`: where each head's pattern lies among all, its cluster and name, and the autoencoder that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.atlas.clusters import assign
from workbench.analysis.atlas.encoder import Autoencoder, encode, scaled
from workbench.analysis.atlas.gathering import gather
from workbench.analysis.atlas.names import UNNAMED
from workbench.errors import FormatError, WorkbenchError, nearest
from workbench.storage.result import Result
from workbench.storage.typed import Places

if TYPE_CHECKING:
    import pandas as pd

    from workbench.capture.capture import Capture


class EncodedPatterns(NamedTuple):
    """Patterns of a capture in an atlas.

    Attributes:
        labels: of the heads.
        maps: [example, head, size, size]. latents: [example, head, width]. xy: [example, head, 2] on the map.
        clusters: [example, head] the nearest cluster. error: [example, head] squared error of the reconstruction.
        head_clusters: [head] the cluster nearest to a head's mean latent vector.
    """

    labels: tuple[str, ...]
    maps: Tensor
    latents: Tensor
    xy: Tensor
    clusters: Tensor
    error: Tensor
    head_clusters: Tensor


@dataclass(frozen=True, repr=False)
class PatternAtlas(Result):
    """What `pattern_atlas` found. Rows are heads, in the order of the sites.

    Attributes:
        sites, layers, heads, labels: of each row, its site's name, layer and head, and a label such as "L3H5".
        kind: "image" or "text". grid, prefix: rows and columns of patches, and tokens before them.
        size: side of the pooled patterns. patterns: [row, size, size] mean over examples; rows are queries.
        latents: [row, width] mean over examples. sample_latents: [example, row, width].
        xy: [row, 2] on the map. sample_xy: [example, row, 2]. explained: [2] share of the latents' variance.
        clusters: [row]. sample_clusters: [example, row]. cluster_patterns: [cluster, size, size] mean over its heads.
        names: evidence's names. evidence: [row, name], NaN where a name does not apply. head_names: one per row;
            "not named" where there is no evidence, as of a single token.
        cluster_evidence: [cluster, name]. cluster_names: one per cluster, by its heads' mean evidence.
        content_dependence: [row] mean of ‖A(x) − Ā‖ / ‖Ā‖ over examples; NaN with one example.
        error: [example, row] squared error of the reconstruction. losses: mean of every epoch of the training.
        centres: [cluster, width]. mean, axes: [width], [2, width], of the map. weights: of the autoencoder.
        seed: of all that was drawn. provenance: of the capture.
    """

    form = "workbench.pattern_atlas"

    sites: Annotated[tuple[str, ...], "row"]
    layers: Annotated[tuple[int, ...], "row"]
    heads: Annotated[tuple[int, ...], "row"]
    labels: Annotated[tuple[str, ...], "row"]
    kind: str
    grid: tuple[int, int]
    prefix: int
    size: Annotated[int, "query", "key"]
    patterns: Float[Tensor, "row query key"]
    latents: Float[Tensor, "row width"]
    sample_latents: Float[Tensor, "example row width"]
    xy: Float[Tensor, "row 2"]
    sample_xy: Float[Tensor, "example row 2"]
    explained: Float[Tensor, " 2"]
    clusters: Annotated[Int[Tensor, " row"], Places("cluster")]
    sample_clusters: Annotated[Int[Tensor, "example row"], Places("cluster")]
    cluster_patterns: Float[Tensor, "cluster query key"]
    names: Annotated[tuple[str, ...], "name"]
    evidence: Float[Tensor, "row name"]
    head_names: Annotated[tuple[str, ...], "row"]
    cluster_evidence: Float[Tensor, "cluster name"]
    cluster_names: Annotated[tuple[str, ...], "cluster"]
    content_dependence: Float[Tensor, " row"]
    error: Float[Tensor, "example row"]
    losses: tuple[float, ...]
    centres: Float[Tensor, "cluster width"]
    mean: Float[Tensor, " width"]
    axes: Float[Tensor, "2 width"]
    weights: dict[str, Float[Tensor, "_ ..."]]
    seed: int
    provenance: dict[str, Any]

    def check_parts(self) -> None:
        """Raise a FormatError if the weights are not those of an autoencoder of this size and width."""
        with torch.device("meta"):
            wanted = Autoencoder(self.size, self.latents.shape[-1]).state_dict()
        if {k: t.shape for k, t in wanted.items()} != {k: t.shape for k, t in self.weights.items()}:
            raise FormatError(f"its weights are not of an autoencoder of {self.size} x {self.size} patterns")

    @property
    def n_clusters(self) -> int:
        """How many clusters there are."""
        return len(self.cluster_names)

    def members(self, cluster: int) -> tuple[str, ...]:
        """Labels of a cluster's heads.

        Raises:
            WorkbenchError: there is no such cluster.
        """
        if not 0 <= cluster < self.n_clusters:
            raise WorkbenchError(f"there are {self.n_clusters} clusters, no cluster {cluster}")
        return tuple(label for label, c in zip(self.labels, self.clusters.tolist(), strict=True) if c == cluster)

    @property
    def unnamed(self) -> tuple[str, ...]:
        """Labels of heads whose patterns show nothing that could name them, as of prompts of a single token."""
        return tuple(label for label, name in zip(self.labels, self.head_names, strict=True) if name == UNNAMED)

    def row(self, label: str) -> int:
        """Row of a head.

        Raises:
            WorkbenchError: there is no such head.
        """
        if label not in self.labels:
            raise WorkbenchError(f'there is no head "{label}"', hint=nearest(label, self.labels, "head"))
        return self.labels.index(label)

    def encode(
        self,
        cap: Capture,
        grid: tuple[int, int] | str | None = None,
        *,
        prefix: int | None = None,
        sites: Sequence[Any] | None = None,
    ) -> EncodedPatterns:
        """Place the patterns of a capture, of this model or another, in this atlas; nothing is trained.

        Args:
            grid, prefix, sites: as `pattern_atlas` takes them.

        Raises:
            WorkbenchError: an atlas of images and a capture of text, or the other way round.
        """
        found = gather(cap, self.size, grid, prefix, sites)
        kind = "text" if found.places.text else "image"
        if kind != self.kind:
            raise WorkbenchError(
                f"this is an atlas of {self.kind} patterns, the capture is of {kind}",
                hint="give grid=, if it has patches",
            )
        latents, error = self._encoded(found.maps)
        return EncodedPatterns(
            found.labels,
            found.maps,
            latents,
            self.place(latents),
            assign(latents, self.centres),
            error,
            assign(latents.mean(0), self.centres),
        )

    def _encoded(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [example, row, width] and errors [example, row] of maps [example, row, size, size]."""
        latents, error = encode(scaled(maps), self.weights, self.latents.shape[-1])
        return latents.unflatten(0, maps.shape[:2]), error.unflatten(0, maps.shape[:2])

    def place(self, latents: Tensor) -> Tensor:
        """[..., 2] on the map, of latents [..., width]."""
        return (latents - self.mean) @ self.axes.T

    def decode(self, latents: Tensor) -> Tensor:
        """[..., size, size] patterns that the autoencoder makes of latents [..., width]: √ of weight, 1 at most."""
        model = Autoencoder(self.size, self.latents.shape[-1])
        model.load_state_dict(self.weights)
        with torch.no_grad():
            made: Tensor = model.decoder(latents.reshape(-1, latents.shape[-1]).float())
        return made.reshape(*latents.shape[:-1], self.size, self.size)

    @property
    def table(self) -> pd.DataFrame:
        """One row per head: its name, cluster, place on the map, content dependence, and evidence for each name."""
        import pandas as pd

        clusters = self.clusters.tolist()
        columns: dict[str, Any] = {
            "site": self.sites, "layer": self.layers, "head": self.heads, "label": self.labels, "name": self.head_names,
            "cluster": clusters, "cluster_name": [self.cluster_names[c] for c in clusters],
            "x": self.xy[:, 0].tolist(), "y": self.xy[:, 1].tolist(),
            "content_dependence": self.content_dependence.tolist(), "error": self.error.mean(0).tolist(),
        }  # fmt: skip
        columns |= {f"is_{name.replace(' ', '_')}": self.evidence[:, i].tolist() for i, name in enumerate(self.names)}
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        sizes = [f"{name} ({len(self.members(c))})" for c, name in enumerate(self.cluster_names)]
        lost = f"; {len(self.unnamed)} heads show nothing to be named by" if self.unnamed else ""
        return f"PatternAtlas({len(self.labels)} heads, {len(self.error)} examples; clusters: {', '.join(sizes)}{lost})"
