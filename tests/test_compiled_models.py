"""Ten models that inductor has compiled: statistics are their eager twins', outputs those without a capture."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import workbench
from support.tiny import family, make
from workbench import Capture

NAMES = ("entropy", "received", "distance", "peak", "sink")


class FlexLayer(nn.Module):
    """Causal attention by FlexAttention, in windows of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.o = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 8), None, None, 32, 32, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, 1)
        return self.o(flex_attention(q, k, v, block_mask=self.mask).transpose(1, 2).flatten(2)) + x


class FlexModel(nn.Module):
    """Of one layer: inductor takes seconds for each, as it numbers buffers throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(FlexLayer())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@dataclass(frozen=True)
class Case:
    """A model with inputs, how it is compiled, and whether its outputs are the compiled model's to the bit.

    Those of one layer have two in `tests/hooks/compiled/test_recording.py`, or are like one here that has two.
    """

    name: str
    exact: bool = True
    dynamic: bool | None = None
    by_layer: bool = False
    one_layer: bool = False

    def made(self) -> tuple[Any, dict[str, Any]]:
        if self.name == "flex":
            torch.manual_seed(0)
            return FlexModel().eval(), {"x": torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))}
        found = family(self.name)
        model = make(found)
        for blocks in model.modules() if self.one_layer else ():  # inductor takes seconds for each
            if isinstance(blocks, nn.ModuleList) and len(blocks) == 2 and type(blocks[0]) is type(blocks[1]):
                del blocks[1:]
        inputs = found.inputs()
        if self.name == "t5":  # of one length, its towers share kernels; Whisper's are of two
            inputs["decoder_input_ids"] = inputs["input_ids"].flip(-1)
        return model, inputs

    def compiled(self, model: Any) -> Any:
        if not self.by_layer:
            return torch.compile(model, dynamic=self.dynamic)
        for layer in model.model.layers:
            layer.compile()
        return model


CASES = [
    Case("gpt2"),
    Case("llama-gqa", dynamic=True, one_layer=True),
    Case("qwen2", one_layer=True),
    Case("gemma2", exact=False, one_layer=True),
    Case("bert", one_layer=True),
    Case("t5", one_layer=True),
    Case("vit", one_layer=True),
    Case("whisper", one_layer=True),
    Case("flex", exact=False),
    Case("mistral-left-padded", by_layer=True),
]


@dataclass(frozen=True)
class Run:
    """What came of a case: an eager capture, two compiled ones, outputs before, inside and after, and compilations."""

    case: Case
    eager: Capture
    first: Capture
    second: Capture
    before: Tensor
    inside: tuple[Tensor, Tensor]
    after: Tensor
    graphs: tuple[int, int, int, int]


def _output(made: Any) -> Tensor:
    found = next((getattr(made, name) for name in ("logits", "last_hidden_state") if hasattr(made, name)), made)
    assert isinstance(found, Tensor)
    return found


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    case: Case = request.param
    torch._dynamo.reset()
    model, inputs = case.made()
    count = functools.partial(counters["stats"].__getitem__, "unique_graphs")
    with torch.no_grad():
        with workbench.attach(model) as wb, wb.capture(NAMES) as eager:
            model(**inputs)
        built, started = case.compiled(model), count()
        before, compiled = _output(built(**inputs)), count()
        found, inside = [], []
        with workbench.attach(built) as wb:
            for _ in range(2):
                with wb.capture(NAMES, z=case.exact) as cap:
                    inside.append(_output(built(**inputs)))
                found.append(cap)
                recorded = count()
                if len(found) == 1:
                    once = recorded
        after = _output(built(**inputs))
    graphs = (compiled - started, once - compiled, recorded - once, count() - recorded)
    yield Run(case, eager, found[0], found[1], before, (inside[0], inside[1]), after, graphs)
    torch._dynamo.reset()


def test_statistics_are_those_of_the_eager_twin(run: Run) -> None:
    for cap in (run.first, run.second):
        assert [site.name for site in cap.sites] == [site.name for site in run.eager.sites]
        assert not cap.unrecorded
        for a, b in zip(cap, run.eager, strict=True):
            assert a.shape == b.shape
            for name, value in b.statistics.items():
                torch.testing.assert_close(a.statistics[name], value, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_outputs_are_those_of_the_compiled_model(run: Run) -> None:
    said = str(run.first.provenance["compiled"])
    assert ("to the bit" in said) == run.case.exact
    for output in run.inside:
        if run.case.exact:
            assert torch.equal(output, run.before)
        else:
            torch.testing.assert_close(output, run.before, atol=1e-5, rtol=1e-5)
    assert torch.equal(run.after, run.before)


def test_graphs_are_compiled_once_more(run: Run) -> None:
    compiled, first, second, after = run.graphs
    assert 0 < first <= compiled
    assert (second, after) == (0, 0)


def test_the_fused_kernel_gives_its_denominators(run: Run) -> None:
    for site in run.first if run.case.exact else ():
        assert site.kernel.startswith("flash_attention"), site.kernel
        lse = site.pattern.lse
        assert lse is not None
        q, k = site.pattern.q.double(), site.pattern.k.double()
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * site.pattern.scale
        if site.pattern.mask.additive:  # T5's bias of positions
            scores = scores + site.pattern.mask.tensor.double()
        scores = scores.masked_fill(site.pattern.dense() == 0, -torch.inf)
        seen = lse.isfinite() & scores.isfinite().any(-1)
        torch.testing.assert_close(lse.double()[seen], scores.logsumexp(-1)[seen], atol=1e-5, rtol=1e-5)
