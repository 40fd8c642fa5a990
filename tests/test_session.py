"""Attaching and capturing: what a user gets, and what bad input says."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.tiny import FAMILIES, family, make
from workbench import AttachError, CaptureError

GPT2 = FAMILIES[0]
WHISPER = FAMILIES[-1]


@pytest.fixture
def model() -> nn.Module:
    return make(GPT2)


@pytest.fixture
def ids() -> torch.Tensor:
    return GPT2.inputs()["input_ids"]


def test_sites_are_known_before_anything_ran(model: nn.Module) -> None:
    with workbench.attach(model) as wb:
        assert len(wb.sites) == 2
        site = wb.sites["blocks.1.attn"]
        assert site is wb.sites["transformer.h.1.attn"] is wb.sites["blocks.1.attn.hook_pattern"] is wb.sites[1]
        assert (site.layer, site.kind, site.n_heads, site.n_kv_heads, site.d_head) == (1, "self", 4, 4, 8)
        assert site.label(3) == "L1H3"
        assert "transformer.h.1.attn" in repr(wb.sites)
        assert "blocks.1.attn" in wb.sites._repr_html_()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_sites_read_from_code_are_those_that_fire(family) -> None:
    built = make(family)
    with workbench.attach(built) as wb:
        before = [(s.name, s.layer, s.kind, s.n_heads, s.n_kv_heads, s.d_head, s.tower) for s in wb.sites]
        with wb.capture() as capture:
            built(**family.inputs())
        after = [(s.name, s.layer, s.kind, s.n_heads, s.n_kv_heads, s.d_head, s.tower) for s in wb.sites]
    assert before == after
    assert [s.name for s in capture.sites] == [name for name, *_ in before]


def test_towers_and_kinds_of_an_encoder_decoder() -> None:
    with workbench.attach(make(WHISPER)) as wb:
        assert [site.alias for site in wb.sites] == [
            "encoder.0.attn", "encoder.1.attn", "decoder.0.attn", "decoder.0.cross_attn", "decoder.1.attn",
            "decoder.1.cross_attn",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("thing", "hint"),
    [("gpt2", "nn.Module"), (nn.Linear(2, 2), "check=False"), (type("P", (), {"model": nn.Linear(1, 1)})(), ".model")],
    ids=["string", "no attention", "pipeline"],
)
def test_what_cannot_be_attached(thing: object, hint: str) -> None:
    with pytest.raises(AttachError) as caught:
        workbench.attach(thing)
    assert hint in str(caught.value)


def test_attaching_twice(model: nn.Module) -> None:
    wb = workbench.attach(model)
    with pytest.raises(AttachError, match="attached already"):
        workbench.attach(model)
    wb.detach()
    wb.detach()
    workbench.attach(model).detach()


def test_a_forgotten_workbench_does_not_block_its_model(model: nn.Module) -> None:
    workbench.attach(model)
    workbench.attach(model).detach()


def test_capture_after_detach(model: nn.Module) -> None:
    wb = workbench.attach(model)
    wb.detach()
    with pytest.raises(AttachError, match="detached"), wb.capture():
        pass
    with pytest.raises(AttachError, match="detached"):
        wb.verify(input_ids=torch.ones(1, 2, dtype=torch.long))


def test_nested_captures(model: nn.Module, ids: torch.Tensor) -> None:
    with workbench.attach(model) as wb, wb.capture():
        with pytest.raises(CaptureError, match="capturing"), wb.capture():
            pass
        model(ids)


def test_a_site_that_does_not_exist(model: nn.Module) -> None:
    with workbench.attach(model) as wb, pytest.raises(CaptureError) as caught, wb.capture(sites="transformer.h.1.atn"):
        pass
    assert 'did you mean "transformer.h.1.attn"?' in str(caught.value)


def test_no_site_chosen(model: nn.Module) -> None:
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match="no site was chosen"):
        wb.capture(sites=[]).__enter__()


@pytest.mark.parametrize("names", [["entropi"], "entropy", ["value_weighted_lse"]])
def test_a_statistic_that_does_not_exist(model: nn.Module, names: object) -> None:
    with workbench.attach(model) as wb, pytest.raises(CaptureError) as caught, wb.capture(names):
        pass
    assert "Hint" in str(caught.value)


def test_a_capture_in_which_nothing_runs(model: nn.Module) -> None:
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match="did not run"), wb.capture():
        pass


def test_attention_written_out_by_hand() -> None:
    class ByHand(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.transpose(-1, -2)).softmax(-1) @ x

    x = torch.randn(2, 5, 4)
    with workbench.attach(ByHand().eval()) as wb:
        assert wb.verify(x).ok
        with wb.capture() as capture:
            wb.model(x)
    assert torch.equal(capture[0].pattern.dense()[:, 0], (x @ x.transpose(-1, -2)).softmax(-1))


def test_a_model_that_never_calls_a_tapped_function() -> None:
    class ByHand(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.transpose(-1, -2)).sigmoid() @ x

    built = ByHand().eval()
    with pytest.raises(AttachError):
        workbench.attach(built)
    with (
        workbench.attach(built, check=False) as wb,
        pytest.raises(CaptureError, match="no attention call was seen"),
        wb.capture(),
    ):
        built(torch.randn(1, 3, 4))


def test_a_hidden_call_of_sdpa_is_still_seen() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = {"f": torch.nn.functional.scaled_dot_product_attention}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.kernel["f"](x, x, x)

    built = Hidden()
    with workbench.attach(built, check=False) as wb:
        assert len(wb.sites) == 0
        with wb.capture() as capture:
            built(torch.randn(1, 2, 3, 4))
        assert [(s.n_heads, s.d_head) for s in wb.sites] == [(2, 4)]
    assert capture[0].entropy.shape == (1, 2, 3)


def test_an_eager_model_gives_what_its_twin_on_sdpa_gives(model: nn.Module, ids: torch.Tensor) -> None:
    from support.tiny import eager_twin

    with torch.no_grad():
        with workbench.attach(model) as wb, wb.capture() as fast:
            model(ids)
        eager = eager_twin(model)
        with workbench.attach(eager) as wb, wb.capture() as slow:
            eager(ids)
    assert slow[0].kernel == "eager"
    torch.testing.assert_close(slow[0].entropy, fast[0].entropy)


def test_a_site_that_does_not_fire() -> None:
    built, inputs = make(WHISPER), WHISPER.inputs()
    with workbench.attach(built) as wb:
        with pytest.warns(UserWarning, match="4 of 6 sites did not fire"), wb.capture() as capture:
            built.model.encoder(inputs["input_features"])
        assert len(capture.silent) == 4
        with pytest.raises(CaptureError, match="no attention call was seen"), wb.capture(sites="decoder.0.attn"):
            built.model.encoder(inputs["input_features"])


def test_train_mode_with_dropout_warns_once_and_names_it(model: nn.Module, ids: torch.Tensor) -> None:
    model.train()
    with workbench.attach(model) as wb:
        with pytest.warns(UserWarning, match=r"train mode.*transformer.drop"), wb.capture() as capture:
            model(ids)
        with warnings.catch_warnings(), wb.capture():
            warnings.simplefilter("error")
            model(ids)
    assert capture["blocks.0.attn"].kernel == "math"  # the CPU's fast kernel has no dropout
    sums = capture["blocks.0.attn"].pattern.dense().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_verify_accepts_dropout(model: nn.Module, ids: torch.Tensor) -> None:
    with workbench.attach(model.train()) as wb:
        assert wb.verify(input_ids=ids).identical


def test_inputs_on_another_device(model: nn.Module, ids: torch.Tensor) -> None:
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match="on meta, the model on cpu"), wb.capture():
        model(input_ids=ids.to("meta"))


def test_an_empty_prompt(model: nn.Module) -> None:
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match="empty"), wb.capture():
        model(input_ids=torch.zeros(1, 0, dtype=torch.long))


def test_a_prompt_longer_than_the_context(model: nn.Module) -> None:
    ids = torch.zeros(1, 65, dtype=torch.long)
    message = "65 tokens, the model's context 64"
    with workbench.attach(model) as wb:
        with pytest.raises(CaptureError, match=message):
            wb.verify(input_ids=ids)
        with pytest.raises(CaptureError, match=message), wb.capture():
            model(ids)


def test_texts_that_are_padded_on_the_left_have_the_positions_of_each_alone() -> None:
    """A table of positions, which counts from the first column unless it is told better."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    texts = ["w5 w9 w11 w3 w8", "w7 w2"]
    with workbench.attach(make(family("gpt2")), tokenizer) as wb, torch.no_grad():
        inputs = wb.tokenize(texts)
        assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
        assert "position_ids" not in wb.tokenize(texts[0])
        together = wb.model(**inputs).logits[:, -1]
        alone = torch.cat([wb.model(**wb.tokenize(text)).logits[:, -1] for text in texts])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        written = wb.model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        single = wb.model.generate(**wb.tokenize(texts[1]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert written[1, -4:].tolist() == single[0, -4:].tolist()
    with workbench.attach(make(family("bloom")), tokenizer) as wb:
        assert "position_ids" not in wb.tokenize(texts)  # it counts by the mask


def test_a_text_without_tokens_is_empty() -> None:
    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb, pytest.raises(CaptureError, match="the input prompt is empty"):
        wb.tokenize("  ")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"input_ids": torch.tensor([[1, 999]])}, "no id 999: the model knows 0 to 323"),
        ({"input_ids": torch.tensor([[1, -1]])}, "no id -1"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, "input_ids are torch.float32, expected whole numbers"),
        ({"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[-100, 999]])}, "no label 999"),
    ],
)
def test_ids_that_the_vocabulary_does_not_have(bad: dict[str, Tensor], message: str) -> None:
    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb:
        with pytest.raises(CaptureError, match=message), wb.capture():
            model(**bad)
        with pytest.raises(workbench.WorkbenchError, match=message):
            workbench.head_importance(wb, [bad], metric="loss")


def test_half_a_character_is_no_text() -> None:
    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb:
        for text, where in (("a \udcff", r"U\+DCFF at 2"), (["a", "\ud83d"], r"U\+D83D at 0")):
            with pytest.raises(CaptureError, match=f"half of a character, {where}"):
                wb.tokenize(text)
        with pytest.raises(workbench.WorkbenchError, match="`inputs` is a str, and no Mapping"):
            workbench.saliency(wb, "a text")
    with pytest.raises(workbench.TaskError, match="in example 0, the text holds half of a character"):
        workbench.tasks.from_prompts(["a \ud800"], ["b \ud800"], [" c"], [" d"])


def test_text_needs_a_tokenizer(model: nn.Module) -> None:
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match="tokenizer"):
        wb.tokenize("hello")


def test_the_limit_says_how_much_and_how_to_ask_for_less(model: nn.Module, ids: torch.Tensor) -> None:
    with workbench.attach(model) as wb:
        needed = wb.estimate(2, 17, pattern=True)
        with (
            pytest.raises(CaptureError, match=r"bytes or more, the limit is 1,000") as caught,
            wb.capture(pattern=True, limit=1000),
        ):
            model(ids)
        assert "fewer sites" in str(caught.value)
        with wb.capture(pattern=True, limit=needed) as capture:
            model(ids)
    assert 0 < capture.nbytes <= needed


def test_dense_refuses_above_its_limit(model: nn.Module, ids: torch.Tensor) -> None:
    with workbench.attach(model) as wb, wb.capture() as capture:
        model(ids)
    size = 2 * 4 * 17 * 17 * 4
    with pytest.raises(CaptureError, match=f"{size:,} bytes, the limit is {size - 1:,}"):
        capture[0].pattern.dense(limit=size - 1)
    assert capture[0].pattern.dense(limit=size).shape == (2, 4, 17, 17)


class Cached(nn.Module):
    """Writes its keys and its mask into buffers of its own, as a static cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 2, 5, 4))
        self.register_buffer("mask", torch.zeros(1, 1, 5, 5))

    def forward(self, x: torch.Tensor, bias: float) -> torch.Tensor:
        self.keys.copy_(x)
        self.mask[..., 0] = bias
        return torch.nn.functional.scaled_dot_product_attention(x, self.keys, x, attn_mask=self.mask)


def test_a_pattern_outlives_the_models_buffers() -> None:
    built = Cached()
    with workbench.attach(built) as wb, wb.capture(pattern=True) as capture:
        built(torch.randn(1, 2, 5, 4), 1.0)
    built.keys.zero_()
    torch.testing.assert_close(capture[0].pattern.dense(), capture[0].weights)


def test_a_pattern_whose_mask_was_overwritten_is_refused() -> None:
    built = Cached()
    with workbench.attach(built) as wb, wb.capture() as capture:
        built(torch.randn(1, 2, 5, 4), 1.0)
    built.mask.fill_(2.0)
    with pytest.raises(CaptureError, match="overwritten"):
        _ = capture[0].pattern


@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_statistics_are_ordinary_full_precision_tensors(model: nn.Module, ids: torch.Tensor, context) -> None:
    with workbench.attach(model) as wb, context(), wb.capture(["entropy"]) as capture:
        model(ids)
    entropy = capture[0].entropy
    assert entropy.dtype == torch.float32
    assert not entropy.is_inference()
    assert not entropy.requires_grad
    pattern = capture[0].pattern
    # Under autocast the kernel's lse has the error of its bfloat16 products, about 5e-5 here.
    torch.testing.assert_close(torch.special.entr(pattern.dense()).sum(-1), entropy, atol=2e-4, rtol=1e-5)


def test_verify_finds_a_tap_that_lies(model: nn.Module, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.hooks.tap import AttentionCall

    honest = AttentionCall.pattern

    def lying(self: AttentionCall, **options: object):
        pattern = honest(self, **options)
        pattern.scale *= 1.5
        return pattern

    monkeypatch.setattr(AttentionCall, "pattern", lying)
    with workbench.attach(model) as wb:
        found = wb.verify(input_ids=ids)
    assert not found.ok
    with pytest.raises(AttachError, match="A·V is not the kernel's output"):
        found.raise_if_failed()


@pytest.mark.parametrize(
    ("use", "context", "idle"),
    [
        (lambda x, z: x + 0 * z, torch.no_grad, True),
        (lambda x, z: x + 0 * z, torch.inference_mode, True),
        (lambda x, z: x + 0 * z.detach(), torch.no_grad, False),
        (lambda x, z: x, torch.no_grad, False),
    ],
)
def test_verify_tells_a_site_that_adds_nothing_from_one_whose_output_goes_nowhere(use, context, idle: bool) -> None:
    class Unused(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return use(x, torch.nn.functional.scaled_dot_product_attention(x, x, x))

    with workbench.attach(Unused()) as wb, context():
        found = wb.verify(torch.randn(1, 2, 3, 4))
        assert found.identical
        assert found.ok == idle
        assert found.table[["editable", "idle"]].values.tolist() == [[False, idle]]
        assert ("adds nothing here" in repr(found)) == idle
        if not idle:
            with pytest.raises(AttachError, match="stays the same"):
                found.raise_if_failed()


def test_a_capture_of_a_tap_that_lies_is_refused(
    model: nn.Module, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.hooks import registry

    read = registry.read
    monkeypatch.setattr(registry, "read", lambda *args: read(*args) | {"scale": 0.1, "lse": None})
    with (
        torch.no_grad(),
        workbench.attach(model) as wb,
        pytest.raises(CaptureError, match="is not what it computes"),
        wb.capture(),
    ):
        model(ids)


def test_verify_finds_a_model_that_is_not_deterministic(model: nn.Module, ids: torch.Tensor) -> None:
    model.lm_head.register_forward_hook(lambda m, i, out: out + torch.rand(1, generator=generator))
    generator = torch.Generator().manual_seed(0)
    with workbench.attach(model) as wb, pytest.raises(AttachError, match="deterministic"):
        wb.verify(input_ids=ids).raise_if_failed()
