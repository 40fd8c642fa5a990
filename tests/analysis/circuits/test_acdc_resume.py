"""Greedy pruning that is interrupted, and goes on from its file to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import workbench
from support.circuits import Words, random_task, tiny
from support.tiny import ONE_TOWER, SPECIAL, VOCABULARY, Family, decoder_inputs, make
from workbench import Circuit, Pruning, PruningInterrupted, find_circuit
from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.recordings import Recordings
from workbench.analysis.circuits.engine.setup import Setup
from workbench.analysis.circuits.methods import acdc
from workbench.errors import FormatError, InterventionError, WorkbenchError
from workbench.metrics import logit_diff

TASK = random_task(5, 6, 60, lengths=2)
HOW: dict[str, Any] = {"threshold": 0.05, "batch_size": 3, "progress": False}


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers of two heads: a pruning goes through few edges."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=VOCABULARY, n_positions=32, **SPECIAL)
    return make(Family("small", lambda: GPT2LMHeadModel(config), decoder_inputs, ONE_TOWER)).to(dtype)


@pytest.fixture(scope="module")
def wb() -> Iterator[Any]:
    with workbench.attach(small(), Words()) as wb:
        yield wb


def named(metric: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A metric whose identity does not hold what it counts."""

    def difference(output: Any, batch: Any) -> Tensor:
        return metric(output, batch)

    return difference


class Counted:
    """A metric that says how often it was called, and during whose n-th call something happens."""

    def __init__(self, after: int = 10**6, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls, self.after, self.error = 0, after, error

    def __call__(self, output: Any, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise self.error("stop")
        return logit_diff(output, batch)


def prune(wb: Any, metric: Counted, **settings: Any) -> Circuit:
    return find_circuit(wb, TASK, "acdc", metric=named(metric), **(HOW | settings))


def same(one: Circuit, two: Circuit) -> None:
    for name in ("edges_in", "senders_in", "edge_scores", "node_scores", "clean", "corrupted"):
        assert getattr(one, name).numpy().tobytes() == getattr(two, name).numpy().tobytes(), name
    assert one.threshold == two.threshold


@pytest.fixture(scope="module")
def whole(wb: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Circuit, int, Path]:
    """The circuit without an interrupt, how often its metric was called, and its file."""
    counted, path = Counted(), tmp_path_factory.mktemp("acdc") / "whole"
    circuit = prune(wb, counted, resume=path)
    assert 0 < circuit.n_edges < circuit.graph.n_edges * 0.8
    same(circuit, prune(wb, Counted()))
    return circuit, counted.calls, path


def test_each_batch_is_recorded_once_and_nothing_else_differs(
    wb: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room, all but the first are recorded again at each step, to the same bits."""
    record, recorded = Setup.record, list[int]()

    def counted(setup: Setup, pair: Pair) -> Any:
        recorded.append(pair.start)
        return record(setup, pair)

    monkeypatch.setattr(Setup, "record", counted)
    same(prune(wb, Counted()), whole[0])
    assert recorded == [0, 3]
    recorded.clear()
    made = Recordings.__init__

    def without_room(recordings: Recordings, *args: Any) -> None:
        made(recordings, *args)
        recordings.room = 0

    monkeypatch.setattr(Recordings, "__init__", without_room)
    same(prune(wb, Counted()), whole[0])
    assert recorded.count(0) == 1
    assert recorded.count(3) > 4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_it_goes_on_to_the_same_bits(wb: Any, whole: Any, tmp_path: Path, share: float) -> None:
    circuit, calls, _ = whole
    path = tmp_path / "part"
    first = 4  # the baselines of two batches
    with pytest.raises(PruningInterrupted, match="go on with resume=path") as stopped:
        prune(wb, Counted(first + int(share * (calls - first - 1))), resume=path)
    partial, held = stopped.value.partial, Pruning.load(path)
    assert not held.complete
    assert (held.place, held.present) == (partial.place, partial.present)
    assert torch.equal(held.kept, partial.kept)
    counted = Counted()
    same(prune(wb, counted, resume=path), circuit)
    assert (counted.calls < calls) == (held.place > 0)
    assert Pruning.load(path).complete


def test_it_is_interrupted_again_and_again(wb: Any, whole: Any, tmp_path: Path) -> None:
    path, places = tmp_path / "part", [-1]
    for _ in range(1000):
        try:
            found = prune(wb, Counted(16), resume=path)
            break
        except PruningInterrupted as stopped:
            places.append(stopped.partial.place)
    same(found, whole[0])
    assert len(places) > 3
    assert places == sorted(set(places))


def test_an_interrupt_between_two_decisions_leaves_whole_steps(
    wb: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    means, path = acdc._means, tmp_path / "part"

    class Breaks(list[float]):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    def third(*args: Any) -> list[float]:
        steps.append(1)
        return Breaks(means(*args)) if len(steps) > 6 else means(*args)

    steps: list[int] = []
    monkeypatch.setattr(acdc, "_means", third)
    with pytest.raises(PruningInterrupted):
        prune(wb, Counted(), resume=path)
    monkeypatch.undo()
    assert Pruning.load(path).place > 0
    same(prune(wb, Counted(), resume=path), whole[0])


def test_a_complete_file_is_not_run_again(wb: Any, whole: Any) -> None:
    circuit, _, path = whole
    counted, before = Counted(), Pruning.load(path)
    same(prune(wb, counted, resume=path), circuit)
    assert counted.calls == 4  # the baselines
    assert before.complete
    assert set(before.table["edge"][before.table["kept"]]) >= set(circuit.edges)
    assert "edges kept)" in repr(before)


def test_without_a_file_the_interrupt_carries_what_is_done(wb: Any, whole: Any, tmp_path: Path) -> None:
    with pytest.raises(PruningInterrupted, match=r"partial\.save") as stopped:
        prune(wb, Counted(whole[1] // 2))
    path = stopped.value.partial.save(tmp_path / "kept")
    same(prune(wb, Counted(), resume=path), whole[0])


def test_an_error_keeps_what_is_done(wb: Any, whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "part"
    with pytest.raises(ZeroDivisionError) as failed:
        prune(wb, Counted(whole[1] // 2, ZeroDivisionError), resume=path)
    assert "resume=" in failed.value.__notes__[0]
    assert Pruning.load(path).place > 0
    same(prune(wb, Counted(), resume=path), whole[0])


def test_it_is_written_now_and_then(wb: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a process that is killed has lost no more than that."""
    monkeypatch.setattr(acdc, "_SAVE_EVERY", 0.0)
    saved, save = [], Pruning.save

    def noted(self: Pruning, path: str | Path) -> Path:
        saved.append(self.place)
        return save(self, path)

    monkeypatch.setattr(Pruning, "save", noted)
    prune(wb, Counted(), resume=tmp_path / "file")
    assert len(saved) > 10
    assert saved == sorted(saved)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"threshold": 0.06}, r"threshold \(0\.05 there, 0\.06 here\)"),
        ({"ablation": "zero"}, "ablation"),
        ({"batch_size": 5}, "prompts"),
        ({"memory": 1 << 20}, "memory"),
    ],
)
def test_a_file_of_other_settings_is_refused(wb: Any, whole: Any, changed: dict[str, Any], says: str) -> None:
    before = whole[2].read_bytes()
    with pytest.raises(FormatError, match=f"is of another pruning: it differs in .*{says}"):
        prune(wb, Counted(), resume=whole[2], **changed)
    assert whole[2].read_bytes() == before


def test_a_file_of_another_task_model_or_metric_is_refused(wb: Any, whole: Any) -> None:
    path, how = whole[2], {**HOW, "resume": whole[2], "metric": named(Counted())}
    for task in (random_task(5, 6, 60, seed=1, lengths=2), TASK[:4]):
        with pytest.raises(FormatError, match=r"differs in .*prompts"):
            find_circuit(wb, task, "acdc", **how)
    with pytest.raises(FormatError, match="differs in metric"):
        find_circuit(wb, TASK, "acdc", **(how | {"metric": "logit_diff"}))
    for model, says in (
        (small(torch.float64), "model weights"),
        (tiny("llama-gqa", torch.float32), "model class, model weights"),
    ):
        with (
            workbench.attach(model, Words()) as other,
            pytest.raises(FormatError, match=f"differs in {says}"),
        ):
            find_circuit(other, TASK, "acdc", **how)
    assert Pruning.load(path).complete


def test_answers_belong_to_the_prompts(wb: Any, whole: Any) -> None:
    turned = workbench.tasks.from_prompts(
        TASK.prompts, TASK.twins, [e.wrong[0] for e in TASK], [e.answer for e in TASK], name=TASK.name
    )
    with pytest.raises(FormatError, match="differs in prompts"):
        find_circuit(wb, turned, "acdc", **HOW, resume=whole[2], metric=named(Counted()))


def test_files_that_are_none(wb: Any, whole: Any, tmp_path: Path) -> None:
    content = whole[2].read_bytes()
    for name, wrong, says in (
        ("cut", content[: len(content) // 2], "truncated"),
        ("empty", b"", "truncated"),
        ("changed", content[:-1] + bytes([content[-1] ^ 1]), "was changed"),
        ("text", b"no circuit", "truncated or not"),
    ):
        path = tmp_path / name
        path.write_bytes(wrong)
        with pytest.raises(FormatError, match=says):
            prune(wb, Counted(), resume=path)
        assert path.read_bytes() == wrong
    with pytest.raises(FormatError, match=r"not a workbench\.pruning file"):
        prune(wb, Counted(), resume=whole[0].save(tmp_path / "circuit"))
    with pytest.raises(WorkbenchError, match="no folder"):
        prune(wb, Counted(), resume=tmp_path / "none" / "file")


def test_other_methods_write_no_file(wb: Any, tmp_path: Path) -> None:
    for method in ("eap", "eap_ig", "ablation", "path_patching"):
        with pytest.raises(InterventionError, match=f'"{method}" writes no file'):
            find_circuit(wb, TASK, method, resume=tmp_path / "file", progress=False)
    assert not list(tmp_path.iterdir())
