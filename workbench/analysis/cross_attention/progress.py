"""How a comparison goes on from a file after an interruption: what is kept of the examples that are done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from jaxtyping import Float
from torch import Tensor

from workbench.analysis.cross_attention.result import Alignment, CrossAttentionSaliency, Drawn
from workbench.storage.result import Result
from workbench.sweep.inputs import check_resumed

if TYPE_CHECKING:
    import pandas as pd

_SAVE_EVERY = 30.0  # seconds


class ComparisonInterrupted(KeyboardInterrupt):
    """Ctrl-C during `cross_attention_saliency`.

    Attributes:
        partial: the result of the examples that are done, or None if none is.
    """

    def __init__(self, partial: CrossAttentionSaliency | None, total: int, path: Path | None) -> None:
        self.partial = partial
        where = f"all that was done is in {path}; go on with resume=path" if path else "error.partial has their result"
        super().__init__(f"{partial.n_utterances if partial else 0} of {total} utterances are done; {where}")


class _Example(TypedDict):
    name: str
    hypothesis: str
    reference: str | None
    reference_words: int
    aggregates: dict[str, tuple[str, int | None, int | None]]
    alignment_heads: tuple[tuple[int, int], ...]
    attention_cells: tuple[Float[Tensor, " cell"] | None, ...]
    saliency_cells: tuple[Float[Tensor, " cell"] | None, ...]
    correlations: Float[Tensor, "aggregate saliency measure"]
    between: Float[Tensor, " measure"]
    undefined: tuple[str, ...]
    alignment: Annotated[dict[str, Any], Alignment]
    curves: Float[Tensor, "order 2 step score"]
    sizes: Float[Tensor, "order threshold"]
    drawn: Annotated[dict[str, Any], Drawn] | None


@dataclass(frozen=True, repr=False)
class ComparisonProgress(Result):
    """What is done of a comparison.

    Attributes:
        identity: what a comparison must share with this one to go on from it; plain values.
        examples: per example, in order, what `study.compare` gives and what belongs to it.
        provenance: of the model.
    """

    form = "workbench.cross_attention_progress"

    identity: dict[str, Any]
    examples: tuple[Annotated[dict[str, Any], _Example], ...]
    provenance: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row per example that is done: what the model said, and what was said."""
        import pandas as pd

        names = ("name", "hypothesis", "reference")
        return pd.DataFrame([{key: one[key] for key in names} for one in self.examples], columns=list(names))

    def __repr__(self) -> str:
        return f"ComparisonProgress({len(self.examples)} utterances are done)"


class Kept:
    """The examples that are done, and the file that they go to, if there is one.

    Beside it stand files of the masks of the example that is under way; they go when the example is in the file.

    Raises:
        FormatError: the file is none of a comparison, or of another one.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], provenance: dict[str, Any]) -> None:
        self.path, self.identity, self.provenance = path, identity, provenance
        self.examples: list[dict[str, Any]] = []
        self._saved = time.monotonic()
        if path is None:
            return
        if path.exists():
            held = ComparisonProgress.load(path)
            check_resumed(held.identity, identity, path.name, "comparison")
            self.examples = list(held.examples)

    def masks_file(self, i: int, where: str) -> Path | None:
        """Where the masks of example i at "input" or "encoder" are kept while they run."""
        return None if self.path is None else self.path.with_name(f"{self.path.name}.{i}.{where}")

    def add(self, example: dict[str, Any], *, last: bool) -> None:
        """Keep an example, and write the file if the last time was a while ago."""
        self.examples.append(example)
        if last or time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the file; masks of the examples in it are not needed any more."""
        if self.path is None:
            return
        ComparisonProgress(self.identity, tuple(self.examples), self.provenance).save(self.path)
        self._saved = time.monotonic()
        for i in range(len(self.examples)):
            for where in ("input", "encoder"):
                self.path.with_name(f"{self.path.name}.{i}.{where}").unlink(missing_ok=True)
