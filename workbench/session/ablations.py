"""What ablations put in a head's place: one table for `wb.ablate`, sweeps, importance and circuits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.errors import InterventionError, nearest

Need = Literal["nothing", "reference", "twins"]


@dataclass(frozen=True)
class AblationKind:
    """One way to ablate.

    Attributes:
        name: as `how=` and `ablation=` take it.
        definition: what stands in the place of a head's output z (in circuits, of what any sender writes).
        needs: "nothing"; a "reference", examples that the replacement is made from; or "twins", a task's
            counterfactual prompts.
        singles: whether single examples of the reference are used, which must be held, rather than their sums.
        by_position: whether positions of the reference have to correspond to those of the input.
    """

    name: str
    definition: str
    needs: Need = "nothing"
    singles: bool = False
    by_position: bool = False


ABLATIONS = {
    kind.name: kind
    for kind in (
        AblationKind("zero", "zeros"),
        AblationKind("mean", "the mean over the reference's examples and their real positions", "reference"),
        AblationKind(
            "mean_positional", "the mean over the reference's examples, at each position", "reference", by_position=True
        ),
        AblationKind("resample", "z of another example of the reference", "reference", singles=True, by_position=True),
        AblationKind("counterfactual", "z of the prompt's own twin", "twins", singles=True, by_position=True),
    )
}
"""All ablations by name."""

WITHOUT_TWINS = tuple(name for name, kind in ABLATIONS.items() if kind.needs != "twins")
"""Names of those that need no task with twins."""


def find_ablation(name: object, *, twins: bool = False) -> AblationKind:
    """The ablation of a name.

    Args:
        twins: whether there are twins, so that "counterfactual" is one.

    Raises:
        InterventionError: there is no such ablation.

    >>> find_ablation("mean").needs
    'reference'
    """
    known = tuple(ABLATIONS) if twins else WITHOUT_TWINS
    if name not in known:
        needs = ABLATIONS[str(name)].needs if str(name) in ABLATIONS else ""
        hint = f"it needs {needs}: it is for circuits, of a task" if needs else nearest(str(name), known)
        raise InterventionError(f'there is no ablation "{name}"', hint=hint)
    return ABLATIONS[str(name)]
