"""The Triton kernel of lightning attention without a GPU: its numbers in the interpreter, and what it compiles to.

A process can interpret kernels or compile them, never both: this file is also the script of the processes that do.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.kernels.lightning import chunked, decays, lightning_attention

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel for this system")

CASES = [  # positions, d, width, dtype, starts from a state
    (1, 16, 16, "float32", True),
    (17, 8, 5, "float32", False),
    (100, 100, 20, "float32", True),
    (64, 256, 256, "float16", False),
    (100, 32, 40, "float16", True),
    (256, 64, 64, "float16", True),
]
LIMITS = {"80": 166_912, "90": 232_448, "gfx942": 65_536}
"""Most shared memory of one program, in bytes."""
KINDS = [(128, "fp16"), (128, "fp32"), (32, "fp32"), (16, "bf16")]
"""Features (= width, a multiple of 16 when a kernel starts) and dtype of the compiled kernels."""


def interpret() -> list[dict[str, Any]]:
    """Relative errors of the kernel in the interpreter against the chunked form in float64."""
    from workbench.kernels.lightning import triton

    found = []
    for n, d, width, name, started in CASES:
        gen = torch.Generator().manual_seed(n)
        dtype = getattr(torch, name)
        q, k, v, do = (torch.randn(2, 2, n, w, generator=gen).to(dtype) for w in (d, d, width, width))
        state, d_state = (torch.randn(2, 2, d, width, generator=gen) if started else None for _ in range(2))
        exact = [None if t is None else t.double() for t in (q, k, v, do, state, d_state)]
        eq, ek, ev, edo, es, eds = exact
        rates = decays(2)
        got = [*triton.forward(q, k, v, rates, state), *triton.backward(q, k, v, rates, state, do, d_state)]
        want = [*chunked.forward(eq, ek, ev, rates, es, 32), *chunked.backward(eq, ek, ev, rates, es, 32, edo, eds)]
        errors = [float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)]
        found.append({"case": [n, d, width, name], "errors": errors, "dtypes": [str(t.dtype) for t in got]})
    return found


def compile_all() -> list[dict[str, Any]]:
    """Shared memory, registers, spills and matrix instructions of each kernel for each GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from workbench.kernels.lightning import triton as ours

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    names = ours.lightning_kernel.arg_names
    found = []
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        for d, dtype in KINDS:
            for reverse in (False, True):
                options = ours.tiles(dtypes[dtype], d)
                warps = {name: options.pop(name) for name in ("num_warps", "num_stages")}
                parts = -(-d // options["BLOCK_D"])
                constants = options | {
                    "REVERSE": reverse,
                    "FROM_STATE": True,
                    "PRECISION": ours.precision(dtypes[dtype], target.backend == "hip"),
                }
                signature = dict.fromkeys(("q", "k", "v"), f"*{dtype}")
                signature |= dict.fromkeys(("log2_decay", "state_in", "state_out"), "*fp32")
                signature |= dict.fromkeys(("n_sequences", "n_heads", "n", "d", "width"), "i32")
                signature |= {"out": f"*{dtype}" if parts == 1 else "*fp32"}
                aligned = [x for x in names if signature.get(x, "").startswith("*") or x in ("d", "width")]
                source = ASTSource(
                    fn=ours.lightning_kernel,
                    signature={name: signature.get(name, "constexpr") for name in names},
                    constexprs=constants,
                    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
                )
                kernel = triton.compile(source, target=target, options=warps)
                case = {"arch": str(target.arch), "d": d, "dtype": dtype, "reverse": reverse}
                found.append(case | {"shared": kernel.metadata.shared} | _read(kernel.asm, target.backend))
    return found


def _read(asm: dict[str, Any], backend: str) -> dict[str, int]:
    if backend == "hip":
        text = asm["amdgcn"]
        spills = [int(x) for x in re.findall(r"(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)]
        return {"spilled": max(spills), "matrix": text.count("v_mfma")}
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = max(int(x) for x in re.findall(r"STACK:(\d+)", usage))
    return {"spilled": stack, "matrix": len(re.findall(r"mma\.sync|wgmma\.mma_async", asm["ptx"]))}


def run(what: str) -> list[dict[str, Any]]:
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
    assert len(results) == len(CASES)
    for result in results:
        name = result["case"][-1]
        limit = 2e-6 if name == "float32" else 1e-3
        assert max(result["errors"]) < limit, result
        own, state = f"torch.{name}", "torch.float32"
        assert result["dtypes"] == [own, state, own, own, own, state]


@pytest.mark.slow
def test_compiles_within_the_limits_of_three_gpus():
    results = run("compile")
    assert len(results) == 3 * 2 * len(KINDS)
    for result in results:
        assert result["shared"] <= LIMITS[result["arch"]], result
        assert result["spilled"] == 0, result
        assert result["matrix"] > 0, result


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d", "width"), [(1, 16, 16), (100, 100, 20), (257, 64, 64), (1000, 256, 128)])
def test_numbers_on_a_gpu(n: int, d: int, width: int, dtype: torch.dtype):
    gen = torch.Generator().manual_seed(n)
    tensors = [torch.randn(2, 3, n, w, generator=gen).to("cuda", dtype) for w in (d, d, width)]
    state = torch.randn(2, 3, d, width, generator=gen).cuda()
    leaves = [t.requires_grad_() for t in (*tensors, state)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    results = []
    for q, k, v, s in (leaves, exact):
        out, last = lightning_attention(q, k, v, initial_state=s, return_state=True)
        (out.double().sum() + last.double().sum()).backward()
        results.append([out, last, q.grad, k.grad, v.grad, s.grad])
    limit = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for got, want in zip(*results, strict=True):
        assert float((got - want).abs().max() / want.abs().max()) < limit


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
