"""Interventions on other models than Hugging Face's on SDPA, in other precisions, and with input that does not fit."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import workbench
from support.kernel_models import KERNELS, kernel_model
from support.tiny import FAMILIES, eager_twin, make
from workbench.errors import AttachError, CaptureError, InterventionError
from workbench.session.workbench import Workbench

GPT2 = FAMILIES[0]
HEAD, WIDTH, LENGTH = (1, 2), 8, 17


def mixed(rows: Tensor, *args: Any) -> Tensor:
    return rows / 2 + rows.roll(1, -1).square() + 0.01


@pytest.fixture
def wb() -> Iterator[Workbench]:
    with workbench.attach(make(GPT2)) as wb:
        yield wb


def mixed_by_hand(attention: nn.MultiheadAttention, x: Tensor, head: int) -> Tensor:
    """Self-attention [batch, position, d] in which one head's rows are `mixed`, from the module's weights."""
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    weights = torch.cat((weights[:, :head], mixed(weights[:, head : head + 1]), weights[:, head + 1 :]), 1)
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_pytorchs_attention_modules(grad: bool, need_weights: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    given = x if batch_first else x.transpose(0, 1)
    with torch.set_grad_enabled(grad), workbench.attach(attention) as wb, wb.edit_pattern((0, 3), mixed):
        got = attention(given, given, given, need_weights=need_weights)[0]
    want = mixed_by_hand(attention, x, 3)
    torch.testing.assert_close(got if batch_first else got.transpose(0, 1), want, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_pytorchs_layers_leave_their_native_path_while_they_are_edited() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 8, batch_first=True, norm_first=True).double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    bare = layer(x)
    y = x + mixed_by_hand(layer.self_attn, layer.norm1(x), 1)
    want = y + layer.linear2(F.relu(layer.linear1(layer.norm2(y))))
    with workbench.attach(layer) as wb:
        with wb.edit_pattern((0, 1), mixed):
            torch.testing.assert_close(layer(x), want, atol=1e-10, rtol=1e-10)
        with wb.steer("linear2", torch.ones(16, dtype=torch.float64), positions=-1):  # inside what is native else
            steered = layer(x)
        torch.testing.assert_close(steered[:, -1], bare[:, -1] + 1)
        torch.testing.assert_close(steered[:, :-1], bare[:, :-1])
        assert torch.equal(layer(x), bare)


def test_an_eager_model(wb: Workbench) -> None:
    inputs = GPT2.inputs()
    eager = eager_twin(wb.model)
    direction = torch.ones(WIDTH)
    with workbench.attach(eager) as other:
        for edit in (
            lambda w: w.ablate(HEAD),
            lambda w: w.steer(HEAD, direction),
            lambda w: w.edit_pattern(HEAD, mixed, -1),
        ):
            with edit(wb), edit(other):
                torch.testing.assert_close(wb.model(**inputs).logits, eager(**inputs).logits, atol=1e-4, rtol=1e-4)


class WrittenOut(nn.Module):
    """Attention in plain products, whose weights the test can change."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = 3, nn.Linear(12, 36)
        self.change: Callable[[Tensor], Tensor] = lambda weights: weights

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.change((q @ k.transpose(-1, -2)).softmax(-1))
        return (weights @ v).transpose(1, 2).flatten(2)


def test_attention_that_is_written_out() -> None:
    torch.manual_seed(0)
    model, x = WrittenOut().double(), torch.randn(2, 5, 12, dtype=torch.float64)

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        out = model(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return out.detach(), model.qkv.weight.grad.clone()

    with workbench.attach(model) as wb, wb.edit_pattern((0, 1), mixed, [0, 3]):
        got = run()

    def change(weights: Tensor) -> Tensor:
        new = weights.clone()
        new[:, 1, [0, 3]] = mixed(weights[:, 1, [0, 3]])
        return new

    model.change = change
    for a, b in zip(got, run(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_ours(name: str) -> None:
    """Rows are constants there; the new rows times V are the heads' output, and gradients reach V."""
    model, ids = kernel_model(name)
    with workbench.attach(model) as wb:
        with torch.no_grad(), wb.capture(z=True, values=True) as plain:
            bare = model(ids)
        with wb.edit_pattern([(0, 1), (0, 3)], lambda rows, site, head: rows, slice(5, 9)):
            torch.testing.assert_close(model(ids), bare, atol=1e-4, rtol=1e-4)
        with wb.edit_pattern((0, 1), mixed, 6), wb.capture(z=True) as edited:
            model(ids).sum().backward()
    pattern = plain[0].pattern
    want = mixed(pattern.rows(6, [1])[:, 0].float()) @ pattern.values[:, 1].float()
    torch.testing.assert_close(edited[0].z[:, 6, 1], want[:, 0], atol=1e-4, rtol=1e-4)
    same = torch.ones(edited[0].z.shape[1:3], dtype=torch.bool)
    same[6, 1] = False
    assert torch.equal(edited[0].z[:, same], plain[0].z[:, same])
    assert model.embed.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_heads_of_a_state_space_mixer() -> None:
    """Their output is what they read, before the skip, the gate and the projection."""
    torch.manual_seed(0)
    config = hf.Mamba2Config(
        num_hidden_layers=2, hidden_size=16, state_size=4, vocab_size=60, num_heads=4, head_dim=8, n_groups=1,
        chunk_size=8,
    )  # fmt: skip
    model, inputs = hf.Mamba2ForCausalLM(config).eval(), {"input_ids": GPT2.inputs()["input_ids"], "use_cache": False}
    direction = torch.ones(8)
    with workbench.attach(model) as wb:
        with pytest.raises(InterventionError, match="no head 4: the site has 4 heads"), wb.ablate((0, 4)):
            model(**inputs)
        with wb.capture(z=True, values=True) as plain:
            bare = model(**inputs).logits
        with wb.edit_pattern((0, 3), lambda rows, site, head: rows):
            torch.testing.assert_close(model(**inputs).logits, bare, atol=1e-5, rtol=1e-5)
        z = plain[0].z
        row = mixed(plain[0].pattern.rows(6, [3])[:, 0]) @ plain[0].pattern.values[:, 3].float()
        for intervention, want in (
            (wb.ablate((0, 3)), torch.zeros_like(z[:, :, 3])),
            (wb.ablate((0, 3), "mean", reference=inputs), z[:, :, 3].mean((0, 1)).expand_as(z[:, :, 3])),
            (wb.steer((0, 3), direction), z[:, :, 3] + 1),
            (wb.patch({(0, 3): direction}), torch.ones_like(z[:, :, 3])),
            (wb.edit_pattern((0, 3), mixed, 6), torch.cat((z[:, :6, 3], row, z[:, 7:, 3]), 1)),
        ):
            with intervention, wb.capture(z=True) as edited:
                assert not torch.allclose(model(**inputs).logits, bare)
            torch.testing.assert_close(edited[0].z[:, :, 3], want)
            assert torch.equal(edited[0].z[:, :, :3], z[:, :, :3])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model, inputs = make(GPT2).to(dtype), GPT2.inputs()
    seen = []

    def edit(rows: Tensor, site: Any, head: int) -> Tensor:
        seen.append(rows.dtype)
        return mixed(rows)

    with workbench.attach(model) as wb:
        with wb.capture(z=True, values=True) as plain:
            model(**inputs)
        with wb.edit_pattern(HEAD, edit), wb.capture(z=True) as edited:
            model(**inputs)
        with wb.patch({HEAD: edited[1].z[:, :, 2]}), wb.capture(z=True) as patched:
            model(**inputs)
        with (
            pytest.raises(InterventionError, match=f"is torch.float32, expected {dtype}"),
            wb.steer(HEAD, torch.ones(8)),
        ):
            model(**inputs)
    assert seen == [torch.float32]
    want = mixed(plain[1].pattern.dense([2])[:, 0]) @ plain[1].pattern.values[:, 2].float()
    torch.testing.assert_close(edited[1].z[:, :, 2].float(), want, atol=2e-3, rtol=0.01)
    assert torch.equal(edited[1].z, patched[1].z)


def test_autocast(wb: Workbench) -> None:
    inputs, seen = GPT2.inputs(), []

    def edit(rows: Tensor, site: Any, head: int) -> Tensor:
        seen.append(rows.dtype)
        return rows @ torch.eye(LENGTH)

    with torch.autocast("cpu", dtype=torch.bfloat16), wb.capture(z=True) as capture, wb.edit_pattern(HEAD, edit):
        wb.model(**inputs).logits.float().sum().backward()
    assert seen == [torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16), wb.capture(z=True) as plain:
        wb.model(**inputs)
    torch.testing.assert_close(capture[1].z.float(), plain[1].z.float(), atol=2e-2, rtol=2e-2)


def test_a_functions_own_softmax_and_products_are_no_attention(wb: Workbench) -> None:
    inputs = GPT2.inputs()

    def attend(z: Tensor, site: Any, head: int) -> Tensor:
        scores = (z @ z.transpose(-1, -2))[:, None]
        F.scaled_dot_product_attention(z, z, z)
        return (scores.softmax(-1) @ z[:, None])[:, 0]

    with torch.no_grad(), wb.patch({HEAD: attend}), wb.capture() as capture:
        wb.model(**inputs)
    assert capture.ledger == {"transformer.h.0.attn": 1, "transformer.h.1.attn": 1}


def test_dropout_drops_from_new_rows_too() -> None:
    model = make(GPT2).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    rows_seen = []
    with torch.no_grad(), workbench.attach(model) as wb:

        def uniform(rows: Tensor, site: Any, head: int) -> Tensor:
            rows_seen.append(rows)
            return torch.full_like(rows, 1 / LENGTH)

        with wb.edit_pattern((0, 1), uniform):
            one, two = (_z(wb, (0, 1)) for _ in range(2))
    torch.testing.assert_close(rows_seen[0].sum(-1), torch.ones(2, LENGTH))
    assert not torch.equal(one, two)


@torch.no_grad()
def test_steps_of_a_generation_are_edited_one_by_one(wb: Workbench) -> None:
    ids = GPT2.inputs()["input_ids"]
    with wb.edit_pattern(HEAD, mixed, -1), wb.steer(HEAD, torch.ones(WIDTH)):
        first = wb.model(ids[:, :-1], use_cache=True)
        second = wb.model(ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
        whole = wb.model(ids).logits[:, -1]
    torch.testing.assert_close(second, whole, atol=1e-4, rtol=1e-4)


def _z(wb: Workbench, head: tuple[int, int]) -> Tensor:
    found = []
    with wb.patch({head: lambda z, site, head: found.append(z) or z}):
        wb.model(**GPT2.inputs())
    return found[0]


BAD: list[tuple[Callable[[Workbench], Any], str]] = [
    (lambda wb: wb.ablate((1, 9)), "no head 9: the site has 4 heads, 0 to 3 (site transformer.h.1.attn)"),
    (lambda wb: wb.ablate((5, 0)), "no layer 5: the model has 0 to 1"),
    (lambda wb: wb.ablate([]), "no head was chosen"),
    (lambda wb: wb.ablate(HEAD, positions=LENGTH), "no position 17: the call has 17 queries, −17 to 16"),
    (lambda wb: wb.ablate(HEAD, positions="last"), "not 'last'"),
    (lambda wb: wb.ablate(HEAD, positions=slice(40, None)), "choose none of 17"),
    (lambda wb: wb.patch([HEAD]), "patch takes a dict, not list"),
    (lambda wb: wb.patch({}), "no head was chosen"),
    (lambda wb: wb.patch({HEAD: 1.0}), "the patch of (1, 2) is float, expected a tensor or a function"),
    (lambda wb: wb.patch({HEAD: torch.ones(8), "L1H2": torch.ones(8)}), "head 2 has two patches"),
    (lambda wb: wb.patch({HEAD: torch.ones(7)}), "the patch of head 2 is [7], expected [2, 17, 8] [batch, position, d"),
    (lambda wb: wb.patch({HEAD: torch.ones(1)}), "is [1], expected [2, 17, 8]"),
    (lambda wb: wb.patch({HEAD: torch.ones(())}), "is [], expected [2, 17, 8]"),
    (lambda wb: wb.patch({HEAD: torch.ones(2, 8)}), "is [2, 8], expected [2, 17, 8]"),
    (lambda wb: wb.patch({HEAD: torch.ones(3, 17, 8)}), "is [3, 17, 8], expected [2, 17, 8]"),
    (lambda wb: wb.patch({HEAD: torch.ones(1, 2, 17, 8)}), "is [1, 2, 17, 8], expected [2, 17, 8]"),
    (lambda wb: wb.patch({HEAD: torch.ones(8).double()}), "is torch.float64, expected torch.float32"),
    (lambda wb: wb.patch({HEAD: torch.ones(8, device="meta")}), "is on meta, expected cpu"),
    (lambda wb: wb.patch({HEAD: torch.ones(8).to_sparse()}), "is laid out as torch.sparse_coo"),
    (lambda wb: wb.patch({HEAD: lambda z, site, head: None}), "what the function gave for head 2 is NoneType"),
    (lambda wb: wb.patch({HEAD: lambda z, site, head: z[0, 0, :3]}), "what the function gave for head 2 is [3]"),
    (lambda wb: wb.patch({HEAD: lambda z, site, head: z.half()}), "is torch.float16, expected torch.float32"),
    (lambda wb: wb.patch({HEAD: lambda z: z}), "for head 2 cannot be called as f(z, site, head): too many"),
    (lambda wb: wb.edit_pattern(HEAD, lambda rows, site, head, x: rows), "as edit(rows, site, head): missing"),
    (lambda wb: wb.set_gate(HEAD, lambda: None), "cannot be called as f(g, site, head): too many"),
    (lambda wb: wb.edit_pattern(HEAD, torch.ones(3)), "edit is Tensor, expected a function"),
    (lambda wb: wb.edit_pattern(HEAD, lambda rows, site, head: rows.zero_() and None), "Boolean value"),
    (lambda wb: wb.edit_pattern(HEAD, lambda rows, site, head: None), "what the function gave for head 2 is NoneType"),
    (lambda wb: wb.edit_pattern(HEAD, lambda rows, site, head: rows[:, :1]), "rows of head 2 are [2, 1, 17], not [2"),
    (lambda wb: wb.edit_pattern(HEAD, lambda rows, site, head: rows.double()), "is torch.float64, expected"),
    (lambda wb: wb.edit_pattern(HEAD, mixed, [3, 3]), "a query is chosen twice"),
    (lambda wb: wb.edit_pattern(HEAD, mixed, [16, -1]), "a query is chosen twice"),
    (lambda wb: wb.edit_pattern(HEAD, mixed, torch.ones(2, 17).tril().bool()), "which must be as many of each"),
    (lambda wb: wb.steer(HEAD, [1.0] * 8), "the direction is list"),
    (lambda wb: wb.steer(HEAD, torch.ones(8).to_sparse()), "laid out as torch.sparse_coo"),
    (lambda wb: wb.steer(HEAD, torch.ones(8, 1)), "the direction is [8, 1]"),
    (lambda wb: wb.steer(HEAD, torch.ones(8).long()), "expected a floating-point tensor"),
    (lambda wb: wb.steer(HEAD, torch.full((8,), torch.nan)), "not finite"),
    (lambda wb: wb.steer(HEAD, torch.ones(8), scale=float("inf")), "not finite"),
    (lambda wb: wb.steer(HEAD, torch.ones(32)), "the direction has 32 numbers, d_head is 8"),
    (lambda wb: wb.steer("blocks.1.attn", torch.ones(8)), "the direction has 8 numbers, d_model is 32"),
    (lambda wb: wb.steer(("resid", 0), torch.ones(32).double()), "is torch.float64, expected torch.float32"),
    (lambda wb: wb.steer(("resid", 2), torch.ones(32)), "no layer 2: the model has 0 to 1"),
    (lambda wb: wb.steer("transformer.h.0.mpl", torch.ones(32)), 'did you mean "transformer.h.0.mlp"'),
    (lambda wb: wb.steer("L1H9", torch.ones(8)), "no head 9"),
    (lambda wb: wb.steer(3, torch.ones(8)), "3 names no head"),
    (lambda wb: wb.steer("transformer.h", torch.ones(8)), "never fired at transformer.h"),
]  # fmt: skip


@pytest.mark.parametrize(("intervene", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(wb: Workbench, intervene: Callable[[Workbench], Any], message: str) -> None:
    inputs = GPT2.inputs()
    bare = wb.model(**inputs).logits
    expected = RuntimeError if message == "Boolean value" else InterventionError  # a function's own error
    with pytest.raises(expected) as caught, intervene(wb):
        wb.model(**inputs)
    assert message in str(caught.value)
    wb.check_idle()
    assert torch.equal(wb.model(**inputs).logits, bare)


def test_a_head_of_unknown_range_is_checked_when_the_site_fires() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2))

    model, x = nn.ModuleList([Hidden()]), torch.randn(1, 2, 3, 4)
    seen: list[Tensor] = []
    model[0].o.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with workbench.attach(model) as wb:
        assert wb.sites[0].n_heads is None
        with pytest.raises(InterventionError, match="no head -1: heads count from 0"), wb.ablate((0, -1)):
            model[0](x)
        with pytest.raises(InterventionError, match="no head 2: the site has 2 heads, 0 to 1"), wb.ablate((0, 2)):
            model[0](x)
        with wb.ablate((0, 1)):
            model[0](x)
    assert seen[-1].unflatten(-1, (2, 4))[:, :, 1].count_nonzero() == 0


INTERVENTIONS: list[Callable[[Workbench], Any]] = [
    lambda wb: wb.ablate(HEAD),
    lambda wb: wb.patch({HEAD: torch.ones(8)}),
    lambda wb: wb.edit_pattern(HEAD, mixed),
    lambda wb: wb.steer(HEAD, torch.ones(8)),
    lambda wb: wb.steer(("resid", 1), torch.ones(32)),
]
NAMES = ["ablate", "patch", "edit_pattern", "steer head", "steer resid"]


@pytest.mark.parametrize("intervene", INTERVENTIONS, ids=NAMES)
def test_what_never_fires_is_an_error_unless_another_is_on_its_way(wb: Workbench, intervene: Any) -> None:
    with pytest.raises(InterventionError, match=re.escape("never fired at transformer.h.1")), intervene(wb):
        pass
    with pytest.raises(InterventionError, match="never fired"), intervene(wb):
        wb.model.transformer.h[0](torch.randn(1, 3, 32))
    with pytest.raises(ZeroDivisionError), intervene(wb):
        raise ZeroDivisionError


@pytest.mark.parametrize("intervene", INTERVENTIONS, ids=NAMES)
def test_after_detach_and_on_a_compiled_model(wb: Workbench, intervene: Any) -> None:
    wb.detach()
    with pytest.raises(AttachError, match="detached"), intervene(wb):
        pass
    with workbench.attach(wb.model) as again:
        again.model.compile()
        with pytest.raises(CaptureError, match="is compiled"), intervene(again):
            pass


@torch.no_grad()
def test_captures_inside_and_outside_see_the_same(wb: Workbench) -> None:
    inputs = GPT2.inputs()
    for intervene in INTERVENTIONS:
        with wb.capture(z=True) as outside, intervene(wb):
            one = wb.model(**inputs).logits
        with intervene(wb), wb.capture(z=True) as inside:
            two = wb.model(**inputs).logits
        assert torch.equal(one, two)
        assert all(torch.equal(a.z, b.z) for a, b in zip(outside, inside, strict=True))


@torch.no_grad()
def test_an_error_in_a_function_comes_out_and_all_is_restored(wb: Workbench) -> None:
    def fail(*args: Any) -> Tensor:
        raise ZeroDivisionError

    inputs = GPT2.inputs()
    bare = wb.model(**inputs).logits
    for intervene in (lambda: wb.patch({HEAD: fail}), lambda: wb.edit_pattern(HEAD, fail)):
        with pytest.raises(ZeroDivisionError), wb.ablate((0, 0)), intervene():
            wb.model(**inputs)
        assert torch.equal(wb.model(**inputs).logits, bare)


@torch.no_grad()
def test_an_edit_may_be_kept_to_a_task(wb: Workbench) -> None:
    inputs = GPT2.inputs()

    async def edited(head: tuple[int, int]) -> tuple[Tensor, Tensor]:
        with wb.ablate(head, threads="this"):
            await asyncio.sleep(0)  # the other begins
            own = wb.model(**inputs).logits
            return own, await asyncio.create_task(started())

    async def started() -> Tensor:
        return wb.model(**inputs).logits

    async def both() -> list[tuple[Tensor, Tensor]]:
        return await asyncio.gather(edited((0, 1)), edited((1, 2)))

    for head, found in zip([(0, 1), (1, 2)], asyncio.run(both()), strict=True):
        with wb.ablate(head):
            assert all(torch.equal(one, wb.model(**inputs).logits) for one in found)
