"""What users add: statistics, engines, and mechanisms with a pattern of their own."""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from workbench.errors import CaptureError, FormatError
from workbench.kernels import engines, families, passes
from workbench.kernels.functions import FUNCTIONS
from workbench.kernels.lightning import LightningPattern
from workbench.kernels.masks import Mask, causal
from workbench.kernels.merging import merge_rows
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.kernels.patterns.base import FAMILIES
from workbench.kernels.s2 import S2Layout
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import STATISTICS, Accumulator, Options, RowSum, dense, unregister
from workbench.views.head_atlas.quantities import quantity


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    statistics, functions, before = dict(STATISTICS), dict(FUNCTIONS), {k: dict(v) for k, v in FAMILIES.items()}
    asked = engines.registered()
    yield
    for kept, known in ((STATISTICS, statistics), (FUNCTIONS, functions), (FAMILIES, before)):
        kept.clear()
        kept.update(known)
    for engine in engines.registered():
        if engine not in asked:
            engines.unregister(engine.name)


def renyi2(rows):
    return -rows.p.square().sum(-1).log()


def drawn(n: int = 70, dtype: torch.dtype = torch.float32, **how: Any) -> SoftmaxPattern:
    gen = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, h, n, 12, generator=gen, dtype=torch.float64).to(dtype) for h in (4, 2, 2))
    return SoftmaxPattern(q, k, values=v, **how)


def whole(pattern: Pattern) -> Tensor:
    return (pattern.magnitude() if pattern.by_magnitude else pattern).dense().double()


class Squares(RowSum):
    def add(self, tile):
        self.of_tiles.append(tile.p.square().sum(-1))

    def rescale(self, rows, online):
        self.total[rows] *= online.factor.square()

    def normalise(self, denominator, mass):
        self.total /= denominator.square()

    def results(self):
        return {"squares": self.total}


class ReceivedSquares(Accumulator):
    def __init__(self, space, options):
        super().__init__(space, options)
        self.total = torch.zeros(space.n_batch, space.n_heads, space.n_keys, dtype=torch.float64)

    def add(self, tile):
        self.total[tile.batch, tile.heads, tile.keys] += tile.p.square().sum(-2)

    def results(self):
        return {"received_squares": self.total}


MASKS = {
    "none": None,
    "causal": causal(70),
    "window": Mask(70, 70, causal=True, window=9),
    "dead rows": Mask(70, 70, causal=True, offset=-3),
    "padding": Mask(70, 70, tensor=torch.arange(70) < torch.tensor([70, 30])[:, None, None, None]),
    "layout": Mask(
        70, 70, causal=True, layout=S2Layout(70, 70, 4, 2, block=16, local_blocks=1, vert_stride=3), n_heads=4
    ),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("collect", [None, Squares])
def test_a_statistic_is_that_of_its_definition(mask, dtype, collect):
    from_sums = {} if collect is None else {"finish": lambda raw, space, options: -raw["squares"].log()}
    workbench.statistic(unit="nats", meaning="Rényi entropy", collect=collect, **from_sums)(renyi2)
    pattern = drawn(dtype=dtype, mask=MASKS[mask])
    got = pattern.statistics(["renyi2", "entropy", "received", "value_weighted_renyi2"])
    want = dense(whole(pattern), ["renyi2", "entropy", "received"], pattern.mask)
    weighted = dense(whole(pattern.value_weighted()), ["renyi2"], pattern.mask)
    for name, value in (*want.items(), ("value_weighted_renyi2", weighted["renyi2"])):
        torch.testing.assert_close(got[name].double(), value, atol=2e-5, rtol=2e-5, equal_nan=True)
    assert got["renyi2"].dtype == dtype


@pytest.mark.parametrize("known", [False, True])
def test_the_fast_engine_keeps_what_it_knows(known):
    workbench.statistic(meaning="Rényi entropy")(renyi2)
    lse = drawn(mask=causal(70)).lse if known else None
    pattern = drawn(mask=causal(70), lse=lse)
    assert pattern.engines(["entropy"], Options()) == {"native"}
    assert pattern.engines(["entropy", "renyi2"], Options()) == {"native", "torch"}
    alone = drawn(mask=causal(70), lse=lse).statistics(["entropy", "top_keys"])
    got = pattern.statistics(["entropy", "top_keys", "renyi2"])
    assert all(torch.allclose(got[name], value, rtol=0, atol=0, equal_nan=True) for name, value in alone.items())


def test_a_statistic_of_signed_weights_is_that_of_their_magnitude():
    workbench.statistic(meaning="Rényi entropy")(renyi2)
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 50, 8, generator=gen)
    pattern = LightningPattern(q, k, values=v)
    got = pattern.statistics(["renyi2"])["renyi2"].double()
    want = dense(pattern.dense(), ["renyi2"], pattern.mask, by_magnitude=True)["renyi2"]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_what_can_be_rescaled_needs_one_pass():
    workbench.statistic(meaning="from whole rows")(renyi2)
    assert [each.statistics for each in passes(["renyi2", "peak"]).passes] == [("peak",), ("renyi2",)]
    unregister("renyi2")
    how = {"finish": lambda raw, space, options: -raw["squares"].log()}
    workbench.statistic(meaning="from tiles", collect=Squares, **how)(renyi2)
    assert [each.statistics for each in passes(["renyi2", "peak"]).passes] == [("renyi2", "peak")]


def test_a_statistic_of_columns():
    @workbench.statistic(axes="key", meaning="Σ p² over queries", collect=ReceivedSquares)
    def received_squares(rows):
        return rows.p.square().sum(-2)

    assert received_squares.needs_denominators
    pattern = drawn(mask=causal(70))
    got = pattern.statistics(["received_squares"])["received_squares"]
    want = dense(whole(pattern), ["received_squares"], pattern.mask)["received_squares"]
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_a_statistic_of_several_outputs_and_whole_numbers():
    @workbench.statistic(axes="query top", meaning="smallest weights", outputs=("least_weight", "least_key"))
    def least(rows):
        weight, key = rows.p.masked_fill(~rows.seen, math.inf).topk(2, largest=False)
        return {"least_weight": weight, "least_key": key}

    @workbench.statistic(meaning="keys above a tenth", empty=-1)
    def large_keys(rows):
        return (rows.p > 0.1).sum(-1)

    pattern = drawn(mask=Mask(70, 70, causal=True, offset=-1))
    got = pattern.statistics(["least", "large_keys"])
    want = dense(whole(pattern), ["least", "large_keys"], pattern.mask)
    assert got["large_keys"].dtype == torch.int64
    assert got["large_keys"][..., 0].unique().tolist() == [-1]
    assert torch.equal(got["large_keys"], want["large_keys"])
    assert torch.equal(got["least_key"][:, :, 5:], want["least_key"][:, :, 5:])


def test_shards_of_a_statistic_merge():
    workbench.statistic(
        meaning="Rényi entropy",
        merge=lambda shards: shards.alive(-(shards.weight.square() * (-shards.of("renyi2")).exp()).sum(0).log()),
    )(renyi2)
    pattern = drawn(60)
    parts = [
        SoftmaxPattern(pattern.q, pattern.k[:, :, a:z]).statistics(["lse", "renyi2"]) for a, z in ((0, 25), (25, 60))
    ]
    got = merge_rows(parts, [0, 25])["renyi2"]
    torch.testing.assert_close(got, pattern.statistics(["renyi2"])["renyi2"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("says", "fields", "called"),
    [
        ("already", {}, "entropy"),
        ("already", {}, "top_keys_weight"),
        ("cannot be the name", {}, "two words"),
        ("cannot be the name", {}, "value_weighted_more"),
        ("no collect=", {"axes": "key"}, "columns"),
        ("query, key, query top or block", {"axes": "head"}, "heads"),
        ("no such field", {"colour": "red"}, "painted"),
    ],
)
def test_statistics_that_are_refused(says, fields, called):
    with pytest.raises(CaptureError, match=says):
        workbench.statistic(name=called, meaning="-", **fields)(renyi2)
    assert called == "entropy" or called not in STATISTICS


def test_definitions_that_give_something_else_are_named():
    for wrong, says in ((lambda rows: 1.0, "gives float"), (lambda rows: {"other": rows.p}, "gives other")):
        workbench.statistic(name="strange", meaning="-")(wrong)
        with pytest.raises(CaptureError, match=says):
            drawn(5).statistics(["strange"])
        unregister("strange")
    workbench.statistic(name="strange", meaning="-")(lambda rows: rows.p.sum())
    with pytest.raises(CaptureError, match="must give"):
        drawn(5).statistics(["strange"])
    unregister("strange")
    workbench.statistic(name="strange", meaning="-")(lambda rows: rows.p.argmax(-1))
    with pytest.raises(CaptureError, match="no NaN"):
        drawn(5).statistics(["strange"])
    workbench.statistic(name="late", meaning="-", collect=ReceivedSquares)(renyi2)
    with pytest.raises(CaptureError, match="needs_denominators=True"):
        drawn(5, dtype=torch.float64).statistics(["late"])


def test_the_same_cell_may_run_twice():
    for _ in range(2):
        record = workbench.statistic(meaning="Rényi entropy")(renyi2)
    assert STATISTICS["renyi2"] is record


def test_ranges_hold():
    pattern = drawn(mask=causal(70))
    tokens = torch.randint(0, 4, (2, 70), generator=torch.Generator().manual_seed(0))
    for name, record in STATISTICS.items():
        for out, value in pattern.statistics([name], tokens=tokens).items():
            low, high = record.range if not out.endswith("_index") else (-1, 69)
            there = value[~value.isnan()]  # rows that cannot have one have none
            assert there.numel() > value.numel() / 2, out
            assert low - 1e-5 <= there.min(), out
            assert there.max() <= high + 1e-5, out
        assert record.meaning
        assert record.formula


class Toy(nn.Module):
    """Attention by SDPA, one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.heads(x).chunk(3, -1))
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


def test_a_statistic_goes_through_a_capture_and_its_file(tmp_path):
    workbench.statistic(unit="nats", meaning="Rényi entropy", range=(0, math.inf))(renyi2)
    model, x = Toy().eval(), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    names = ["renyi2", "value_weighted_renyi2", "entropy"]
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture(statistics=names) as cap:
        model(x)
    site = cap[0]
    want = dense(site.pattern.dense(), ["renyi2"], site.pattern.mask)["renyi2"]
    torch.testing.assert_close(site.renyi2.double(), want, atol=1e-5, rtol=1e-5)
    assert list(cap.table("renyi2").columns)[-2:] == ["renyi2", "n"]
    assert len(cap.table("value_weighted_renyi2")) == 4
    label = quantity("renyi2")
    assert label is not None
    assert (label.label, label.unit, label.signed) == ("Renyi2", "nats", False)
    path = tmp_path / "run.safetensors"
    cap.save(path)
    assert torch.equal(workbench.load_capture(path)[0].renyi2, site.renyi2)
    code = f"import workbench; print(tuple(workbench.load_capture({str(path)!r})[0].renyi2.shape))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert elsewhere.stdout.strip() == "(2, 2, 9)", elsewhere.stderr


class Even:
    """An engine that knows the entropy of what it takes for even rows."""

    name = "even"

    def refusal(self, problem, names, options):
        return engines.unknown(names, options, {"entropy"}, ()) or (None if problem.lse is not None else "it wants lse")

    def raw(self, problem, names, options):
        return {"entropy": problem.seen.keys_per_query.expand(problem.shape[:3]).log()}


def test_an_engine_takes_what_it_does_not_refuse():
    engines.register(Even())
    lse = drawn(mask=causal(70)).lse
    pattern = drawn(mask=causal(70), lse=lse)
    assert pattern.engines(["entropy", "peak"], Options()) == {"even", "native"}
    got = pattern.statistics(["entropy", "peak"])
    torch.testing.assert_close(got["entropy"][0, 0], torch.arange(1, 71).log())
    assert torch.equal(got["peak"], drawn(mask=causal(70), lse=lse).statistics(["peak"])["peak"])
    assert drawn(mask=causal(70)).engines(["entropy"], Options()) == {"native"}
    with pytest.raises(CaptureError, match="already"):
        engines.register(Even())
    engines.unregister("even")
    with pytest.raises(CaptureError, match="no engine"):
        engines.unregister("even")


def test_engines_refuse_options_that_they_do_not_know():
    @dataclass(frozen=True)
    class More(Options):
        temperature: float | None = None

    pattern = drawn(mask=causal(70))
    assert pattern.engines(["entropy"], More(n_top=4)) == {"native"}
    assert pattern.engines(["entropy"], More(temperature=2.0)) == {"torch"}


def test_without_an_engine_the_reasons_are_told(monkeypatch):
    monkeypatch.setattr(engines, "_ENGINES", [Even()])
    with pytest.raises(CaptureError, match="no engine can make peak") as caught:
        drawn(5, lse=torch.zeros(2, 4, 5)).statistics(["peak"])
    assert 'it has no "peak"' in str(caught.value)


class GatedPattern(Pattern):
    """A = softmax(q kᵀ) · gate, rows that sum to the gate."""

    normalised = False

    def __init__(self, q: Tensor, k: Tensor, gate: float = 1.0) -> None:
        super().__init__((*q.shape[:3], k.shape[2]), Mask(q.shape[2], k.shape[2]), torch.float32, q.device)
        self.q, self.k, self.gate = q.detach(), k.detach(), gate

    def tile(self, queries, keys, heads=None):
        rows = (self.q[:, :, queries] @ self.k.mT).softmax(-1)[..., keys] * self.gate
        return rows if heads is None else rows[:, list(heads)]

    def state(self):
        return {"gate": self.gate}, {"q": self.q, "k": self.k}

    @classmethod
    def rebuild(cls, facts, tensors):
        return cls(tensors["q"], tensors["k"], facts["gate"])


def gated(q, k, v, gate=1.0, unused=None):
    return (q @ k.mT).softmax(-1) * gate @ v


@pytest.mark.parametrize("renamed", [False, True])
def test_a_mechanism_of_ones_own_is_captured_and_kept(tmp_path, renamed):
    marked = workbench.attention_function(pattern=GatedPattern)(gated)

    class Layer(Toy):
        def forward(self, x):
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.heads(x).chunk(3, -1))
            z = self.called(q, k, v)
            return self.out(z.transpose(1, 2).flatten(2))

        def called(self, q, k, v):
            return marked(k=k, q=q, v=v, gate=0.5) if renamed else marked(q, k, v, 0.5, unused=3)

    model, x = Layer().eval(), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), workbench.attach(nn.Sequential(model)) as wb:
        before = model(x)
        with wb.capture(statistics=["entropy", "received"]) as cap:
            after = wb.model(x)
        assert torch.equal(before, after)
        assert wb.verify(x).ok
    pattern = cap[0].pattern
    assert type(pattern) is GatedPattern
    torch.testing.assert_close(pattern.dense().sum(-1), torch.full((2, 2, 9), 0.5))
    want = dense(pattern.dense(), ["entropy", "received"], pattern.mask, by_magnitude=True)
    torch.testing.assert_close(cap[0].entropy.double(), want["entropy"], atol=1e-5, rtol=1e-5)
    path = tmp_path / "run.safetensors"
    cap.save(path, pattern=True)
    again = workbench.load_capture(path)[0].pattern
    assert type(again) is GatedPattern
    torch.testing.assert_close(again.dense(), pattern.dense())
    del FAMILIES["GatedPattern"]
    with pytest.raises(FormatError, match='no pattern family "GatedPattern"'):
        workbench.load_capture(path)


def test_functions_that_are_refused():
    with pytest.raises(CaptureError, match="call them q, k and v"):
        workbench.attention_function(pattern=GatedPattern)(lambda query, key, value: value)
    with pytest.raises(CaptureError, match="needs strength, which"):

        @workbench.attention_function(pattern=lambda q, k, strength: GatedPattern(q, k, strength))
        def weak(q, k, v):
            return v


def test_two_families_of_one_name_are_not_mixed_up():
    def define(module: str) -> type[Pattern]:
        return type("TwicePattern", (GatedPattern,), {"__module__": module})

    define("first"), define("first")  # a cell that ran twice
    facts, tensors = GatedPattern(*torch.zeros(2, 1, 1, 3, 4)).state()
    assert type(families.rebuild("TwicePattern", facts, tensors)).__module__ == "first"
    define("second")
    with pytest.raises(FormatError, match=r"first\.TwicePattern and second\.TwicePattern"):
        families.rebuild("TwicePattern", facts, tensors)


def test_families_of_the_package_are_found_without_an_import(tmp_path):
    code = (
        "import sys, torch; from workbench.kernels import families;"
        "print('workbench.kernels.lightning' in sys.modules);"
        "one = torch.ones(1, 1, 3, 1); held = {'q': one, 'k': one, 'decay': torch.tensor([0.5])};"
        "print(families.rebuild('LightningPattern', {}, held).dense()[0, 0, 2].tolist(), 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split("\n")[:2] == ["False", "[0.25, 0.5, 1.0] False"]


def test_families_of_other_packages_are_found_by_their_entry_point(tmp_path, monkeypatch):
    (tmp_path / "elsewhere_patterns.py").write_text(
        "from workbench.kernels.patterns import DensePattern\nclass ElsewherePattern(DensePattern): ...\n"
    )
    info = tmp_path / "elsewhere-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[workbench.patterns]\nElsewherePattern = elsewhere_patterns\n")
    monkeypatch.syspath_prepend(tmp_path)
    facts, tensors = DensePattern(torch.eye(3)[None, None]).state()
    found = families.rebuild("ElsewherePattern", facts, tensors)
    assert type(found).__module__ == "elsewhere_patterns"
    with pytest.raises(FormatError, match="no pattern family"):
        families.rebuild("os", facts, tensors)
