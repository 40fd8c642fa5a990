"""Adapters: of a model that has several, the one that acts is a part of what it is. A stand-in has peft's shape."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.tiny import small_llama, some_ids
from workbench import AttachError, CaptureError
from workbench.storage.weights import weights_hash


class Lora(nn.Module):
    """A linear layer with adapters beside it, and the switches of peft's `LoraLayer`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, 2, bias=False) for name in "ab"})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, base.out_features, bias=False) for name in "ab"})
        self._active_adapter, self._disable_adapters, self.merged_adapters = ["a"], False, list[str]()
        self.scaling = {"a": 2.0, "b": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        for name in [] if self._disable_adapters or self.merged_adapters else self._active_adapter:
            out = out + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return out


class Wrapped(nn.Module):
    """As peft's models: names alone go on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.active_adapter = model, "a"
        self.config: Any = model.config

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def _adapted(*parts: str) -> Any:
    model: Any = small_llama()
    for layer in model.model.layers:
        for part in parts:
            setattr(layer.self_attn, part, Lora(getattr(layer.self_attn, part)))
    return Wrapped(model).eval()


@torch.no_grad()
def test_another_adapter_is_another_model(tmp_path: Path) -> None:
    model, path = _adapted("q_proj"), tmp_path / "a"
    layers = [part for part in model.modules() if isinstance(part, Lora)]
    hashes = [weights_hash(model)]
    with workbench.attach(model) as wb:
        with wb.capture(("entropy",), store=path):
            model(input_ids=some_ids(1, 5))
        for change in ({"_active_adapter": ["b"]}, {"scaling": {"a": 2.0, "b": 3.0}}, {"_disable_adapters": True}):
            for layer in layers:
                vars(layer).update(change)
            with (
                pytest.raises(CaptureError, match="another model: weights_sha256 differs"),
                wb.capture(("entropy",), store=path),
            ):
                pass
            hashes.append(weights_hash(model))
        assert len(set(hashes)) == 4
        with wb.capture(("entropy",)) as cap:
            model(input_ids=some_ids(1, 5))
        layers[0]._disable_adapters = False
        assert cap.provenance["weights_sha256"] is None
        assert "have changed" in cap.provenance["weights_note"]
        for layer in layers:
            vars(layer).update({"_active_adapter": ["a"], "scaling": {"a": 2.0, "b": 2.0}, "_disable_adapters": False})
        with wb.capture(("entropy",), store=path):
            model(input_ids=some_ids(1, 5))
    assert len(workbench.load_capture(path).forwards) == 2


def test_weights_are_those_of_the_model_or_refused() -> None:
    """Where an adapter acts, the layer that it stands beside is not all that a head has."""
    plain = small_llama()
    with workbench.attach(plain) as wb, workbench.attach(Wrapped(plain).eval()) as wrapped:
        assert workbench.ov_copying(wrapped).table.score.tolist() == workbench.ov_copying(wb).table.score.tolist()
    with workbench.attach(_adapted("v_proj")) as wb, pytest.raises(AttachError, match="come from 3 linear modules"):
        workbench.ov_copying(wb)
    model = _adapted("o_proj")
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(("entropy",), z=True) as cap:
        model(input_ids=some_ids(1, 5))
    with pytest.raises(CaptureError, match="only a part of its projection"):
        cap[0].result()
