"""A capture as an activation cache: names, layouts, short forms, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import workbench
from support.autograd import loss_of
from support.tiny import FAMILIES, Family, make
from workbench import Capture, CaptureError
from workbench.capture.transformer_lens import Cache

BY_NAME = {family.name: family for family in FAMILIES}
GPT2, LLAMA, T5 = BY_NAME["gpt2"], BY_NAME["llama-gqa"], BY_NAME["t5"]


def capture_of(family: Family, model: Any = None, **options: Any) -> Capture:
    model = make(family) if model is None else model
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture([], **options) as capture:
        model(**family.inputs())
    return capture


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return make(GPT2)


@pytest.fixture(scope="module")
def capture(gpt2: Any) -> Capture:
    return capture_of(GPT2, gpt2, z=True, values=True)  # its results need the model


@pytest.fixture(scope="module")
def cache(capture: Capture) -> Cache:
    return capture.to_cache()


def test_names_and_layouts(capture: Capture, cache: Cache) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in cache.items()}
    part, result, pattern = (2, 17, 4, 8), (2, 17, 4, 32), (2, 4, 17, 17)
    assert shapes == {
        f"blocks.{layer}.attn.{hook}": shape
        for layer in (0, 1)
        for hook, shape in {
            "hook_pattern": pattern, "hook_q": part, "hook_k": part, "hook_v": part, "hook_z": part,
            "hook_result": result,
        }.items()
    }  # fmt: skip
    assert len(cache) == 12
    assert list(cache) == list(cache.keys()) == list(shapes)
    assert torch.equal(cache["blocks.1.attn.hook_pattern"], capture[1].pattern.dense())
    assert torch.equal(cache["blocks.1.attn.hook_q"].transpose(1, 2), capture[1].pattern.q)
    assert "2 sites" in repr(cache)


def test_the_parts_make_the_pattern(cache: Cache) -> None:
    q, k, v, z, a = (cache[f"blocks.0.attn.hook_{name}"] for name in ("q", "k", "v", "z", "pattern"))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    scores = scores.masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(a, scores.softmax(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", a, v), z, atol=1e-5, rtol=1e-5)


def test_short_forms(cache: Cache) -> None:
    long = cache["blocks.1.attn.hook_pattern"]
    for key in [
        ("pattern", 1), ("pattern", -1), ("hook_pattern", 1), ("pattern", 1, "attn"), ("pattern", 1, "blocks"),
        "transformer.h.1.attn.hook_pattern",
    ]:  # fmt: skip
        assert key in cache
        assert torch.equal(cache[key], long)
    assert torch.equal(cache["z", -2], cache["blocks.0.attn.hook_z"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("blocks.1.attn.hook_patern", 'did you mean "blocks.1.attn.hook_pattern"'),
        (("pattern", 2), "blocks.attn has the layers 0, 1, no layer 2"),
        (("pattern", -3), "no layer -3"),
        (("pattern", 0, "decoder"), '"decoder" is none of blocks.attn'),
        (("z_grad", 0), 'no "blocks.0.attn.hook_z_grad"'),
        (3, "not 3"),
        (("pattern", "0"), "a key is a name"),
    ],
)
def test_keys_that_are_not_there(cache: Cache, key: Any, message: str) -> None:
    assert key not in cache
    assert cache.get(key) is None
    with pytest.raises(KeyError):
        cache[key]
    with pytest.raises(CaptureError) as caught:
        cache[key]
    assert message in str(caught.value)


def test_only_what_was_kept_is_there() -> None:
    bare = capture_of(GPT2, queries_keys=False)
    assert len(bare.to_cache()) == 0
    dense = capture_of(GPT2, queries_keys=False, pattern=True, sites=[1])
    assert list(dense.to_cache()) == ["blocks.1.attn.hook_pattern"]
    assert ("pattern", -1) in dense.to_cache()
    assert ("pattern", 0) not in dense.to_cache()


def test_patterns_are_made_when_they_are_read(capture: Capture) -> None:
    limited = capture.to_cache(limit=2 * 4 * 17 * 17 * 4 - 1)
    assert ("pattern", 0) in limited
    assert limited["q", 0].shape == (2, 17, 4, 8)
    with pytest.raises(CaptureError, match="the limit is"):
        limited["pattern", 0]
    with pytest.raises(CaptureError, match="the limit is"):
        limited["result", 0]


def test_turned_queries_have_their_own_name() -> None:
    cache = capture_of(LLAMA, values=True).to_cache()
    assert cache["rot_q", 0].shape == (2, 17, 6, 8)
    assert cache["rot_k", 0].shape == cache["v", 0].shape == (2, 17, 2, 8)
    assert ("q", 0) not in cache


def test_towers_and_kinds() -> None:
    cache = capture_of(T5, z=True).to_cache()
    assert cache["decoder.1.cross_attn.hook_pattern"].shape == (2, 4, 9, 17)
    for key in [("pattern", 1, "decoder.cross_attn"), ("pattern", -1, "cross_attn")]:
        assert torch.equal(cache[key], cache["decoder.1.cross_attn.hook_pattern"])
    for key in [("z", 1, "encoder"), "encoder.1.self_attn.hook_z"]:
        assert torch.equal(cache[key], cache["encoder.1.attn.hook_z"])
    with pytest.raises(KeyError, match=r"one of several: encoder\.attn, decoder\.attn, decoder\.cross_attn"):
        cache["pattern", 1]
    with pytest.raises(KeyError, match='"attn" is several'):
        cache["pattern", 1, "attn"]


def test_several_forwards() -> None:
    model, ids = make(GPT2), GPT2.inputs()["input_ids"]
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture([], z=True) as capture:
        model(ids)
        model(ids[:, :5])
    assert capture.to_cache()["z", 0].shape[1] == 17
    assert capture.to_cache(forward=1)["z", 0].shape[1] == capture.to_cache(-1)["z", 0].shape[1] == 5
    with pytest.raises(CaptureError, match="2 forwards, no forward 2"):
        capture.to_cache(2)


def test_gradients_of_z() -> None:
    model, inputs = make(GPT2), GPT2.inputs()
    with workbench.attach(model) as wb, wb.capture([], gradients=True) as capture:
        loss_of(model(**inputs), inputs).backward()
    assert torch.equal(capture.to_cache()["z_grad", 1], capture[1].z_gradient)


def test_a_module_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(self.attn(x, x, x)[0], x, x)[0]

    model = Twice().eval()
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture([], z=True) as capture:
        model(torch.randn(2, 5, 16))
    cache = capture.to_cache()
    assert torch.equal(cache["z", 0], capture["attn"].z)
    assert torch.equal(cache["blocks.0.attn#1.hook_z"], capture["attn", 1].z)
    assert "blocks.1.attn.hook_z" not in cache


def test_from_a_file(capture: Capture, tmp_path: Path) -> None:
    path = capture.save(tmp_path / "run.safetensors", pattern=True, result=True)
    again = workbench.load_capture(path).to_cache()
    before = capture.to_cache()
    assert list(again) == list(before)
    for name in before:
        assert torch.equal(again[name], before[name]), name
    llama = capture_of(LLAMA).save(tmp_path / "llama.safetensors", pattern=True)
    assert ("rot_q", 0) in workbench.load_capture(llama).to_cache()
