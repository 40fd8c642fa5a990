"""`spike_activity`: runs a spiking model and counts, layer by layer, while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.analysis.spikes.result import SpikeActivity
from workbench.errors import WorkbenchError, expect
from workbench.hooks.changes import Changes
from workbench.kernels.checks import check_range
from workbench.session.workbench import Workbench
from workbench.storage.provenance import describe
from workbench.storage.weights import latest_hash

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@dataclass
class _Population:
    """Counts of one module of neurons.

    Attributes:
        ran: examples that it has fired for, each as often as it was called. examples: each once.
        called: whether it was called in this forward already.
    """

    name: str
    axis: int
    spikes: Tensor | None = None  # [step, neuron]
    raster: Tensor | None = None
    ran: int = 0
    examples: int = 0
    called: bool = False

    def count(self, given: Any, shown: int) -> None:
        made = given[0] if isinstance(given, tuple) else given
        if not isinstance(made, Tensor) or made.dim() < 3:
            raise WorkbenchError(f"{self.name} gives no spikes of several steps", hint="run it over all steps at once")
        made = made.detach().movedim(self.axis, 0).flatten(2)  # [step, batch, neuron]
        if bool(((made != 0) & (made != 1)).any()):
            raise WorkbenchError(f"{self.name} gives other numbers than zeros and ones: it does not fire")
        total = made.double().sum(1)
        if self.spikes is None:
            at = torch.linspace(0, made.shape[2] - 1, min(shown, made.shape[2])).round().long().to(made.device)
            self.spikes, self.raster = total, made[:, 0, at].to(torch.uint8)
        elif self.spikes.shape != total.shape:
            raise WorkbenchError(
                f"{self.name} has {list(total.shape)} steps and neurons, and had {list(self.spikes.shape)}",
                hint="inputs of one size",
            )
        else:
            self.spikes = self.spikes + total
        self.ran += made.shape[1]
        self.examples += 0 if self.called else made.shape[1]
        self.called = True


@dataclass
class _Layer:
    """Operations of one linear or convolutional module."""

    name: str
    whole: bool = True
    additions: float = 0.0
    products: float = 0.0

    def count(self, module: Any, x: Tensor) -> None:
        x = x.detach().double()
        x = x[None] if x.dim() < module.weight.dim() else x  # one example, without an axis of them
        self.whole &= bool((x == x.round()).all()) and bool((x >= 0).all())
        self.additions += float(_met(module, x.abs()).sum())
        self.products += float(_met(module, torch.ones_like(x[:1])).sum()) * len(x)


def _met(module: Any, x: Tensor) -> Tensor:
    """What a layer gives of x whose weights are all one: each number counts once for each weight that it meets."""
    ones = torch.ones_like(module.weight, dtype=x.dtype)
    if isinstance(module, nn.Linear):
        return x.sum(-1) * module.out_features
    convolve = next(one for kind, one in _CONVOLUTIONS.items() if isinstance(module, kind))
    return convolve(x, ones, None, module.stride, module.padding, module.dilation, module.groups)


def _step_axis(module: nn.Module) -> int | None:
    """Where steps lie in what neurons give; None of modules that are none.

    Neurons of this package say it; spikingjelly's, which have a threshold of their potential v, have steps first.
    """
    own = getattr(module, "step_axis", None)
    if isinstance(own, int) and hasattr(module, "threshold"):
        return own
    return 0 if hasattr(module, "v_threshold") and hasattr(module, "surrogate_function") else None


def spike_activity(
    model: nn.Module | Workbench, batches: Iterable[Mapping[str, Any] | Tensor], *, shown: int = 64
) -> SpikeActivity:
    """Count the spikes of a model's neurons, and what its layers do with them.

    Neurons are modules that fire over several steps at once: `workbench.mechanisms.spikformer.Leaky`, and those of
    spikingjelly in multi-step mode. Of linear and convolutional layers that are given whole numbers, spikes or sums of
    them, an addition is counted for each spike and each weight that it meets; of others a product for each number.

    Args:
        model: in evaluation mode; neurons that keep their potential have to be set back by the model itself.
        batches: inputs, by name or a tensor alone, of one size.
        shown: neurons of each population in the raster.

    Raises:
        WorkbenchError: no neurons, no batches, or neurons that give other numbers than zeros and ones.

    >>> from workbench.mechanisms import Place
    >>> from workbench.mechanisms.spikformer import Spikformer
    >>> model = Spikformer(Place(16, 2, 9, causal=False, grid=(3, 3)), n_classes=2, layers=1).eval()
    >>> spike_activity(model, [torch.rand(2, 3, 12, 12)]).steps
    4
    """
    check_range("shown", shown, 1, None)
    model = model.model if isinstance(model, Workbench) else model
    expect(nn.Module, model=model)
    axes = {name: axis for name, module in model.named_modules() if (axis := _step_axis(module)) is not None}
    if not axes:
        raise WorkbenchError(
            "the model has no spiking neurons", hint="such as mechanisms.spikformer.Leaky, or those of spikingjelly"
        )
    populations = {name: _Population(name, axis) for name, axis in axes.items()}
    kinds = (nn.Linear, *_CONVOLUTIONS)
    layers = {name: _Layer(name) for name, module in model.named_modules() if isinstance(module, kinds)}
    modules = dict(model.named_modules())
    with Changes() as changes, torch.no_grad():
        for name, population in populations.items():

            def fired(module: nn.Module, given: Any, made: Any, population: _Population = population) -> None:
                population.count(made, shown)

            changes.after(modules[name], fired)
        for name, layer in layers.items():

            def ran(module: nn.Module, given: Any, named: dict[str, Any], layer: _Layer = layer) -> None:
                layer.count(module, given[0] if given else named["input"])

            changes.before(modules[name], ran, with_kwargs=True)
        for batch in batches:
            for population in populations.values():
                population.called = False
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    seen = [one for one in populations.values() if one.spikes is not None]
    if not seen:
        raise WorkbenchError("no neurons have run", hint="pass at least one batch")
    steps = {len(one.spikes) for one in seen if one.spikes is not None}
    if len(steps) > 1:
        raise WorkbenchError(f"neurons run over {' and '.join(map(str, sorted(steps)))} steps", hint="the same for all")
    return _result(
        seen,
        [one for one in layers.values() if one.products],
        describe(model) | {"weights_sha256": latest_hash(model)},
    )


def _result(populations: list[_Population], layers: list[_Layer], provenance: dict[str, Any]) -> SpikeActivity:
    counts = [one.spikes.cpu() for one in populations if one.spikes is not None]
    most = [len(spikes) * one.ran for spikes, one in zip(counts, populations, strict=True)]
    examples = max(one.examples for one in populations)
    return SpikeActivity(
        populations=tuple(one.name for one in populations),
        neurons=tuple(spikes.shape[1] for spikes in counts),
        examples=examples,
        rate=torch.stack([s.mean(1) / one.ran for s, one in zip(counts, populations, strict=True)]),
        dead=torch.stack([(s.sum(0) == 0).double().mean() for s in counts]),
        saturated=torch.stack([(s.sum(0) == n).double().mean() for s, n in zip(counts, most, strict=True)]),
        raster={one.name: one.raster.cpu() for one in populations if one.raster is not None},
        layers=tuple(one.name for one in layers),
        whole=tuple(one.whole for one in layers),
        additions=torch.tensor([one.additions / examples for one in layers], dtype=torch.float64),
        products=torch.tensor([one.products / examples for one in layers], dtype=torch.float64),
        provenance=provenance,
    )
