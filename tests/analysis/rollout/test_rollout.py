"""Attention rollout and the maps that it chains, compared with the published definitions worked by hand in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import workbench
from support.held import Held
from support.hybrid_models import hybrid
from support.kept_elsewhere import Clipped, Int8, put
from support.tiny import eager_twin, family, make
from support.zoo.family import ids
from workbench import (
    AttachError,
    AttentionRollout,
    CaptureError,
    FormatError,
    WorkbenchError,
    attach,
    attention_rollout,
)
from workbench.analysis.rollout.maps import ProximityMap, linear, tiles
from workbench.analysis.rollout.recorded import run_of
from workbench.kernels.patterns import Pattern

METHODS = ("attention", "norm", "alti", "value_zeroing")


@dataclass
class Layer:
    """One attention by hand: A [head, query, key], u [key, head, d_model], and [query, d_model] of the stream.

    `total` is x and what the heads write, `y` what follows on it, `finish` what y has of a part of total, and `block`
    what the block makes of a total.
    """

    a: Tensor
    u: Tensor
    x: Tensor
    total: Tensor
    y: Tensor
    finish: Callable[[Tensor], Tensor]
    block: Callable[[Tensor], Tensor]
    cross: bool = False


def _model(name: str) -> nn.Module:
    model = make(family(name))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key.lower() or "ln_" in key or key.endswith("bias"):  # norms and biases that do something
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def _inputs(name: str, n: int = 11) -> dict[str, Tensor]:
    found = {"input_ids": ids(1, n)}
    return found | ({"decoder_input_ids": ids(1, 6, 1)} if name == "t5" else {})


def _written(v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    """u [key, head, d_model] of values [key, kv · width] and a joining matrix [head · width, d_model]."""
    w = w_o.unflatten(0, (n_heads, -1))
    kv = v.unflatten(-1, (-1, w.shape[1]))
    return torch.einsum("khw,hwd->khd", kv.repeat_interleave(n_heads // kv.shape[1], 1), w)


def _gpt2(model: Any, inputs: dict[str, Tensor]) -> list[Layer]:
    seen = eager_twin(model)(**inputs, output_attentions=True, output_hidden_states=True)
    found = []
    for block, a, x in zip(model.transformer.h, seen.attentions, seen.hidden_states, strict=False):
        v = block.attn.c_attn(block.ln_1(x[0])).chunk(3, -1)[2]
        u = _written(v, block.attn.c_proj.weight, a.shape[1])
        y = x[0] + torch.einsum("hqk,khd->qd", a[0], u) + block.attn.c_proj.bias
        found.append(Layer(a[0], u, x[0], y, y, lambda s: s, lambda s, b=block: s + b.mlp(b.ln_2(s))))
    return found


def _llama(model: Any, inputs: dict[str, Tensor]) -> list[Layer]:
    seen = eager_twin(model)(**inputs, output_attentions=True, output_hidden_states=True)
    found = []
    for block, a, x in zip(model.model.layers, seen.attentions, seen.hidden_states, strict=False):
        v = block.self_attn.v_proj(block.input_layernorm(x[0]))
        u = _written(v, block.self_attn.o_proj.weight.T, a.shape[1])
        y = x[0] + torch.einsum("hqk,khd->qd", a[0], u)
        found.append(
            Layer(a[0], u, x[0], y, y, lambda s: s, lambda s, b=block: s + b.mlp(b.post_attention_layernorm(s)))
        )
    return found


def _bert(model: Any, inputs: dict[str, Tensor]) -> list[Layer]:
    seen = eager_twin(model)(**inputs, output_attentions=True, output_hidden_states=True)
    found = []
    for block, a, x in zip(model.encoder.layer, seen.attentions, seen.hidden_states, strict=False):
        out = block.attention.output
        u = _written(block.attention.self.value(x[0]), out.dense.weight.T, a.shape[1])
        total = x[0] + torch.einsum("hqk,khd->qd", a[0], u) + out.dense.bias
        sigma = (total.var(-1, correction=0, keepdim=True) + out.LayerNorm.eps).sqrt()

        def finish(s: Tensor, gain: Tensor = out.LayerNorm.weight, sigma: Tensor = sigma) -> Tensor:
            """A part [query, ..., d_model] of what the norm is given, its scale frozen."""
            return (s - s.mean(-1, keepdim=True)) * gain / sigma.view(-1, *[1] * (s.dim() - 1))

        def rest(s: Tensor, b: Any = block) -> Tensor:
            n = b.attention.output.LayerNorm(s)
            return b.output.LayerNorm(n + b.output.dense(b.intermediate(n)))

        found.append(Layer(a[0], u, x[0], total, out.LayerNorm(total), finish, rest))
    return found


def _t5(model: Any, inputs: dict[str, Tensor]) -> list[Layer]:
    """The encoder's, then of each block of the decoder self- and cross-attention."""
    seen = eager_twin(model)(**inputs, output_attentions=True, output_hidden_states=True)
    n_heads, found = model.config.num_heads, []
    for block, a, x in zip(model.encoder.block, seen.encoder_attentions, seen.encoder_hidden_states, strict=False):
        part = block.layer[0]
        u = _written(part.SelfAttention.v(part.layer_norm(x[0])), part.SelfAttention.o.weight.T, n_heads)
        y = x[0] + torch.einsum("hqk,khd->qd", a[0], u)
        found.append(Layer(a[0], u, x[0], y, y, lambda s: s, lambda s, b=block: b.layer[1](s)))
    source = seen.encoder_last_hidden_state[0]
    maps = zip(seen.decoder_attentions, seen.cross_attentions, strict=True)
    for block, (a, c), x in zip(model.decoder.block, maps, seen.decoder_hidden_states, strict=False):
        part, across = block.layer[0], block.layer[1].EncDecAttention
        u = _written(part.SelfAttention.v(part.layer_norm(x[0])), part.SelfAttention.o.weight.T, n_heads)
        y = x[0] + torch.einsum("hqk,khd->qd", a[0], u)
        found.append(Layer(a[0], u, x[0], y, y, lambda s: s, lambda s: s))
        u = _written(across.v(source), across.o.weight.T, n_heads)
        z = y + torch.einsum("hqk,khd->qd", c[0], u)
        found.append(Layer(c[0], u, y, z, z, lambda s: s, lambda s: s, True))
    return found


BY_HAND = {"gpt2": _gpt2, "llama-gqa": _llama, "bert": _bert, "t5": _t5}


def _map(layer: Layer, method: str) -> Tensor:
    """[query, key] shares; of cross-attention [query, key + 1], the last of which stays."""
    n_q, n_k = layer.a.shape[1:]
    eye = torch.eye(n_q, dtype=torch.float64)
    if method == "attention":
        mean = layer.a.mean(0)
        return torch.cat([mean / 2, torch.full((n_q, 1), 0.5)], 1) if layer.cross else (mean + eye) / 2
    if method == "value_zeroing":
        found = torch.zeros(n_q, n_k, dtype=torch.float64)
        for j in range(n_k):
            without = layer.total - torch.einsum("hq,hd->qd", layer.a[..., j], layer.u[j])
            found[:, j] = 1 - torch.cosine_similarity(layer.block(without), layer.block(layer.total), dim=-1)
        return found / found.sum(-1, keepdim=True)
    t = torch.einsum("hqk,khd->qkd", layer.a, layer.u)
    t = torch.cat([t, layer.x[:, None]], 1) if layer.cross else t + eye[..., None] * layer.x[:, None]
    t = layer.finish(t)
    if method == "norm":
        found = t.norm(dim=-1)
    else:
        size = layer.y.abs().sum(-1, keepdim=True)
        found = (size - (layer.y[:, None] - t).abs().sum(-1)).clamp_min(0)
    return found / found.sum(-1, keepdim=True)


@torch.no_grad()
def _by_hand(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[str], list[Tensor]]:
    layers = BY_HAND[name](model, inputs)
    return lambda method: [_map(layer, method) for layer in layers]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert"])
def test_one_stack_by_hand(name: str) -> None:
    model, inputs = _model(name), _inputs(name)
    maps_of = _by_hand(name, model, inputs)
    # Norms of Llama's kind are computed in float32, whatever the model's dtype.
    close = {"rtol": 1e-4, "atol": 1e-6} if name == "llama-gqa" else {"rtol": 1e-7, "atol": 1e-10}
    with attach(model) as wb:
        for method in METHODS:
            with torch.no_grad():
                maps = maps_of(method)
            whole = attention_rollout(wb, inputs, method=method, position=None)
            product = torch.eye(11, dtype=torch.float64)
            for layer in reversed(range(len(maps))):
                torch.testing.assert_close(whole.own[layer], maps[layer], **close)
                product = product @ maps[layer]
                torch.testing.assert_close(whole.shares[layer], product, **close)
            some = attention_rollout(wb, inputs, method=method, position=[-1, 3])
            torch.testing.assert_close(some.rollout, whole.rollout[[-1, 3]])
            torch.testing.assert_close(some.own, whole.own[:, [-1, 3]])
            assert some.targets == (10, 3)


@pytest.mark.parametrize("method", METHODS[:3])
def test_an_encoder_and_its_decoder_by_hand(method: str) -> None:
    model, inputs = _model("t5"), _inputs("t5")
    with torch.no_grad():
        maps = _by_hand("t5", model, inputs)(method)
    n_layers, n_in, n_out = len(model.encoder.block), 11, 6
    encoder, decoder = maps[:n_layers], maps[n_layers:]
    input_part, own_part = torch.zeros(n_out, n_in, dtype=torch.float64), torch.eye(n_out, dtype=torch.float64)
    for mixing in reversed(decoder):
        if mixing.shape[1] == n_out:
            own_part = own_part @ mixing
        else:
            input_part = input_part + own_part @ mixing[:, :-1]
            own_part = own_part * mixing[:, -1]
    for mixing in reversed(encoder):
        input_part = input_part @ mixing
    with attach(model) as wb:
        found = attention_rollout(wb, inputs, method=method, position=None)
        source = attention_rollout(wb, inputs, method=method, position=None, stream="input")
    truth = torch.cat([input_part, own_part], 1)
    torch.testing.assert_close(found.rollout, truth, rtol=1e-4, atol=1e-6)
    assert found.streams == ("input",) * n_in + ("decoder",) * n_out
    assert found.targets == tuple(range(n_in, n_in + n_out))
    assert found.own[0].isnan().all()  # no target is a query of the encoder
    assert source.streams == ("input",) * n_in
    truth = torch.linalg.multi_dot(encoder[::-1]) if len(encoder) > 1 else encoder[0]
    torch.testing.assert_close(source.rollout, truth, rtol=1e-4, atol=1e-6)


def test_value_zeroing_of_an_encoder_by_hand() -> None:
    model, inputs = _model("t5"), _inputs("t5")
    with torch.no_grad():
        maps = _by_hand("t5", model, inputs)("value_zeroing")[: len(model.encoder.block)]
    with attach(model) as wb:
        found = attention_rollout(wb, inputs, method="value_zeroing", position=None, stream="input")
        with pytest.raises(CaptureError, match="does not say what stays"):
            attention_rollout(wb, inputs, method="value_zeroing")
    for site, mixing in enumerate(maps):
        torch.testing.assert_close(found.own[site], mixing, rtol=1e-4, atol=1e-6)


def test_a_norm_behind_the_heads_is_frozen() -> None:
    """Gemma 2: what heads write goes through a norm of its own before it is added."""
    model, inputs = _model("gemma2"), _inputs("gemma2")
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[0]
    handles = [
        layer.register_forward_hook(lambda _, args, output: seen.__setitem__("x", args[0][0])),
        layer.self_attn.v_proj.register_forward_hook(lambda _, args, output: seen.__setitem__("v", output[0])),
        layer.self_attn.o_proj.register_forward_hook(lambda _, args, output: seen.__setitem__("written", output[0])),
    ]
    with torch.no_grad():
        a = eager_twin(model)(**inputs, output_attentions=True).attentions[0][0]
        model(**inputs)
        for handle in handles:
            handle.remove()
        norm = layer.post_attention_layernorm
        u = _written(seen["v"], layer.self_attn.o_proj.weight.T, a.shape[0])
        scale = (seen["written"].square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        t = torch.einsum("hqk,khd->qkd", a, u) * (1 + norm.weight) * scale[:, None]
        t = t + torch.eye(11)[..., None] * seen["x"][:, None]
        norms = t.norm(dim=-1)
    with attach(model) as wb:
        found = attention_rollout(wb, inputs, method="norm", position=None)
    torch.testing.assert_close(found.own[0], norms / norms.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["gpt-neox", "bart", "whisper", "modernbert", "dinov2", "bloom", "qwen3", "gemma2", "deepseek-v3", "bert"]
)
def test_the_vectors_add_up_to_the_sum(name: str) -> None:
    """Of every attention of other architectures: Σ_j T_ij and the bias are what the model has there."""
    made, inputs = make(family(name)), family(name).inputs()
    one = {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    with attach(made) as wb, torch.no_grad():
        run = run_of(wb, one, "alti", 0.5, None)
        for step in run.steps:
            mixing = step.map()
            assert isinstance(mixing, ProximityMap)
            of = mixing.of
            n = of.pattern.n_queries
            alpha = torch.cat([p for _, p in tiles(of.pattern, slice(0, n), of.pattern.n_keys)], -1).double()
            keys = slice(0, alpha.shape[-1])
            total = torch.einsum("hqk,khd->qd", alpha, of.written(keys, torch.float64)) * of.scale[:, None] + of.own
            bias = getattr(of_module(made, step.site), "bias", None)
            if bias is not None:
                total = total + linear(of.norm, bias.double()) * of.scale[:, None]
            if of.norm is not None:
                total = total + of.norm.bias
            torch.testing.assert_close(total, of.whole, rtol=1e-3, atol=1e-4 * float(of.whole.abs().max()))


def of_module(model: nn.Module, site: str) -> nn.Module:
    """The linear module that ends an attention."""
    inside = [m for n, m in model.named_modules() if n.startswith(f"{site.rpartition('.')[0]}.") or n.startswith(site)]
    last = ("dense", "out_proj", "o_proj", "Wo", "c_proj", "out_lin")
    names = {m: n.rpartition(".")[2] for n, m in model.named_modules()}
    own = [m for n, m in model.named_modules() if n.startswith(f"{site}.") and names[m] in last]
    return own[0] if own else next(m for m in inside if names[m] in last)


def test_padding_is_left_out() -> None:
    model, alone = _model("gpt2"), _inputs("gpt2", 9)
    padded = {"input_ids": torch.cat([torch.zeros(1, 4, dtype=torch.long), alone["input_ids"]], 1)}
    padded["attention_mask"] = torch.tensor([[0] * 4 + [1] * 9])
    padded["position_ids"] = torch.tensor([[0] * 4 + list(range(9))])
    with attach(model) as wb:
        for method in METHODS:
            one, other = (attention_rollout(wb, each, method=method) for each in (alone, padded))
            torch.testing.assert_close(one.shares, other.shares)
            assert one.tokens == other.tokens
            assert one.targets == other.targets == (8,)


def test_no_map_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 tokens: no tensor of more than a few hundred rows' weights, and no call for a dense map."""
    torch.manual_seed(0)
    n = 4096
    config = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 60, "n_positions": n}
    model = hf.GPT2Model(hf.GPT2Config(**config, bos_token_id=1, eos_token_id=2)).eval()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.untyped_storage().nbytes())
            return made

    monkeypatch.setattr(Pattern, "dense", lambda *_, **__: pytest.fail("a dense map"))
    with attach(model) as wb:
        inputs = {"input_ids": ids(1, n)}
        for method in METHODS[:3]:
            with Watch():
                found = attention_rollout(wb, inputs, method=method)
            torch.testing.assert_close(found.shares.sum(-1), torch.ones(2, 1, dtype=torch.float64))
    assert largest <= n * n  # bytes: a quarter of one head's map, the room that tiles are made in


def _most_at_once(n: int, method: Any) -> int:
    """Bytes of what operators of a rollout over n tokens have made and is still held, at most."""
    torch.manual_seed(0)
    config = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 60, "n_positions": n}
    model = hf.GPT2Model(hf.GPT2Config(**config, bos_token_id=1, eos_token_id=2)).eval()
    with attach(model) as wb, Held() as held:
        attention_rollout(wb, {"input_ids": ids(1, n)}, method=method)
    return held.most


@pytest.mark.parametrize("method", METHODS[:3])
def test_memory_grows_with_the_length_alone(method: str) -> None:
    """Twice as many tokens more: twice as much more of what is there at once, and not four times."""
    n = 512 if method == "alti" else 256
    few, more, most = (_most_at_once(times * n, method) for times in (1, 2, 4))
    assert 0 < most - more < 2.5 * (more - few)
    assert most - more < (4 * n) ** 2 * 4  # bytes of one head's map


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _model("gpt2"), _inputs("gpt2")
    with attach(model) as wb:
        with monkeypatch.context() as patch:
            patch.setattr("workbench.analysis.rollout.rollout.DENSE_LIMIT", 4000)
            attention_rollout(wb, inputs)
            with pytest.raises(CaptureError, match="shares of 11 positions would take 4,840 bytes"):
                attention_rollout(wb, inputs, position=None)
        for options, said in (
            ({"method": "flow"}, "method is one of"), ({"position": 11}, "beyond the prompt, which has 11 tokens"),
            ({"residual": 1.0}, "residual is a share"), ({"position": []}, "no position"),
            ({"stream": "decoder"}, "no stream"),
        ):  # fmt: skip
            with pytest.raises(CaptureError, match=said):
                attention_rollout(wb, inputs, **options)
        with pytest.raises(CaptureError, match="of one prompt, not of 2"):
            attention_rollout(wb, {"input_ids": ids(2, 5)})


def test_blocks_that_mix_positions_elsewhere_are_refused() -> None:
    """Their MLP takes means over positions: value zeroing would not be that of the attention alone."""
    model, inputs = _model("gpt2"), _inputs("gpt2")

    class Smeared(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.mlp(x)
            return made + made.cumsum(1)

    model.transformer.h[1].mlp = Smeared(model.transformer.h[1].mlp)
    with attach(model, check=False) as wb:
        with pytest.raises(AttachError, match=r"transformer\.h\.1 mixes positions elsewhere"):
            attention_rollout(wb, inputs, method="value_zeroing")
        attention_rollout(wb, inputs)
    with attach(make(family("torch-transformer"))) as wb:
        inputs = family("torch-transformer").inputs()
        inputs = {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
        with pytest.raises(AttachError, match="joins the heads without being called"):
            attention_rollout(wb, inputs, method="norm")
    with attach(hybrid("falcon-h1")) as wb:  # a recurrence beside attention
        for method in METHODS:
            with pytest.raises(AttachError, match="which do not read each other's stream"):
                attention_rollout(wb, {"input_ids": ids(1, 9)}, method=method)
    several = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_kv_shared_layers": 0}
    config = hf.Gemma3nTextConfig(
        **several, vocab_size=60, vocab_size_per_layer_input=60, hidden_size=32, hidden_size_per_layer_input=8,
        num_hidden_layers=2, intermediate_size=[48, 48], laurel_rank=4, altup_num_inputs=2, sliding_window=8,
        activation_sparsity_pattern=[0.0, 0.0], layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    with attach(hf.Gemma3nForCausalLM(config).eval()) as wb:  # two streams in one tensor
        for method in METHODS[1:]:
            with pytest.raises(AttachError):
                attention_rollout(wb, {"input_ids": 3 + ids(1, 9) % 40}, method=method)
    gated = hybrid("qwen3-next")
    with attach(gated) as wb:
        for method, said in (
            ("norm", "gate or skip of the module lies"),
            ("value_zeroing", "as they are"),
        ):
            with pytest.raises(WorkbenchError, match=said):
                attention_rollout(wb, {"input_ids": ids(1, 9)}, method=method)
        shares = attention_rollout(wb, {"input_ids": ids(1, 9)}).shares
        torch.testing.assert_close(shares.sum(-1), torch.ones(3, 1, dtype=torch.float64))
    for name, said in (("swin", "of kind 'window'"), ("clip", "2 stacks of layers"), ("mamba", "lies between what")):
        one = {key: value[:1] if isinstance(value, Tensor) else value for key, value in family(name).inputs().items()}
        with attach(make(family(name))) as wb, pytest.raises(AttachError, match=said):
            attention_rollout(wb, one, method="norm")


def test_weights_that_are_not_there_are_named() -> None:
    """Projections that are no matrices: "attention" and value zeroing need none of them, the others say so."""
    model, inputs = _model("llama-gqa").float(), _inputs("llama-gqa")
    for layer in range(len(model.model.layers)):
        put(model, f"model.layers.{layer}.self_attn.o_proj", Clipped)
    with attach(model) as wb:
        for method in ("attention", "value_zeroing"):
            attention_rollout(wb, inputs, method=method)
        for method in ("norm", "alti"):
            with pytest.raises(AttachError, match="no matrix of floating-point numbers"):
                attention_rollout(wb, inputs, method=method)


def test_weights_in_whole_numbers_are_read() -> None:
    model, inputs = _model("llama-gqa").float(), _inputs("llama-gqa")
    with attach(model) as wb:
        before = [attention_rollout(wb, inputs, method=method) for method in ("value_zeroing", "norm")]
    for layer in range(len(model.model.layers)):
        put(model, f"model.layers.{layer}.self_attn.o_proj", Int8)
    with attach(model) as wb:
        near = [attention_rollout(wb, inputs, method=method) for method in ("value_zeroing", "norm")]
    for one, other in zip(near, before, strict=True):
        assert float((one.rollout - other.rollout).abs().max()) < 0.1


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    model, tokenizer = workbench.models.load("demo-lm")
    prompt = workbench.tasks.ioi(1, seed=0)[0].prompt
    with attach(model, tokenizer) as wb:
        before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
        found = attention_rollout(wb, prompt, method="alti", position=[-1, -2])
        after = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    assert before == after
    again = AttentionRollout.load(found.save(tmp_path / "a.safetensors"))
    assert torch.equal(again.shares, found.shares)
    assert again.table.equals(found.table)
    with pytest.raises(FormatError, match="6 places around 6 sites"):
        AttentionRollout.load(replace(found, shares=found.shares[1:]).save(tmp_path / "b.safetensors"))
    assert "alti" in repr(found)
    assert abs(float(found.table["share"].sum()) - 2) < 1e-9
    assert len(found.to_png()) > 1000
    assert "<html" in str(found.to_html())
