"""Models whose calls are easily taken for what they are not: shown right, or refused and listed, never in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import workbench
from workbench import CaptureError, InterventionError
from workbench.hooks.readers import reader_of, registered

B, N, D, H = 2, 10, 24, 4
W = D // H


def split(t: Tensor) -> Tensor:
    return t.unflatten(-1, (H, W)).transpose(1, 2)


def merge(z: Tensor) -> Tensor:
    return z.transpose(1, 2).flatten(2)


class Projected(nn.Module):
    """Queries, keys and values [batch, head, position, width], a function of the three, and an output projection."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_heads, self.attend = H, attend
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(merge(self.attend(*map(split, self.qkv(x).chunk(3, -1)))))

    def by_hand(self, x: Tensor, without: int | None = None) -> tuple[Tensor, Tensor]:
        """The pattern in float64, and the output without a head."""
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        weights = (q.double() @ k.double().transpose(-1, -2) / W**0.5).softmax(-1)
        z = weights @ v.double()
        if without is not None:
            z[:, without] = 0
        return weights, self.o(merge(z).float())


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (q, k, v))
    return ((q @ k.transpose(1, 2) / W**0.5).softmax(2) @ v).unflatten(0, (H, -1)).transpose(0, 1)


def merged_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in (q, k, v))).unflatten(0, (-1, H))


def heads_axis_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v))).transpose(0, 1)


def any_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("xyuz,xyvz->yuxv", q, k) / W**0.5).softmax(-1)
    return torch.einsum("yuxv,xyvz->uxzy", weights, v).permute(1, 3, 0, 2)


def first_rows_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([F.scaled_dot_product_attention(q[:, :, :4], k, v), v[:, :, 4:]], 2)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(B, N, D)


def attached(module: nn.Module, **options: Any) -> workbench.Workbench:
    return workbench.attach(nn.Sequential(module).eval(), check=False, **options)


@torch.no_grad()
@pytest.mark.parametrize("attend", [heads_first, merged_sdpa, heads_axis_first, any_letters])
def test_heads_are_those_of_the_projection_in_any_layout(attend: Any, x: Tensor) -> None:
    module = Projected(attend)
    want, without = module.by_hand(x, without=1)
    with attached(module) as wb:
        with wb.capture(z=True) as cap:
            wb.model(x)
        torch.testing.assert_close(cap[0].pattern.dense().double(), want, atol=1e-5, rtol=1e-4)
        assert (cap[0].site.n_heads, cap[0].entropy.shape) == (H, (B, H, N))
        torch.testing.assert_close(cap[0].result().sum(2) + module.o.bias, module(x), atol=1e-5, rtol=1e-4)
        with wb.ablate((0, 1)):
            torch.testing.assert_close(wb.model(x), without, atol=1e-5, rtol=1e-4)
        assert wb.verify(x).ok


@torch.no_grad()
def test_an_edit_before_any_proof_is_right_or_an_error(x: Tensor) -> None:
    class Merged(Projected):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (split(t).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
            return self.o(merge(F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, H))))

    class HeadsFirst(Projected):
        scale = 1

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (split(t).transpose(0, 1).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
            z = F.scaled_dot_product_attention(q, k, v * self.scale if self.scale > 1 else v)
            return self.o(merge(z.unflatten(0, (H, -1)).transpose(0, 1)))

    class Scaled(HeadsFirst):
        scale = 2  # no linear function gave its values, so that these do not show the axes

    for module in (Merged(merged_sdpa), HeadsFirst(heads_first)):
        with attached(module) as wb, wb.ablate((0, 1)):
            torch.testing.assert_close(wb.model(x), module.by_hand(x, without=1)[1], atol=1e-5, rtol=1e-4)
    module = Scaled(heads_first)
    with attached(module) as wb:
        with pytest.raises(WORKBENCH_ERRORS, match=r"its axes are .*head=4 batch"), wb.ablate((0, 1)):
            wb.model(x)
        want = 2 * module.by_hand(x, without=1)[1] - module.o.bias
        with wb.ablate((0, 1)):
            torch.testing.assert_close(wb.model(x), want, atol=1e-5, rtol=1e-4)


WORKBENCH_ERRORS = (CaptureError, InterventionError)


@torch.no_grad()
def test_a_layout_can_be_stated(x: Tensor) -> None:
    def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q) * heads_first(q, k, v.tanh())  # the values too show nothing

    module = Projected(gated)
    with attached(module) as wb, pytest.raises(CaptureError, match="could not be placed") as caught, wb.capture():
        wb.model(x)
    assert "layout=" in str(caught.value.hint)
    with attached(module, layout={"0": "(head batch) query width"}) as wb:
        with wb.capture() as cap:
            wb.model(x)
        want = module.by_hand(x)[0]
        torch.testing.assert_close(cap[0].pattern.dense().double(), want, atol=1e-5, rtol=1e-4)
    with pytest.raises(CaptureError, match="is no layout"):
        attached(module, layout={"0": "b; h"})


@torch.no_grad()
@pytest.mark.parametrize(("attend", "share"), [(first_rows_only, "8 of 20 rows")])
def test_parts_of_heads_are_refused_with_their_share(attend: Any, share: str, x: Tensor) -> None:
    with attached(Projected(attend)) as wb:
        with pytest.raises(CaptureError, match=share), wb.capture():
            wb.model(x)
        with pytest.raises(WORKBENCH_ERRORS), wb.ablate((0, 1)):
            wb.model(x)
        assert [one.name for one in wb.sites.unread] == ["0"]
        assert share in wb.sites.unread[0].reason


@torch.no_grad()
def test_block_sparse_attention_is_refused_with_its_share() -> None:
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, block_size=16,
        num_random_blocks=1, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    model, ids = transformers.BigBirdModel(config).eval(), torch.randint(3, 99, (1, 256))
    with workbench.attach(model) as wb:
        with pytest.raises(CaptureError, match="64 of 256 rows"), wb.capture():
            model(ids)
        assert not wb.verify(ids).ok


@torch.no_grad()
def test_windows_whose_last_is_padded_are_refused_with_their_rows() -> None:
    """Local attention takes windows of whole blocks: a length that is none has rows that no projection sees."""
    torch.manual_seed(0)
    config = transformers.LongT5Config(
        num_layers=1, num_heads=4, d_model=32, d_kv=8, d_ff=48, vocab_size=60, local_radius=5, pad_token_id=0,
        encoder_attention_type="local",
    )  # fmt: skip
    model, name = transformers.LongT5EncoderModel(config).eval(), "encoder.block.0.layer.0.LocalSelfAttention"
    ids = torch.randint(3, 60, (2, 18))
    with workbench.attach(model, check=False) as wb:
        with pytest.raises(CaptureError, match="gives 36 rows, of which 34 enter"), wb.capture():
            model(ids[:, :17])
        assert [one.name for one in wb.sites.unread] == [name]
        with wb.capture() as cap:
            model(ids)
        assert (cap[0].site.kind, cap[0].site.windows, cap[0].shape) == ("halo", 3, (6, 4, 6, 18))


@torch.no_grad()
def test_local_and_global_keys_apart_are_refused() -> None:
    """Another block-sparse family: what its heads give is the sum of two products, each with a part of the weights."""
    torch.manual_seed(0)
    config = transformers.PegasusXConfig(
        encoder_layers=1, decoder_layers=1, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, block_size=6, num_global_tokens=3,
    )  # fmt: skip
    model, ids = transformers.PegasusXModel(config).eval(), torch.randint(3, 60, (2, 18))
    with workbench.attach(model) as wb:
        with pytest.warns(UserWarning, match="were not captured"), wb.capture() as cap:
            model(ids, decoder_input_ids=ids[:, :9], use_cache=False)
        assert [one.site.kind for one in cap] == ["self", "cross"]
        assert [one.name for one in wb.sites.unread] == ["encoder.layers.0.self_attn"]


class Shared(nn.Module):
    """Three blocks that run several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.blocks, self.times = nn.ModuleList(Projected(F.scaled_dot_product_attention) for _ in range(3)), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            for block in self.blocks:
                x = x + block(x)
        return x


@torch.no_grad()
def test_calls_belong_to_their_site(x: Tensor, tmp_path: Path) -> None:
    model = Shared(2).eval()
    with workbench.attach(model, check=False) as wb, wb.capture() as cap:
        model(x)
    assert [site.name for site in cap.sites] == [f"blocks.{i}{call}" for i in range(3) for call in ("", "#1")]
    assert cap["blocks.1.attn"] is cap["blocks.1"]
    assert cap["blocks.1"].site.layer == cap["blocks.1", 1].site.layer == 1
    assert cap["blocks.1", -1].site.label(2) == "L1H2#1"
    assert cap["blocks.1.attn#1"] is cap["blocks.1", 1]
    assert 'choose another with ["blocks.1", call]' in repr(cap["blocks.1"])
    with pytest.raises(CaptureError, match="there is no call 2"):
        _ = cap["blocks.1", 2]
    table = cap.table("entropy")
    assert table.groupby("layer").site.unique().map(list).to_dict() == {i: [f"blocks.{i}"] for i in range(3)}
    assert sorted(table.call.unique()) == [0, 1]
    cache = cap.to_cache()
    assert torch.equal(cache["pattern", 1], cap["blocks.1"].pattern.dense())
    assert torch.equal(cache["blocks.1.attn#1.hook_pattern"], cap["blocks.1", 1].pattern.dense())
    again = workbench.load_capture(cap.save(tmp_path / "run.safetensors"))
    assert torch.equal(again["blocks.1", 1].entropy, cap["blocks.1", 1].entropy)
    assert cap.ledger == {f"blocks.{i}": 2 for i in range(3)}


@torch.no_grad()
def test_two_calls_of_one_module() -> None:
    config = transformers.DiffLlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99,
    )  # fmt: skip
    model = transformers.DiffLlamaForCausalLM(config).eval()
    with workbench.attach(model) as wb, wb.capture() as cap:
        model(torch.randint(3, 99, (1, 12)))
    for layer in range(3):
        assert cap[f"blocks.{layer}.attn"].site.name == f"model.layers.{layer}.self_attn"
    assert cap.table("entropy").groupby("layer").site.nunique().to_dict() == {0: 1, 1: 1, 2: 1}


class OverChannels(nn.Module):
    """Cross-covariance attention: the softmax runs over the channels of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(t).transpose(-1, -2) for t in self.qkv(x).chunk(3, -1))
        return self.o(merge(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(-1, -2)))


class Efficient(nn.Module):
    """Linear attention whose keys are normalised over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(t).transpose(-1, -2) for t in self.qkv(x).chunk(3, -1))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
        return self.o(merge(torch.einsum("bhde,bhdn->bhne", context, q.softmax(-2))))


class Slots(nn.Module):
    """Soft mixture of experts: what the tokens read are slots, each a sum over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.phi, self.w, self.o = nn.Parameter(torch.randn(D, 6)), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.phi
        return self.o(logits.softmax(-1) @ self.w(logits.softmax(1).transpose(1, 2) @ x))


class Experts(nn.Module):
    """A softmax that gates experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.o = nn.Linear(D, 3), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        experts = self.experts(x).unflatten(-1, (3, D))
        return self.o(torch.einsum("bne,bned->bnd", self.gate(x).softmax(-1), experts))


@torch.no_grad()
def test_attention_over_channels_says_so(x: Tensor) -> None:
    with attached(OverChannels()) as wb:
        with wb.capture(("entropy", "distance")) as cap:
            wb.model(x)
        assert cap[0].site.kind == "channel"
        assert cap[0].shape == (B, H, W, W)
        with pytest.raises(CaptureError, match='kind "channel"'):
            _ = cap[0].distance
        with pytest.raises(InterventionError, match="no token positions"), wb.ablate((0, 1), positions=0):
            wb.model(x)


class Windows(nn.Module):
    """Windows of five positions that also read `halo` positions on either side."""

    def __init__(self, halo: int) -> None:
        super().__init__()
        self.num_heads, self.halo = H, halo
        self.q, self.kv, self.o = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        around = F.pad(x, (0, 0, self.halo, self.halo)).unfold(1, 5 + 2 * self.halo, 5).transpose(-1, -2).flatten(0, 1)
        q, k, v = map(split, (self.q(x.reshape(-1, 5, D)), *self.kv(around).chunk(2, -1)))
        weights = torch.softmax(torch.einsum("...id,...jd->...ij", q, k), -1)
        return self.o(merge(torch.einsum("...ij,...jd->...id", weights, v))).reshape(x.shape)


@torch.no_grad()
@pytest.mark.parametrize(("halo", "kind"), [(0, "window"), (2, "halo")])
def test_windows_are_counted_and_their_surroundings_have_no_distance(halo: int, kind: str, x: Tensor) -> None:
    with attached(Windows(halo)) as wb:
        with wb.capture(("entropy", "distance")) as cap:
            wb.model(x)
        assert cap[0].shape == (2 * B, H, 5, 5 + 2 * halo)
        assert (cap[0].site.windows, cap[0].site.kind) == (2, kind)
        assert f"{kind} × 2" in repr(wb.sites)
        assert "batch 2 × 2 windows" in repr(cap[0])
        entropy = cap[0].by_window("entropy")
        assert entropy.shape == (B, 2, H, 5)
        table = cap.table("entropy")
        last = table[(table.batch == 3) & (table["head"] == 1)]  # the second window of the second example
        assert last.window.tolist() == [1]
        assert last.entropy.item() == pytest.approx(entropy[1, 1, 1].mean().item())
        if halo:
            with pytest.raises(CaptureError, match='kind "halo"'):
                _ = cap[0].distance
        else:
            assert cap[0].distance.shape == (2 * B, H, 5)
        assert wb.verify(x).ok


@torch.no_grad()
def test_sites_without_windows_have_none(x: Tensor) -> None:
    with attached(Projected(any_letters)) as wb, wb.capture() as cap:
        wb.model(x)
    assert "window" not in cap.table("entropy")
    with pytest.raises(CaptureError, match="has no windows"):
        cap[0].by_window("entropy")


@torch.no_grad()
def test_a_capture_says_that_nothing_else_was_looked_for(x: Tensor) -> None:
    """Sigmoid weights, which only a look finds, beside a site that is read."""

    def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.transpose(-1, -2)) @ v

    model = nn.ModuleDict({"read": Projected(any_letters), "other": Projected(sigmoid)}).eval()
    model.forward = lambda x: model["other"](model["read"](x))  # type: ignore[assignment]
    with workbench.attach(model) as wb:
        with wb.capture() as cap:
            wb.model(x)
        assert "1 site, others not looked for, " in repr(cap)
        assert "mix tokens was not looked at" in limits_of(cap)
        wb.look(x)
        with wb.capture() as cap:
            wb.model(x)
        assert "1 site, 1 mixer unread, " in repr(cap)
        assert "other (Projected)" in limits_of(cap)
        assert "not looked at" not in limits_of(cap)


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.transpose(-1, -2)) @ v


def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.relu(q @ k.transpose(-1, -2)).square() / k.shape[-2]) @ v


def talking(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return torch.einsum("hg,bgij->bhij", torch.eye(H).flip(0), weights) @ v


class Hidden(Projected):
    """Its code speaks of a softmax and a product, so that it is taken for a site before it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.o.bias is not None else x.softmax(-1) @ x.transpose(-1, -2)


@torch.no_grad()
@pytest.mark.parametrize("attend", [sigmoid, squared_relu, talking])
def test_what_ran_without_a_call_that_is_read_is_unread_by_name(attend: Any, x: Tensor) -> None:
    model = nn.Sequential(Hidden(attend), Projected(any_letters)).eval()
    with workbench.attach(model, check=False) as wb:
        assert "0" in [site.name for site in wb.sites]
        with pytest.warns(UserWarning, match="0 ran without a call: wb.look"), wb.capture() as cap:
            model(x)
        for sites in (cap.model_sites, wb.sites):
            assert [(one.name, one.proved) for one in sites.unread] == [("0", False)]
        assert "called nothing that is read" in str(cap.ledger["0"])
        with pytest.raises(CaptureError, match="no attention call was seen at 0\nHint: 0 ran"), wb.capture(sites="0"):
            model(x)
        model[0].attend = any_letters  # now it is read
        with wb.capture():
            model(x)
        assert wb.sites.unread == ()


def limits_of(cap: workbench.Capture) -> str:
    """The limits that a report of a capture states."""
    return workbench.Report("Limits").add(cap).to_html().partition('id="limits"')[2].partition("</ul>")[0]


@torch.no_grad()
def test_one_query_that_pools_its_window_is_no_gate(x: Tensor) -> None:
    class Pooled(Projected):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.reshape(B, 2, 5, H, W).permute(0, 3, 1, 2, 4) for t in self.qkv(x).chunk(3, -1))
            weights = torch.softmax(q.amax(3, keepdim=True) @ k.transpose(-1, -2), -1)
            return self.o((weights @ v).permute(0, 2, 3, 1, 4).reshape(B, 2, D))

    with attached(Pooled(heads_first)) as wb, wb.capture() as cap:
        wb.model(x)
    assert [(one.site.kind, one.shape) for one in cap] == [("halo", (2 * B, H, 1, 5))]


@torch.no_grad()
def test_sites_that_only_a_run_shows_are_sites_after_a_look(x: Tensor) -> None:
    with attached(Projected(any_letters)) as wb:
        assert [site.name for site in wb.look(x)] == ["0"]
        assert (wb.sites[0].n_heads, wb.sites.unread) == (H, ())


@torch.no_grad()
def test_linear_attention_is_no_site_but_unread(x: Tensor) -> None:
    with attached(Efficient()) as wb:
        with pytest.raises(CaptureError, match="could not be placed"), wb.capture():
            wb.model(x)
        found = wb.verify(x)
        assert not found.ok
        assert "1 of 1 mixers unread" in repr(found)
        assert [one.name for one in wb.sites.unread] == ["0"]


@torch.no_grad()
@pytest.mark.parametrize("sharp", [1, 3])
def test_slots_are_no_positions(sharp: int, x: Tensor) -> None:
    slots = Slots()
    slots.phi.mul_(sharp)  # a sharp softmax leaves many tokens out of a slot
    with attached(slots) as wb:
        wb.look(x)
        assert [(one.name, one.proved) for one in wb.sites.unread] == [("0", True)]
        with wb.capture(("entropy",)) as cap:
            wb.model(x)
        assert cap[0].site.kind == "pooled"


@torch.no_grad()
def test_gates_are_no_sites(x: Tensor) -> None:
    model = nn.Sequential(Projected(F.scaled_dot_product_attention), Experts()).eval()
    with workbench.attach(model) as wb:
        with wb.capture() as cap:
            model(x)
        assert [site.name for site in cap.sites] == ["0"]
        assert wb.verify(x).complete
        assert [site.name for site in wb.sites] == ["0"]


HYBRID: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HYBRIDS: dict[str, Callable[[], nn.Module]] = {
    "short convolutions": lambda: transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(**HYBRID, layer_types=["conv", "conv", "conv", "full_attention"])
    ),
    "gated delta rule": lambda: transformers.Qwen3_5ForCausalLM(
        transformers.Qwen3_5TextConfig(
            **HYBRID, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
            linear_num_value_heads=4,
        )
    ),
    "real-gated recurrence": lambda: transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            **HYBRID | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=8, head_dim=8
        )
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("name", HYBRIDS)
def test_every_layer_of_a_hybrid_is_a_site_or_listed(
    name: str, read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, ids = HYBRIDS[name]().eval(), torch.randint(3, 60, (2, 13))
    if not read:  # as if no reader knew of its recurrences
        for module in filter(reader_of, model.modules()):
            monkeypatch.setitem(registered._of_class, type(module), None)
    with workbench.attach(model) as wb:
        assert not wb.sites.looked
        found = wb.verify(input_ids=ids)
        with wb.capture() as cap:
            model(ids)
        sites = wb.sites
    assert found.ok
    assert sites.looked
    layers = model.config.num_hidden_layers
    mixing = {one.name for one in sites.unread if one.proved} | {site.name for site in sites}
    assert all(any(f".layers.{i}." in one for one in mixing) for i in range(layers)), mixing
    for text in (repr(sites), sites._repr_html_(), repr(list(cap.ledger.items()))):
        assert all(one.name in text for one in sites.unread)
    assert bool(sites.unread) != read
    if sites.unread:
        assert f"{len(sites.unread)} of " in repr(found)
        assert not found.complete
        assert f", {len(sites.unread)} mixer" in repr(cap)
    again = workbench.load_capture(cap.save(tmp_path / "run.safetensors"))
    assert again.model_sites.unread == sites.unread
