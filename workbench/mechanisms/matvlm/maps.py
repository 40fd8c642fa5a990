"""A teacher's maps and its student's, head by head: how alike they are, and which heads found no counterpart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.statistics.intervals import means_t
from workbench.errors import CaptureError
from workbench.kernels.patterns import Pattern
from workbench.kernels.recurrent import RecurrentPattern
from workbench.mechanisms.matvlm.distil import losses
from workbench.mechanisms.matvlm.student import Student
from workbench.session.attaching import attach
from workbench.session.workbench import Workbench
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd

_MEASURES = ("entropy", "distance")


@dataclass(frozen=True, repr=False)
class HybridMaps(Result):
    """The map of each replaced head beside its teacher's, over examples. The student's is |M| normalised per row.

    Attributes:
        layers, numbers, sites: of each head, in the teacher.
        alike: [head, example] cosine of both maps, all rows as one vector.
        others: [head, example] mean cosine of the student's map with those of the layer's other teacher heads; NaN in
            a layer of one head.
        rank: [head, 2, example] effective rank of the teacher's map and of the signed M: exp of the entropy of their
            singular values as shares (Roy and Vetterli 2007).
        entropy, distance: [head, 2, example] means over rows, in nats and positions.
        signed_mass: [head, example] Σ M / Σ |M|, a mean over rows.
        half_life: [head] positions in which the decay halves what is held.
        loss: [layer, example] ‖r − t‖ / ‖t‖ of each replaced layer. loss_sites: its names.
    """

    form = "workbench.hybrid_maps"
    filled = ("head", "layer", "example")

    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    alike: Float[Tensor, "head example"]
    others: Float[Tensor, "head example"]
    rank: Float[Tensor, "head 2 example"]
    entropy: Float[Tensor, "head 2 example"]
    distance: Float[Tensor, "head 2 example"]
    signed_mass: Float[Tensor, "head example"]
    half_life: Float[Tensor, " head"]
    loss_sites: Annotated[tuple[str, ...], "layer"]
    loss: Float[Tensor, "layer example"]
    provenance: dict[str, Any]

    @property
    def beyond(self) -> Tensor:
        """[head, 2] 95 % t intervals of how much more alike a head is to its own teacher than to the others."""
        return means_t((self.alike - self.others).double())

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Heads, such as "L0H3", that are not surely more like their own teacher than like the layer's others.

        In a layer of one head there are no others, and nothing is said of it.
        """
        return tuple(f"L{self.layers[i]}H{self.numbers[i]}" for i, found in enumerate(self._matched) if found is False)

    @property
    def _matched(self) -> list[bool | None]:
        """[head] None in a layer of one head."""
        alone, low = self.others.isnan().all(1).tolist(), self.beyond[:, 0].tolist()
        return [None if no_others else least > 0 for no_others, least in zip(alone, low, strict=True)]

    @property
    def table(self) -> pd.DataFrame:
        """One row per head: means over examples, and the interval of what it has beyond the others."""
        import pandas as pd

        frame: dict[str, Any] = {"layer": self.layers, "head": self.numbers, "site": self.sites}
        frame["cosine"] = self.alike.double().mean(1).numpy()
        frame["low"], frame["high"] = self.beyond.T.numpy()
        for name in ("rank", "entropy", "distance"):
            for i, whose in enumerate(("teacher", "student")):
                frame[f"{name}, {whose}"] = getattr(self, name)[:, i].double().mean(1).numpy()
        frame["signed mass"] = self.signed_mass.double().mean(1).numpy()
        frame["half-life"] = self.half_life.double().numpy()
        frame["matched"] = self._matched
        return pd.DataFrame(frame)

    @property
    def losses(self) -> pd.DataFrame:
        """One row per replaced layer: its loss, and the 95 % t interval over examples."""
        import pandas as pd

        ends = means_t(self.loss.double())
        return pd.DataFrame(
            {
                "site": self.loss_sites,
                "loss": self.loss.double().mean(1).numpy(),
                "low": ends[:, 0].numpy(),
                "high": ends[:, 1].numpy(),
            }
        )

    def __repr__(self) -> str:
        named = ", ".join(self.unmatched[:8]) + (", …" if len(self.unmatched) > 8 else "")
        said = f"; {len(self.unmatched)} unmatched: {named}" if self.unmatched else ""
        return (
            f"HybridMaps({len(self.numbers)} heads of {len(self.loss_sites)} layers, {self.alike.shape[1]} examples, "
            f"mean cosine {float(self.alike.mean()):.3f}{said})"
        )


def hybrid_maps(wb: Workbench, student: Student, batches: Iterable[Mapping[str, Any]]) -> HybridMaps:
    """Compare the maps of a teacher and its student on the same inputs, of every head that was replaced.

    The student's head h began with the weights of the teacher's head h, so that they are compared with each other. A
    head whose map is not more like its own teacher's than like those of the layer's other heads, surely at 95 %, is
    named as unmatched: it does something else now.

    Args:
        wb: attached to the teacher.
        batches: model inputs, rows of one length without padding; every row is an example.

    Raises:
        CaptureError: fewer than two examples, or a student without new layers.
    """
    if not student.replaced:
        raise CaptureError("the student has no layer of its own to compare")
    rows: list[Tensor] = []  # [head, 9] of each example
    half_lives: list[Tensor] = []
    by_layer: list[Tensor] = []
    heads: list[tuple[int, int, str]] = []
    own = attach(student.model)
    try:
        for row in _rows(batches):
            with torch.inference_mode(mode=False), torch.no_grad():
                with wb.capture((), list(student.replaced), limit=None) as before:
                    wb.model(**row, use_cache=False)
                with own.capture((), [f"{name}.mixer" for name in student.replaced], limit=None) as after:
                    student(**row, use_cache=False)
                found, sizes = losses(wb.model, student, row)
            by_layer.append((found.layers / sizes).cpu())
            parts, lives = [], []
            for name in student.replaced:
                site, new = before[name], after[f"{name}.mixer"]
                pattern = new.pattern
                assert isinstance(pattern, RecurrentPattern)
                parts.append(_compared(site.pattern, pattern))
                lives.append(pattern.half_life[0, :, 0].cpu())
                if len(rows) == 0:
                    heads += [(site.site.layer, head, name) for head in range(pattern.n_heads)]
            rows.append(torch.cat(parts))
            half_lives.append(torch.cat(lives))
    finally:
        own.detach()
    if len(rows) < 2:
        raise CaptureError(f"{len(rows)} examples have no interval", hint="pass two rows or more")
    whole = torch.stack(rows, dim=-1).float()  # [head, 9, example]
    alike, others, mass = whole[:, 0], whole[:, 1], whole[:, 8]
    layers, numbers, sites = zip(*heads, strict=True)
    return HybridMaps(
        layers, numbers, sites, alike, others, whole[:, 2:4], whole[:, 4:6], whole[:, 6:8], mass,
        torch.stack(half_lives).mean(0).float(), student.replaced, torch.stack(by_layer, dim=1).float(),
        wb.provenance(),
    )  # fmt: skip


def _rows(batches: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Each example as inputs of its own."""
    for batch in batches:
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        for i in range(len(next(iter(tensors.values())))):
            yield {**batch, **{name: t[i : i + 1] for name, t in tensors.items()}}


def _compared(teacher: Pattern, student: RecurrentPattern) -> Tensor:
    """[head, 9] of one example: see `hybrid_maps` for the order."""
    a, signed = teacher.dense()[0].double(), student.dense()[0].double()
    m = student.magnitude().dense()[0].double()
    unit_a, unit_m = (torch.nn.functional.normalize(t.flatten(1), dim=-1) for t in (a, m))
    cosines = unit_m @ unit_a.T  # [student's head, teacher's]
    n_heads = len(cosines)
    own = cosines.diagonal()
    others = (cosines.sum(1) - own) / (n_heads - 1) if n_heads > 1 else torch.full_like(own, torch.nan)
    ranks = [_rank(t) for t in (a, signed)]
    measured = [pattern.statistics(_MEASURES) for pattern in (teacher, student)]
    means = [found[name][0].double().nanmean(-1) for name in _MEASURES for found in measured]
    mass = student.signed_mass[0].double().nanmean(-1)
    return torch.stack([own, others, *ranks, *means, mass], dim=-1).cpu()


def _rank(maps: Tensor) -> Tensor:
    """[head] effective rank."""
    values = torch.linalg.svdvals(maps)
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()
