"""Which models are trained, in the order of their worth: where time is short, what is missing is at the end."""

from __future__ import annotations

from dataclasses import dataclass

from workbench import mechanisms
from workbench.mechanisms.deconstructed import laid_out
from workbench.mechanisms.training.work import LAYERS, size_of, width_for

PLAIN = "sqa:mha"
STEPS, ROWS = {"text": 800, "images": 800}, {"text": 16, "images": 32}
FORMS = ("mlp", "keys", "random", "embedding", "text", "taylor")


@dataclass(frozen=True)
class Model:
    """One to be trained.

    Attributes:
        work: "text" or "images". name: of the mechanism, with its variant.
        layout: which layers stay plain attention.
        mlp: whether there are MLPs, as wide as makes the model as large as one of plain attention.
    """

    work: str
    name: str
    layout: str = "uniform"
    mlp: bool = True

    @property
    def layers(self) -> list[str]:
        """The mechanism of each layer."""
        return laid_out(self.name, self.layout, LAYERS[self.work], PLAIN)

    @property
    def hidden(self) -> int:
        """Width of the MLPs."""
        plain = [PLAIN] * LAYERS[self.work]
        return width_for(self.work, self.layers, size_of(self.work, plain)) if self.mlp else 0

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """What tells it from others, as a run is kept with it."""
        return self.work, self.name, self.layout, self.mlp

    def __str__(self) -> str:
        notes = [] if self.layout == "uniform" else [f"{self.layout} layers plain"]
        notes += [] if self.mlp else ["no MLP"]
        return " ".join([self.name, *(f"({note})" for note in notes)])


def text(*names: str) -> list[Model]:
    return [Model("text", name) for name in names]


def images(*names: str, mlp: bool = True) -> list[Model]:
    return [Model("images", name, mlp=mlp) for name in names]


HYBRIDS = [Model("text", f"deconstructed:{form}", "even") for form in FORMS]
# What a claim compares beside the rooms themselves.
PARTNERS = [
    *text("deconstructed:mlp", "sqa:gqa", "moh:half", "long_lora:unshifted", "rcmha:relative", "s2:one dense head"),
    *images("halo:window"),
    *images("reduced:original", "reduced:shared", "reduced:minimal", mlp=False),
    *text("routing:local alone", *(f"deconstructed:{form}" for form in FORMS[1:5]), "sqa:ssqa", "sqa:xsqa"),
]
FIRST = [
    *text(PLAIN), *images(PLAIN), *text("moh", "deconstructed", "aaren"), *images("agent"), *text("s2", "sqa"),
    *images("halo", "reduced"), *text("long_lora", "rcmha", "routing"), *images("moh"), *text("sink_lora", "reduced"),
]  # fmt: skip
REPEATED = [
    *text(PLAIN), *images(PLAIN, "agent"), *text("aaren", "sqa", "sqa:gqa", "moh", "moh:half", "s2"),
    *images("reduced:original", mlp=False), *text("rcmha", "rcmha:relative", "deconstructed:mlp", "long_lora"),
]  # fmt: skip
SHIPPED_VARIANTS = {PLAIN, "deconstructed:mlp", "s2:one dense head"}


def plan() -> list[tuple[Model, int]]:
    """All models and seeds, the most valuable first.

    Every room that can stand in a work is there once; what claims compare comes next, then further seeds.
    """
    rooms = FIRST + [each for each in standing() if each not in FIRST]
    order = [(each, 0) for each in rooms] + [(each, 0) for each in PARTNERS]
    order += [(each, 1) for each in REPEATED] + [(each, 0) for each in HYBRIDS]
    order += [(each, 2) for each in REPEATED] + [(each, 1) for each in PARTNERS if each not in REPEATED]
    return order


def standing() -> list[Model]:
    """Every room with the works that it can stand in."""
    found = []
    for room in mechanisms.list():
        if room.inputs is not None:  # it is given more than what these models have
            continue
        causal, grid = room.card.causal, room.card.grid
        if causal != "never" and not grid:
            found.append(Model("text", room.name))
        if grid or causal == "never":
            found.append(Model("images", room.name))
    return found


def ships(model: Model) -> bool:
    """Whether the model of seed 0 is shipped: one for each room and work, and variants that are looked at beside it."""
    return model.layout == "uniform" and model.mlp and (":" not in model.name or model.name in SHIPPED_VARIANTS)
