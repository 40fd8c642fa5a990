"""Captures of `generate()`: its steps joined are what one forward over prompt and answer shows."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.tiny import FAMILIES, SPECIAL, VOCABULARY, Family, make
from workbench import Capture, CaptureError
from workbench.kernels.statistics import STATISTICS

NEW = 7
BY_NAME = {family.name: family for family in FAMILIES}
EVERYTHING = tuple(STATISTICS)
OPTIONS: dict[str, Any] = {"n_top": 3, "block": 5, "z": True, "pattern": True, "values": True}


def _mistral(kv: int = 4) -> nn.Module:
    return hf.MistralForCausalLM(
        hf.MistralConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv, hidden_size=32, intermediate_size=32,
            vocab_size=VOCABULARY, sliding_window=5, head_dim=8, **SPECIAL,
        )
    )  # fmt: skip


def _llama(kv: int = 2) -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv, hidden_size=32, intermediate_size=32,
            vocab_size=VOCABULARY, **SPECIAL,
        )
    )  # fmt: skip


def _gpt_oss() -> nn.Module:
    """Sink logits, and one layer of two with a window."""
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=32,
            vocab_size=VOCABULARY, sliding_window=5, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
            layer_types=["sliding_attention", "full_attention"], **SPECIAL,
        )
    )  # fmt: skip


def _bloom() -> nn.Module:
    """Writes its attention out, so that only weights and values are known."""
    return hf.BloomForCausalLM(hf.BloomConfig(n_layer=2, n_head=4, hidden_size=32, vocab_size=VOCABULARY, **SPECIAL))


def _made(build: Callable[[], nn.Module]) -> Any:
    return make(Family("", build, dict, {}))


def _ids(batch: int, length: int) -> Tensor:
    """Few different tokens, so that there is something to find for induction."""
    return torch.randint(3, 9, (batch, length), generator=torch.Generator().manual_seed(length))


def _generate(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    plain = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0} | options
    made: Tensor = model.generate(**inputs, **plain)
    return made


def _captured(model: nn.Module, run: Callable[[Any], Any], names: tuple[str, ...] = EVERYTHING, **options: Any):
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(names, **OPTIONS | options) as capture:
        out = run(model)
    return capture, out


def assert_same(joined: Capture, whole: Capture, tolerance: float = 2e-5, of_statistics: float = 1e-4) -> None:
    """Statistics, patterns, z, shapes and ids are the same."""
    assert [site.name for site in joined.sites] == [site.name for site in whole.sites]
    for got, want in zip(joined, whole, strict=True):
        assert got.shape == want.shape
        assert got.statistics.keys() == want.statistics.keys()
        truth = want.pattern.dense()
        torch.testing.assert_close(got.pattern.dense(), truth, atol=tolerance, rtol=0)
        torch.testing.assert_close(got.weights, truth, atol=tolerance, rtol=0)
        assert torch.equal(got.pattern.seen.keys_per_query.expand(got.shape[:3]),
                           want.pattern.seen.keys_per_query.expand(got.shape[:3]))  # fmt: skip
        alive = want.pattern.seen.keys_per_query.expand(got.shape[:3]).transpose(1, 2) > 0
        torch.testing.assert_close(got.z[alive], want.z[alive], atol=1e-4, rtol=1e-4)
        for name, value in want.statistics.items():
            found = got.statistics[name]
            if name == "peak_key":
                found, value = (truth.gather(-1, t.clamp(min=0)[..., None]) for t in (found, value))
            if name == "top_keys_index":  # ties may come in any order
                found, value = (truth.gather(-1, t.clamp(min=0)) * (t >= 0) for t in (found, value))
            close = {"atol": of_statistics, "rtol": of_statistics, "equal_nan": True}
            torch.testing.assert_close(found, value, **close, msg=f"{got.site.name}: {name} differs")
    for axis in ("query", "key"):
        for site in whole.sites:
            ids = whole._only().ids_of(site, axis)
            if ids is not None:
                assert torch.equal(joined._only().ids_of(site, axis), ids)


DECODERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "llama": (lambda: _llama(4), _ids(2, 11)),
    "llama, one token": (lambda: _llama(4), _ids(1, 1)),
    "llama-gqa": (_llama, _ids(3, 11)),
    "mistral beyond its window": (_mistral, _ids(2, 9)),
    "mistral reaches its window": (_mistral, _ids(2, 3)),
    "mistral-gqa": (lambda: _mistral(2), _ids(2, 9)),
    "gpt2": (BY_NAME["gpt2"].build, _ids(1, 13)),
    "gpt-oss": (_gpt_oss, _ids(2, 9)),
    "bloom": (_bloom, _ids(2, 9)),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_generated_sequence_is_one_forward(name: str) -> None:
    build, ids = DECODERS[name]
    model = _made(build)
    names = tuple(n for n in EVERYTHING if name != "bloom" or n != "lse")
    steps, out = _captured(model, lambda m: _generate(m, {"input_ids": ids}), names)
    assert out.shape[1] == ids.shape[1] + NEW
    assert len(steps.calls) == NEW
    whole, _ = _captured(model, lambda m: m(out[:, :-1]), names)
    joined = steps.joined()
    assert_same(joined, whole)
    n = ids.shape[1] + NEW - 1
    assert joined[0].pattern.rows([-1, 0]).shape == (len(ids), 4, 2, n)
    assert "1 forward, 2 sites" in repr(joined)
    assert f"[batch, head, query, key] [{len(ids)}, 4, {n}, {n}]" in repr(joined)
    assert set(joined.table("received", per="position").position) == set(range(n))


def test_what_the_model_generates_is_the_same_with_a_capture() -> None:
    model = _made(_mistral)
    ids = _ids(2, 9)
    bare = _generate(model, {"input_ids": ids}, output_logits=True, return_dict_in_generate=True)
    _, seen = _captured(
        model, lambda m: _generate(m, {"input_ids": ids}, output_logits=True, return_dict_in_generate=True)
    )
    assert torch.equal(bare.sequences, seen.sequences)
    assert all(torch.equal(a, b) for a, b in zip(bare.logits, seen.logits, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_left_padding(name: str) -> None:
    model = _made({"gpt2": BY_NAME["gpt2"].build, "llama": lambda: _llama(4), "mistral": _mistral}[name])
    ids, mask = _ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    steps, out = _captured(model, lambda m: _generate(m, {"input_ids": ids, "attention_mask": mask}))
    longer = torch.cat((mask, torch.ones(3, NEW - 1, dtype=torch.long)), dim=1)
    position_ids = (longer.cumsum(-1) - 1).clamp(min=0)
    whole, _ = _captured(model, lambda m: m(out[:, :-1], attention_mask=longer, position_ids=position_ids))
    assert_same(steps.joined(), whole)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoders(name: str) -> None:
    model: Any = make(BY_NAME[name])
    inputs = {k: v for k, v in BY_NAME[name].inputs().items() if k != "decoder_input_ids"}
    names = tuple(n for n in EVERYTHING if n != "induction") if name == "whisper" else EVERYTHING  # no ids to speech
    # Whisper's generate() leaves out its prompt and the end token, so that the model says what it was given.
    given: list[Tensor] = []

    def run(m: Any) -> Tensor:
        handle = m.register_forward_pre_hook(lambda _, __, kw: given.append(kw["decoder_input_ids"]), with_kwargs=True)
        try:
            return _generate(m, inputs)
        finally:
            handle.remove()

    steps, _ = _captured(model, run, names)
    decoder_ids = torch.cat(given, dim=1)
    assert decoder_ids.shape[1] >= NEW
    assert len(steps.calls) == 1 + len(given)
    whole, _ = _captured(model, lambda m: m(**inputs, decoder_input_ids=decoder_ids), names)
    assert_same(steps.joined(), whole)


def test_each_call_of_generate_is_a_forward() -> None:
    model = _made(_llama)
    prompts = [_ids(2, 5), _ids(1, 8), _ids(1, 8)]
    steps, outs = _captured(model, lambda m: [_generate(m, {"input_ids": ids}) for ids in prompts])
    joined = steps.joined()
    assert len(joined.calls) == 3
    for call, out in zip(joined.calls, outs, strict=True):
        assert_same(call, _captured(model, lambda m, out=out: m(out[:, :-1]))[0])
    assert joined.table("entropy").forward.unique().tolist() == [0, 1, 2]


def test_a_conversation_goes_on_with_its_cache() -> None:
    model = _made(lambda: _llama(4))
    cache = hf.DynamicCache(config=model.config)

    def talk(m: Any) -> Tensor:
        said = _generate(m, {"input_ids": _ids(1, 5)}, past_key_values=cache)
        return _generate(m, {"input_ids": torch.cat((said, _ids(1, 4)), dim=1)}, past_key_values=cache)

    steps, out = _captured(model, talk)
    assert_same(steps.joined(), _captured(model, lambda m: m(out[:, :-1]))[0])


@pytest.mark.parametrize("build", [_llama, lambda: _mistral(2)], ids=["full", "window"])
@pytest.mark.parametrize("how", [{"prefill_chunk_size": 4}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_prompts_in_chunks_and_several_samples(build: Callable[[], nn.Module], how: dict[str, Any]) -> None:
    model = _made(build)
    steps, out = _captured(model, lambda m: _generate(m, {"input_ids": _ids(2, 9)}, **how))
    assert_same(steps.joined(), _captured(model, lambda m: m(out[:, :-1]))[0])


@pytest.mark.parametrize("build", [lambda: _llama(4), _mistral], ids=["full", "window"])
def test_a_cache_of_fixed_size(build: Callable[[], nn.Module]) -> None:
    model = _made(build)
    names = tuple(n for n in EVERYTHING if n != "induction")
    ids = _ids(2, 9)
    steps, out = _captured(
        model, lambda m: _generate(m, {"input_ids": ids}, cache_implementation="static", disable_compile=True), names
    )
    assert_same(steps.joined(), _captured(model, lambda m: m(out[:, :-1]), names)[0])


def test_threads_are_kept_apart() -> None:
    model = _made(lambda: _llama(4))
    prompts, outs, turn = [_ids(1, 5), _ids(1, 8)], {}, threading.Barrier(2)

    def work(i: int) -> None:
        def meet(*args: Any) -> None:  # at every step, so that the forwards of both alternate
            turn.wait()

        outs[i] = _generate(model, {"input_ids": prompts[i]}, logits_processor=hf.LogitsProcessorList([_Meet(meet)]))

    def run(m: Any) -> None:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    steps, _ = _captured(model, run)
    assert len({forward.thread for forward in steps._forwards}) == 2
    joined = sorted(steps.joined().calls, key=lambda call: call[0].shape)
    assert len(joined) == 2
    for i, call in enumerate(joined):
        assert_same(call, _captured(model, lambda m, i=i: m(outs[i][:, :-1]))[0])


class _Meet(hf.LogitsProcessor):
    def __init__(self, meet: Callable[..., None]) -> None:
        self.meet = meet

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.meet()
        return scores


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-gqa", "gpt2", "bloom"])
def test_induction_at_a_step_is_that_of_the_whole(name: str) -> None:
    """Also where the token that the oldest kept key follows has been forgotten."""
    model = _made(DECODERS[name][0])
    ids = torch.randint(3, 5, (2, 19), generator=torch.Generator().manual_seed(1))

    def run(m: Any) -> None:
        cache = hf.DynamicCache(config=m.config)
        for part in (ids[:, :9], ids[:, 9:11], *ids[:, 11:].split(1, dim=1)):
            m(part, past_key_values=cache)

    steps, _ = _captured(model, run, ("induction",))
    whole, _ = _captured(model, lambda m: m(ids), ("induction",))
    want = whole.stack("induction")
    assert want.nan_to_num().max() > 0.1
    got = torch.cat([call.stack("induction") for call in steps.calls], dim=-1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_induction_follows_the_beams() -> None:
    """Beams change places in the cache: each step's rows have the ids of the beam that they belong to."""
    model = _made(lambda: _llama(4))
    seen: list[Tensor] = []

    class Note(hf.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids.clone())
            return scores

    ids = _ids(1, 7)
    steps, _ = _captured(
        model,
        lambda m: _generate(m, {"input_ids": ids}, num_beams=3, logits_processor=hf.LogitsProcessorList([Note()])),
        ("induction",),
    )
    assert any(not torch.equal(a, b[:, :-1]) for a, b in itertools.pairwise(seen)), "no beam changed places"
    for call, whole_ids in zip(steps.calls, seen, strict=True):
        whole, _ = _captured(model, lambda m, i=whole_ids: m(i), ("induction",))
        torch.testing.assert_close(
            call.stack("induction")[..., -1], whole.stack("induction")[..., -1], atol=1e-5, rtol=1e-4, equal_nan=True
        )
    with pytest.raises(CaptureError, match="found other keys in its cache") as caught:
        steps.joined()
    assert "beam search" in str(caught.value)
    assert caught.value.site == "model.layers.0.self_attn"


def test_a_cache_that_is_cut_back_is_refused() -> None:
    model = _made(lambda: _llama(4))
    ids = _ids(1, 7)

    def speculate(m: Any) -> None:
        cache = hf.DynamicCache(config=m.config)
        m(ids, past_key_values=cache)
        m(ids[:, :3], past_key_values=cache)
        cache.crop(-2)
        m(ids[:, 3:5], past_key_values=cache)

    steps, _ = _captured(model, speculate)
    whole, _ = _captured(model, lambda m: m(torch.cat((ids, ids[:, :1], ids[:, 3:5]), dim=1)))
    last = steps.calls[-1].stack("induction")
    torch.testing.assert_close(last, whole.stack("induction")[..., -2:], atol=1e-5, rtol=1e-4, equal_nan=True)
    with pytest.raises(CaptureError, match="found other keys in its cache"):
        steps.joined()


class Forgetful(nn.Module):
    """One head whose cache keeps the last `keep` keys of the steps before."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None

    def forward(self, x: Tensor, keep: int) -> Tensor:
        cached = x[:, :, :0] if self.keys is None else self.keys[:, :, self.keys.shape[2] - keep :]
        self.keys = torch.cat((cached, x), dim=2)
        return nn.functional.scaled_dot_product_attention(x, self.keys, self.keys, is_causal=x.shape[2] > 1)


@pytest.mark.parametrize(
    ("keep", "rule"),
    [([3, 4, 5, 6], (True, None)), ([3, 3, 3, 3], (True, 4)), ([3, 2, 1, 1], None), ([3, 1, 2, 3], None)],
    ids=["all", "window", "less and less", "anew"],
)
def test_a_cache_that_forgets(keep: list[int], rule: tuple[bool, int | None] | None) -> None:
    """What rows saw is written as a rule of positions where there is one, else as a tensor."""
    x = torch.randn(1, 1, 7, 4, generator=torch.Generator().manual_seed(0))
    model = Forgetful()

    def run(m: nn.Module) -> None:
        for n, part in zip([0, *keep], (x[:, :, :3], *x[:, :, 3:].split(1, dim=2)), strict=True):
            m(part, n)

    with workbench.attach(model, check=False) as wb, torch.no_grad(), wb.capture(["entropy", "received"]) as steps:
        run(model)
    shown = torch.ones(7, 7).tril().bool()
    for i, n in enumerate(keep, start=3):
        shown[i, : i - n] = False
    joined = steps.joined()[0]
    truth = (x @ x.mT / 2).masked_fill(~shown, -torch.inf).softmax(-1)
    torch.testing.assert_close(joined.pattern.dense(), truth)
    torch.testing.assert_close(joined.received, truth.sum(-2))
    mask = joined.pattern.mask
    assert (None if mask.tensor is not None else (mask.causal, mask.window)) == rule


def test_a_capture_that_begins_in_the_middle() -> None:
    model = _made(lambda: _llama(4))
    cache = hf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(_ids(1, 7), past_key_values=cache)
    with workbench.attach(model) as wb, torch.no_grad():
        with wb.capture(["entropy"]) as steps:
            model(_ids(1, 2), past_key_values=cache)
            model(_ids(1, 1), past_key_values=cache)
        with pytest.raises(CaptureError, match="2 queries and 9 keys: its first tokens were not seen"):
            steps.joined()
        with pytest.raises(CaptureError, match="needs the ids of all keys"), wb.capture(["induction"]):
            model(_ids(1, 1), past_key_values=cache)


def test_what_cannot_be_joined() -> None:
    model = _made(lambda: _llama(4))
    ids = _ids(1, 5)
    bare, _ = _captured(model, lambda m: _generate(m, {"input_ids": ids}), queries_keys=False, pattern=False)
    with pytest.raises(CaptureError, match="pattern was not kept"):
        bare.joined()
    dense, _ = _captured(model, lambda m: _generate(m, {"input_ids": ids}), queries_keys=False)
    with pytest.raises(CaptureError, match="steps of a DensePattern cannot be joined"):
        dense.joined()
    written_out, _ = _captured(_made(_bloom), lambda m: _generate(m, {"input_ids": ids}), ("entropy",), values=False)
    with pytest.raises(CaptureError, match="values=True where the model writes its attention out"):
        written_out.joined()
    with workbench.attach(model) as wb, wb.capture(gradients=True) as trained:
        cache = hf.DynamicCache(config=model.config)
        logits = [model(part, past_key_values=cache).logits for part in (ids[:, :4], ids[:, 4:])]
        torch.cat(logits, dim=1).square().mean().backward()
    with pytest.raises(CaptureError, match="gradients at single steps"):
        trained.joined()
    with workbench.attach(model) as wb, torch.no_grad():
        needed = 2 * wb_bytes(wb, ids.shape[1] + NEW - 1)
        with wb.capture(["entropy"], limit=needed) as steps:
            _generate(model, {"input_ids": ids}, max_new_tokens=2, min_new_tokens=2)
    assert len(steps.joined().calls) == 1
    object.__setattr__(steps.settings, "limit", needed // 20)
    with pytest.raises(CaptureError, match="joined capture would keep"):
        steps.joined()


def wb_bytes(wb: workbench.Workbench, n: int) -> int:
    return wb.estimate(1, n, statistics=["entropy"])


def test_a_hybrid_is_joined_with_its_states() -> None:
    config = hf.JambaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=32,
        vocab_size=VOCABULARY, attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1,
        mamba_d_state=8, use_mamba_kernels=False, **SPECIAL,
    )  # fmt: skip
    model, ids = _made(lambda: hf.JambaForCausalLM(config)), _ids(1, 9)
    alone = {"sites": lambda site: site.kind == "self"}
    steps, out = _captured(model, lambda m: _generate(m, {"input_ids": ids}), **alone)
    assert_same(steps.joined(), _captured(model, lambda m: m(out[:, :-1]), **alone)[0])
    plain, again = _captured(model, lambda m: _generate(m, {"input_ids": ids}), ("entropy",))
    assert torch.equal(again, out)
    assert [len(call) for call in plain.calls] == [2] * NEW
    assert [call[0].before is None for call in plain.calls] == [True] + [False] * (NEW - 1)
    mixer, attention = plain.joined()
    assert mixer.before is None  # it is whole
    torch.testing.assert_close(attention.entropy, steps.joined()[0].entropy)


def test_a_model_without_a_cache_keeps_its_forwards() -> None:
    model = _made(lambda: _llama(4))
    ids = _ids(1, 5)
    steps, _ = _captured(model, lambda m: _generate(m, {"input_ids": ids}, use_cache=False), ("entropy",))
    assert [call[0].shape[2] for call in steps.joined().calls] == [5 + t for t in range(NEW)]


def test_chosen_sites(tmp_path: Path) -> None:
    model: Any = make(BY_NAME["whisper"])
    inputs = {"input_features": BY_NAME["whisper"].inputs()["input_features"]}
    steps, _ = _captured(model, lambda m: _generate(m, inputs), ("entropy",), sites=lambda s: s.kind == "cross")
    joined = steps.joined()
    assert [site.kind for site in joined.sites] == ["cross", "cross"]
    assert joined[0].shape[2] == len(steps.calls) - 1


def test_files(tmp_path: Path) -> None:
    model = _made(_mistral)
    steps, _ = _captured(model, lambda m: _generate(m, {"input_ids": _ids(2, 9)}), sink_keys=(0, 1))
    joined = steps.joined()
    again = workbench.load_capture(joined.save(tmp_path / "joined.safetensors", pattern=True))
    late = workbench.load_capture(steps.save(tmp_path / "steps.safetensors", pattern=True)).joined()
    for other in (again, late):
        assert other.settings == joined.settings
        assert other.calls[0].provenance == joined.provenance
        for old, new in zip(joined, other, strict=True):
            torch.testing.assert_close(old.pattern.dense(), new.pattern.dense())
            for name, value in old.statistics.items():
                torch.testing.assert_close(new.statistics[name], value, rtol=0, atol=0, equal_nan=True)


def test_tokens_are_those_of_the_whole_sequence() -> None:
    class Tokenizer:
        def decode(self, ids: list[int], **_: Any) -> str:
            return f"<{ids[0]}>"

    model = _made(_llama)
    with workbench.attach(model, Tokenizer()) as wb, torch.no_grad(), wb.capture(["entropy"]) as steps:
        out = _generate(model, {"input_ids": _ids(2, 5)})
    want = [[f"<{i}>" for i in row] for row in out[:, :-1].tolist()]
    joined = steps.joined()
    assert joined.query_tokens("blocks.0.attn") == joined.key_tokens("blocks.1.attn") == want
