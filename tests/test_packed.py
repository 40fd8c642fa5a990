"""Rows that hold several sequences: each is captured as it would be alone, with a forward of its own."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.backends import flash_packages, on_backend, uncompiled_flex
from workbench import Capture, CaptureError
from workbench.hooks import packing
from workbench.hooks.packing import Segment

NAMES = ("entropy", "received", "distance", "previous", "sink", "induction", "top_keys")
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
TWO_ROWS = ((0, 0, 7), (0, 7, 19), (1, 0, 4), (1, 4, 5), (1, 5, 19))  # of 19 positions: more than the context
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=5)),
}


def _made(name: str, backend: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return on_backend(model, backend)


def _packed(cuts: Any) -> tuple[Tensor, Tensor]:
    """Ids and positions [row, position]."""
    rows, length = 1 + max(row for row, *_ in cuts), max(stop for *_, stop in cuts)
    ids = torch.randint(3, 9, (rows, length), generator=torch.Generator().manual_seed(0))
    positions = torch.zeros_like(ids)
    for row, start, stop in cuts:
        positions[row, start:stop] = torch.arange(stop - start)
    return ids, positions


def assert_alone(got: Capture, want: Capture) -> None:
    """A sequence of a packed row is what it is alone: statistics, patterns, results."""
    assert [one.site for one in got] == [one.site for one in want]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.statistics.keys() == b.statistics.keys()
        for name, value in b.statistics.items():
            if not name.endswith("keys"):  # ties
                torch.testing.assert_close(a.statistics[name], value, atol=1e-5, rtol=1e-5, equal_nan=True)
        torch.testing.assert_close(a.pattern.dense(), b.pattern.dense(), atol=1e-5, rtol=0)
        torch.testing.assert_close(a.result(), b.result(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("llama", "sdpa"), ("llama", "eager"), ("llama", "flex_attention"), ("llama", "flash_attention_2"),
     ("qwen3", "sdpa"), ("mistral", "sdpa"), ("mistral", "flash_attention_3")],
)  # fmt: skip
@torch.no_grad()
def test_positions_that_start_again(name: str, backend: str) -> None:
    model = _made(name, backend)
    cuts = TWO_ROWS[:2] if "flash" in backend else TWO_ROWS
    ids, positions = _packed(cuts)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with flash_packages(), uncompiled_flex(), workbench.attach(model) as wb:
        bare = model(**inputs).logits
        with wb.capture(NAMES, z=True) as cap:
            assert torch.equal(model(**inputs).logits, bare)
        assert [forward.packed for forward in cap.forwards] == list(cuts)
        assert wb.verify(**inputs).raise_if_failed().ok
        for call, (row, start, stop) in zip(cap.calls, cuts, strict=True):
            with wb.capture(NAMES, z=True) as alone:
                model(ids[row : row + 1, start:stop])
            assert torch.equal(call.forwards[0].ids["input"], alone.forwards[0].ids["input"])
            assert_alone(call, alone)


@torch.no_grad()
def test_a_mask_that_the_user_has_packed_himself() -> None:
    """Padding lies before, between and behind; the second row is one sequence."""
    model, cuts = _made("llama"), ((0, 1, 6), (0, 6, 9), (0, 10, 12), (1, 0, 13))
    ids, positions = _packed(((0, 0, 13), (1, 0, 13)))
    mask = torch.zeros(2, 1, 13, 13, dtype=torch.bool)
    for row, start, stop in cuts:
        mask[row, 0, start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
    with workbench.attach(model) as wb:
        with wb.capture(NAMES, z=True) as cap:
            model(ids, attention_mask=mask, position_ids=positions)
        assert [forward.packed for forward in cap.forwards] == list(cuts)
        for call, (row, start, stop) in zip(cap.calls, cuts, strict=True):
            with wb.capture(NAMES, z=True) as alone:  # rotary: where a sequence begins does not matter
                model(ids[row : row + 1, start:stop])
            assert_alone(call, alone)


@torch.no_grad()
def test_lengths_given_to_a_flash_backend() -> None:
    model = _made("llama", "flash_attention_2")
    ids, positions = _packed(TWO_ROWS[:2])
    ends = torch.tensor([0, 7, 19], dtype=torch.int32)
    varlen = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    with flash_packages(), workbench.attach(model) as wb:
        with wb.capture(NAMES, z=True) as cap:
            model(ids, position_ids=positions, use_cache=False, **varlen)
        for call, (row, start, stop) in zip(cap.calls, TWO_ROWS[:2], strict=True):
            with wb.capture(NAMES, z=True) as alone:
                model(ids[row : row + 1, start:stop])
            assert_alone(call, alone)


def test_gradients_of_each_sequence() -> None:
    model = _made("llama")
    ids, positions = _packed(TWO_ROWS[:2])

    def captured(wb: workbench.Workbench, ids: Tensor, **inputs: Any) -> Capture:
        with wb.capture(("entropy",), gradients=True) as cap, wb.ablate((0, 1)):
            model(ids, use_cache=False, **inputs).logits.square().sum().backward()
        return cap

    with workbench.attach(model) as wb:
        cap = captured(wb, ids, position_ids=positions)
        for call, (row, start, stop) in zip(cap.calls, TWO_ROWS[:2], strict=True):
            alone = captured(wb, ids[row : row + 1, start:stop])
            for a, b in zip(call, alone, strict=True):
                torch.testing.assert_close(a.z_gradient, b.z_gradient, atol=1e-3, rtol=1e-4)
                torch.testing.assert_close(a.key_gradient, b.key_gradient, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_rows_of_a_packed_pattern_are_edited_where_they_are() -> None:
    """The flash backend, which has no mask, and SDPA, which has one, go on to the same output."""
    ids, positions = _packed(TWO_ROWS[:2])
    outputs = []
    with flash_packages():
        for backend in ("sdpa", "flash_attention_2"):
            model = _made("llama", backend)
            with workbench.attach(model) as wb, wb.edit_pattern((0, 1), lambda rows, site, head: rows.flip(-1)):
                outputs.append(model(ids, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_mixes_its_sequences_is_shown_as_it_is() -> None:
    """With a cache, Hugging Face's models take positions that start again for one sequence all the same."""
    model = _made("llama")
    ids, positions = _packed(TWO_ROWS[:2])
    with workbench.attach(model) as wb, wb.capture(NAMES) as cap:
        model(ids, position_ids=positions, use_cache=True)
    assert [forward.packed for forward in cap.forwards] == [None]
    assert cap[0].shape == (1, 4, 19, 19)
    assert cap[0].pattern.dense()[0, 0, 18, 0] > 0


@torch.no_grad()
def test_a_file_keeps_the_sequences(tmp_path: Path) -> None:
    model = _made("llama")
    ids, positions = _packed(TWO_ROWS)
    with workbench.attach(model) as wb, wb.capture(("entropy",)) as cap:
        model(ids, position_ids=positions, use_cache=False)
    assert "5 of them sequences of packed rows" in repr(cap)
    with pytest.raises(CaptureError, match="5 sequences of packed rows"):
        cap["blocks.0.attn"]
    again = workbench.load_capture(cap.save(tmp_path / "packed.safetensors"))
    assert [forward.packed for forward in again.forwards] == list(TWO_ROWS)


def test_the_blocks_of_a_mask() -> None:
    band = torch.ones(9, 9).tril().triu(-2).bool()  # a window: one sequence
    blocks = torch.zeros(9, 9, dtype=torch.bool)
    for start, stop in ((0, 4), (4, 9)):
        blocks[start:stop, start:stop] = True
    padded = torch.ones(9, 9).tril().bool()
    padded[:3], padded[:, :3] = False, False
    additive = torch.zeros(9, 9).masked_fill(~blocks, torch.finfo(torch.float32).min)

    def found(mask: Tensor) -> list[tuple[int, int, int]]:
        return [one.where for one in packing.of_inputs({"attention_mask": mask[None, None]}, 1)]

    assert found(blocks) == found(additive) == [(0, 0, 4), (0, 4, 9)]
    assert found(band) == found(padded) == found(torch.ones(9, 9).bool()) == []


def test_rules_inside_of_segments() -> None:
    segments = (Segment(0, 0, 2, 0, 5), Segment(0, 2, 5, 5, 12))  # steps of a cache: keys before the queries
    causal = packing.block_mask(segments, 5, 12, causal=True, window=None, device=torch.device("cpu"))
    windowed = packing.block_mask(segments, 5, 12, causal=True, window=3, device=torch.device("cpu"))
    for mask, window in ((causal, None), (windowed, 3)):
        rules = packing.rules(mask, segments)
        assert rules is not None
        assert [(rule.causal, rule.window, rule.mask) for rule in rules] == [(True, window, None)] * 2
    biased = torch.zeros(causal.shape).masked_fill(~causal, -torch.inf) - 0.5 * causal
    rules = packing.rules(biased, segments)
    assert rules is not None
    assert rules[0].mask is not None
    assert torch.equal(rules[0].mask, biased[:, :, :2, :5])
    leaking = causal.clone()
    leaking[0, 0, 4, 1] = True
    assert packing.rules(leaking, segments) is None


# Continuous batches.

PROMPTS = [list(range(5, 16)), list(range(20, 25)), [7]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def _batch(model: Any) -> dict[tuple[int, ...], list[int]]:
    """The tokens that each prompt is answered with."""
    config = hf.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = hf.ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64)
    found = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=room)
    return {tuple(PROMPTS[int(name.rpartition("_")[2]) % 3]): one.generated_tokens for name, one in found.items()}


@pytest.mark.parametrize(("name", "backend"), [("llama", "sdpa"), ("mistral", "sdpa"), ("qwen3", "eager")])
def test_continuous_batches(name: str, backend: str) -> None:
    model = _made(name)
    model.set_attn_implementation(backend)
    bare = _batch(model)
    with workbench.attach(model) as wb:
        with wb.capture(NAMES, z=True) as cap:
            assert _batch(model) == bare
        assert not cap.unrecorded
        assert len(cap.calls) == sum(map(len, bare.values()))  # a prefill and the steps of each request
        _assert_requests_alone(wb, cap, bare)


def test_continuous_batches_go_to_a_store(tmp_path: Path) -> None:
    model = _made("llama")
    bare = _batch(model)
    with workbench.attach(model) as wb:
        with wb.capture(NAMES, z=True, store=tmp_path / "a.zarr") as cap:
            assert _batch(model) == bare
        _assert_requests_alone(wb, cap, bare)
    opened = workbench.load_capture(tmp_path / "a.zarr")
    assert [call.stack("entropy").tolist() for call in opened.calls] == [
        call.stack("entropy").tolist() for call in cap.calls
    ]


def _assert_requests_alone(wb: workbench.Workbench, cap: Capture, bare: dict[tuple[int, ...], list[int]]) -> None:
    """Each request in a batch has what it has alone."""
    requests = {tuple(call.forwards[0].ids["input"][0].tolist()): call for call in cap.joined().calls}
    assert len(requests) == len(bare)
    for prompt, answer in bare.items():
        ids = (*prompt, *answer[:-1])
        with torch.no_grad(), wb.capture(NAMES, z=True) as alone:
            wb.model(torch.tensor([ids]))
        assert_alone(requests[ids], alone)


def test_a_request_never_fails_because_of_a_capture() -> None:
    """Too little room for what a capture would keep: the requests are answered, the ledger says what is missing."""
    model = _made("llama")
    bare = _batch(model)
    with workbench.attach(model) as wb:
        with pytest.warns(UserWarning, match="not recorded, the ledger lists them"), wb.capture(limit=9000) as cap:
            assert _batch(model) == bare
        assert 0 < len(cap.calls) < 12
        assert "the limit is 9,000" in str(cap.ledger["model.layers.0.self_attn"])
        assert "calls not recorded" in repr(cap)
        with pytest.raises(CaptureError, match="nothing could be recorded"), wb.capture(limit=10):
            assert _batch(model) == bare
