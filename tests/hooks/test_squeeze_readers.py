"""Squeeze-and-excitation of timm, torchvision's form and transformers: gates over channels, to be set and swept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.unavailable import unavailable
from support.vision import timm


def _timm(make: Callable[[Any], nn.Module]) -> nn.Module:
    try:
        return make(timm())
    except ModuleNotFoundError as error:
        unavailable(str(error))


def _efficientnet() -> nn.Module:
    from transformers import EfficientNetConfig
    from transformers.models.efficientnet.modeling_efficientnet import EfficientNetSqueezeExciteLayer

    return EfficientNetSqueezeExciteLayer(EfficientNetConfig(), 12, 12)


def _regnet() -> nn.Module:
    from transformers.models.regnet.modeling_regnet import RegNetSELayer

    return RegNetSELayer(12, 5)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: _timm(lambda t: t.layers.SEModule(12, rd_channels=5)),
    "timm, with the largest": lambda: _timm(lambda t: t.layers.SEModule(12, rd_channels=5, add_maxpool=True)),
    "timm, normalised": lambda: _timm(lambda t: t.layers.SEModule(12, rd_channels=5, norm_layer=nn.BatchNorm2d)),
    "timm, channels last": lambda: _timm(lambda t: t.layers.squeeze_excite.SqueezeExciteCl(12, rd_channels=5)),
    "timm, effective": lambda: _timm(lambda t: t.layers.EffectiveSEModule(12)),
    "timm, EfficientNet": lambda: _timm(lambda t: t.models._efficientnet_blocks.SqueezeExcite(12)),
    "EfficientNet": _efficientnet,
    "RegNet": _regnet,
}


class Image(nn.Module):
    """A convolution, and what is examined."""

    def __init__(self, inner: nn.Module, last: bool) -> None:
        super().__init__()
        self.conv, self.squeeze, self.last = nn.Conv2d(3, 12, 3), inner, last

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.squeeze(y.movedim(1, -1)).movedim(-1, 1) if self.last else self.squeeze(y)


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_factors_of_channels_are_read_and_can_be_set(name: str) -> None:
    torch.manual_seed(0)
    model = Image(MODULES[name](), "last" in name).eval()
    x = torch.randn(2, 3, 9, 7)
    bare, given = model(x), model.conv(x)
    with workbench.attach(model) as wb:
        with wb.capture() as cap:
            assert torch.equal(model(x), bare)
        assert [(site.name, site.kind, site.n_heads) for site in cap.sites] == [("squeeze", "gate", 12)]
        pattern = cap["squeeze"].pattern
        assert pattern.over == ("channel",)
        torch.testing.assert_close(given * pattern.gates[..., :1, None], bare)
        assert float(pattern.gates.std()) > 0
        assert wb.verify(x).ok
        with wb.set_gate("squeeze"):
            torch.testing.assert_close(model(x), given)
        with wb.set_gate({(0, 4)}, to=0.0):
            without = model(x)
    assert not without[:, 4].any()
    torch.testing.assert_close(without[:, 5:], bare[:, 5:])


def test_what_has_only_the_name_is_no_gate() -> None:
    class SEModule(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    with pytest.raises(workbench.AttachError):
        workbench.attach(nn.Sequential(SEModule()))


@torch.no_grad()
def test_a_network_of_timm_has_its_gates_in_order() -> None:
    torch.manual_seed(0)
    model = _timm(lambda t: t.create_model("seresnet18", num_classes=4, zero_init_last=False)).eval()
    x = torch.randn(1, 3, 64, 64)
    bare = model(x)
    with workbench.attach(model) as wb:
        with wb.capture([]) as cap:
            assert torch.equal(model(x), bare)
        assert [site.kind for site in cap.sites] == ["gate"] * 8
        assert [site.n_heads for site in cap.sites] == [64, 64, 128, 128, 256, 256, 512, 512]
        assert wb.verify(x).ok
