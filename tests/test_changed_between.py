"""Models that are changed between two forwards: what was learned of the first is not believed of the second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import workbench
from support.tiny import small_llama, some_ids
from workbench.errors import CaptureError, InterventionError

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))


class Joining(nn.Module):
    """The projection of the heads, with an adapter, a gate or a factor that can be switched on."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.how = ""

    def forward(self, z: Tensor) -> Tensor:
        match self.how:
            case "adapter":
                return self.base(z) + self.up(self.down(z))
            case "adapter before":
                return self.up(self.down(z)) + self.base(z)
            case "functions":
                return self.base(z) + (z @ self.down.weight.T) @ self.up.weight.T
            case "gate":
                return self.base(z * z.sigmoid())
            case "factor":
                return self.base(z * 3)
        return self.base(z)


class Attention(nn.Module):
    """Four heads; `examples_first` says which of heads and examples the kernel takes for its batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.examples_first = 4, True
        self.qkv, self.o = nn.Linear(16, 48), Joining(nn.Linear(16, 16))

    def split(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x) if self.examples_first else self.split(x).transpose(1, 2)
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o((z if self.examples_first else z.transpose(0, 1)).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


@pytest.mark.parametrize("how", ["adapter", "adapter before", "functions", "gate", "factor"])
def test_what_joins_the_heads_is_looked_at_in_every_forward(how: str) -> None:
    model = Model().eval()
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture([], z=True) as cap:
        model(X)
        model.attn.o.how = how
        model(X)
    before, after = (forward.sites["attn"] for forward in cap.forwards)
    torch.testing.assert_close(before.result().sum(2) + model.attn.o.base.bias, model.attn.o.base(before.z.flatten(2)))
    with pytest.raises(CaptureError, match=r"not given the heads' outputs as they are|a part of its projection"):
        after.result()
    with pytest.raises(CaptureError, match=r"not given the heads' outputs as they are|a part of its projection"):
        cap.pool()["attn"].result()


def test_a_module_that_is_put_in_while_a_capture_is_open() -> None:
    model = Model().eval()
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture([], z=True) as cap:
        model(X)
        model.attn.o.base = nn.Linear(16, 16)
        model(X)
        y = model(X)
    with pytest.raises(CaptureError, match="not given"):
        cap.forwards[1].sites["attn"].result()
    found = cap.forwards[2].sites["attn"]
    torch.testing.assert_close(found.result().sum(2) + model.attn.o.base.bias, y)
    with torch.no_grad(), workbench.attach(model) as wb, wb.ablate("L0H1"):
        model(X)
        model.attn = Attention()
        model.attn.o.base.weight.data.copy_(torch.eye(16))
        y = model(X)
    torch.testing.assert_close(y[..., 4:8], model.attn.o.base.bias[4:8].expand(4, 5, 4))


def test_axes_that_are_exchanged() -> None:
    """As many examples as heads: sizes show nothing, only how the queries lie in memory does."""
    model = Model().eval()
    q, k, _ = model.attn.split(X).double()
    want = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    with torch.no_grad(), workbench.attach(model) as wb:
        for examples_first in (True, False, True):
            model.attn.examples_first = examples_first
            with wb.capture([]) as cap:
                model(X)
            torch.testing.assert_close(cap[0].pattern.dense().double(), want)
            with wb.ablate("L0H1"), wb.capture([], z=True) as cut:
                model(X)
            assert cut[0].z[:, :, 1].eq(0).all()
            assert cut[0].z[:, :, [0, 2, 3]].ne(0).all()


def _other_scores(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **rest: Any) -> Any:
    return sdpa_attention_forward(module, q * 1.5, k, v, mask, **rest)


def test_a_backend_that_is_exchanged() -> None:
    transformers.AttentionInterface.register("other scores", _other_scores)
    model, ids = small_llama(), some_ids(2, 6)

    def both() -> None:
        for name in ("sdpa", "other scores"):
            model.set_attn_implementation(name)
            model(ids)

    try:
        with torch.no_grad(), workbench.attach(model) as wb:
            with pytest.raises(CaptureError, match="rebuilt for the backend other scores"), wb.capture([]):
                both()
            with pytest.raises(InterventionError, match="not those of other"), wb.edit_pattern("L0H1", lambda r, *_: r):
                both()
            with pytest.raises(CaptureError, match="backend other scores"), wb.watch_rows("L0H1", lambda step: None):
                both()
    finally:
        model.set_attn_implementation("sdpa")


def _new_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.clone()


def _scaled(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


def _unmasked(layer: nn.Linear) -> None:
    layer.weight_mask.fill_(1)


@pytest.mark.parametrize(
    ("prepare", "change"),
    [
        (lambda layer: None, lambda layer: layer.bfloat16()),
        (lambda layer: None, _new_data),
        (parametrizations.weight_norm, _scaled),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.5), _unmasked),
    ],
    ids=["dtype", "data", "parametrized", "pruned"],
)
def test_weights_that_have_changed_since(
    prepare: Callable[[nn.Linear], Any], change: Callable[[nn.Linear], Any]
) -> None:
    model = Model().eval()
    prepare(model.attn.o.base)
    with torch.no_grad(), workbench.attach(model) as wb:
        with wb.capture([], z=True) as cap:
            model(X)
        cap[0].result()
        change(model.attn.o.base)
        with pytest.raises(CaptureError, match="has changed since the capture"):
            cap[0].result()
    assert cap.provenance["weights_sha256"] is None
    assert "changed since the capture began" in cap.provenance["weights_note"]


@pytest.mark.parametrize("open_it", [lambda wb: wb.capture([]), lambda wb: wb.ablate("L0H1")], ids=["capture", "edit"])
def test_where_tensors_would_not_be_on_the_host_or_no_numbers_at_all(open_it: Callable[[Any], Any]) -> None:
    """A default device is that of what is made here too: the C++ library would write to where no memory is."""
    model = Model().eval()
    with torch.no_grad(), workbench.attach(model) as wb:
        model(X)
        wb.look(X)
        with pytest.raises(CaptureError, match="makes tensors on meta"), torch.device("meta"), open_it(wb):
            model(X)
        with pytest.raises(CaptureError, match="being traced"), open_it(wb):
            torch.jit.trace(model, (X,))


def test_a_model_without_numbers_is_edited_no_more_than_it_is_captured() -> None:
    model = Model().to("meta")
    with workbench.attach(model) as wb:
        for opened in (wb.ablate("L0H1"), wb.edit_pattern("L0H1", lambda r, *_: r), wb.watch_rows("L0H1", print)):
            with pytest.raises(CaptureError, match='on the "meta" device'), opened:
                model(X.to("meta"))
