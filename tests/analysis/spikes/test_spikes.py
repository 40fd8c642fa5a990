"""Spikes are counted neuron by neuron, operations weight by weight, and both come back from files and in views."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.judges import judges, missing
from workbench import SpikeActivity, WorkbenchError, spike_activity
from workbench.mechanisms import Place
from workbench.mechanisms.spikformer import Leaky, Spikformer

PLACE = Place(16, 2, 12, causal=False, grid=(3, 4))


class _Two(nn.Module):
    """Four neurons that are driven as they are told, and a layer that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.neurons, self.read = Leaky(), nn.Linear(4, 3, bias=False)
        self.conv = nn.Conv2d(1, 2, 2, padding=1, bias=False)

    def forward(self, current: Tensor) -> Tensor:
        spikes = self.neurons(current)
        self.conv(current[:, :1])
        out: Tensor = self.read(spikes)
        return out


def _driven() -> Tensor:
    """[example 2, step 4, neuron 4]: silent, every second step, every step, and in the second example alone."""
    one = torch.tensor([0.5, 1.5, 2.0, 0.0]).expand(4, 4)
    other = torch.tensor([0.5, 1.5, 2.0, 2.0]).expand(4, 4)
    return torch.stack((one, other))


def test_counts_are_those_of_hand() -> None:
    found = spike_activity(_Two(), [_driven()[:1], _driven()[1:]])
    assert found.populations == ("neurons",)
    assert (found.neurons, found.steps, found.examples) == ((4,), 4, 2)
    torch.testing.assert_close(found.rate, torch.tensor([[1.5, 2.5, 1.5, 2.5]], dtype=torch.float64) / 4)
    assert found.dead.tolist() == [0.25]
    assert found.saturated.tolist() == [0.25]
    assert found.of("neurons").tolist() == [[0, 0, 1, 0], [0, 1, 1, 0]] * 2
    by_name = dict(zip(found.layers, range(2), strict=True))
    read, conv = by_name["read"], by_name["conv"]
    assert found.whole[read]
    assert not found.whole[conv]
    spikes = (2 + 4) + (2 + 4 + 4)  # of both examples
    assert float(found.additions[read]) == spikes * 3 / 2
    assert float(found.products[read]) == 4 * 4 * 3
    # Each number of [1, 1, 4] images meets a 2 × 2 kernel at every place around it, of both outputs.
    assert float(found.products[conv]) == 4 * 4 * 2
    assert float(found.energy[read]) == pytest.approx(spikes * 3 / 2 * 0.9)
    assert float(found.energy[conv]) == pytest.approx(32 * 4.6)
    assert float(found.dense_energy[read]) == pytest.approx(4 * 3 * 4.6)


class _Again(_Two):
    """Calls its neurons twice, and its layer by name."""

    def forward(self, current: Tensor) -> Tensor:
        self.neurons(current)
        self.conv(current[:, :1])
        out: Tensor = self.read(input=self.neurons(current))
        return out


def test_neurons_that_are_called_twice_fire_for_each_example_once() -> None:
    once, twice = (spike_activity(model, _driven().split(1)) for model in (_Two(), _Again()))
    assert twice.examples == 2
    for name in ("rate", "dead", "saturated", "additions", "products"):
        assert torch.equal(getattr(twice, name), getattr(once, name)), name


def test_an_image_alone_is_a_batch_of_one() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neurons, self.conv = Leaky(), nn.Conv2d(2, 3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            self.neurons(x)
            return self.conv(x.mean(1).unflatten(-1, (4, 5)))

    found = spike_activity(Alone(), [torch.rand(2, 4, 20)])
    assert found.products.tolist() == [3 * 2 * 9 * 2 * 3 / 2]  # outputs, channels, kernel, places; of two examples


@pytest.fixture(scope="module")
def activity() -> SpikeActivity:
    torch.manual_seed(0)
    model = Spikformer(PLACE, n_classes=5, layers=1, steps=3).eval()
    return spike_activity(model, [torch.rand(2, 3, 12, 16)], shown=8)


def test_a_spiking_transformer_adds_and_its_first_layer_multiplies(activity: SpikeActivity) -> None:
    assert len(activity.populations) == 6 + 5 + 2
    assert dict(zip(activity.layers, activity.whole, strict=True))["stem.halving.0.conv"] is False
    inner = [whole for name, whole in zip(activity.layers, activity.whole, strict=True) if name.startswith("blocks")]
    assert all(inner)
    assert len(inner) == 6
    assert all(0 <= float(rate.min()) <= float(rate.max()) <= 1 for rate in activity.rate)
    assert activity.of("blocks.0.attention.asks").shape == (3, 8)
    assert "3 steps, 2 examples" in repr(activity)
    assert activity.table.population.tolist() == list(activity.populations)
    assert activity.operations.picojoules.sum() == pytest.approx(float(activity.energy.sum()))


def test_it_comes_back_from_a_file_and_is_shown(activity: SpikeActivity, tmp_path: Path) -> None:
    again = SpikeActivity.load(activity.save(tmp_path / "spikes.safetensors"))
    assert again.table.equals(activity.table)
    assert torch.equal(again.of("blocks.0.attention.fires"), activity.of("blocks.0.attention.fires"))
    page = Path(activity.to_html(tmp_path / "spikes.html")).read_text()
    for title in ("Spike raster", "Energy, estimated", "neurons never fired"):
        assert title in page
    assert len(activity.to_png()) > 1000


def test_steps_of_spikingjelly_come_first() -> None:
    try:
        with judges():
            from spikingjelly.activation_based import neuron
    except ImportError as error:
        missing(error)
    node = neuron.LIFNode(tau=2.0, step_mode="m")
    theirs = spike_activity(nn.Sequential(node), [_driven().transpose(0, 1)])
    ours = spike_activity(nn.Sequential(Leaky()), [_driven()])
    assert torch.equal(theirs.rate, ours.rate)
    assert torch.equal(theirs.raster["0"], ours.raster["0"])


def test_what_does_not_fire_is_named() -> None:
    with pytest.raises(WorkbenchError, match="no spiking neurons"):
        spike_activity(nn.Linear(2, 2), [])
    with pytest.raises(WorkbenchError, match="no neurons have run"):
        spike_activity(nn.Sequential(Leaky()), [])
    with pytest.raises(WorkbenchError, match="and had"):
        spike_activity(nn.Sequential(Leaky()), [_driven(), _driven()[:, :2]])

    class Loud(Leaky):
        def forward(self, current: Tensor) -> Tensor:
            return 2 * super().forward(current)

    with pytest.raises(WorkbenchError, match="other numbers than zeros and ones"):
        spike_activity(nn.Sequential(Loud()), [_driven()])
    with workbench.attach(Spikformer(PLACE, n_classes=2).eval()) as wb:
        found = spike_activity(wb, [torch.rand(1, 3, 12, 16)])
    with pytest.raises(WorkbenchError, match='no neurons "asks"'):
        found.of("asks")
