"""Mamba-2 layers seeded from attention: what goes where, distillation, and the comparison of maps."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import workbench
from workbench.errors import AttachError, CaptureError, WorkbenchError
from workbench.kernels.state_space import naive_dual
from workbench.mechanisms.matvlm import (
    AttentionWeights,
    Distillation,
    HybridMaps,
    Mamba2,
    attention_weights,
    distil,
    evenly_spaced,
    hybrid_maps,
    losses,
    seed_mamba2,
    student,
)
from workbench.mechanisms.matvlm.distil import teacher_calls

TIGHT = {"atol": 1e-11, "rtol": 1e-10}
VOCABULARY = 17


def gpt2(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_head=4, n_embd=24, vocab_size=VOCABULARY, n_positions=32,
                        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=24,
                         intermediate_size=32, vocab_size=VOCABULARY, max_position_embeddings=32)  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def teacher() -> Iterator[workbench.Workbench]:
    with workbench.attach(gpt2()) as wb:
        yield wb


def batches(n: int, rows: int = 4, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(VOCABULARY, (rows, length), generator=generator)} for _ in range(n)]


def plain(layer: Mamba2) -> Mamba2:
    """The layer in float64 without decay, with steps of one and no skip."""
    layer = layer.double()
    with torch.no_grad():
        layer.A_log.fill_(-torch.inf)
        layer.D.zero_()
        layer.dt_bias.fill_(math.log(math.e - 1))
        layer.in_proj.weight[-layer.n_heads :] = 0
        if layer.in_proj.bias is not None:
            layer.in_proj.bias[-layer.n_heads :] = 0
    return layer


def projections(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
    """q, k, v [batch, head, position, width] of the first layer by its own modules, unrotated, and its projection."""
    if isinstance(model, GPT2LMHeadModel):
        attention = model.transformer.h[0].attn
        parts, out = attention.c_attn(x).split(24, dim=-1), attention.c_proj
    else:
        attention = model.model.layers[0].self_attn
        parts, out = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], attention.o_proj
    q, k, v = (t.unflatten(-1, (-1, 6)).transpose(1, 2) for t in parts)
    return q, *(t.repeat_interleave(4 // t.shape[1], dim=1) for t in (k, v)), out


@pytest.mark.parametrize("make", [gpt2, llama])
def test_seeded_without_decay_gate_and_convolution_it_is_linear_attention_of_the_teacher(make: Any):
    """So that every matrix went where it belongs."""
    model = make().double()
    with torch.no_grad(), workbench.attach(model) as wb:
        layer = plain(seed_mamba2(attention_weights(wb, 0), conv=0, gated=False))
        x = torch.randn(2, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        q, k, v, out = projections(model, x)
        want = out(((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x), want, **TIGHT)
    assert layer.n_kv_heads == (4 if make is gpt2 else 2)


def test_what_is_not_the_teachers_is_drawn_as_mamba_2_draws_it():
    eye = torch.eye(24).view(4, 6, 24)
    first, again, other = (seed_mamba2(AttentionWeights(eye, eye, eye, eye), seed=seed) for seed in (0, 0, 1))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.conv1d.weight, other.conv1d.weight)
    rates, steps = first.A_log.exp(), F.softplus(first.dt_bias)
    assert bool(((rates >= 1) & (rates <= 16)).all())
    assert bool(((steps >= 0.999e-3) & (steps <= 0.1001)).all())
    assert bool((first.D == 1).all())
    assert first.conv1d.kernel_size == (4,)
    assert first.in_proj.bias is None
    assert torch.equal(first.in_proj.weight[24:48], torch.eye(24))
    assert torch.equal(first.out_proj.weight, torch.eye(24))


def test_the_layer_is_causal_and_its_map_is_that_of_its_definition():
    torch.manual_seed(0)
    layer = Mamba2(24, 4, 6, 2).double()
    x = torch.randn(1, 11, 24, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7:] += 1
    with torch.no_grad():
        torch.testing.assert_close(layer(changed)[:, :7], layer(x)[:, :7], **TIGHT)
        with workbench.attach(nn.Sequential(layer)) as wb, wb.capture(z=True) as cap:
            wb.model(x)
        _, v, B, C, delta = layer.split(x)
    (site,) = cap
    for head in range(4):
        want = naive_dual(delta[0, head], -layer.A_log.exp()[head].detach(), B[0, head], C[0, head])
        torch.testing.assert_close(site.pattern.dense()[0, head], want, **TIGHT)
        torch.testing.assert_close(site.z[0, :, head], want @ v[0, head], **TIGHT)


def test_weights_that_no_such_layer_can_have_are_refused(teacher: workbench.Workbench):
    eye = torch.eye(24).view(4, 6, 24)
    with pytest.raises(AttachError, match="of one width"):
        AttentionWeights(eye, eye, torch.zeros(4, 5, 24), eye)
    with pytest.raises(AttachError, match="do not divide"):
        AttentionWeights(eye, eye[:3], eye[:3], eye)
    with pytest.raises(WorkbenchError, match="no share"):
        evenly_spaced(6, 1.5)
    with pytest.raises(WorkbenchError, match="conv=-1"):
        Mamba2(24, 4, 6, conv=-1)
    made = student(teacher, [0])
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(WorkbenchError, match="padding"):
        made(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    right = made(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])).logits
    torch.testing.assert_close(right[0, :3], made(input_ids=ids[:1, :3]).logits[0])
    with pytest.raises(WorkbenchError, match="no layer of its own"):
        distil(teacher, student(teacher, []), batches(1), progress=False)
    with pytest.raises(WorkbenchError, match="no batches"):
        distil(teacher, made, [], progress=False)
    with pytest.raises(CaptureError, match="no interval"):
        hybrid_maps(teacher, made, batches(1, rows=1))


def test_layers_are_spaced_as_the_paper_spaces_them():
    assert evenly_spaced(32, 0.25) == list(range(0, 32, 4))
    assert evenly_spaced(6, 0.0) == []
    assert evenly_spaced(6, 1.0) == [0, 1, 2, 3, 4, 5]
    assert evenly_spaced(6, 1 / 3) == [0, 3]


def test_kept_layers_fed_the_teachers_states_have_no_loss(teacher: workbench.Workbench):
    made, (batch,) = student(teacher, [1]), batches(1)
    blocks = [f"transformer.h.{i}" for i in range(3)]
    calls, _ = teacher_calls(teacher.model, blocks, batch)
    with torch.no_grad():
        away = {}
        for block in blocks:
            call = calls[block]
            given = made.model.get_submodule(block)(*call.args, **call.kwargs)
            away[block] = float(((given if isinstance(given, Tensor) else given[0]) - call.gave).norm())
        found, sizes = losses(teacher.model, made, batch)
    assert away["transformer.h.0"] == away["transformer.h.2"] == 0.0
    assert away["transformer.h.1"] > 0.1
    torch.testing.assert_close(found.layers, torch.tensor([away["transformer.h.1"]]))
    assert float(found.logits) > 0
    assert len(sizes) == 1
    with torch.no_grad():
        untouched, _ = losses(teacher.model, student(teacher, []), batch)
    assert float(untouched.logits) == 0.0


def test_distilling_brings_the_student_nearer_and_leaves_the_rest_alone(teacher: workbench.Workbench, tmp_path: Any):
    weights = {name: p.clone() for name, p in teacher.model.named_parameters()}
    made = student(teacher, [0, 2])
    kept = {name: p.clone() for name, p in made.named_parameters() if ".mixer." not in name}
    found = distil(teacher, made, batches(40), rate=1e-2, progress=False)
    assert bool((found.layers[-5:].mean(0) < 0.7 * found.layers[0]).all())
    assert float(found.logits[-5:].mean()) < 0.7 * float(found.logits[0])
    assert all(torch.equal(p, weights[name]) for name, p in teacher.model.named_parameters())
    assert all(torch.equal(dict(made.named_parameters())[name], p) for name, p in kept.items())
    assert all(p.grad is None for p in (*made.parameters(), *teacher.model.parameters()))
    again = Distillation.load(found.save(tmp_path / "found.safetensors"))
    assert torch.equal(again.layers, found.layers)
    assert list(found.table["site"]) == ["transformer.h.0.attn", "transformer.h.2.attn"]
    assert "2 layers, 40 steps" in repr(found)
    workbench.views.of(found)


def test_maps_of_teacher_and_student(teacher: workbench.Workbench, tmp_path: Any):
    made = student(teacher, [0, 2])
    (batch,) = batches(1, rows=3)
    found = hybrid_maps(teacher, made, [batch])
    assert (len(found.numbers), found.alike.shape, found.loss.shape) == (8, (8, 3), (2, 3))
    with torch.no_grad():
        with teacher.capture() as cap:
            teacher.model(**batch)
        with workbench.attach(made.model) as own, own.capture() as new:
            made(**batch)
    a, m = cap[2].pattern.dense()[1, 3].double(), new["transformer.h.2.attn.mixer"].pattern.dense()[1, 3].double()
    share = m.abs() / m.abs().sum(-1, keepdim=True)
    assert (found.layers[7], found.numbers[7]) == (2, 3)
    assert float(found.alike[7, 1]) == pytest.approx(
        float(F.cosine_similarity(a.flatten(), share.flatten(), dim=0)), 1e-5
    )
    others = [
        F.cosine_similarity(cap[2].pattern.dense()[1, h].double().flatten(), share.flatten(), dim=0) for h in range(3)
    ]
    assert float(found.others[7, 1]) == pytest.approx(float(sum(others)) / 3, 1e-5)
    values = torch.linalg.svdvals(m)
    shares = values / values.sum()
    assert float(found.rank[7, 1, 1]) == pytest.approx(math.exp(float(-(shares * shares.log()).sum())), 1e-4)
    i = torch.arange(12).double()
    away = (share * (i[:, None] - i)).sum(-1).mean()
    assert float(found.distance[7, 1, 1]) == pytest.approx(float(away), 1e-4)
    torch.testing.assert_close(found.half_life[4:], new["transformer.h.2.attn.mixer"].pattern.half_life.mean(0)[:, 0])
    named = [
        f"L{a}H{b}" for a, b, low in zip(found.layers, found.numbers, found.beyond[:, 0], strict=True) if not low > 0
    ]
    assert list(found.unmatched) == named
    assert list(found.table["matched"]) == [f"L{row.layer}H{row.head}" not in named for row in found.table.itertuples()]
    again = HybridMaps.load(found.save(tmp_path / "maps.safetensors"))
    assert again.table.equals(found.table)
    assert len(workbench.views.all_of(found)) == 2
    assert "8 heads of 2 layers, 3 examples" in repr(found)
    assert teacher.capture  # the teacher's workbench is still open


def test_a_student_of_its_own_teacher_is_matched(teacher: workbench.Workbench):
    """Heads that are compared with themselves are alike, and none is named."""
    from workbench.mechanisms.matvlm.maps import _compared

    (batch,) = batches(1, rows=2)
    made = student(teacher, [0])
    with torch.no_grad(), workbench.attach(made.model) as own, own.capture() as cap:
        made(**batch)
    pattern = cap["transformer.h.0.attn.mixer"].pattern
    found = _compared(pattern.magnitude(), pattern)
    torch.testing.assert_close(found[:, 0], torch.ones(4, dtype=torch.float64))
    assert bool((found[:, 1] < 1).all())


@pytest.mark.parametrize("sites", [[0, 2], [0, 1, 2]])
def test_a_student_writes_what_it_says_without_a_cache(teacher: workbench.Workbench, sites: list[int]):
    made = student(teacher, sites).model
    ids = batches(1, 2, 5)[0]["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = made.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with torch.no_grad():
        said = made(written[:, :-1]).logits.argmax(-1)
        assert torch.equal(written[:, 6:], said[:, 5:])  # each is the likeliest behind those before
        with pytest.raises(WorkbenchError, match="cannot go on from a cache"):
            made(ids, use_cache=True)
    assert teacher.model.config.use_cache  # the teacher's is its own


def test_a_layer_that_is_named_twice_is_refused(teacher: workbench.Workbench):
    with pytest.raises(AttachError, match="named twice"):
        student(teacher, [1, "transformer.h.1.attn"])


def test_of_a_layer_of_one_head_nothing_is_said_against_others(tmp_path: Any):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=1, n_embd=8, vocab_size=VOCABULARY, n_positions=16)
    with workbench.attach(GPT2LMHeadModel(config).eval()) as wb:
        found = hybrid_maps(wb, student(wb, [1]), batches(1, 3, 6))
    assert found.unmatched == ()
    assert found.table["matched"].tolist() == [None]
    assert "unmatched" not in repr(found)
    found.view().to_html(tmp_path / "one.html")
