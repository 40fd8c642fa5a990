"""What a sweep gives, whole or interrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxtyping import Bool, Float
from torch import Tensor

from workbench.counting import count
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Sweep(Result):
    """What each variant of a model scores on each example.

    Attributes:
        variants: their labels. metrics: names.
        values: [variant, metric, example], float64; NaN where the sweep has not been yet.
        clean: [metric, example] of the model as it is (with the sweep's `base`).
        done: [variant, batch], True where it has been. batch_sizes: examples in each batch.
        mode: "resumed", from the first edited block on; or "full", with `reason` why.
        batched: whether variants ran side by side.
        identity: what a file must share to be gone on from.
    """

    form = "workbench.sweep"

    variants: Annotated[tuple[str, ...], "variant"]
    metrics: Annotated[tuple[str, ...], "metric"]
    values: Float[Tensor, "variant metric example"]
    clean: Float[Tensor, "metric example"]
    done: Bool[Tensor, "variant batch"]
    batch_sizes: Annotated[tuple[int, ...], "batch"]
    mode: str
    reason: str
    batched: bool
    identity: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether every variant has been run on every batch."""
        return bool(self.done.all())

    @property
    def effects(self) -> Tensor:
        """[variant, metric, example]: the variant's value minus that of the model as it is."""
        return self.values - self.clean

    @property
    def table(self) -> pd.DataFrame:
        """One row per variant and metric: means over the examples that are done."""
        import pandas as pd

        rows = [
            {
                "variant": label,
                "metric": metric,
                "value": float(self.values[i, j].nanmean()),
                "clean": float(self.clean[j].nanmean()),
                "effect": float(self.effects[i, j].nanmean()),
            }
            for i, label in enumerate(self.variants)
            for j, metric in enumerate(self.metrics)
        ]
        return pd.DataFrame(rows, columns=["variant", "metric", "value", "clean", "effect"])

    def __repr__(self) -> str:
        done = "" if self.complete else f", {int(self.done.sum())} of {self.done.numel()} done"
        return (
            f"Sweep({count(len(self.variants), 'variant')}, {count(sum(self.batch_sizes), 'example')}, "
            f"{', '.join(self.metrics)}; {self.mode}{done})"
        )


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep. `partial` holds what is done; save it, and pass its path as `resume` to go on."""

    def __init__(self, partial: Sweep, path: Path | None) -> None:
        self.partial = partial
        where = f"it is in {path}" if path else "keep it with error.partial.save(path)"
        done = f"{int(partial.done.sum())} of {partial.done.numel()} runs are done"
        super().__init__(f"{done}; {where}, and go on with resume=path")
