"""One model of a mechanism, looked at: its maps on the input that all share, which heads matter, how far they look."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from workbench.analysis.gates import GateProfile, gate_profile
from workbench.analysis.importance import HeadImportance, head_importance
from workbench.analysis.profile import AttentionProfile, attention_profile
from workbench.capture.capture import Capture
from workbench.errors import WorkbenchError
from workbench.hooks.sites import Site
from workbench.mechanisms.frame import Mechanism, Signature, named
from workbench.mechanisms.rooms import inputs
from workbench.mechanisms.training import ByteLM, PatchModel, TrainedModel
from workbench.mechanisms.training.work import LAYERS, PLACES, SHOWN
from workbench.session.attaching import attach
from workbench.session.workbench import Workbench

ALONE = "alone"
"""The work of a module that stands in no model: it is shown drawn vectors."""
_STATISTICS = {
    "text": ("entropy", "effective_keys", "distance", "sink", "current", "previous", "induction", "peak"),
    "images": ("entropy", "effective_keys", "current", "peak"),
    ALONE: ("entropy", "effective_keys", "peak"),
}
_ROWS, _FEW = 32, 8  # examples on which heads are ablated, and where there are many
_MANY = 64  # heads in all
T = TypeVar("T")


@dataclass(frozen=True)
class SignatureMaps:
    """The maps of a mechanism's signature in all layers.

    Attributes:
        signature: what they are. maps: [map, row, column]. names, heads, sites: of each, its name, (layer, head), and
            site.
    """

    signature: Signature
    maps: Tensor
    names: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    sites: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Seen:
    """One model of a mechanism, and what was seen of its heads.

    Attributes:
        work: what it does: "text", "images", or "alone", a module by itself.
        model: the model. trained: how it came about; None where its weights are drawn at random.
        capture: on the text, the scenes, or drawn vectors. images: the scenes, [example, 3, row, column], and classes.
        importance: of its heads, by ablation. profile: how far they look, or of gates how large they are and where.
            None where `missing` says why.
        signatures: what is the mechanism's own; () where it has nothing here.
        missing: "importance" and "profile" -> why there is none.
    """

    work: str
    model: nn.Module
    trained: TrainedModel | None
    capture: Capture
    images: tuple[Tensor, Tensor] | None = None
    importance: HeadImportance | None = None
    profile: AttentionProfile | GateProfile | None = None
    signatures: tuple[SignatureMaps, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)


def see(mechanism: Mechanism, name: str, work: str, trained: TrainedModel | None = None) -> Seen:
    """Look at a mechanism's heads.

    Args:
        name: what the model is called. work: "text", "images" or "alone".
        trained: the model; one with random weights if None.

    Raises:
        WorkbenchError: the mechanism cannot do such work.
    """
    model = untrained(mechanism, name, work) if trained is None else trained.model
    called = f"{name}, {'random weights' if trained is None else work}"
    missing: dict[str, str] = {}
    importance = None
    with attach(model, inputs.Characters() if work == "text" else None) as wb:
        capture, images = _captured(mechanism, wb, work)
        if trained is None:
            missing["importance"] = "no trained weights are shipped"
        else:
            importance = _tried(missing, "importance", lambda: _importance(wb, work))
    capture.provenance["model_name"] = called
    if importance is not None:
        importance = replace(importance, provenance=importance.provenance | {"model_name": called})
    grid = (mechanism.places[0] if work == ALONE else PLACES[work]).grid
    profile = _tried(missing, "profile", lambda: _profile(capture, grid))
    own = (_signature(each, model, capture) for each in (mechanism.signature, mechanism.also) if each is not None)
    return Seen(
        work=work, model=model, trained=trained, capture=capture, images=images, importance=importance,
        profile=profile, signatures=tuple(each for each in own if each is not None), missing=missing,
    )  # fmt: skip


def untrained(mechanism: Mechanism, name: str, work: str) -> nn.Module:
    """A model with random weights, always the same: of the size that is trained, or the module alone.

    Raises:
        WorkbenchError: the mechanism cannot stand there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if work == ALONE:
            return mechanism.build(mechanism.places[0], named(name)[1]).eval()
        return (ByteLM if work == "text" else PatchModel)(PLACES[work], [name] * LAYERS[work]).eval()


def work_of(mechanism: Mechanism, name: str) -> str:
    """What a mechanism without shipped weights is shown with: text, else images, else it stands alone."""
    for work in SHOWN:
        with suppress(WorkbenchError):
            untrained(mechanism, name, work)
            return work
    return ALONE


def _captured(mechanism: Mechanism, wb: Workbench, work: str) -> tuple[Capture, tuple[Tensor, Tensor] | None]:
    with torch.no_grad(), wb.capture(_STATISTICS[work]) as capture:
        if work == "text":
            wb.model(inputs.shown_text())
            return capture, None
        if work == ALONE:
            wb.model(**mechanism.example(mechanism.places[0]))
            return capture, None
        scenes = inputs.shown_scenes()
        wb.model(scenes.images)
        return capture, (scenes.images, scenes.classes)


def _importance(wb: Workbench, work: str) -> HeadImportance:
    length = PLACES["text"].length
    rows = _ROWS if sum(site.n_heads or 1 for site in wb.sites) <= _MANY else _FEW
    batches = inputs.text_examples(length, rows) if work == "text" else inputs.scene_examples(rows)
    return head_importance(wb, batches, inputs.LOSS, "zero", resumed=False, progress=False)


def _profile(capture: Capture, grid: tuple[int, int] | None) -> AttentionProfile | GateProfile:
    if all(site.kind == "gate" for site in capture.sites):
        return gate_profile(capture, grid)
    return attention_profile(capture, grid, prefix=None if grid is None else 0)


def _tried(missing: dict[str, str], what: str, find: Callable[[], T]) -> T | None:
    """What is found, or None with the reason in `missing`."""
    try:
        return find()
    except WorkbenchError as error:
        missing[what] = str(error.message)
        return None


def _signature(signature: Signature, model: nn.Module, capture: Capture) -> SignatureMaps | None:
    maps: list[Tensor] = []
    about: list[tuple[str, tuple[int, int], str]] = []
    for site in capture.sites:
        module = _mixer(model, site)
        for name, each in signature.of(module, capture[site.name].pattern).items():
            maps += list(each)
            about += [(name, (site.layer, head), site.name) for head in range(len(each))]
    if not maps:
        return None
    names, heads, sites = (tuple(part) for part in zip(*about, strict=True))
    return SignatureMaps(signature, torch.stack(maps), names, heads, sites)


def _mixer(model: nn.Module, site: Site) -> nn.Module:
    """The mechanism's module that a site is, or is in."""
    blocks: Any = getattr(getattr(model, "stack", None), "blocks", ())
    for number, block in enumerate(blocks):
        if f"{site.name}.".startswith(f"stack.blocks.{number}."):
            mixer: nn.Module = block.mixer
            return mixer
    return model
