"""What a file or a caller may hand to patterns: sizes, ranges and numbers that do not fit are errors at once."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from workbench.errors import CaptureError, FormatError
from workbench.kernels import engines, families
from workbench.kernels.lightning import LightningPattern, lightning_attention
from workbench.kernels.masks import Mask, causal, padding
from workbench.kernels.neighborhood import NeighborhoodLayout, NeighborhoodPattern
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.kernels.s2 import S2Layout, S2Pattern
from workbench.kernels.scan import ScanPattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.state_space import DualPattern, SelectivePattern
from workbench.kernels.statistics import Options
from workbench.kernels.triton import TritonEngine

B, H, KV, N, D = 2, 4, 2, 48, 8


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


Q, K, V = drawn(B, H, N, D), drawn(B, KV, N, D), drawn(B, KV, N, 5)


def patterns() -> dict[str, Pattern]:
    delta, rate = drawn(B, H, N).abs(), -drawn(H).abs()
    state = drawn(B, 2, N, 3), drawn(B, 2, N, 3)
    of_state = drawn(B, H, N, 5)
    softmax = SoftmaxPattern(
        Q, K, padding([N, 9], N, causal=True), values=V, softcap=30.0, sinks=drawn(H), key_bias=drawn(B, H, N)
    )
    assert softmax.lse.shape == (B, H, N)
    return {
        "SoftmaxPattern": softmax,
        "DensePattern": DensePattern(torch.eye(N).expand(B, H, N, N), causal(N)),
        "S2Pattern": S2Pattern(Q, K, S2Layout(N, N, H, KV, block=16, local_blocks=1, vert_stride=2), values=V),
        "NeighborhoodPattern": NeighborhoodPattern(Q, K, NeighborhoodLayout((6, 8), 3), values=V),
        "LightningPattern": LightningPattern(Q, K, values=V),
        "ScanPattern": ScanPattern(Q[:, :, :1], K, values=V),
        "SelectivePattern": SelectivePattern(delta, rate[:, None].expand(-1, 3), *state, values=of_state),
        "DualPattern": DualPattern(delta, rate, *state, values=of_state),
    }


PATTERNS = patterns()
WRONG_SHAPES = {
    "one number": lambda x: torch.zeros(1, dtype=x.dtype),
    "nothing": lambda x: x[:0],
    "no dimension": lambda x: torch.zeros((), dtype=x.dtype),
    "one less": lambda x: x[..., :-1] if x.dim() == 1 else x[..., :-1, :],
    "one dimension more": lambda x: x[None],
    "whole numbers": lambda x: x.to(torch.int64),
    "complex numbers": lambda x: x.to(torch.complex64),
}


@pytest.mark.parametrize("wrong", WRONG_SHAPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_tensors_of_a_file_that_do_not_fit(name: str, wrong: str) -> None:
    facts, tensors = PATTERNS[name].state()
    facts = json.loads(json.dumps(facts))
    torch.testing.assert_close(families.rebuild(name, facts, dict(tensors)).dense(), PATTERNS[name].dense())
    for which, tensor in tensors.items():
        if which == "values" and wrong in ("whole numbers", "complex numbers"):
            continue
        if (name, which, wrong) == ("DensePattern", "weights", "nothing"):
            continue  # a map of no examples
        changed = tensors | {which: WRONG_SHAPES[wrong](tensor)}
        with pytest.raises(FormatError):
            families.rebuild(name, facts, changed)
        if which not in ("lse", "values", "sinks", "key_bias", "mask"):
            with pytest.raises(FormatError):
                families.rebuild(name, facts, {k: v for k, v in tensors.items() if k != which})


HOSTILE: list[Any] = [0, -1, -(2**63), 2**31, 2**62, 2**70, 1.5, math.nan, math.inf, True, None, "8", [], [1, 2], {}]


def changes(facts: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every fact of a file replaced by each hostile value."""
    found = []
    for key, value in facts.items():
        for hostile in HOSTILE:
            found.append((f"{key}={hostile!r}", facts | {key: hostile}))
        if isinstance(value, dict):
            found += [(f"{key}.{label}", facts | {key: inner}) for label, inner in changes(value)]
    return found


@pytest.mark.parametrize("name", [name for name, pattern in PATTERNS.items() if pattern.state()[0]])
def test_facts_of_a_file_that_do_not_fit(name: str) -> None:
    """They are refused at once, or the pattern works: nothing is read out of bounds, and no other error comes."""
    facts, tensors = PATTERNS[name].state()
    refused = 0
    for _, changed in changes(facts):
        try:
            pattern = families.rebuild(name, changed, dict(tensors))
        except FormatError:
            refused += 1
            continue
        try:
            for value in pattern.statistics(["entropy", "received", "peak_key", "sink", "distance"]).values():
                assert value.shape[:2] == (B, H)
        except CaptureError:
            refused += 1
    assert refused >= len(changes(facts)) // 3


@pytest.mark.parametrize(("facts", "says"), [
    ({"window": 0}, "window=0"), ({"window": -5}, "window=-5"), ({"window": 1.5}, "window"),
    ({"offset": 2**31}, "offset"), ({"offset": -(2**62)}, "offset"), ({"offset": 150.5}, "offset"),
    ({"offset": True}, "offset"),
    ({"causal": 5}, "causal"),
    ({"n_queries": -1}, "n_queries"), ({"n_keys": 2**40}, "n_keys"), ({"n_heads": 0}, "n_heads"),
])  # fmt: skip
def test_masks_that_cannot_be(facts: dict[str, Any], says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        Mask(**{"n_queries": 4, "n_keys": 4, **facts})


@pytest.mark.parametrize("offset", [-(10**6), -50, 50, 10**6, 2**31 - 1])
@pytest.mark.parametrize("window", [None, 1, 2**31, 2**62])
@pytest.mark.parametrize("is_causal", [False, True])
def test_far_offsets_and_windows_are_right(offset: int, window: int | None, is_causal: bool) -> None:
    mask = Mask(N, N, causal=is_causal, offset=offset, window=window)
    names = ["entropy", "received", "peak_key", "sink", "current"]
    got = SoftmaxPattern(Q, K, mask).statistics(names)
    want = SoftmaxPattern(Q.double(), K.double(), mask).statistics(names)
    for name in names:
        torch.testing.assert_close(got[name].double(), want[name].double(), atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("how", "says"), [
    ({"lse": torch.zeros(1)}, "lse must be"),
    ({"lse": torch.zeros(B, H, N, dtype=torch.long)}, "lse must be floating point"),
    ({"sinks": torch.zeros(0)}, "sinks must be"),
    ({"sinks": torch.full((H,), math.nan)}, "sinks holds nan"),
    ({"key_bias": torch.zeros(B, 1, N)}, "key_bias must be"),
    ({"key_bias": torch.full((B, H, N), math.inf)}, "key_bias holds inf"),
    ({"scale": math.nan}, "scale is a finite number"),
    ({"scale": math.inf}, "scale is a finite number"),
    ({"softcap": -1.0}, "softcap is a finite number above 0"),
    ({"softcap": math.nan}, "softcap is a finite number above 0"),
    ({"mask": Mask(N, N - 1)}, "the mask is for 48 queries and 47 keys"),
    ({"mask": Mask(N, N, tensor=torch.ones(3, 1, N, N) > 0)}, "does not fit a map of batch 2"),
    ({"mask": Mask(N, N, tensor=torch.ones(1, 3, N, N) > 0)}, "and 4 heads"),
    ({"values": torch.zeros(B, 3, N, 5)}, "values must be"),
    ({"values": torch.zeros(B, KV, N - 1, 5)}, "values must be"),
    ({"values": torch.zeros(B, 0, N, 5)}, "values must be"),
    ({"values": torch.zeros(B, KV, N, 0)}, "values must be"),
])  # fmt: skip
def test_softmax_patterns_that_cannot_be(how: dict[str, Any], says: str) -> None:
    mask = how.pop("mask", None)
    with pytest.raises(CaptureError, match=says):
        SoftmaxPattern(Q, K, mask, **how)


@pytest.mark.parametrize(("q", "k"), [
    ((B, 0, N, D), (B, KV, N, D)), ((B, H, N, D), (B, 0, N, D)), ((B, 0, N, D), (B, 0, N, D)),
    ((B, H, N, 0), (B, KV, N, 0)),
    ((B, H, N, D), (B, KV, 0, D)), ((B, H, N, D), (B, 3, N, D)), ((H, N, D), (KV, N, D)),
])  # fmt: skip
@pytest.mark.parametrize("family", [SoftmaxPattern, LightningPattern])
def test_no_heads_no_width_no_keys(family: type[Pattern], q: tuple[int, ...], k: tuple[int, ...]) -> None:
    with pytest.raises(CaptureError):
        family(torch.zeros(q), torch.zeros(k))  # type: ignore[arg-type]
    if len(q) == 4:
        with pytest.raises(CaptureError):
            lightning_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k))
        with pytest.raises(CaptureError):
            DensePattern(torch.zeros(q[0], q[1], 3, 0))


def test_no_batch_and_no_queries_are_no_error() -> None:
    for b, n in ((0, N), (B, 0)):
        got = SoftmaxPattern(torch.zeros(b, H, n, D), torch.zeros(b, KV, N, D)).statistics(
            ["entropy", "received", "peak"]
        )
        assert got["entropy"].shape == (b, H, n)
        assert got["received"].shape == (b, H, N)
    ids = torch.zeros(0, N, dtype=torch.long)
    assert Options(tokens=ids).ids(0, N, N, 0).shape == (0, N + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masks_that_add_no_numbers_are_named(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.zeros(1, 1, N, N, dtype=dtype)
    tensor[0, 0, 5, 3:] = -math.inf
    pattern = SoftmaxPattern(Q.to(dtype), K.to(dtype), Mask(N, N, tensor=tensor))
    assert pattern.statistics(["entropy"])["entropy"].isfinite().all()
    tensor = tensor.clone()
    tensor[0, 0, 7, 2] = bad
    with pytest.raises(CaptureError, match=rf"the mask holds {bad} at \[0, 0, 7, 2\]"):
        SoftmaxPattern(Q.to(dtype), K.to(dtype), Mask(N, N, tensor=tensor)).statistics(["entropy"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_that_overflow_are_an_error(dtype: torch.dtype, masked: bool) -> None:
    large = 1e25 if dtype == torch.float32 else 1e200
    q, k = torch.ones(1, 1, 70, 4, dtype=dtype), torch.ones(1, 1, 70, 4, dtype=dtype)
    q[0, 0, 9], k[0, 0, 4] = large, large
    pattern = SoftmaxPattern(q, k, causal(70) if masked else None)
    with pytest.raises(CaptureError, match="overflow") as caught:
        pattern.statistics(["entropy", "received"])
    assert "[0, 0, 9]" in str(caught.value)
    with pytest.raises(CaptureError, match="overflow"):
        SoftmaxPattern(q, k).dense()
    given = torch.zeros(1, 1, 70, dtype=dtype)
    given[0, 0, 3] = math.nan
    with pytest.raises(CaptureError, match=r"nan at \[batch, head, query\] \[0, 0, 3\]"):
        SoftmaxPattern(torch.ones_like(q), torch.ones_like(k), lse=given).statistics(["entropy"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_that_overflow_downwards_weigh_nothing(dtype: torch.dtype) -> None:
    large = 1e25 if dtype == torch.float32 else 1e200
    q, k = torch.ones(1, 1, 70, 4, dtype=dtype), torch.ones(1, 1, 70, 4, dtype=dtype)
    q[0, 0, 9], k[0, 0, 4] = large, -large
    got = SoftmaxPattern(q, k).statistics(["entropy", "effective_keys", "received"])
    even = torch.full((70,), math.log(69), dtype=dtype)
    torch.testing.assert_close(got["entropy"][0, 0], even, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got["received"][0, 0, 4], torch.zeros((), dtype=dtype), atol=1e-6, rtol=0)


def test_a_softcap_bounds_what_overflows() -> None:
    q, k = torch.full((1, 1, 5, 4), 1e25), torch.full((1, 1, 5, 4), 1e25)
    got = SoftmaxPattern(q, k, softcap=20.0).statistics(["entropy", "lse"])
    torch.testing.assert_close(got["entropy"], torch.full((1, 1, 5), math.log(5)))
    torch.testing.assert_close(got["lse"], torch.full((1, 1, 5), 20 + math.log(5)))


def test_a_capture_with_such_a_pattern_does_not_load(tmp_path: Any) -> None:
    """In a process of its own, since it once read out of bounds."""
    code = """
import torch, workbench
from torch import nn
from workbench.storage import files
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.Linear(8, 24)
    def forward(self, x):
        q, k, v = self.heads(x).unflatten(-1, (3, 8, 1)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
def find(thing):
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ()
    here = [thing["mask"]] if isinstance(thing, dict) and isinstance(thing.get("mask"), dict) else []
    return here + [mask for each in inner for mask in find(each)]
with workbench.attach(Model().eval()) as wb, torch.no_grad(), wb.capture() as cap:
    wb.model(torch.randn(1, 64, 8))
for which in ("nothing", "lse", "sinks", "n_queries", "window"):
    cap.save("run.safetensors", pattern=True)
    header, tensors = files.read("run.safetensors", "workbench.capture")
    header = {name: value for name, value in header.value.items() if name != "version"}
    key = next(name for name in tensors if name.endswith(("pattern.q", "pattern.pattern.q"))).removesuffix("q")
    [mask] = find(header)
    if which == "lse":
        tensors[key + "lse"] = torch.zeros(1)
    elif which == "sinks":
        tensors[key + "sinks"] = torch.zeros(0)
    elif which != "nothing":
        mask[which] = 0 if which == "window" else 10**6
    files.write("run.safetensors", "workbench.capture", header, tensors)
    try:
        workbench.load_capture("run.safetensors")[0].pattern.statistics(["entropy", "received"])
        print(which, "loaded", flush=True)
    except workbench.FormatError:
        print(which, "refused", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    found = dict(line.split() for line in done.stdout.splitlines())
    refused = dict.fromkeys(("lse", "sinks", "n_queries", "window"), "refused")
    assert found == {"nothing": "loaded"} | refused, done.stderr
    assert workbench.FormatError is FormatError


def test_devices_that_differ_are_named() -> None:
    elsewhere = torch.ones(1, 1, N, N, dtype=torch.bool, device="meta")
    with pytest.raises(CaptureError, match="the mask is on meta and the queries on cpu"):
        SoftmaxPattern(Q, K, Mask(N, N, tensor=elsewhere))
    with pytest.raises(CaptureError, match="q is on cpu and k on meta"):
        SoftmaxPattern(Q, K.to("meta"))
    with pytest.raises(CaptureError, match="lse is on meta"):
        SoftmaxPattern(Q, K, lse=torch.empty(B, H, N, device="meta"))
    with pytest.raises(CaptureError, match="sinks is on meta"):
        SoftmaxPattern(Q, K, sinks=torch.empty(H, device="meta"))


@pytest.mark.parametrize(
    ("q", "why"),
    [
        (Q, "not on meta"),
        (drawn(B, H, N, 300), "up to 256 wide, not 300"),
        (Q.double(), "not torch.float64"),
    ],
)
def test_what_no_fused_kernel_takes_is_left_to_torch(q: Tensor, why: str) -> None:
    """On a device without Triton, in heads of any width and in float64: `engines` says who streams."""
    q = q.to("meta")
    problem = SoftmaxPattern(q, q, lse=q[..., 0]).problem
    ((engine, names),) = engines.assign(problem, ["entropy", "received"], Options())
    assert (engine.name, names) == ("torch", ("entropy", "received"))
    assert why in str(TritonEngine().refusal(problem, ["entropy"], Options()))
