"""A module that states another number of heads than its call has is refused, with both numbers."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import workbench
from workbench import CaptureError, InterventionError, WorkbenchError

X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    """One process's part of attention with four heads that was split by hand: it has two of them."""

    def __init__(self, written: bool = False) -> None:
        super().__init__()
        self.num_heads, self.written = 4, written
        self.q, self.k, self.v = (nn.Linear(16, 8) for _ in range(3))
        self.out = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.written:
            z = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        else:
            z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(z.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Attention of a kind that states its heads rightly, and one that does not."""

    def __init__(self, written: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.right, self.wrong = Part(written), Part(written)
        self.right.num_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        return self.wrong(self.right(x))


@pytest.mark.parametrize("written", [False, True])
@torch.no_grad()
def test_a_capture_refuses_it_and_keeps_the_rest(written: bool) -> None:
    model = Model(written)
    bare = model(X)
    with workbench.attach(model) as wb:
        with (
            pytest.warns(UserWarning, match="wrong: the module states 4 heads, and its call has 2"),
            wb.capture() as cap,
        ):
            assert torch.equal(model(X), bare)
        assert list(cap.ledger) == ["right", "wrong"]
        assert "states 4 heads, and its call has 2" in str(cap.ledger["wrong"])
    wanted = r"the module states 4 heads, and its call has 2 \(site wrong\)\n.*layout="
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match=wanted), wb.capture(sites="wrong"):
        model(X)


@torch.no_grad()
def test_an_edit_refuses_it() -> None:
    model = Model()
    with workbench.attach(model) as wb:
        with (
            pytest.raises(InterventionError, match=r"states 4 heads, and its call has 2 \(site wrong\)\n.*layout="),
            wb.ablate(("wrong", 1)),
        ):
            model(X)
        with wb.ablate(("right", 1)):
            model(X)


@torch.no_grad()
def test_a_stated_layout_settles_it() -> None:
    model = Model()
    with workbench.attach(model, layout={"wrong": "batch head=2 query width"}) as wb, wb.capture() as cap:
        model(X)
    assert cap["wrong"].shape == (3, 2, 7, 7)


class HeadByHead(Part):
    """Its four heads are computed one after the other."""

    def __init__(self, written: bool = False) -> None:
        super().__init__(written)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        several = zip(*(part(x).split(4, -1) for part in (self.q, self.k, self.v)), strict=True)
        return self.out(torch.cat([self.head(*qkv) for qkv in several], -1))

    def head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.written:
            return (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("written", [False, True])
@torch.no_grad()
def test_calls_of_one_head_each_are_not_all_called_head_0(written: bool) -> None:
    model = nn.Sequential(HeadByHead(written)).eval()
    with workbench.attach(model) as wb:
        for _ in range(2):
            with pytest.raises(CaptureError, match="states 4 heads, and its call has 1"), wb.capture():
                model(X)
        assert [one.name for one in wb.sites.unread] == ["0"]
    with workbench.attach(model) as wb, pytest.raises(WorkbenchError), wb.ablate((0, 0)):
        model(X)


def half(layer: nn.Module) -> None:
    """One process's part of a layer of `transformers`, split by hand: the second half of its heads."""
    for name in ("q_proj", "k_proj", "v_proj"):
        one = getattr(layer, name)
        one.weight = nn.Parameter(one.weight[len(one.weight) // 2 :])
    layer.o_proj.weight = nn.Parameter(layer.o_proj.weight[:, layer.o_proj.weight.shape[1] // 2 :])


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@torch.no_grad()
def test_a_backend_of_transformers_is_counted_too(backend: str) -> None:
    """Its config states the heads; a module that states its own is believed rather."""
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=backend,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(60, (2, 7))
    name = "model.layers.1.self_attn"
    half(layer := model.model.layers[1].self_attn)
    reason = "the config states 4 heads, and its call has 2"
    with workbench.attach(model) as wb:
        with pytest.warns(UserWarning, match=reason), wb.capture() as cap:
            model(ids)
        assert [site.site.name for site in cap] == ["model.layers.0.self_attn"]
        assert reason in str(cap.ledger[name])
        assert [(one.name, one.reason) for one in wb.sites.unread] == [(name, reason)]
        assert not wb.verify(ids).complete
    with workbench.attach(model) as wb, pytest.raises(InterventionError, match=reason), wb.ablate((1, 1)):
        model(ids)
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match=reason), wb.capture(sites=name):
        model(ids)
    layer.num_heads = 2
    with workbench.attach(model) as wb, wb.capture() as cap:
        model(ids)
    assert cap[name].shape == (2, 2, 7, 7)
    layer.num_heads = 3
    with workbench.attach(model) as wb, pytest.warns(UserWarning, match="states 3 heads"), wb.capture() as cap:
        model(ids)
    layout = {name: "batch query head=2 width"}
    with workbench.attach(model, layout=layout) as wb, wb.capture() as cap:
        model(ids)
    assert cap[name].shape == (2, 2, 7, 7)
