"""The Triton kernels of recurrences without a GPU: their numbers in the interpreter, and what they compile to.

A process can interpret kernels or compile them, never both: this file is also the script of the processes that do.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this file is a script
from support.triton_builds import TARGETS, Figures, Program, assert_kept, keep, needs, read
from workbench.kernels.lightning import decays, lightning_attention
from workbench.kernels.recurrent import chunked, gated_delta_rule, gated_linear_attention
from workbench.kernels.recurrent.chunked import Inputs

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel for this system")

CASES = [  # kind, positions, d, width, dtype, starts from a state
    ("gated delta", 1, 16, 16, "float32", True),
    ("gated delta", 43, 20, 33, "float32", True),
    ("delta", 20, 8, 5, "float32", False),
    ("gated delta", 34, 80, 16, "float16", True),
    ("decay", 45, 70, 5, "float32", True),
    ("decay", 70, 32, 20, "float16", True),
    ("lightning", 70, 16, 5, "float16", False),
    ("strong decay", 34, 16, 16, "float32", True),
    ("channels", 1, 16, 16, "float32", True),
    ("channels", 35, 40, 5, "float32", True),
    ("channels", 18, 20, 70, "float16", False),
    ("strong channels", 18, 16, 16, "float32", True),
    ("kimi delta", 34, 36, 18, "float32", True),
    ("kimi delta", 14, 80, 5, "float16", False),
]
SCANS = [(1, 5, 1.0), (70, 20, 3.0), (34, 16, 100.0)]
"""Positions, width, and how large scores are."""
KEPT = Path(__file__).parent / "recurrent_figures.json"
KINDS = [
    ("states", "fp16", 128, True),
    ("states", "fp32", 128, False),
    ("sum", "fp16", 128, True),
    ("sum", "fp32", 128, False),
    ("news", "fp16", 128, False),
    ("news", "fp32", 128, True),
    ("channel_sum", "fp16", 128, True),
    ("channel_sum", "fp32", 128, False),
    ("channel_keys", "fp16", 128, False),
    ("channel_keys", "fp32", 128, True),
    ("channel_news", "fp16", 128, True),
    ("channel_news", "fp32", 128, False),
]
"""Kernel, dtype, features and direction of what is compiled: the widest programs, which need most registers."""


def made(kind: str, n: int, d: int, width: int, dtype: torch.dtype, device: str = "cpu", examples: int = 2) -> Inputs:
    """Two heads of each example; of some decays nothing is left, and after them hardly anything fades."""
    gen = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(examples, 2, n, w, generator=gen).to(device, dtype) for w in (d, d, width))
    of_channels = kind in ("channels", "strong channels", "kimi delta")
    log_decay = -(2 * torch.randn(examples, 2, n, *[d] * of_channels, generator=gen) - 2).exp()
    log_decay[:, :, 11::29] = -torch.inf
    log_decay[:, :, 12:20] = -1e-3
    if "strong" in kind:  # hardly anything is left of the position before: what it makes of itself must not drown that
        log_decay = log_decay.clamp(min=-1) - 14
    steps = 2 * torch.randn(examples, 2, n, generator=gen).sigmoid()
    if kind == "lightning":
        log_decay = decays(2).log()[None, :, None].expand(examples, 2, n)
    if "delta" in kind:
        k = normalize(k.float(), dim=-1).to(dtype)
    g = None if kind in ("linear", "delta") else log_decay.to(device).requires_grad_()
    return Inputs(q, k, v, g, steps.to(device, dtype) if "delta" in kind else None)


def interpret() -> list[dict[str, Any]]:
    """Relative errors of the kernels in the interpreter against the chunked form in float64."""
    from support.interpreter import patch_once
    from workbench.kernels.recurrent import triton
    from workbench.kernels.recurrent.triton import by_head

    by_head._MOST_STATES = 1 << 12  # some cases take their blocks in several runs

    patch_once()
    found = []
    for kind, n, d, width, name, started in CASES:
        examples = 1 if n > 20 else 2  # the interpreter takes its time
        inputs = made(kind, n, d, width, getattr(torch, name), examples=examples)
        gen = torch.Generator().manual_seed(n + 1)
        do = torch.randn(inputs.v.shape, generator=gen).to(inputs.v.dtype)
        state, d_state = (torch.randn(examples, 2, d, width, generator=gen) if started else None for _ in range(2))
        exact = Inputs(*(None if t is None else t.detach().double() for t in vars(inputs).values()))
        first, last = (None if t is None else t.double() for t in (state, d_state))
        with torch.no_grad():
            got = [*triton.forward(inputs, state), *_flat(triton.backward(inputs, state, do, d_state))]
        want = [*chunked.forward(exact, first, 32), *_flat(chunked.backward(exact, first, 32, do.double(), last))]
        errors = [float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)]
        dtypes = [str(t.dtype) for t in got]
        wanted = [str(inputs.v.dtype), "torch.float32", *(str(t.dtype) for t in vars(inputs).values() if t is not None)]
        found.append(
            {"case": [kind, n, name], "errors": errors, "dtypes": dtypes, "wanted": [*wanted, "torch.float32"]}
        )
    return [*found, *(interpreted_scan(n, width, large) for n, width, large in SCANS)]


def interpreted_scan(n: int, width: int, large: float) -> dict[str, Any]:
    """The same of scan attention, against its definition and what autograd makes of that."""
    from workbench.kernels.scan import triton

    gen = torch.Generator().manual_seed(n)
    scores, values, do = large * torch.randn(2, 2, n, generator=gen), *torch.randn(2, 2, 2, n, width, generator=gen)
    exact = [t.double().requires_grad_() for t in (scores, values)]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    want = exact[0][:, :, None].expand(-1, -1, n, -1).masked_fill(hidden, -torch.inf).softmax(-1) @ exact[1]
    want.backward(do.double())
    out, sizes = triton.forward(scores, values)
    got = out, *triton.backward(scores, values, sizes, out, do)
    pairs = zip(got, (want.detach(), *(t.grad for t in exact)), strict=True)
    terms = (values * do).sum(-1).abs().max()  # which cancel in the gradient of a score
    errors = [float((g - w).abs().max() / torch.maximum(w.abs().max(), terms)) for g, w in pairs]
    dtypes = [str(t.dtype) for t in got]
    return {"case": ["scan", n, "float32"], "errors": errors, "dtypes": dtypes, "wanted": ["torch.float32"] * 3}


def _flat(gradients: tuple[dict[str, Tensor], Tensor]) -> list[Tensor]:
    found, state = gradients
    return [*(found[name] for name in ("q", "k", "v", "log_decay", "beta") if name in found), state]


def programs(target: str) -> Iterator[Program]:
    """The kernels with the argument types and tiles of a launch on it."""
    from triton.compiler import ASTSource

    from workbench.kernels.recurrent.triton import by_channel, by_head, shared

    dtypes, amd = {"fp16": torch.float16, "fp32": torch.float32}, TARGETS[target][0] == "hip"
    for kind, dtype, d, reverse in KINDS:
        kernel = getattr(by_channel if "channel" in kind else by_head, f"{kind}_kernel")
        names = kernel.arg_names
        if "channel" in kind:
            options = by_channel.channel_tiles(d, 16 if "news" in kind else d, dtype == "fp32")
        elif kind == "news":
            options = by_head.news_tiles(dtypes[dtype], d)
        else:
            options = by_head.sum_tiles(dtypes[dtype], d, d, amd)
        warps, stages = (options.pop(name) for name in ("num_warps", "num_stages"))
        exact = shared.precision(dtypes[dtype], amd)
        constants = options | {"REVERSE": reverse, "STRICT": True, "FROM_STATE": True, "PRECISION": exact}
        signature = dict.fromkeys(("q", "k", "v", "x"), f"*{dtype}")
        float32 = ("beta", "total", "log_decay", "state_in", "state_out", "state", "states", "out")
        signature |= dict.fromkeys(float32, "*fp32")
        signature |= dict.fromkeys(("n_sequences", "n", "d", "width", "first", "last"), "i32")
        aligned = [x for x in names if signature.get(x, "").startswith("*") or x in ("d", "width")]
        source = ASTSource(
            fn=kernel,
            signature={name: signature.get(name, "constexpr") for name in names},
            constexprs={name: value for name, value in constants.items() if name in names},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        yield Program(f"{kind} {dtype} {d}", source, warps, stages)


def of(target: str) -> Figures:
    """What they need; the first is compiled every time."""
    return needs(target, programs(target), read(KEPT)[target], {"sum fp16 128"})


def run(what: str) -> Any:
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if what == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, __file__, what], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_numbers_in_the_interpreter():
    results = run("interpret")
    assert len(results) == len(CASES) + len(SCANS)
    for result in results:
        limit = 5e-6 if result["case"][-1] == "float32" else 1e-3
        assert max(result["errors"]) < limit, result
        assert result["dtypes"] == result["wanted"]


@pytest.mark.slow
def test_compiles_within_the_limits_of_three_gpus():
    found = run("compile")
    for target, programs in found.items():
        assert_kept(KEPT, target, programs, "python tests/kernels/test_recurrent_triton.py keep")
        assert len(programs) == len(KINDS)
        for name, one in programs.items():
            assert one["shared"] <= TARGETS[target][2], name
            assert one["spilled"] == 0, name
            assert one["tensor"] > 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d", "width"), [(1, 16, 16), (100, 100, 20), (257, 64, 64), (1000, 256, 128)])
@pytest.mark.parametrize("kind", ["lightning", "decay", "gated delta", "channels", "kimi delta"])
def test_numbers_on_a_gpu(kind: str, n: int, d: int, width: int, dtype: torch.dtype):
    inputs = made(kind, n, d, width, dtype, "cuda")
    state = torch.randn(2, 2, d, width, generator=torch.Generator().manual_seed(n)).cuda()
    leaves = [t.detach().requires_grad_() for t in (*vars(inputs).values(), state) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    results = []
    for tensors in (leaves, exact):
        *given, first = tensors
        if kind == "lightning":
            out, last = lightning_attention(*given[:3], decays(2), initial_state=first, return_state=True)
        else:
            function = gated_delta_rule if "delta" in kind else gated_linear_attention
            out, last = function(*given, initial_state=first, return_state=True)
        (out.double().sum() + last.double().sum()).backward()
        results.append([out, last, *(t.grad for t in tensors if t.grad is not None)])
    limit = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for got, want in zip(*results, strict=True):
        assert float((got - want).abs().max() / want.abs().max()) < limit


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep(KEPT, of)
    else:
        print(json.dumps(interpret() if sys.argv[1] == "interpret" else {target: of(target) for target in TARGETS}))
