"""A sweep gives what one forward per variant gives, keeps what is done, and goes on only from its own file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.tiny import FAMILIES, Family, family, make
from workbench import Sweep, SweepInterrupted, Variant, Workbench, run_sweep
from workbench.errors import FormatError, InterventionError, WorkbenchError
from workbench.hooks.edits import SteerOutput
from workbench.hooks.nested import tensors
from workbench.hooks.positions import Positions
from workbench.sweep.variants import split

Batch = Mapping[str, Any]


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def weighed(output: Any, batch: Batch) -> Tensor:
    """One number per example that depends on every number of the output."""
    first = next(t for t in tensors(output) if t.dim() > 1).double()
    return (first * torch.arange(first[0].numel()).sin().view(first[0].shape)).flatten(1).sum(1)


def all_heads(wb: Workbench, **how: Any) -> list[Variant]:
    return [Variant((s.alias, h), label=f"{s.alias} {h}", **how) for s in wb.sites for h in range(s.n_heads or 0)]


@pytest.fixture
def wb() -> Iterator[Workbench]:
    with workbench.attach(make(family("gpt2"))) as wb:
        yield wb
        wb.check_idle()
        assert all("forward" not in module.__dict__ for module in wb.model.modules())


@pytest.fixture
def batches() -> list[Batch]:
    return [{"input_ids": ids(3, 9)}, {"input_ids": ids(1, 12, 1)}, {"input_ids": ids(2, 9, 2)}]


@torch.no_grad()
def one_by_one(wb: Workbench, variants: list[Variant], batches: list[Batch], **more: Any) -> Tensor:
    rows = []
    for variant in variants:
        each = []
        for draw in range(3 if variant.how == "resample" else 1):  # of a reference of four examples
            with wb.ablate(variant.heads, variant.how, positions=variant.positions, draw=draw, **more):
                each.append(torch.cat([weighed(wb.model(**batch), batch) for batch in batches]))
        rows.append(torch.stack(each).mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("one", [*FAMILIES, family("bridge-gpt2"), family("swin")], ids=lambda one: one.name)
def test_every_family_is_resumed_and_gives_what_single_forwards_give(one: Family) -> None:
    batch = {name: t.double() if t.is_floating_point() else t for name, t in one.inputs().items()}
    with workbench.attach(make(one).double()) as wb:
        variants = all_heads(wb)
        found = run_sweep(wb, variants, [batch], weighed, progress=False)
        truth = one_by_one(wb, variants, [batch])
    assert (found.mode, found.reason, found.batched) == ("resumed", "", True)
    torch.testing.assert_close(found.values[:, 0], truth, rtol=1e-5, atol=1e-5)
    assert found.effects.abs().amax((1, 2)).min() > 1e-3
    assert found.complete


@pytest.mark.parametrize("how", ["zero", "mean", "mean_positional", "resample"])
def test_ablations_are_those_of_ablate(wb: Workbench, batches: list[Batch], how: str) -> None:
    reference = {"input_ids": ids(4, 12, 7)}
    variants = [
        Variant("L0H1", how=how),
        Variant(["L1H0", "L0H3", "L1H2"], how=how, positions=[0, -2]),
        Variant("L1H3", how=how, positions=slice(1, None)),
    ]
    found = run_sweep(wb, variants, batches, weighed, reference=reference, progress=False)
    more = {} if how == "zero" else {"reference": reference}
    torch.testing.assert_close(found.values[:, 0], one_by_one(wb, variants, batches, **more), rtol=1e-5, atol=1e-5)


def test_resampling_takes_other_examples_whatever_the_batches(wb: Workbench) -> None:
    rows = ids(6, 9)
    variants, one = all_heads(wb, how="resample"), [{"input_ids": rows[:1]}]
    batched = [[{"input_ids": part} for part in rows.split(size)] for size in (6, 4, 1)]
    found = [run_sweep(wb, variants, several, weighed, seed=1, progress=False) for several in batched]
    assert found[0].effects.abs().amax((1, 2)).min() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other.values, found[0].values, rtol=1e-4, atol=1e-4)
    assert found[0].provenance["resampling"] == {"draws": 5, "seed": 1}
    with pytest.raises(InterventionError, match="no other that differs"):
        run_sweep(wb, variants, one, weighed, progress=False)
    with pytest.raises(InterventionError, match="base= cannot resample"):
        run_sweep(wb, all_heads(wb), batched[0], weighed, base=variants[0], progress=False)


def test_pattern_edits_and_edits_of_modules_run_side_by_side(wb: Workbench, batches: list[Batch]) -> None:
    def backwards(rows: Tensor, site: Any, head: int) -> Tensor:
        return rows.flip(-1) * (head + 1)

    direction = torch.linspace(-1, 1, 32)
    steered = SteerOutput("transformer.h.0", direction, Positions(2))
    variants = [
        Variant(["L1H0", "L1H2"], edit=backwards, positions=-1),
        Variant("L1H1", edit=backwards),
        Variant(edit=steered, label="steered"),
        Variant("L1H1"),
    ]
    found = run_sweep(wb, variants, batches, weighed, progress=False)
    want = []
    for opened in (
        lambda: wb.edit_pattern(["L1H0", "L1H2"], backwards, queries=-1),
        lambda: wb.edit_pattern("L1H1", backwards),
        lambda: wb.steer("transformer.h.0", direction, positions=2),
        lambda: wb.ablate("L1H1"),
    ):
        with torch.no_grad(), opened():
            want.append(torch.cat([weighed(wb.model(**batch), batch) for batch in batches]))
    torch.testing.assert_close(found.values[:, 0], torch.stack(want), rtol=1e-5, atol=1e-5)
    assert found.variants[2] == "steered"


def test_a_base_is_under_all_variants_and_under_the_clean_run(wb: Workbench, batches: list[Batch]) -> None:
    found = run_sweep(wb, [Variant("L1H1")], batches, weighed, base=Variant("L0H2"), progress=False)
    both, alone = one_by_one(wb, [Variant(["L0H2", "L1H1"]), Variant("L0H2")], batches)
    torch.testing.assert_close(found.values[0, 0], both, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.clean[0], alone, rtol=1e-5, atol=1e-5)


def test_what_lies_below_runs_once(wb: Workbench) -> None:
    runs = []
    handle = wb.model.get_submodule("transformer.h.0.mlp").register_forward_hook(lambda *_: runs.append(1))
    counts = []
    for heads in ([0], [0, 1, 2, 3]):
        runs.clear()
        variants = [Variant((1, head)) for head in heads]
        run_sweep(wb, variants, [{"input_ids": ids(2, 9)}], weighed, batched=False, progress=False)
        counts.append(len(runs))
    handle.remove()
    assert counts[0] == counts[1]


def test_a_decoder_edit_leaves_the_encoder_alone() -> None:
    with workbench.attach(make(family("t5"))) as wb:
        runs = []
        wb.model.get_submodule("encoder.block.0").register_forward_hook(lambda *_: runs.append(1))
        batch, counts = family("t5").inputs(), []
        for n in (1, 4):
            runs.clear()
            variants = [Variant(("decoder.0.cross_attn", head)) for head in range(n)]
            assert run_sweep(wb, variants, [batch], weighed, batched=False, progress=False).mode == "resumed"
            counts.append(len(runs))
    assert counts[0] == counts[1]


def test_metrics_by_name_and_against_the_clean_output(wb: Workbench, batches: list[Batch]) -> None:
    def moved(output: Any, batch: Batch, clean: Any) -> Tensor:
        return (output.logits - clean.logits).abs().amax((1, 2))

    moved.against_clean = True  # type: ignore[attr-defined]
    found = run_sweep(wb, [Variant("L1H1")], batches, {"weighed": weighed, "moved": moved}, progress=False)
    assert found.metrics == ("weighed", "moved")
    assert (found.clean[1] == 0).all()
    assert (found.values[0, 1] > 0).all()
    assert list(found.table["metric"]) == ["weighed", "moved"]
    assert "1 variant, 6 examples" in repr(found)


def last_only(output: Any, batch: Batch) -> Tensor:
    return output.logits[:, -1].double().sin().sum(-1)


def says_last(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def metric(output: Any, batch: Batch) -> Tensor:
        return function(output, batch)

    metric.reads = lambda batch: torch.tensor([batch["input_ids"].shape[1] - 1])  # type: ignore[attr-defined]
    return metric


def test_logits_that_no_metric_reads_are_not_computed(wb: Workbench, batches: list[Batch]) -> None:
    variants, places = all_heads(wb), []
    handle = wb.model.lm_head.register_forward_hook(lambda module, given, output: places.append(output.shape[1]))
    full = run_sweep(wb, variants, batches, last_only, progress=False)
    assert set(places) == {9, 12}
    places.clear()
    few = run_sweep(wb, variants, batches, says_last(last_only), progress=False)
    handle.remove()
    assert places.count(1) == len(places) - 1  # all but the forward that they are compared with
    assert few.mode == "resumed"
    assert few.batched
    assert torch.allclose(few.values, full.values, atol=1e-5)
    assert torch.allclose(few.clean, full.clean, atol=1e-5)
    both = run_sweep(wb, variants, batches, {"a": says_last(last_only), "b": weighed}, progress=False)
    assert torch.allclose(both.values[:, 1], run_sweep(wb, variants, batches, weighed, progress=False).values[:, 0])


def test_a_metric_that_reads_more_than_it_says_is_found_out(wb: Workbench, batches: list[Batch]) -> None:
    with pytest.raises(WorkbenchError, match="nan"):
        run_sweep(wb, all_heads(wb), batches, says_last(weighed), progress=False)


def test_a_model_that_keeps_the_wrong_logits_computes_them_all(wb: Workbench, batches: list[Batch]) -> None:
    variants = all_heads(wb)
    expected = run_sweep(wb, variants, batches, last_only, progress=False)
    forward = wb.model.forward

    def wrong(*args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        return forward(*args, logits_to_keep=logits_to_keep * 0 if torch.is_tensor(logits_to_keep) else 0, **kwargs)

    wb.model.forward = wrong
    try:
        with pytest.warns(UserWarning, match="all logits are computed"):
            found = run_sweep(wb, variants, batches, says_last(last_only), progress=False)
    finally:
        del wb.model.forward
    assert torch.equal(found.values, expected.values)


def test_weights_that_were_changed_behind_autograd_s_back_have_another_hash(wb: Workbench) -> None:
    before = wb.weights_hash()
    assert wb.weights_hash() == before
    weight = wb.model.transformer.h[0].mlp.c_fc.weight
    weight.data[0, 0] += 1
    assert wb.weights_hash() != before
    weight.data[0, 0] -= 1


def test_labels_leave_no_mixed_loss(wb: Workbench) -> None:
    """The loss of a repeated batch would be that of all variants."""
    tokens = ids(2, 9)

    def of_model(output: Any, batch: Batch) -> Tensor:
        return output.loss.expand(2)

    batch = {"input_ids": tokens, "labels": tokens}
    with pytest.raises(AttributeError, match="expand"):
        run_sweep(wb, [Variant("L1H1"), Variant("L1H2")], [batch], of_model, progress=False)
    found = run_sweep(wb, [Variant("L1H1"), Variant("L1H2")], [batch], of_model, batched=False, progress=False)
    assert found.effects.abs().min() > 0


class Interrupt:
    """A metric during whose n-th call Ctrl-C is pressed."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return weighed(output, batch)


def named(metric: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A metric whose identity does not hold what it counts."""

    def weighs(output: Any, batch: Batch) -> Tensor:
        return metric(output, batch)

    return weighs


@pytest.mark.parametrize("after", [1, 6, 15])
def test_an_interrupted_sweep_goes_on_to_the_same_bytes(
    wb: Workbench, batches: list[Batch], tmp_path: Path, after: int
) -> None:
    variants = all_heads(wb, how="resample")
    options: dict[str, Any] = {
        "progress": False,
        "seed": 3,
        "memory": 200_000,
        "reference": {"input_ids": ids(5, 12, 9)},
    }
    whole = run_sweep(wb, variants, batches, named(weighed), resume=tmp_path / "whole", **options)
    path = tmp_path / "part"
    with pytest.raises(SweepInterrupted, match="go on with resume=path") as stopped:
        run_sweep(wb, variants, batches, named(Interrupt(after)), resume=path, **options)
    partial = stopped.value.partial
    assert not partial.complete
    assert partial.values.isnan().any()
    assert torch.equal(partial.done, Sweep.load(path).done)
    resumed = run_sweep(wb, variants, batches, named(weighed), resume=path, **options)
    assert resumed.complete
    assert resumed.values.numpy().tobytes() == whole.values.numpy().tobytes()
    assert resumed.clean.numpy().tobytes() == whole.clean.numpy().tobytes()
    assert resumed.identity == whole.identity
    files = [Sweep.load(tmp_path / name) for name in ("whole", "part")]
    for file in files:
        file.provenance.pop("created")
        file.save(tmp_path / "same")
    assert len({(f.values.numpy().tobytes(), str(f.provenance), str(f.identity)) for f in files}) == 1


def test_without_a_file_an_interrupt_carries_what_is_done(wb: Workbench, batches: list[Batch], tmp_path: Path) -> None:
    variants = all_heads(wb)
    with pytest.raises(SweepInterrupted) as stopped:
        run_sweep(wb, variants, batches, named(Interrupt(12)), progress=False)
    path = stopped.value.partial.save(tmp_path / "kept")
    done = int(Sweep.load(path).done.sum())
    assert 0 < done < len(variants) * len(batches)
    counted = Interrupt(10_000)
    found = run_sweep(wb, variants, batches, named(counted), resume=path, progress=False)
    # The rest of the variants, and the clean run of each batch that was not complete.
    assert 10_000 - counted.left <= len(variants) * len(batches) - done + len(batches)
    assert found.complete


def test_an_error_keeps_what_is_done(wb: Workbench, batches: list[Batch], tmp_path: Path) -> None:
    def fails_late(output: Any, batch: Batch) -> Tensor:
        value = weighed(output, batch)
        return value * torch.nan if len(value) == 2 else value

    with pytest.raises(WorkbenchError, match='"fails_late" is nan on example 4 for the unedited model') as failed:
        run_sweep(wb, all_heads(wb), batches, fails_late, resume=tmp_path / "kept", progress=False)
    assert "resume=" in failed.value.__notes__[0]
    assert Sweep.load(tmp_path / "kept").done.sum(0).tolist() == [8, 8, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights", "model weights"),
        ("variants", "variants, number of variants .4 there, 3 here"),
        ("how", "differs in variants, reference"),
        ("data", "differs in data"),
        ("fewer", "number of batches .2 there, 1 here"),
        ("metric", "metrics"),
        ("memory", r"memory .2147483648 there, 999999 here"),
        ("batched", "batched"),
        ("seed", "seed"),
        ("base", "base"),
    ],
)
def test_the_file_of_another_sweep_is_refused(wb: Workbench, tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "file"
    batches = [{"input_ids": ids(2, 9)}, {"input_ids": ids(2, 9, 1)}]
    variants = [Variant((0, head)) for head in range(4)]
    run_sweep(wb, variants, batches, weighed, resume=path, progress=False)
    before = path.read_bytes()
    options: dict[str, Any] = {"progress": False, "resume": path}
    metric: Any = weighed
    if change == "weights":
        with torch.no_grad():
            next(wb.model.parameters())[0, 0] += 1
    elif change == "variants":
        variants = variants[:3]
    elif change == "how":
        variants = [Variant(v.heads, how="mean") for v in variants]
    elif change == "data":
        batches = [batches[1], batches[0]]
    elif change == "fewer":
        batches = batches[:1]
    elif change == "metric":
        metric = {"other": weighed}
    elif change == "memory":
        options["memory"] = 999_999
    elif change == "batched":
        options["batched"] = False
    elif change == "seed":
        options["seed"] = 1
    else:
        options["base"] = Variant("L1H1")
    with pytest.raises(FormatError, match=message):
        run_sweep(wb, variants, batches, metric, **options)
    assert path.read_bytes() == before


def test_a_file_that_is_no_sweep_is_refused(wb: Workbench, batches: list[Batch], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(FormatError, match="not a safetensors file"):
        run_sweep(wb, [Variant("L0H0")], batches, weighed, resume=path, progress=False)
    assert path.read_text() == "mine"
    with pytest.raises(WorkbenchError, match="there is no folder"):
        run_sweep(wb, [Variant("L0H0")], batches, weighed, resume=tmp_path / "none" / "file", progress=False)


class Short:
    """A loader that gives fewer batches than it says."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Batch]:
        return iter([{"input_ids": ids(1, 5)}])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there is no batch"),
        (iter(()), "there is no batch"),
        (Short(), "end early: 1 came of 3"),
        ([{"input_ids": ids(2, 5)}, 7], "batch 1 is int"),
        ([{"input_ids": torch.zeros(0, 5, dtype=torch.long)}], "batch 0 is empty"),
        ([{"input_ids": torch.zeros(2, 0, dtype=torch.long)}], "the input prompt is empty"),
        ([{"input_ids": ids(1, 65)}], "in batch 0, the input prompt has 65 tokens"),
        ([{"input_ids": [[1, 2]]}], "batch 0 holds no tensor"),
        ([{"input_ids": ids(1, 5), "past_key_values": None}], "goes on from a cache"),
        (7, "dicts of model inputs, not int"),
    ],
    ids=range(10),
)
def test_bad_batches_are_named(wb: Workbench, batches: Any, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        run_sweep(wb, [Variant("L0H0")], batches, weighed, progress=False)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda output, batch: output.logits.mean(), r"gave \[\], expected one real number for each of the 3"),
        (lambda output, batch: output.logits[:, 0], r"gave \[3, 60\]"),
        (lambda output, batch: 1.0, "gave float"),
        (lambda output, batch: weighed(output, batch) / 0, "is (-?inf|nan) on example 0"),
        ("los", 'no metric "los"'),
        (3, "is int, expected a name"),
        ({}, "there is no metric"),
    ],
)
def test_bad_metrics_are_named(wb: Workbench, batches: list[Batch], metric: Any, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        run_sweep(wb, [Variant("L0H0")], batches, metric, progress=False)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant(), "neither heads nor an edit"),
        (Variant("L0H9"), "there is no head 9"),
        (Variant("L0H1", how="noise"), 'no ablation "noise"'),
        (Variant("L0H1", edit=3), "edit is int"),  # type: ignore[arg-type]
        (Variant("L0H1", positions=99), "no position 99"),
        ("L0H1", "a variant is a Variant, not str"),
    ],
)
def test_bad_variants_are_named(wb: Workbench, batches: list[Batch], variant: Any, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        run_sweep(wb, [variant], batches, weighed, progress=False)


def test_a_model_that_is_not_deterministic_is_refused(wb: Workbench, batches: list[Batch]) -> None:
    wb.model.train()
    with pytest.raises(InterventionError, match=r"drops out .*\n.*eval"):
        run_sweep(wb, [Variant("L0H0")], batches, weighed, progress=False)
    wb.model.eval()
    handle = wb.model.get_submodule("transformer.h.0").register_forward_hook(
        lambda module, args, output: output + 1e-3 * torch.randn_like(output)
    )
    with pytest.raises(InterventionError, match="not deterministic: two forwards"):
        run_sweep(wb, [Variant("L0H0")], batches, weighed, progress=False)
    handle.remove()


def test_what_is_open_must_be_ended_first(wb: Workbench, batches: list[Batch]) -> None:
    def swept() -> None:
        run_sweep(wb, [Variant("L0H0")], batches, weighed, progress=False)

    with pytest.raises(InterventionError, match="is open"), wb.ablate("L1H1"):
        swept()
    with pytest.raises(InterventionError, match="is open"), wb.capture():
        swept()
    with pytest.raises(InterventionError, match="no variant"):
        run_sweep(wb, [], batches, weighed, progress=False)


def test_memory_that_does_not_hold_the_blocks(wb: Workbench, batches: list[Batch]) -> None:
    with pytest.raises(InterventionError, match=r"more than half of memory="):
        run_sweep(wb, [Variant("L0H0")], batches, weighed, memory=1000, progress=False)
    few = run_sweep(wb, all_heads(wb), batches, weighed, memory=50_000, progress=False)
    many = run_sweep(wb, all_heads(wb), batches, weighed, resumed=False, progress=False)
    assert many.mode == "full"
    torch.testing.assert_close(few.values, many.values, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """Attention written out, and a sum over what it has seen in this forward, if it is told to keep one."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.num_heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor, beside: list[Tensor] | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        if beside is not None:
            beside.append(x)
        return x + self.out(z.transpose(1, 2).flatten(2))


class Stacked(nn.Module):
    """Blocks in sequence; `shared`: one block twice; `beside`: blocks hand on more than they return."""

    def __init__(self, shared: bool = False, beside: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.order = [0, 0, 1, 1] if shared else [0, 1]
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for i in self.order:
            x = self.layers[i](x, kept if self.beside else None)
        return x + sum(kept) if self.beside else x


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shared": True}, "layers.0 runs 2 times in one forward"),
        ({"beside": True}, "resumed at layers.1 does not give the same numbers"),
    ],
)
def test_models_that_cannot_be_resumed_run_whole_forwards_and_say_so(options: dict[str, bool], reason: str) -> None:
    torch.manual_seed(0)
    with workbench.attach(Stacked(**options).eval()) as wb:
        batch = {"x": torch.randn(3, 5, 16)}
        variants = [Variant((f"layers.{layer}", head)) for layer in range(2) for head in range(4)]
        with pytest.warns(UserWarning, match=reason):
            found = run_sweep(wb, variants, [batch], weighed, progress=False)
        assert found.mode == "full"
        assert found.reason
        torch.testing.assert_close(found.values[:, 0], one_by_one(wb, variants, [batch]), rtol=1e-5, atol=1e-5)


def test_examples_that_act_on_one_another_run_one_by_one() -> None:
    with workbench.attach(make(family("clip"))) as wb:
        variants, batch = all_heads(wb), family("clip").inputs()
        with pytest.warns(UserWarning, match="one by one: a repeated batch gives other numbers"):
            found = run_sweep(wb, variants, [batch], weighed, progress=False)
        assert not found.batched
        torch.testing.assert_close(found.values[:, 0], one_by_one(wb, variants, [batch]), rtol=1e-5, atol=1e-5)


def test_outputs_are_split_by_examples() -> None:
    output = {"a": torch.arange(6), "loss": torch.tensor(1.0), "b": (torch.arange(12), torch.ones(1, 4), None)}
    first, second = split(output, 2, 6)
    assert "loss" not in first
    assert [first["a"].tolist(), second["a"].tolist()] == [[0, 1, 2], [3, 4, 5]]
    assert second["b"][0].tolist() == list(range(6, 12))
    assert second["b"][1].shape == (1, 4)
