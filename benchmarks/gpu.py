"""What the kernels compute and cost on one GPU, in at most eight minutes: correctness first, then time and memory.

Every Triton kernel is compared with float64, then timed against SDPA, FlashAttention and published code in the same
run. Prints its page, writes its numbers as JSON, and writes its section of docs/benchmarks.md. Steps that do not fit
into the time that is left are not run, and the page says so.

    python benchmarks/gpu.py [--json gpu.json] [--minutes 8]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny       # on a CPU, sizes of a test; writes no section
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from shared.measuring import machine, table, write_section
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.kernels import streaming
from workbench.kernels.lightning import LightningPattern, decays, lightning_attention
from workbench.kernels.masks import Mask, causal
from workbench.kernels.neighborhood import neighborhood_attention
from workbench.kernels.recurrent import chunked
from workbench.kernels.recurrent.chunked import Inputs
from workbench.kernels.s2 import s2_attention
from workbench.kernels.scan.blocked import PrefixAttention
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options
from workbench.kernels.triton import engine

HEADING = "On a GPU"
MASKED = 8192  # the longest that is run with a mask tensor
DEFAULT = ("entropy", "received")
ALL = ("peak", "peak_key", "effective_keys", "distance", "distance_var", "sink", "current", "previous", *DEFAULT)
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of products in TF32, and of these dtypes


@dataclass(frozen=True)
class Sizes:
    """What is run: on a GPU, or tiny in Triton's interpreter."""

    device: str
    checked: int
    dtypes: tuple[torch.dtype, ...]
    lengths: tuple[int, ...]
    heads: int
    widths: tuple[int, ...]
    rounds: int
    long: int
    grid: int
    layers: int
    model: dict[str, int]


GPU = Sizes(
    "cuda", 777, (torch.float32, torch.float16, torch.bfloat16), (1024, 4096, 8192, 32768, 131072), 32, (64, 128), 5,
    131072, 128, 4,
    {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
)  # fmt: skip
TINY = Sizes(
    "cpu", 40, (torch.float32,), (64,), 2, (32,), 1, 256, 8, 1,
    {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2},
)  # fmt: skip


@dataclass
class Run:
    """What was found, and the time that is left."""

    sizes: Sizes
    ends: float
    found: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """In which is timed."""
        return self.sizes.dtypes[-1]

    def draw(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers of the run's dtype."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.sizes.device, dtype or self.dtype)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median of the rounds, after two to warm up."""
        found = []
        for turn in range(self.sizes.rounds + 2):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            if turn > 1:
                found.append(time.perf_counter() - start)
        return statistics.median(found)

    def peak(self, work: Callable[[], object]) -> int:
        """Most bytes on the device above what was there before; 0 on a CPU."""
        if self.sizes.device == "cpu":
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.sizes.device == "cuda":
            torch.cuda.synchronize()


class _OnKernels(LightningPattern):
    """Its statistics by the Triton kernels, on a CPU in the interpreter."""

    def fused_magnitudes(self) -> Any:
        return self.magnitudes()


def made(problem: SoftmaxPattern, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Statistics by the Triton kernels, on a CPU in the interpreter."""
    return engine.statistics(problem.problem, list(names))


def off(got: Tensor, want: Tensor) -> float:
    """The largest error, over the largest number; numbers that are to be infinite or NaN must be so."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    alike = got.isfinite() == want.isfinite()
    if not bool(alike.all()):
        return math.inf
    got, want = got[want.isfinite()], want[want.isfinite()]
    return float((got - want).abs().max() / want.abs().max().clamp(min=1.0)) if want.numel() else 0.0


def correctness(run: Run) -> None:
    """Each kernel against float64."""
    n, found = run.sizes.checked, run.found.setdefault("errors", {})
    for dtype in run.sizes.dtypes:
        name, errors = str(dtype).removeprefix("torch."), dict[str, float]()
        q, k, v = (run.draw(1, h, n, 32, seed=i, dtype=dtype) for i, h in enumerate((4, 2, 2)))
        masks = {"causal": causal(n), "full": Mask(n, n), "window": Mask(n, n, causal=True, window=n // 3)}
        for kind, mask in masks.items():
            exact = SoftmaxPattern(q.double().cpu(), k.double().cpu(), mask).statistics(list(ALL))
            got = made(SoftmaxPattern(q, k, mask), ALL)
            errors[f"statistics, {kind}"] = max(off(got[each], exact[each]) for each in ALL if each != "peak_key")
        errors["statistics, shaped"] = shaped(run, q, k)
        exact = LightningPattern(q.double().cpu(), k.double().cpu()).statistics(ALL)
        got = _OnKernels(q, k).statistics(ALL)
        errors["statistics, fading"] = max(off(got[each], exact[each]) for each in ALL if each != "peak_key")
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        exacts = [x.double().cpu().requires_grad_() for x in (q, k, v)]
        output, _ = engine.attention(*leaves, causal(n))
        want = scaled_dot_product_attention(*exacts, is_causal=True, enable_gqa=True)
        grads, wanted = (torch.autograd.grad(out.sum(), each) for out, each in ((output, leaves), (want, exacts)))
        errors["attention"] = off(output, want)
        errors["attention, backward"] = max(map(off, grads, wanted))
        errors |= recurrences(run, dtype)
        found[name] = errors
    worst = {name: max(errors.values()) for name, errors in found.items()}
    wrong = [name for name, error in worst.items() if not error <= TOLERANCE[getattr(torch, name)]]
    if wrong:
        raise SystemExit(f"kernels are wrong in {', '.join(wrong)}: {json.dumps(found, indent=1)}")


def shaped(run: Run, q: Tensor, k: Tensor) -> float:
    """With padding, softcap, sink logits, a bias and induction at once."""
    n, names = run.sizes.checked, [*ALL, "induction"]
    padded = Mask(n, n, causal=True, tensor=torch.arange(n)[None, None, None] >= n // 8)
    sinks, bias = torch.tensor([0.5, -1.0, 2.0, 0.0]), run.draw(1, 4, n, seed=5, dtype=torch.float32).cpu()
    options = Options(tokens=torch.arange(n)[None] % 7)

    def made_of(q: Tensor, k: Tensor, dtype: torch.dtype) -> SoftmaxPattern:
        mask = replace(padded, tensor=padded.tensor.to(q.device))
        given = {"sinks": sinks.to(q.device, dtype), "key_bias": bias.to(q.device, dtype)}
        return SoftmaxPattern(q, k, mask, softcap=10.0, **given)

    exact = streaming.statistics(made_of(q.double().cpu(), k.double().cpu(), torch.float64), names, options)
    got = engine.statistics(made_of(q, k, torch.float32).problem, names, options)
    return max(off(got[name], exact[name]) for name in names if name != "peak_key")


def recurrences(run: Run, dtype: torch.dtype) -> dict[str, float]:
    """Lightning and scan attention's kernels, forward and backward, against the chunked forms in float64."""
    from workbench.kernels.recurrent import triton
    from workbench.kernels.scan import triton as scan

    n = run.sizes.checked
    q, k, v, grad = (run.draw(1, 2, n, 32, seed=i, dtype=dtype) for i in range(4))
    fade = decays(2).log()[None, :, None].expand(1, 2, n).to(run.sizes.device)
    given, exact = Inputs(q, k, v, fade), Inputs(*(x.double().cpu() for x in (q, k, v, fade)))
    out, _ = triton.forward(given, None)
    want, _ = chunked.forward(exact, None, 64)
    gradients, _ = triton.backward(given, None, grad, None)
    wanted, _ = chunked.backward(exact, None, 64, grad.double().cpu(), None)
    back = max(off(gradients[name], wanted[name]) for name in ("q", "k", "v"))
    found = {"lightning": off(out, want), "lightning, backward": back}
    scores = run.draw(1, 2, n, seed=5, dtype=torch.float32)
    out, sizes = scan.forward(scores, v)
    wanted = [t.double().cpu().requires_grad_() for t in (scores, v)]
    want = PrefixAttention.apply(*wanted, 64)
    want.backward(grad.double().cpu())
    found["scan"] = off(out, want)
    back = zip(scan.backward(scores, v, sizes, out, grad), wanted, strict=True)
    return found | {"scan, backward": max(off(got, given.grad) for got, given in back)}


def times(run: Run) -> None:
    """Statistics over the fused forward, at each length and width, with memory and the fraction of the peak rate."""
    rows = run.found.setdefault("statistics", [])
    for width in run.sizes.widths:
        for n in run.sizes.lengths:
            if time.monotonic() > run.ends:
                run.left_out.append(f"statistics at N = {n}, width {width}")
                continue
            q, k, v = (run.draw(1, run.sizes.heads, n, width, seed=i) for i in range(3))
            forward = run.seconds(lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True))
            lse = made(SoftmaxPattern(q, k, causal(n)), ("lse",))["lse"]
            pattern = SoftmaxPattern(q, k, causal(n), lse=lse)
            row: dict[str, Any] = {"N": n, "width": width, "forward": forward}
            for name, names in (("default", DEFAULT), ("all", ALL)):
                row[name] = run.seconds(lambda pattern=pattern, names=names: made(pattern, names)) / forward
            if n <= MASKED:  # a mask that a padded batch is given, a byte for each query and key
                shown = torch.ones(1, 1, n, n, dtype=torch.bool, device=q.device).tril_()
                masked = SoftmaxPattern(q, k, Mask(n, n, tensor=shown), lse=lse)
                row["masked"] = run.seconds(lambda masked=masked: made(masked, DEFAULT)) / forward
            row["peak bytes"] = run.peak(lambda pattern=pattern: made(pattern, ALL))
            row["TFLOP/s"] = 2 * run.sizes.heads * n * n * width / (row["all"] * forward) / 1e12  # two products, half
            rows.append(row)


def mechanisms(run: Run) -> None:
    """S2-Attention, lightning and neighbourhood attention, each over the dense kernel or code that was published."""
    n, h, d = run.sizes.long, run.sizes.heads, run.sizes.widths[0]
    q, k, v = (run.draw(1, h, n, d, seed=i) for i in range(3))
    dense = run.seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
    found: dict[str, float | None] = {
        "S2 over SDPA": run.seconds(lambda: s2_attention(q, k, v, vert_stride=h, head_step=1)) / dense,
        "lightning over SDPA": (lightning := run.seconds(lambda: lightning_attention(q, k, v))) / dense,
        "lightning over lightning_attn": None,
    }
    found["lightning's statistics over SDPA"] = run.seconds(lambda: _OnKernels(q, k).statistics(DEFAULT)) / dense
    if find_spec("lightning_attn") is not None:  # the package of its authors
        from lightning_attn.ops import lightning_attn_func

        slopes = -decays(h).log().float().to(q.device)
        found["lightning over lightning_attn"] = lightning / run.seconds(lambda: lightning_attn_func(q, k, v, slopes))
    side = run.sizes.grid
    q, k, v = (run.draw(1, h, side * side, d, seed=i) for i in range(3))
    whole = run.seconds(lambda: scaled_dot_product_attention(q, k, v))
    near = run.seconds(lambda: neighborhood_attention(q, k, v, shape=(side, side), window=min(side - 1, 13)))
    found["neighbourhood over SDPA"] = near / whole
    run.found["mechanisms"] = found


def whole_model(run: Run) -> None:
    """A capture of a model with layers of a 7B's shape, plain and compiled, over its forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import workbench

    n = run.sizes.lengths[min(2, len(run.sizes.lengths) - 1)]
    config = LlamaConfig(
        num_hidden_layers=run.sizes.layers, vocab_size=1000, max_position_embeddings=n, **run.sizes.model
    )
    with torch.device(run.sizes.device):
        model = LlamaForCausalLM(config).eval().to(run.dtype)
    ids = torch.randint(0, 1000, (1, n), device=run.sizes.device)
    found = run.found.setdefault("model", {"N": n, "layers": run.sizes.layers})
    with torch.no_grad():
        for name in ("plain", "compiled"):
            if name == "compiled":
                for layer in model.model.layers:
                    layer.compile(dynamic=False, **({} if run.sizes.device == "cuda" else {"backend": "eager"}))
            forward = run.seconds(lambda: model(ids, use_cache=False))
            with workbench.attach(model) as wb:

                def capture(wb: Any = wb) -> None:
                    with wb.capture(DEFAULT, limit=None) as cap:
                        model(ids, use_cache=False)
                    if len(cap.sites) != run.sizes.layers:
                        raise SystemExit("a site is missing")

                found[name] = run.seconds(capture) / forward
                found[f"{name}, peak bytes"] = run.peak(capture) - run.peak(lambda: model(ids, use_cache=False))


STEPS: tuple[Callable[[Run], None], ...] = (correctness, times, mechanisms, whole_model)


def page(run: Run) -> str:
    """The section."""
    errors = run.found["errors"]
    checks = list(next(iter(errors.values())))
    parts = [
        f"`python benchmarks/gpu.py` on {_device(run)}. Largest error of each kernel against float64, over the\n"
        "largest number (of float32 the recurrences' products are TF32, those of statistics exact):",
        table(["dtype", *checks], [[name, *(f"{each[c]:.1e}" for c in checks)] for name, each in errors.items()]),
    ]
    if rows := run.found.get("statistics"):
        parts += [
            f"Statistics over SDPA's forward, {run.sizes.heads} heads, causal, {run.dtype}; bytes above its inputs:",
            table(
                ["N", "width", "default", "all", "default, mask tensor", "peak MiB", "TFLOP/s"],
                [
                    [str(r["N"]), str(r["width"]), f"{r['default']:.2f}", f"{r['all']:.2f}",
                     f"{r['masked']:.2f}" if "masked" in r else "",
                     f"{r['peak bytes'] / 2**20:.0f}", f"{r['TFLOP/s']:.0f}"]
                    for r in rows
                ],
            ),
        ]  # fmt: skip
    for name in ("mechanisms", "model"):
        if found := run.found.get(name):
            shown = [[key, "not run" if value is None else f"{value:.2f}"] for key, value in found.items()]
            parts.append(table([name, "ratio"], shown))
    if run.left_out:
        parts.append(f"Left out for want of time: {'; '.join(run.left_out)}.")
    return "\n\n".join([*parts, machine("torch", "triton", "transformers")])


def _device(run: Run) -> str:
    return torch.cuda.get_device_name() if run.sizes.device == "cuda" else "a CPU, in Triton's interpreter"


def main() -> None:
    """Run the steps, and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        write_section(
            HEADING, "Not measured: no GPU was there. `python benchmarks/gpu.py` measures it in eight minutes."
        )
        return
    run = Run(TINY if options.tiny else GPU, time.monotonic() + 60 * options.minutes)
    for step in STEPS:
        if time.monotonic() > run.ends:
            run.left_out.append(step.__name__)
        else:
            step(run)
    if options.json:
        options.json.write_text(json.dumps(run.found | {"left_out": run.left_out, "device": _device(run)}, indent=1))
    if options.tiny:
        print(page(run))
    else:
        write_section(HEADING, page(run))


if __name__ == "__main__":
    main()
