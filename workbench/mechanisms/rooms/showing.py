"""`room` and `show`: a mechanism with all that was measured of it, for a notebook and for the gallery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.mechanisms.frame import Card, Mechanism, listed, named
from workbench.mechanisms.rooms.costs import Cost, cost_of
from workbench.mechanisms.rooms.seen import Seen, see, work_of
from workbench.mechanisms.rooms.studied import SeenStudy, see_study
from workbench.mechanisms.studies import file_of as study_of
from workbench.mechanisms.studies import studied, studies
from workbench.mechanisms.training import TrainedModel, trained
from workbench.mechanisms.training.shipped import file_of, read_runs
from workbench.mechanisms.training.work import SHOWN
from workbench.storage.rendering import need_notebook, renderer

PLAIN = "sqa:mha"
"""Plain attention, which all are held against."""


@dataclass(frozen=True, eq=False)
class Room:
    """A mechanism, or a variant of one, with what was measured of it.

    Attributes:
        name: with the variant behind a colon. mechanism: what it is.
        seen: its models, text before images; of a mechanism without shipped weights one with random weights.
        study: its model of data of its own; None where there is none.
        cost: time and memory by length; None where it was not measured.
        plain: by work, the (step, loss) of plain attention.
    """

    name: str
    mechanism: Mechanism
    seen: tuple[Seen, ...]
    cost: Cost | None = None
    plain: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    study: SeenStudy | None = None

    @property
    def card(self) -> Card:
        """What it is, and where its claims stand."""
        return self.mechanism.card

    @property
    def title(self) -> str:
        """What it is called in its paper."""
        variant = self.name.partition(":")[2]
        if self.name == PLAIN:
            return f"plain attention, a limit of {self.card.title}"
        return f"{self.card.title}{variant and f', {variant}'}"

    @property
    def standing(self) -> str:
        """Where the claims of its paper stand, counted; "" of a variant, since they are of the mechanism."""
        if ":" in self.name:
            return ""
        outcomes = [claim.outcome for claim in self.card.claims]
        return ", ".join(f"{outcomes.count(each)} {each}" for each in dict.fromkeys(outcomes))

    @property
    def is_trained(self) -> bool:
        """Whether what is shown are heads of a trained model."""
        return self.study is not None or any(each.trained is not None for each in self.seen)

    def show(self) -> None:
        """Display all views in a notebook, below each other.

        Raises:
            ReportError: there is no notebook.
        """
        need_notebook("write a page: room(name).to_html('room.html')")
        for view in renderer().all_of(self):
            view.show()

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """The views as one self-contained page: its text, or its path when one is given."""
        return renderer().page_of(self, path)

    def _ipython_display_(self) -> None:
        self.show()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return renderer().of(self)._repr_mimebundle_(include, exclude)

    def __repr__(self) -> str:
        works = [f"{each.work}{'' if each.trained else ', random weights'}" for each in self.seen]
        models = ", ".join(works + ([] if self.study is None else [self.study.studied.study.work]))
        return f"Room({self.name}: {self.card.title}; {models})"


def names() -> list[str]:
    """Every mechanism by name, and variants whose weights are shipped; plain attention first."""
    forms = {run["name"] for run in read_runs() if file_of(run["name"], run["work"]).is_file()}
    return [PLAIN, *sorted({*listed().names, *forms} - {PLAIN})]


def room(name: str, models: Mapping[str, TrainedModel] | None = None) -> Room:
    """A mechanism with what was measured of it.

    Args:
        name: of the mechanism, with a variant behind a colon: "moh", "sqa:mha".
        models: by work, "text" or "images", models of your own in the place of those that are shipped.

    Raises:
        WorkbenchError: no such mechanism, variant or work.
    """
    mechanism, _ = named(name)
    given = {work: trained(name, work) for work in SHOWN if file_of(name, work).is_file()}
    given |= models or {}
    for work, model in given.items():
        if work not in SHOWN:
            raise WorkbenchError(f"models={work!r} is no work", hint=" or ".join(SHOWN))
        if not isinstance(model, TrainedModel):
            raise WorkbenchError(
                f"models[{work!r}] is {type(model).__name__}", hint="a mechanisms.training.TrainedModel"
            )
    works = [work for work in SHOWN if work in given]
    seen = [see(mechanism, name, work, given[work]) for work in works]
    study = see_study(studied(name)) if name in studies() and study_of(name).is_file() else None
    if not seen and study is None:
        seen = [see(mechanism, name, work_of(mechanism, name))]
    return Room(
        name,
        mechanism,
        tuple(seen),
        cost_of(name),
        {work: losses_of(trained(PLAIN, work)) for work in works if file_of(PLAIN, work).is_file()},
        study,
    )


def show(name: str, models: Mapping[str, TrainedModel] | None = None) -> None:
    """Show a mechanism in a notebook: its card, trained heads on the input that all mechanisms are shown, which of them
    matter, how far they look, what is its own, how training went beside plain attention, and what it costs.

    Args:
        name, models: as of `room`.

    Raises:
        WorkbenchError: as of `room`. ReportError: there is no notebook; `room(name).to_html(path)` writes a page.
    """
    named(name)
    need_notebook(f"write a page: mechanisms.room({name!r}).to_html('room.html')")  # before anything is measured
    room(name, models).show()


def losses_of(found: TrainedModel) -> tuple[tuple[int, float], ...]:
    """(step, loss) of a model's training."""
    return tuple((int(step), float(loss)) for step, loss in found.facts["losses"])
