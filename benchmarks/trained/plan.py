"""Which models are trained, in the order of their worth: where time is short, what is missing is at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workbench import mechanisms
from workbench.mechanisms.deconstructed import laid_out
from workbench.mechanisms.training.work import LAYERS, SHOWN, size_of, width_for

PLAIN = "sqa:mha"
WIDTH = 192  # of plain attention's MLPs
MOST = 149_000  # parameters of a model that is shipped, of two bytes each
STEPS = {"text": 600, "images": 800, "mqar": 300, "induction": 300, "heads": 600}
ROWS = {"text": 16, "images": 32, "mqar": 24, "induction": 32, "heads": 16}
LARGE = ("van:dense",)  # whose parameters are what is compared
BEHIND = "behind "  # with the name of another mechanism: every second layer is that one, the first among them
WINDOWS = "davit-windows:filled up"  # of 4 × 4 patches
FORMS = ("mlp", "keys", "random", "embedding", "text", "taylor")


@dataclass(frozen=True)
class Model:
    """One to be trained.

    Attributes:
        work: see `run_work`. name: of the mechanism, with its variant.
        layout: which layers stay plain attention, or are another mechanism.
        mlp: whether there are MLPs, as wide as makes the model as large as one of plain attention.
    """

    work: str
    name: str
    layout: str = "uniform"
    mlp: bool = True

    @property
    def layers(self) -> list[str]:
        """The mechanism of each layer."""
        if self.layout.startswith(BEHIND):
            return [(self.layout.removeprefix(BEHIND), self.name)[at % 2] for at in range(LAYERS[self.work])]
        return laid_out(self.name, self.layout, LAYERS[self.work], PLAIN)

    @property
    def hidden(self) -> int:
        """Width of the MLPs: as in plain attention's model where the mechanism alone has more parameters than that, or
        nearly as many.
        """
        plain = [PLAIN] * LAYERS[self.work]
        if not self.mlp:
            return 0
        if self.name in LARGE or size_of(self.work, self.layers, 1) > size_of(self.work, plain):
            return WIDTH
        return width_for(self.work, self.layers, size_of(self.work, plain))

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """What tells it from others, as a run is kept with it."""
        return self.work, self.name, self.layout, self.mlp

    def __str__(self) -> str:
        between = self.layout.startswith(BEHIND)
        notes = [] if self.layout == "uniform" else [self.layout if between else f"{self.layout} layers plain"]
        notes += [] if self.mlp else ["no MLP"]
        return " ".join([self.name, *(f"({note})" for note in notes)])


HYBRIDS = [Model("text", f"deconstructed:{form}", "even") for form in FORMS]
SHIPPED_VARIANTS = {PLAIN, "deconstructed:mlp", "s2:one dense head"}


def plan() -> list[tuple[Model, int]]:
    """All models and seeds, the most valuable first.

    Rooms and, for the spread over seeds, a few models again; then what claims compare, with further seeds of what left
    them undecided first; recall and copying of all rooms; and further seeds of the rest.
    """
    first = [
        *text(PLAIN), *images(PLAIN), *text("moh", "deconstructed:mlp"), *text("aaren"), *images("agent"),
        *text(PLAIN, seed=1), *text("s2"), *text(PLAIN, seed=2), *text("sqa"), *images(PLAIN, seed=1),
        *text("deconstructed"), *images("halo"), *text("long_lora", "rcmha", "routing"),
        *images("reduced:original", mlp=False), *images("agent", seed=1), *text("sqa:gqa", seed=0),
        *images("reduced", "moh"), *text("sink_lora", "reduced"), *text("aaren", "sqa", seed=1),
        *images(PLAIN, seed=2),
    ]  # fmt: skip
    compared = [
        *text("moh:half", "rcmha:relative", "long_lora:unshifted"), *images("halo:window"),
        *images("reduced:shared", "reduced:minimal", mlp=False), *text("s2:one dense head", "routing:local alone"),
        *text("deconstructed:keys", "deconstructed:random", "deconstructed:embedding", "deconstructed:text"),
        *[(each, 0) for each in HYBRIDS],
    ]  # fmt: skip
    reduced = images("reduced:original", "reduced:shared", "reduced:minimal", mlp=False)
    undecided = [
        *recall(PLAIN, "s2:one dense head", "aaren", "s2"), *copies(PLAIN, "aaren"),
        *reduced, *images("halo", "halo:window"),
        *text("moh", "moh:half", "sqa:gqa", "sqa"),
        *text("deconstructed", *(f"deconstructed:{form}" for form in ("random", "embedding", "text", "keys"))),
        *[(each, 0) for each in HYBRIDS],
        *text("routing", "routing:local alone", "long_lora", "long_lora:unshifted", "sink_lora"),
        *images("agent", "reduced", PLAIN), *text("s2", "rcmha", "rcmha:relative", "aaren"),
    ]  # fmt: skip
    vision = [
        *[(Model("images", "davit-channels", BEHIND + before), 0) for before in (WINDOWS, "halo")], *images(WINDOWS),
        *images("s2aformer", "s2aformer:fewer keys", "s2aformer:means"),
        *images("van", "van:convolutions", "van:undilated", "van:dense"),
        (Model("heads", PLAIN), 0), (Model("heads", "moh:most"), 0),
        *images("a2mamba", "a2mamba:scan alone", "a2mamba:attention alone"),
    ]  # fmt: skip
    of_claims = [(model, seed) for some in (undecided, vision) for seed in (0, 1, 2) for model, _ in some]
    rooms = [(each, 0) for each in standing()]
    of_text = [each for each, _ in rooms if each.work == "text"]
    sequences = [(replace(each, work=work), 0) for each in of_text for work in ("mqar", "induction")]
    forms = text("sqa:ssqa", "sqa:xsqa")
    again = [(model, seed) for seed in (1, 2) for model, drawn in first + compared + forms if drawn == 0]
    return list(dict.fromkeys([*first, *rooms, *compared, *of_claims, *sequences, *forms, *again]))


def recall(*names: str) -> list[tuple[Model, int]]:
    """Models that recall alone, to be trained."""
    return [(Model("mqar", name), 0) for name in names]


def copies(*names: str) -> list[tuple[Model, int]]:
    """Models that copy alone, to be trained."""
    return [(Model("induction", name), 0) for name in names]


def text(*names: str, seed: int = 0) -> list[tuple[Model, int]]:
    """Language models to be trained."""
    return [(Model("text", name), seed) for name in names]


def images(*names: str, mlp: bool = True, seed: int = 0) -> list[tuple[Model, int]]:
    """Image models to be trained."""
    return [(Model("images", name, mlp=mlp), seed) for name in names]


def standing() -> list[Model]:
    """Every room with the works that it can stand in."""
    found = []
    for room in mechanisms.list():
        if room.inputs is not None:  # it is given more than what these models have
            continue
        causal, grid = room.card.causal, room.card.grid
        if causal != "never" and not grid and room.card.kind != "gate":  # such a gate mixes nothing
            found.append(Model("text", room.name))
        if grid or causal == "never":
            found.append(Model("images", room.name))
    return found


def ships(model: Model) -> bool:
    """Whether the model of seed 0 is shipped: one for each room and shown work, and variants that are looked at.

    One with more parameters than a file of 300 kB holds is not.
    """
    if model.work not in SHOWN or size_of(model.work, model.layers, model.hidden) > MOST:
        return False
    return model.layout == "uniform" and model.mlp and (":" not in model.name or model.name in SHIPPED_VARIANTS)
