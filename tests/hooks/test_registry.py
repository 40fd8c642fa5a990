"""The tap at Hugging Face's registry: in place only while something listens, and each backend read as it computes."""

import threading

import pytest
import torch
import transformers as hf
from transformers.modeling_utils import AttentionInterface

import workbench
from support.tiny import FAMILIES, make
from workbench.hooks import registry

GPT2, LLAMA = FAMILIES[0], next(f for f in FAMILIES if f.name == "llama-gqa")


def test_the_registry_is_as_before_after_a_capture_and_after_an_error() -> None:
    before = AttentionInterface.__dict__["get_interface"]
    model = make(GPT2)
    with workbench.attach(model) as wb:
        with wb.capture():
            assert AttentionInterface.__dict__["get_interface"] is not before
            model(**GPT2.inputs())
        assert AttentionInterface.__dict__["get_interface"] is before
        with pytest.raises(ZeroDivisionError), wb.capture():
            raise ZeroDivisionError
    assert AttentionInterface.__dict__["get_interface"] is before


def test_a_second_listener_does_not_end_the_first() -> None:
    before = AttentionInterface.get_interface
    registry.install("first")
    registry.install("second")
    registry.uninstall("second")
    assert AttentionInterface.get_interface is not before
    for _ in range(2):  # it may be repeated
        registry.uninstall("first")
        assert AttentionInterface.get_interface is before


def test_only_the_listening_thread_is_heard() -> None:
    model, heard = make(GPT2), []

    def listener(backend, function, module, args, kwargs):
        heard.append(backend)
        return function(module, *args, **kwargs)

    registry.install(heard.append)
    registry.listen(listener)
    try:
        other = threading.Thread(target=lambda: model(**GPT2.inputs()))
        other.start()
        other.join()
        assert heard == []
        model(**GPT2.inputs())
    finally:
        registry.stop_listening(listener)
        registry.uninstall(heard.append)
    model(**GPT2.inputs())
    assert heard == ["sdpa", "sdpa"]


def test_packed_heads_of_a_decoding_step_are_unpacked() -> None:
    """With one query row and a mask, the sdpa backend packs the heads of a group as query rows."""
    model, inputs = make(LLAMA), LLAMA.inputs()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :4] = 0
    with torch.no_grad(), workbench.attach(model) as wb:
        past = model(**inputs, attention_mask=mask, use_cache=True).past_key_values
        mask = torch.cat((mask, mask[:, :1] | 1), dim=1)
        with wb.capture(z=True) as capture:
            model(inputs["input_ids"][:, -1:], attention_mask=mask, past_key_values=past)
    site = capture[0]
    assert site.shape == (2, 6, 1, 18)
    assert site.pattern.seen.keys_per_query[:, 0, 0].tolist() == [14, 18]
    fresh = type(site.pattern)(site.pattern.q, site.pattern.k, site.pattern.mask, scale=site.pattern.scale)
    torch.testing.assert_close(site.pattern.lse, fresh.lse)  # the kernel's own, by head


def test_two_models_made_from_one_config_keep_their_own_backends() -> None:
    config = hf.LlamaConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=8, vocab_size=9
    )
    first, second = (hf.LlamaForCausalLM(config).eval() for _ in range(2))
    ids = torch.tensor([[1, 2, 3]])
    wb, other = workbench.attach(first), workbench.attach(second)
    with torch.no_grad(), wb.capture() as one, other.capture() as two:
        first(ids)
        assert not two.calls
        second(ids)
    assert len(one.calls) == len(two.calls) == 1
    assert first.config._attn_implementation == second.config._attn_implementation == "sdpa"


def test_flash_backends_are_told_of_packed_sequences_by_lengths_or_positions() -> None:
    module = torch.nn.Identity()
    q = torch.randn(1, 2, 6, 4)
    ends = torch.tensor([0, 2, 6])
    for how, want in (
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, [(0, 0, 3), (0, 3, 6)]),
        ({"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, [(0, 0, 2), (0, 2, 6)]),
        ({"position_ids": torch.arange(6)[None]}, []),
    ):
        facts = registry.read("layer", "flash_attention_2", module, (q, q, q, None), how, registry.LseWatch())
        assert [one.where for one in facts.get("segments", ())] == want


def test_a_cache_of_fixed_size_leaves_queries_at_their_own_positions() -> None:
    model, inputs = make(LLAMA), LLAMA.inputs()
    ids = inputs["input_ids"]
    with torch.no_grad(), workbench.attach(model) as wb:
        cache = hf.StaticCache(config=model.config, max_cache_len=40)
        model(ids[:, :-1], past_key_values=cache)
        with wb.capture(("current", "distance")) as step:
            model(ids[:, -1:], past_key_values=cache)
        with wb.capture(("current", "distance")) as whole:
            model(ids)
    assert step[0].shape[3] == 40
    for name in ("current", "distance"):
        got, want = getattr(step[1], name), getattr(whole[1], name)
        torch.testing.assert_close(got, want[:, :, -1:], atol=1e-5, rtol=1e-4)
