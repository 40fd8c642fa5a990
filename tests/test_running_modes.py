"""The ways in which people run models: outputs stay the same to the bit, statistics are those of a plain forward."""

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import workbench
from support.tiny import FAMILIES, make
from workbench import Capture, CaptureError
from workbench.hooks.compiled.regions import check_not_compiled

BY_NAME = {family.name: family for family in FAMILIES}
GPT2, LLAMA, WHISPER = BY_NAME["gpt2"], BY_NAME["llama-gqa"], BY_NAME["whisper"]
ROWS = ("lse", "entropy", "peak", "effective_keys", "distance", "distance_var", "sink", "current", "previous")
NAMES = (*ROWS, "received", "top_keys", "pooled_max", "induction")


@pytest.fixture(params=[GPT2, LLAMA], ids=lambda family: family.name)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture
def ids() -> Tensor:
    return GPT2.inputs()["input_ids"]


def _capture(model: nn.Module, run: Callable[[], Any], names: tuple[str, ...] = NAMES) -> Capture:
    with workbench.attach(model) as wb, wb.capture(names) as capture:
        run()
    return capture


def _plain(model: nn.Module, ids: Tensor, names: tuple[str, ...] = NAMES) -> Capture:
    with torch.no_grad():
        return _capture(model, lambda: model(ids), names)


def assert_same(got: Capture, want: Capture, tolerance: float = 1e-5) -> None:
    assert [site.name for site in got.sites] == [site.name for site in want.sites]
    assert got.statistics == want.statistics
    for a, b in zip(got, want, strict=True):
        for name, value in b.statistics.items():
            assert not a.statistics[name].requires_grad
            torch.testing.assert_close(a.statistics[name], value, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd(model: Any, ids: Tensor, context: Callable[[], AbstractContextManager[None]]) -> None:
    with context():
        bare = model(ids).logits
        with workbench.attach(model) as wb, wb.capture(NAMES) as capture:
            seen = model(ids).logits
    assert torch.equal(bare, seen)
    assert (bare.requires_grad, bare.is_inference()) == (seen.requires_grad, seen.is_inference())
    assert_same(capture, _plain(model, ids))


def _gradients(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(ids).logits
    logits.square().mean().backward()
    return logits, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_a_training_step(model: Any, ids: Tensor) -> None:
    bare = _gradients(model, ids)
    with workbench.attach(model) as wb, wb.capture(NAMES) as capture:
        seen = _gradients(model, ids)
    assert torch.equal(bare[0], seen[0])
    assert len(bare[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(bare[1], seen[1], strict=True))
    assert_same(capture, _plain(model, ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model: Any, ids: Tensor, reentrant: bool) -> None:
    """What the backward pass computes again is no forward of its own."""
    plain = _plain(model, ids)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ran = [0]
    first = next(module for name, module in model.named_modules() if name.endswith("attn"))
    counter = first.register_forward_pre_hook(lambda *_: ran.__setitem__(0, ran[0] + 1))
    bare = _gradients(model, ids)
    assert ran == [2], "the model computed nothing again, so that there is nothing to test"
    counter.remove()
    with workbench.attach(model) as wb, wb.capture(NAMES) as capture:
        seen = [_gradients(model, ids) for _ in range(2)]
    assert all(torch.equal(bare[0], logits) for logits, _ in seen)
    assert all(torch.equal(a, b) for _, gradients in seen for a, b in zip(bare[1], gradients, strict=True))
    assert len(capture.calls) == 2
    for call in capture.calls:
        assert_same(call, plain)


def test_bfloat16(model: Any, ids: Tensor) -> None:
    model.bfloat16()
    with torch.no_grad():
        bare = model(ids).logits
        with workbench.attach(model) as wb, wb.capture(NAMES) as capture:
            assert torch.equal(model(ids).logits, bare)
    assert bare.dtype == torch.bfloat16
    for site in capture:
        assert {t.dtype for t in site.statistics.values()} == {torch.float32, torch.int64}
        exact = site.pattern
        scores = exact.q.double() @ exact.k.double().repeat_interleave(exact.q.shape[1] // exact.k.shape[1], 1).mT
        hidden = torch.ones(17, 17).triu(1).bool()
        truth = (scores * exact.scale).masked_fill(hidden, -torch.inf).softmax(-1)
        torch.testing.assert_close(site.entropy.double(), torch.special.entr(truth).sum(-1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(site.received.double(), truth.sum(-2), atol=1e-4, rtol=1e-4)
    first = _plain(model.float(), ids)[0]  # later layers have drifted apart
    torch.testing.assert_close(capture[0].entropy, first.entropy, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: Any, ids: Tensor, side: str) -> None:
    """Each row of a padded batch has the statistics that it has alone."""
    names = (*ROWS, "received") if side == "left" else ROWS  # to the right, rows of padding give to real keys
    lengths = [11, 17]
    shown = torch.stack([torch.arange(17) >= 17 - n if side == "left" else torch.arange(17) < n for n in lengths])
    inputs = {"input_ids": ids, "attention_mask": shown.long(),
              "position_ids": (shown.long().cumsum(-1) - 1).clamp(min=0)}  # fmt: skip
    with torch.no_grad():
        bare = model(**inputs).logits
        with workbench.attach(model) as wb, wb.capture(names) as capture:
            assert torch.equal(model(**inputs).logits, bare)
    for row, real in enumerate(shown):
        alone = _plain(model, ids[row : row + 1, real], names)
        for padded, whole in zip(capture, alone, strict=True):
            for name in names:
                got, want = padded.statistics[name][row : row + 1][..., real], whole.statistics[name]
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, equal_nan=True, msg=f"{name} differs")


def test_threads_that_share_a_model(model: Any, ids: Tensor) -> None:
    parts = [ids[:, :n] for n in (5, 9, 13, 17)]
    with torch.no_grad():
        bare = [model(part).logits for part in parts]
    seen: dict[int, Tensor] = {}
    barrier = threading.Barrier(len(parts))

    def work(i: int) -> None:
        with torch.no_grad():
            barrier.wait()
            for _ in range(3):
                seen[i] = model(parts[i]).logits

    with workbench.attach(model) as wb, wb.capture(NAMES) as capture:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(seen[i], logits) for i, logits in enumerate(bare))
    calls = sorted(capture.calls, key=lambda call: call[0].shape)
    assert len(calls) == 3 * len(parts)
    for i, part in enumerate(parts):
        want = _plain(model, part)
        for call in calls[3 * i : 3 * i + 3]:
            assert_same(call, want)


def test_a_part_that_is_attached_alone(ids: Tensor) -> None:
    model: Any = make(LLAMA)
    whole = _plain(model, ids)
    inside = _capture(model.model, lambda: model(ids))
    alone = _capture(model.model, lambda: model.model(ids))
    block = _capture(model.model.layers[1], lambda: model(ids), ROWS)
    for part in (inside, alone):
        assert [f"model.{site.name}" for site in part.sites] == [site.name for site in whole.sites]
        for a, b in zip(part, whole, strict=True):
            assert all(
                torch.allclose(a.statistics[name], b.statistics[name], rtol=0, atol=0, equal_nan=True)
                for name in b.statistics
            )
    assert [site.name for site in block.sites] == ["self_attn"]
    assert torch.equal(block[0].entropy, whole[1].entropy)


@torch.no_grad()
def test_a_part_that_mixes_no_tokens_begins_no_forward(model: Any, ids: Tensor) -> None:
    """A user's logit lens, and the weight of a projection that is made anew whenever it is read."""
    last = model.get_submodule(
        "transformer.h.1.attn.c_proj" if hasattr(model, "transformer") else "model.layers.1.self_attn.o_proj"
    )
    torch.nn.utils.parametrizations.weight_norm(last)
    with workbench.attach(model) as wb:
        with wb.capture(("entropy",), z=True) as capture:
            for hidden in model(ids, output_hidden_states=True).hidden_states:
                model.lm_head(hidden)
            model(ids)
        steps: list[Any] = []
        with wb.watch_rows("L0H1", steps.append):
            model.lm_head(model(ids, output_hidden_states=True).hidden_states[0])
        with pytest.raises(CaptureError, match="did not run inside"), wb.capture(("entropy",)):
            model.lm_head(hidden)
    assert [forward.index for forward in capture.forwards] == [0, 1]
    assert capture.calls[1][1].result().shape == (
        *ids.shape,
        4 if hasattr(model, "transformer") else 6,
        hidden.shape[-1],
    )
    assert len(steps) == 1


def _with_distances(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """Attention of a user's own, which takes off the distance of a key that no argument tells of."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    at = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] - torch.arange(k.shape[2])
    scores = q @ k.mT * more["scaling"] - 0.5 * at
    weights = (scores if mask is None else scores + mask[..., : k.shape[2]]).softmax(-1)
    return (weights @ v).transpose(1, 2).contiguous(), weights


@torch.no_grad()
def test_a_backend_that_does_more_than_it_is_told(model: Any, ids: Tensor) -> None:
    """Its own weights are taken; of a prompt of one token nothing shows that they are needed."""
    transformers.AttentionInterface.register("distances", _with_distances)
    transformers.AttentionMaskInterface.register("distances", transformers.masking_utils.eager_mask)
    model.set_attn_implementation("distances")
    want = model(ids, output_attentions=True).attentions
    rows: list[Tensor] = []
    with workbench.attach(model) as wb:
        assert wb.verify(ids).ok
        with wb.capture(("entropy",), values=True) as capture:
            cache = model(ids[:, :1], use_cache=True).past_key_values
            model(ids[:, 1:], past_key_values=cache)
        with wb.watch_rows("L1H2", lambda step: rows.append(step.rows["L1H2"])):
            cache = model(ids[:, :1], use_cache=True).past_key_values
            for at in range(1, 4):
                model(ids[:, at : at + 1], past_key_values=cache)
        with wb.edit_pattern("L1H2", lambda rows, site, head: rows):
            torch.testing.assert_close(model(ids).logits, model(ids).logits)
    for site, weights in zip(capture.calls[1], want, strict=True):
        torch.testing.assert_close(site.pattern.dense(), weights[:, :, 1:])
    for at, row in enumerate(rows):
        torch.testing.assert_close(row, want[1][:, 2, at, : at + 1])


def test_an_encoder_that_is_attached_alone() -> None:
    model: Any = make(WHISPER)
    inputs = WHISPER.inputs()
    whole = _capture(model, lambda: model(**inputs), ROWS)
    encoder = model.get_encoder()
    part = _capture(encoder, lambda: encoder(inputs["input_features"]), ROWS)
    assert len(part) == 2
    assert torch.equal(part[1].entropy, whole["encoder.1.attn"].entropy)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", [GPT2, BY_NAME["t5"]], ids=lambda family: family.name)
def test_a_copy_made_while_a_capture_is_open(family: Any, copied: Callable[[Any], Any]) -> None:
    model: Any = make(family)
    inputs = family.inputs()
    with workbench.attach(model) as wb, torch.no_grad():
        bare = model(**inputs).logits
        with wb.capture() as capture:
            model(**inputs)
            twin = copied(model)
            assert torch.equal(twin(**inputs).logits, bare)
            assert torch.equal(model(**inputs).logits, bare)
        assert torch.equal(twin(**inputs).logits, bare)
    assert len(capture.calls) == 2  # the twin's is none of them


# Compiled models.


@pytest.fixture(autouse=True)
def _no_stance() -> Any:
    yield
    torch.compiler.set_stance("default")


compiled = functools.partial(torch.compile, backend="eager")


def _whole(model: Any) -> Any:
    return compiled(model)


def _one_layer(model: Any) -> Any:
    model.transformer.h[1] = compiled(model.transformer.h[1])
    return model


def _in_place(model: Any) -> Any:
    model.transformer.h[1].attn.compile(backend="eager")
    return model


def _forward(model: Any) -> Any:
    model.forward = compiled(model.forward)
    return model


@pytest.mark.parametrize(
    ("change", "site"),
    [(_whole, None), (_one_layer, "transformer.h.1"), (_in_place, "transformer.h.1.attn"), (_forward, None)],
)
def test_a_compiled_model_is_not_edited_unless_it_runs_eagerly(
    ids: Tensor, change: Callable[[Any], Any], site: str | None
) -> None:
    model: Any = make(GPT2)
    plain = _plain(model, ids)
    built = change(model)
    with workbench.attach(built) as wb, torch.no_grad():
        with pytest.raises(CaptureError, match="is compiled") as caught, wb.ablate({(0, 1)}):
            pytest.fail("the intervention began")
        assert caught.value.site == site
        assert 'attach(model, compiled="eager")' in str(caught.value)
        with torch.compiler.set_stance("force_eager"):
            bare = built(ids).logits
            with wb.capture(NAMES) as capture:
                assert torch.equal(built(ids).logits, bare)
    assert len(capture) == 2
    for a, b in zip(capture, plain, strict=True):
        assert all(
            torch.allclose(a.statistics[name], b.statistics[name], rtol=0, atol=0, equal_nan=True)
            for name in b.statistics
        )


def test_what_was_compiled_can_be_attached_itself(ids: Tensor) -> None:
    model: Any = make(GPT2)
    built: Any = compiled(model)
    assert_same(_plain(built._orig_mod, ids), _plain(make(GPT2), ids))


def _square(x: Tensor) -> Tensor:
    return x * x


_compiled_square = compiled(_square)


def _calls_square(x: Tensor) -> Tensor:
    return _compiled_square(x)


class ByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _compiled_square(x)


class ByAnother(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([_calls_square(row) for row in x])


class Method(nn.Module):
    @functools.partial(torch.compile, backend="eager")
    def square(self, x: Tensor) -> Tensor:
        return x * x

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x)


class Decorated(nn.Module):
    @functools.partial(torch.compile, backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = compiled(_square)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def _closure() -> nn.Module:
    inner = compiled(_square)

    class Closure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner(x)

    return Closure()


class Harmless(nn.Module):
    """Mentions a function that compilers leave alone, and holds one that its forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = compiled(_square)
        self.plain = torch.compiler.disable(_square)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x)


@pytest.mark.parametrize(
    ("make_module", "says"),
    [
        (ByName, r"_compiled_square\(\), which ByName runs"),
        (ByAnother, r"_compiled_square\(\), which ByAnother runs"),
        (Method, r"square\(\), which Method runs"),
        (Decorated, r"forward\(\), which Decorated runs"),
        (Attribute, r"act\(\), which Attribute runs"),
        (_closure, r"inner\(\), which Closure runs"),
    ],
)
def test_functions_compiled_inside_a_forward(make_module: Callable[[], nn.Module], says: str) -> None:
    model: Any = make(GPT2)
    check_not_compiled(model)
    model.transformer.h[0].mlp.act = make_module()
    with pytest.raises(CaptureError, match=says) as caught:
        check_not_compiled(model)
    assert caught.value.site == "transformer.h.0.mlp.act"
    with torch.compiler.set_stance("force_eager"):
        check_not_compiled(model)


def test_what_is_not_compiled_is_not_refused(ids: Tensor) -> None:
    model: Any = make(GPT2)
    model.transformer.h[0].mlp.act = Harmless()
    assert len(_plain(model, ids)) == 2


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_family_is_taken_for_compiled(family: Any) -> None:
    check_not_compiled(make(family))


def test_what_was_compiled_around_the_model_gives_no_empty_capture(ids: Tensor) -> None:
    model: Any = make(GPT2)
    outer = compiled(lambda x: model(x).logits)
    with torch.no_grad():
        bare = outer(ids)
        with (
            workbench.attach(model) as wb,
            pytest.raises(CaptureError, match="did not run"),
            wb.capture(),
        ):
            assert torch.equal(outer(ids), bare)


class _Jagged(nn.Module):
    """Attention of examples that have lengths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        several = torch.nested.nested_tensor([x[0], x[1, :5]], layout=torch.jagged)
        q, k, v = (part(several).unflatten(-1, [4, 4]).transpose(1, 2) for part in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(z.transpose(1, 2).flatten(-2)).to_padded_tensor(0.0)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_nested_tensors_are_refused() -> None:
    model, x = nn.Sequential(_Jagged()).eval(), torch.randn(2, 7, 16)
    bare = model(x)
    with workbench.attach(model) as wb:
        with pytest.raises(CaptureError, match=r"nested tensor[\s\S]*pad them"), wb.capture():
            model(x)
        with wb.steer("0", torch.zeros(16)):
            assert torch.equal(model(x), bare)
    assert torch.equal(model(x), bare)


class _Mixed(nn.Module):
    """A part of PyTorch's own under autocast, which is closed around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        alone = isinstance(self.layer, nn.MultiheadAttention)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.layer(x, x, x, need_weights=False)[0] if alone else self.layer(x)
        return y.float()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        lambda: nn.TransformerEncoderLayer(16, 4, 16, batch_first=True),
        lambda: nn.TransformerEncoderLayer(16, 4, 16, batch_first=True, norm_first=True),
    ],
    ids=["attention", "layer", "norm first"],
)
def test_native_paths_under_autocast(layer: Callable[[], nn.Module], gradients: bool) -> None:
    """What a native operator calls runs under the autocast that there is; a look runs modules so too."""
    torch.manual_seed(0)
    model, x = _Mixed(layer()).eval(), torch.randn(2, 7, 16)
    with torch.set_grad_enabled(gradients):
        bare = model(x)
        with workbench.attach(model) as wb:
            with wb.capture() as cap:
                assert torch.equal(model(x), bare)
            assert (cap[0].kernel.endswith("for_cpu")) == gradients
            found = wb.verify(x).raise_if_failed()
        assert found.complete, wb.sites
