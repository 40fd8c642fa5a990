"""Compiled models: what is recorded, under which name, and that nothing is left or compiled twice.

These tests compile with `backend="eager"`, which traces graphs and runs them as they are.
`tests/test_compiled_models.py` has what inductor makes.
"""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import workbench
from support.tiny import family, make
from workbench import Capture, CaptureError, InterventionError
from workbench.hooks.compiled.operator import ATTENTION
from workbench.hooks.compiled.regions import find_regions

GPT2, LLAMA = family("gpt2"), family("llama-gqa")
NAMES = ("lse", "entropy", "received", "distance")
compiled: Any = functools.partial(torch.compile, backend="eager")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ids() -> Tensor:
    return GPT2.inputs()["input_ids"]


def graphs() -> int:
    """How many graphs have been compiled so far."""
    return counters["stats"]["unique_graphs"]


def capture(model: Any, run: Callable[[], Any], **options: Any) -> Capture:
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(NAMES, **options) as found:
        run()
    return found


def assert_same(got: Capture, want: Capture, names: dict[str, str] | None = None, *, tolerance: float = 1e-5) -> None:
    assert [(names or {}).get(site.name, site.name) for site in got.sites] == [site.name for site in want.sites]
    for a, b in zip(got, want, strict=True):
        assert (a.site.n_heads, a.site.n_kv_heads, a.site.d_head) == (b.site.n_heads, b.site.n_kv_heads, b.site.d_head)
        for name, value in b.statistics.items():
            torch.testing.assert_close(a.statistics[name], value, atol=tolerance, rtol=tolerance, equal_nan=True)


def by_layer(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def in_list(model: Any) -> Any:
    model.model.layers[1] = compiled(model.model.layers[1])
    return model


def attention_alone(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.compile(backend="eager")
    return model


def forward_alone(model: Any) -> Any:
    model.forward = compiled(model.forward)
    return model


@pytest.mark.parametrize(
    "change",
    [compiled, forward_alone, by_layer, in_list, attention_alone],
    ids=["whole", "forward", "by layer", "in a list", "attention"],
)
def test_all_and_parts_of_a_model(change: Callable[[Any], Any]) -> None:
    model, inputs = make(LLAMA), LLAMA.inputs()
    with torch.no_grad():
        want = capture(model, lambda: model(**inputs), z=True)
        built, started = change(model), graphs()
        bare, before = built(**inputs).logits, graphs()
        held = [dict(vars(module)) for module in model.modules()]
        with workbench.attach(built) as wb:
            found = []
            for n in range(3):
                with wb.capture(NAMES, z=True) as cap:
                    assert torch.equal(built(**inputs).logits, bare)
                found.append(cap)
                assert n == 0 or graphs() == after
                after = graphs()
        assert after - before == before - started
        assert torch.equal(built(**inputs).logits, bare)
        assert graphs() == after
    assert [dict(vars(module)) for module in model.modules()] == held
    names = {"model.layers.1._orig_mod.self_attn": "model.layers.1.self_attn"} if change is in_list else {}
    for cap in found:
        assert_same(cap, want, names)
        for a, b in zip(cap, want, strict=True):
            torch.testing.assert_close(a.z, b.z, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(a.result(), b.result(), atol=1e-5, rtol=1e-5)
            assert torch.equal(a.pattern.dense().isfinite(), b.pattern.dense().isfinite())


def test_lengths_masks_and_dynamic_shapes() -> None:
    model = make(LLAMA)
    del model.model.layers[1:]
    built = compiled(model, dynamic=True)
    sizes = [family(name).inputs() for name in ("llama-gqa", "llama-left-padded", "llama-right-padded")]
    sizes += [{"input_ids": LLAMA.inputs()["input_ids"][:, :n]} for n in (5, 9)]
    with torch.no_grad():
        for inputs in sizes:
            want = capture(model, lambda inputs=inputs: model(**inputs))
            bare = built(**inputs).logits
            got = capture(built, lambda inputs=inputs: built(**inputs))
            assert_same(got, want)
            before = graphs()
            assert torch.equal(built(**inputs).logits, bare)
            assert graphs() == before


class Broken(nn.Module):
    """Attention in a frame of its own, which layers share, after a break of the graph."""

    def __init__(self, width: int = 24, heads: int = 4, *, before: bool = False) -> None:
        super().__init__()
        self.num_heads, self.before = heads, before
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2).chunk(3, 1)
        if self.before:
            torch._dynamo.graph_break()
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if not self.before:
            torch._dynamo.graph_break()
        return self.o(z.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("before", [False, True])
def test_layers_that_share_a_graph_after_a_break(before: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Broken(before=before) for _ in range(3))).eval(), torch.randn(2, 7, 24)
    want = capture(model, lambda: model(x))
    built = compiled(model)
    assert_same(capture(built, lambda: built(x)), want)


class Nameless(nn.Module):
    """Attention without a parameter near it, so that nothing tells which of several layers runs."""

    num_heads = 4

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        z = nn.functional.scaled_dot_product_attention(q, q, q)
        torch._dynamo.graph_break()
        return z.transpose(1, 2).flatten(2)


def test_layers_that_cannot_be_told_apart_are_refused() -> None:
    model, x = compiled(nn.Sequential(Nameless(), Nameless())), torch.randn(2, 7, 24)
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match="which module runs") as caught, wb.capture():
        model(x)
    assert 'compiled="eager"' in str(caught.value)


# FlexAttention.


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


class Flex(nn.Module):
    """FlexAttention that a model calls itself; `function` may be compiled."""

    def __init__(self, function: Any, kv: int = 2, alibi: bool = False) -> None:
        super().__init__()
        self.num_heads, self.kv, self.function = 4, kv, function
        self.q, self.k, self.v = (nn.Linear(24, 6 * n) for n in (4, kv, kv))
        self.o = nn.Linear(24, 24)
        self.register_buffer("slopes", torch.tensor([0.1, 0.2, 0.3, 0.4]))
        self.mask, self.alibi = create_block_mask(_causal, None, None, 20, 20, device="cpu"), alibi

    def forward(self, x: Tensor) -> Tensor:
        parts = ((self.q, 4), (self.k, self.kv), (self.v, self.kv))
        q, k, v = (part(x).unflatten(-1, (n, 6)).transpose(1, 2) for part, n in parts)
        slopes = self.slopes

        def bent(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + slopes[h] * (j - i)

        change = bent if self.alibi else None
        z = self.function(q, k, v, score_mod=change, block_mask=self.mask, enable_gqa=True)
        return self.o(z.transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_flex_attention_alone_and_in_a_compiled_model(whole: bool, alibi: bool) -> None:
    torch.manual_seed(0)
    function = flex_attention if whole else compiled(flex_attention)
    model, x = nn.Sequential(Flex(function, alibi=alibi), Flex(function, alibi=alibi)).eval(), torch.randn(2, 20, 24)
    plain = copy.deepcopy(model)
    for layer in plain:
        layer.function = flex_attention
    want: dict[int, Tensor] = {}
    with torch.no_grad():
        y = x
        for n, layer in enumerate(plain):
            q, k = layer.q(y).unflatten(-1, (4, 6)).transpose(1, 2), layer.k(y).unflatten(-1, (2, 6)).transpose(1, 2)
            scores = q.double() @ k.double().repeat_interleave(2, 1).mT / 6**0.5
            if alibi:
                scores += layer.slopes.double()[:, None, None] * (torch.arange(20) - torch.arange(20)[:, None])
            p = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(-1)
            want[n], y = torch.special.entr(p).sum(-1), layer(y)
        built = compiled(model) if whole else model
        bare = built(x)
        with workbench.attach(built, check=False) as wb:
            for _ in range(2):
                with wb.capture(("entropy",)) as cap:
                    assert torch.equal(built(x), bare)
        after = graphs()
        assert torch.equal(built(x), bare)
        assert graphs() == after
    assert [site.name for site in cap.sites] == ["0", "1"]
    for n, site in enumerate(cap):
        torch.testing.assert_close(site.entropy.double(), want[n], atol=1e-5, rtol=1e-5)


# How it is run.


def test_a_training_step(ids: Tensor) -> None:
    model = make(GPT2)
    built = compiled(model)

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        logits = built(ids).logits
        logits.square().mean().backward()
        return logits, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    bare = step()
    with workbench.attach(built) as wb, wb.capture(NAMES) as cap:
        seen = step()
    assert torch.equal(bare[0], seen[0])
    assert all(torch.equal(a, b) for a, b in zip(bare[1], seen[1], strict=True))
    assert_same(cap, capture(model, lambda: model(ids)))


def test_autocast(ids: Tensor) -> None:
    model = make(GPT2)
    built = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        bare = built(ids).logits
        with workbench.attach(model) as wb, wb.capture(NAMES) as want:
            model(ids)
        with workbench.attach(built) as wb, wb.capture(NAMES) as cap:
            assert torch.equal(built(ids).logits, bare)
    assert cap[0].pattern.q.dtype == want[0].pattern.q.dtype == torch.bfloat16
    assert_same(cap, want, tolerance=2e-3)  # this backend takes no denominators from the kernel, which rounds scores


def test_threads_that_share_a_model(ids: Tensor) -> None:
    model = make(GPT2)
    built = compiled(model, dynamic=True)
    parts = [ids[:, :n] for n in (5, 9, 13)]
    with torch.no_grad():
        bare = [built(part).logits for part in parts]
        seen: dict[int, Tensor] = {}
        with workbench.attach(built) as wb:
            with wb.capture():
                built(parts[0])

            def work(i: int) -> None:
                with torch.no_grad():
                    seen[i] = built(parts[i]).logits

            with wb.capture(NAMES) as cap:
                threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    assert all(torch.equal(seen[i], logits) for i, logits in enumerate(bare))
    for call, part in zip(sorted(cap.calls, key=lambda call: call[0].shape), parts, strict=True):
        assert_same(call, capture(model, lambda part=part: model(part)))


def test_an_error_in_the_model_leaves_nothing(ids: Tensor) -> None:
    model = make(GPT2)
    built = compiled(model)
    held = dict(vars(built))
    with workbench.attach(built) as wb, torch.no_grad():
        with pytest.raises(RuntimeError), wb.capture():
            built(inputs_embeds=torch.zeros(*ids.shape, 3))
        assert dict(vars(built)) == held
        with wb.capture(NAMES) as cap:
            built(ids)
    assert_same(cap, capture(model, lambda: model(ids)))


class Raising(Broken):
    """Attention that always raises, which Dynamo leaves to Python: and with it the code that other layers share."""

    raises = False

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        if self.raises:
            raise ValueError("mid-forward")
        return z


def test_a_model_that_raises_mid_forward() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Raising(), Raising()).eval(), torch.randn(2, 7, 24)
    model[1].raises = True
    for layer in model:
        layer.compile(backend="eager")
    with workbench.attach(model) as wb, torch.no_grad():
        for _ in range(2):
            with pytest.raises(ValueError, match="mid-forward"), wb.capture():
                model(x)
        caught = pytest.raises(CaptureError, match="what the compiler leaves to Python there is not seen")
        with caught as said, wb.capture(), contextlib.suppress(ValueError):
            model(x)
    assert 'compiled="eager"' in str(said.value)


def test_what_does_not_run_is_no_capture(ids: Tensor) -> None:
    model = make(GPT2)
    built = compiled(model)
    with workbench.attach(built) as wb, pytest.raises(CaptureError, match="did not run"), wb.capture():
        model(ids)  # not what was compiled


# What cannot be done in compiled code.


def test_interventions_and_gradients_are_refused(ids: Tensor) -> None:
    built = compiled(make(GPT2))
    with workbench.attach(built) as wb:
        for refused in (
            lambda: wb.ablate({(0, 1)}),
            lambda: wb.steer("transformer.h.0", torch.zeros(32)),
            lambda: wb.capture(gradients=True),
        ):
            with pytest.raises(CaptureError, match="is compiled") as caught, refused():
                pytest.fail("it began")
            assert 'attach(model, compiled="eager")' in str(caught.value)
        with pytest.raises(CaptureError, match="is compiled"):
            wb.verify(ids)


@pytest.mark.parametrize("stance", ["fail_on_recompile", "eager_on_recompile"])
def test_a_stance_that_forbids_to_compile(ids: Tensor, stance: str) -> None:
    built = compiled(make(GPT2))
    with (
        workbench.attach(built) as wb,
        torch.compiler.set_stance(stance),
        pytest.raises(CaptureError, match=stance) as caught,
        wb.capture(),
    ):
        built(ids)
    assert 'compiled="eager"' in str(caught.value)


def test_cuda_graphs(ids: Tensor) -> None:
    """Whole, they are refused; inductor leaves our operator out of those that it makes."""
    model = make(GPT2)

    def cudagraphs(graph: Any, inputs: Any) -> Any:  # named as PyTorch's, which needs a GPU to run
        return graph.forward

    built = torch.compile(model, backend=cudagraphs)
    with workbench.attach(built) as wb, pytest.raises(CaptureError, match="CUDA graphs") as caught, wb.capture():
        pytest.fail("it began")
    assert 'compiled="eager"' in str(caught.value)
    with torch.no_grad(), workbench.attach(built, compiled="eager") as wb, wb.capture(NAMES) as cap:
        built(ids)
    assert len(cap.sites) == 2
    assert torch.Tag.cudagraph_unsafe in ATTENTION.tags


def test_two_workbenches_on_one_compiled_part() -> None:
    model = by_layer(make(LLAMA))
    inputs = LLAMA.inputs()
    with (
        workbench.attach(model) as wb,
        workbench.attach(model.model.layers[0]) as part,
        torch.no_grad(),
        wb.capture() as cap,
    ):
        model(**inputs)
        with pytest.raises(CaptureError, match="another Workbench"), part.capture():
            pytest.fail("it began")
    assert len(cap.sites) == 2


def test_native_modules_beside_what_is_compiled() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 16, batch_first=True), nn.Linear(16, 16)).eval()
    model[1].compile(backend="eager")
    refused = pytest.raises(CaptureError, match="PyTorch's own attention")
    with workbench.attach(model) as wb, refused as caught, wb.capture():
        pytest.fail("it began")
    assert caught.value.site == "0"


# Uncompiled for as long as it is attached.


@pytest.mark.parametrize("change", [compiled, by_layer, in_list], ids=["whole", "by layer", "in a list"])
def test_eager(change: Callable[[Any], Any]) -> None:
    model, inputs = make(LLAMA), LLAMA.inputs()
    with torch.no_grad():
        eager = model(**inputs).logits
        with workbench.attach(model) as wb:
            with wb.ablate({(0, 1)}):
                ablated = model(**inputs).logits
            with wb.capture(NAMES) as want:
                model(**inputs)
        built = change(model)
        bare, before = built(**inputs).logits, graphs()
        with workbench.attach(built, compiled="eager") as wb:
            with wb.capture(NAMES) as cap:
                assert torch.equal(built(**inputs).logits, eager)
            with wb.ablate({(0, 1)}):
                assert torch.equal(built(**inputs).logits, ablated)
            assert wb.verify(**inputs).ok
            assert torch.equal(wb.model(**inputs).logits, eager)
        assert torch.equal(built(**inputs).logits, bare)
    assert graphs() == before
    assert cap.provenance["compiled"] == "run uncompiled: outputs are those of the eager model, to the bit"
    names = {"model.layers.1._orig_mod.self_attn": "model.layers.1.self_attn"} if change is in_list else {}
    assert_same(cap, want, names)


def test_eager_ends_with_the_workbench() -> None:
    model = make(LLAMA)
    built = by_layer(model)
    wb = workbench.attach(built, compiled="eager")
    assert not find_regions(built)
    del wb
    assert len(find_regions(built)) == 2


def test_an_unknown_way_of_running() -> None:
    with pytest.raises(workbench.AttachError, match="recorded"):
        workbench.attach(make(GPT2), compiled="graphs")  # type: ignore[arg-type]
    assert issubclass(InterventionError, workbench.WorkbenchError)
