"""The atlas of a model's heads over a corpus, whole or as far as it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.circuits import mib
from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.anatomy import find_anatomy
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.names import head_of
from workbench.analysis.corpus.duo_attention import write_duo_attention
from workbench.analysis.corpus.headvis import MEANINGS, strongest_windows, write_headvis
from workbench.analysis.corpus.measuring import SCORES
from workbench.errors import WorkbenchError, nearest
from workbench.storage.result import Result
from workbench.tokens import utf8

if TYPE_CHECKING:
    import pandas as pd

    from workbench.session.workbench import Workbench

_IN_HEADVIS = {
    "prev_token_score": "previous", "induction_score": "induction", "duplicate_token_score": "duplicate",
    "sink_score": "sink", "retrieval_score": "retrieval", "streaming_score": "streaming",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class CorpusAtlas(Result):
    """What every head does over a corpus. See `head_atlas_over`.

    Attributes:
        layers, numbers, sites: of each head. kv_heads: whose keys it reads, within its site.
        windows: [window, score, head] mean of each score over the rows of a window that it asks for, in the order of
            `SCORES`; NaN in windows that have none.
        entropies, distances: [head, bin] how many positions have an entropy (nats) or a mean distance (tokens) there;
            bins divide 0 to `entropy_range`, 0 to `length`.
        totals: [quantity, head] sums over all positions, in the order of `TOTALS`: weight on the query itself, entropy,
            distance and the square of the distance from a query to its keys.
        copying: [head] as `ov_copying` has it, by the weights alone; NaN where it cannot be read from them.
        weights: [head, example] of the strongest looks, at most one per window; −1 where there is none.
        places: [head, example, 3] their window, query and key. texts: their words, marked ⟦so⟧.
        example_ids: [head, example, position] their windows; −1 where there is none.
        length: tokens of a window. n_tokens: of text in all. n_unknown: of these, tokens for words that the
            tokenizer does not know. sinks, recent: keys that a streaming cache keeps.
        identity: what a file must share to be gone on from. complete: whether it is whole.
    """

    form = "workbench.corpus_atlas"
    filled = ("head",)

    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    kv_heads: Annotated[tuple[int, ...], "head"]
    windows: Float[Tensor, "window 6 head"]
    entropies: Int[Tensor, "head bin"]
    distances: Int[Tensor, "head bin"]
    totals: Float[Tensor, "4 head"]
    entropy_range: float
    copying: Float[Tensor, " head"]
    weights: Float[Tensor, "head example"]
    places: Int[Tensor, "head example 3"]
    texts: Annotated[tuple[tuple[str, ...], ...], "head example"]
    example_ids: Int[Tensor, "head example position"]
    length: int
    n_tokens: int
    n_unknown: int
    sinks: int
    recent: int
    identity: dict[str, Any]
    complete: bool
    provenance: dict[str, Any]

    @property
    def scores(self) -> Tensor:
        """[score, head] means over windows, in the order of `SCORES`."""
        return self.windows.double().nanmean(0)

    @property
    def halves(self) -> Tensor:
        """[2, score, head] the same of the first and the second half of the corpus."""
        middle = len(self.windows) // 2
        whole = self.windows.double()
        return torch.stack([whole[:middle].nanmean(0), whole[middle:].nanmean(0)])

    @property
    def drift(self) -> Tensor:
        """[score, head] by how much the second half's mean is above the first's."""
        first, second = self.halves
        return second - first

    @property
    def drift_error(self) -> Tensor:
        """[score, head] standard error of the drift, if windows were drawn at random: neighbours are alike, so that it
        is too small where a corpus changes slowly."""
        middle, whole = len(self.windows) // 2, self.windows.double()
        of_halves = []
        for part in (whole[:middle], whole[middle:]):
            n = (~part.isnan()).sum(0)
            variance = (part - part.nanmean(0)).square().nansum(0) / (n - 1).where(n > 1, torch.nan)
            of_halves.append(variance / n)
        return (of_halves[0] + of_halves[1]).sqrt()

    def deciles(self, of: str = "entropy") -> Tensor:
        """[head, 9] what 10, 20 … 90 % of the positions lie below, to a bin's width: "entropy" (nats) or "distance"
        (tokens).

        Raises:
            WorkbenchError: another name.
        """
        if of not in ("entropy", "distance"):
            raise WorkbenchError(f"there are deciles of entropy and distance, not of {of!r}")
        counts, most = (self.entropies, self.entropy_range) if of == "entropy" else (self.distances, float(self.length))
        below = counts.double().cumsum(1)
        wanted = below[:, -1:] * torch.arange(1, 10, dtype=torch.float64) / 10
        at = torch.searchsorted(below, wanted).clamp_max(counts.shape[1] - 1)
        before = torch.where(at > 0, below.gather(1, (at - 1).clamp_min(0)), 0.0)
        inside = (wanted - before) / counts.gather(1, at).clamp_min(1)
        return (at + inside) * most / counts.shape[1]

    @property
    def table(self) -> pd.DataFrame:
        """One row per head: scores, drifts with their errors, deciles of entropy and distance, copying."""
        import pandas as pd

        frame: dict[str, Any] = {"layer": self.layers, "head": self.numbers, "site": self.sites}
        scores, drift, error = self.scores, self.drift, self.drift_error
        frame |= {name: scores[i].numpy() for i, name in enumerate(SCORES)}
        frame["copying"] = self.copying.double().numpy()
        for i, name in enumerate(SCORES):
            frame |= {f"{name} drift": drift[i].numpy(), f"{name} drift error": error[i].numpy()}
        for of in ("entropy", "distance"):
            found = self.deciles(of)
            frame |= {f"{of} {10 * (i + 1)} %": found[:, i].numpy() for i in range(9)}
        return pd.DataFrame(frame)

    @property
    def examples(self) -> pd.DataFrame:
        """One row per head and example: its weight, window, query and key, and its words."""
        import pandas as pd

        rows = [
            (
                self.layers[h],
                self.numbers[h],
                float(self.weights[h, e]),
                *self.places[h, e].tolist(),
                utf8(self.texts[h][e]),
            )
            for h in range(len(self.layers))
            for e in range(self.weights.shape[1])
            if self.weights[h, e] >= 0
        ]
        return pd.DataFrame(rows, columns=["layer", "head", "weight", "window", "query", "key", "text"])

    def leading(self, score: str, n: int = 5) -> list[tuple[int, int]]:
        """The (layer, head) of the n largest means of a score.

        Raises:
            WorkbenchError: there is no such score.
        """
        if score not in SCORES:
            raise WorkbenchError(f"there is no score {score!r}", hint=nearest(score, SCORES))
        order = self.scores[SCORES.index(score)].nan_to_num(-1.0).argsort(descending=True, stable=True)[:n]
        return [(self.layers[h], self.numbers[h]) for h in order.tolist()]

    def to_duo_attention(self, folder: str | Path) -> Path:
        """Write which heads need the whole cache, as DuoAttention and kvpress's `DuoAttentionPress` read it:
        `full_attention_heads.tsv` [layer, kv head] and `config.json`.

        A head's number is 1 less its streaming score, a kv head's the largest of its heads': what a cache of `sinks`
        and `recent` keys loses of their weight. DuoAttention's own numbers are gates that are trained; take a share of
        the heads by rank, as both do with `sparsity`, rather than a threshold.

        Raises:
            FileError: it cannot be written. WorkbenchError: layers have different numbers of kv heads.
        """
        lost = 1 - self.scores[SCORES.index("streaming")]
        names = list(dict.fromkeys(self.sites))
        rows: list[Sequence[float]] = []
        for name in names:
            own = [h for h, site in enumerate(self.sites) if site == name]
            groups = sorted({self.kv_heads[h] for h in own})
            rows.append([max(float(lost[h]) for h in own if self.kv_heads[h] == group) for group in groups])
        return write_duo_attention(folder, rows, sinks=self.sinks, recent=self.recent)

    def to_headvis(
        self, folder: str | Path, wb: Workbench | None = None, *, model: str | None = None, dataset: str = "corpus"
    ) -> Path:
        """Write what HeadVis shows, and Neuronpedia imports: `config.json`, `scatter_data.json` and a file per head.

        For Neuronpedia the folder is `<exports>/<model id>/headvis/<dataset>`. Numbers are over positions of the text,
        without what the tokenizer puts around it; scores are means of windows, each of which counts alike.
        `read_headvis` reads such a folder's numbers.

        Args:
            wb: the model, which is run again on the windows of the strongest looks, so that HeadVis shows their maps;
                without it heads have numbers alone.
            model: its name; that of `provenance` if None. dataset: a name for the corpus.

        Raises:
            FileError: it cannot be written. WorkbenchError: `wb` has another model, or two sites share a layer.
        """
        sequences: list[list[dict[str, Any]]] = [[] for _ in self.layers]
        if wb is not None:
            self._check_model(wb)
            heads = list(zip(self.sites, self.numbers, strict=True))
            sequences = strongest_windows(wb, heads, self.places[..., 0], self.example_ids)
        run = {
            "model_name": str(self.provenance["model_name"]) if model is None else model, "dataset_name": dataset,
            "n_sequences": len(self.windows), "seq_len": self.length,
            "dtype": str(self.provenance.get("dtype", "unknown")),
            "attn_implementation": str(self.provenance.get("attention_backend", "unknown")),
        }  # fmt: skip
        return write_headvis(folder, self._headvis_rows(), sequences, run)

    def to_mib(self, path: str | Path, like: Circuit | Workbench, score: str = "induction", n: int = 10) -> Path:
        """Write a score of all heads as MIB's JSON of a circuit, whose nodes have it: `a9.h6` and so on.

        In the graph are the n heads that lead. MIB's form has a number for every edge, which an atlas knows nothing of:
        they are 0, `"scored": false` as in `Circuit.to_mib`. `Circuit.from_mib` reads the file.

        Args:
            like: the model's Workbench, or a circuit of it: the form tells of all nodes and edges that there are.
            score: as in `leading`.

        Raises:
            FileError: it cannot be written. WorkbenchError: no such score; `like` is of another model, or of one that
                the form has no place for.
        """
        chosen = self.leading(score, n)
        graph = like.graph if isinstance(like, Circuit) else self._graph_of(like)
        names = [f"a{layer}.h{head}" for layer, head in zip(self.layers, self.numbers, strict=True)]
        heads = [name for name in graph.senders if head_of(name) is not None]
        if sorted(names) != sorted(heads):
            raise WorkbenchError(
                f"the atlas has {len(names)} heads, not those of this model's graph, of which there are {len(heads)}",
                hint="MIB's form is that of decoders, and of one attention in each layer",
            )
        scores = torch.full((len(graph.senders),), torch.nan, dtype=torch.float64)
        inside = torch.zeros(len(graph.senders), dtype=torch.bool)
        for name, value in zip(names, self.scores[SCORES.index(score)].tolist(), strict=True):
            scores[graph.sender_index[name]] = value
        for layer, head in chosen:
            inside[graph.sender_index[f"a{layer}.h{head}"]] = True
        edges = torch.full((len(graph.senders), len(graph.receivers)), torch.nan, dtype=torch.float64)
        return mib.write(path, graph, inside, torch.zeros_like(edges, dtype=torch.bool), scores, edges)

    def _graph_of(self, wb: Workbench) -> Graph:
        self._check_model(wb)
        rows = self.example_ids.flatten(0, 1)
        ids = next((row[row >= 0] for row in rows if bool((row >= 0).any())), None)
        if ids is None:
            raise WorkbenchError(
                "the atlas has no example, on which the model could be run", hint="pass a circuit of it"
            )
        return find_anatomy(wb, {"input_ids": ids[None]}).graph

    def _check_model(self, wb: Workbench) -> None:
        if wb.weights_identity() != self.identity.get("model weights"):
            raise WorkbenchError("the atlas is of another model", hint="pass the Workbench of the model it was made of")

    def _headvis_rows(self) -> list[dict[str, Any]]:
        current, entropy, distance, squared = self.totals.double() / self.entropies.sum(1).double()
        columns = {
            "self_attention_score": current, "pattern_entropy": entropy, "qk_distance": distance,
            "qk_distance_variance": (squared - distance.square()).clamp_min(0), "copying_score": self.copying.double(),
        }  # fmt: skip
        columns |= {name: self.scores[SCORES.index(score)] for name, score in _IN_HEADVIS.items()}
        each = {"layer": self.layers, "head": self.numbers} | {name: columns[name].tolist() for name in MEANINGS}
        return [dict(zip(each, row, strict=True)) for row in zip(*each.values(), strict=True)]

    def __repr__(self) -> str:
        best = ", ".join(f"{name} L{one[0]}H{one[1]}" for name in SCORES for one in self.leading(name, 1))
        state = "" if self.complete else ", not whole"
        unknown = f", {self.n_unknown / self.n_tokens:.0%} of them unknown" if self.n_unknown else ""
        return f"CorpusAtlas({len(self.layers)} heads, {self.n_tokens:,} tokens{unknown}{state}; {best})"


class CorpusAtlasInterrupted(KeyboardInterrupt):
    """Ctrl-C during `head_atlas_over`. `partial` holds what is done; save it, and pass its path as `resume`."""

    def __init__(self, partial: CorpusAtlas | None, path: Path | None) -> None:
        self.partial = partial
        where = f"it is in {path}" if path else "keep it with error.partial.save(path)"
        done = "nothing is done" if partial is None else f"{partial.n_tokens:,} tokens are done; {where}"
        super().__init__(f"{done}, and go on with resume=path")
