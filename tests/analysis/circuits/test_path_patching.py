"""Path patching against the algorithm written out with one forward per head, and its ground truths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from support.circuits import ENCODER_DECODERS, SlotModel, Words, mover_model, random_task, task_for, tiny
from workbench.analysis.circuits.engine.setup import Setup, open_setup
from workbench.analysis.circuits.engine.stream import Kept
from workbench.analysis.circuits.find import Stage, find_circuit
from workbench.analysis.circuits.methods.path_patching import Paths, run_paths
from workbench.errors import InterventionError

NAMES = ["gpt2", "llama-gqa", "granite", "gpt-neox", *ENCODER_DECODERS]


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[[str], Setup]]:
    """Each tiny model with a task of several lengths, opened once for all that is patched in it."""
    with ExitStack() as stack:

        @cache
        def of(name: str) -> Setup:
            wb = stack.enter_context(workbench.attach(tiny(name), Words()))
            return stack.enter_context(open_setup(wb, task_for(name, 5, lengths=2), batch_size=3))

        yield of


def by_hand(setup: Setup, paths: Paths) -> tuple[Tensor, Tensor]:
    """[sender, example], one sender and two whole forwards at a time; and [example] without a patch."""
    plain = torch.zeros(len(setup.task), dtype=torch.float64)
    found = torch.zeros(len(paths.senders), len(setup.task), dtype=torch.float64)
    layers, end = range(len(setup.graph.layers)), setup.stream.end
    for pair in setup.pairs:
        logits, clean, twin = setup.record(pair)
        plain[setup.rows(pair)] = setup.measure(logits, pair, logits)[0]
        streams = {setup.graph.receiver_spot(name).stream for name in paths.receivers}
        where = {stream: setup.positions(pair, paths.positions, stream) for stream in streams}
        for row, (sender,) in enumerate(paths.senders):
            at, _, head, *_ = setup.graph.sender(sender)
            seen, hooks = Kept(), {}

            def put(old: Tensor, new: Tensor, stream: int, where: dict[int, Tensor | None] = where) -> Tensor:
                index = where.get(stream)
                made = old.clone()
                rows = torch.arange(len(old))[:, None]
                where_to = torch.arange(old.shape[1])[None] if index is None else index
                made[rows, where_to] = new[rows, where_to]
                return made

            for i in layers:
                z = clean["z", i].clone()
                if i == at:
                    z[:, :, head] = twin["z", i][:, :, head]
                stream = setup.graph.stream_of(i)
                hooks["z", i] = [lambda old, z=z, stream=stream: put(old, z, stream)]
                if paths.freeze_mlps and setup.graph.layers[i].mlp:
                    hooks["mlp", i] = [lambda old, new=clean["mlp", i], stream=stream: put(old, new, stream)]
                for part in "qkv":
                    hooks[part, i] = [seen.keep((part, i))]
            hooks[end] = [seen.keep(end)]
            setup.stream.run(pair.clean, pair.last, hooks)
            second: dict[Any, Any] = {}
            for name in paths.receivers:
                if name == "logits":
                    second[end] = [lambda old, seen=seen: put(old, seen[end], end[1])]
                    continue
                i, _, number, part, stream = setup.graph.receiver_spot(name)

                def one(old: Tensor, new: Tensor = seen[part, i], number: int = number, stream: int = stream) -> Tensor:
                    made = old.clone()
                    made[:, :, number] = put(old, new, stream)[:, :, number]
                    return made

                second.setdefault((part, i), []).append(one)
            out = setup.stream.run(pair.clean, pair.last, second)
            found[row, setup.rows(pair)] = setup.measure(out, pair, logits)[0]
    return found, plain


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("which", ["logits", "q", "kv"])
def test_it_is_the_algorithm_written_out(name: str, freeze: bool, which: str, opened: Callable[[str], Setup]) -> None:
    setup = opened(name)
    graph = setup.graph
    receivers: tuple[str, ...] = ("logits",)
    where: Any = "end"
    if which != "logits":
        at = ["decoder.x1.h0", "decoder.x1.h3"] if name in ENCODER_DECODERS else ["a1.h0", "a1.h3"]
        receivers = tuple(dict.fromkeys(graph.receiver(head, part) for head in at for part in which))
        where = "end" if which == "q" else ("early", "end")
    read = graph.exists[:, [graph.receiver_index[receiver] for receiver in receivers]].any(1)
    heads = [head for head in graph.head_names if read[graph.sender_index[head]]]
    assert len(heads) >= 4
    paths = Paths(receivers, tuple((head,) for head in heads), where, freeze)
    with torch.no_grad():
        expected, plain = by_hand(setup, paths)
    found = run_paths(setup, paths, progress=False)
    assert (found - expected).abs().max() < 1e-9
    assert (found - plain).abs().max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_of_everything_it_gives_one_and_of_nothing_zero(name: str) -> None:
    with workbench.attach(tiny(name), Words()) as wb, open_setup(wb, task_for(name, 4)) as setup:
        setup.measure_baselines()
        to_logits = [s for s in setup.graph.senders if setup.graph.exists[setup.graph.sender_index[s], -1]]
        everything = Paths(("logits",), (tuple(to_logits),), None, freeze_mlps=True)
        assert (run_paths(setup, everything, progress=False)[0] - setup.corrupted).abs().max() < 1e-9
        record = setup.record
        setup.record = lambda pair: (record(pair)[0], record(pair)[1], record(pair)[1])  # type: ignore[method-assign]
        heads = tuple((head,) for head in setup.graph.head_names if head in to_logits)
        same = run_paths(setup, Paths(("logits",), heads), progress=False)
        assert torch.equal(same, setup.clean.expand_as(same))  # to the bit
        last = len(setup.graph.layers) - 1
        upper = tuple(setup.graph.receivers[column] for column in setup.graph.columns(last, "q"))[:2]
        lower = tuple(unit for unit in heads if setup.graph.layer_of(unit[0]) < last)
        same = run_paths(setup, Paths(upper, lower), progress=False)
        assert torch.equal(same, setup.clean.expand_as(same))


def test_direct_effects_of_a_linear_layer_add_up() -> None:
    model = SlotModel(layers=1, noise=0.3)
    with workbench.attach(model, Words()) as wb, open_setup(wb, random_task(5, 6, 12)) as setup:
        setup.measure_baselines()
        units = (("input",), *((name,) for name in setup.graph.senders[1:]))
        found = run_paths(setup, Paths(("logits",), units), progress=False)
        importance = (found - setup.clean).mean(1) / (setup.corrupted - setup.clean).mean()
        assert float(importance.sum()) == pytest.approx(1, abs=1e-9)


def test_a_planted_mover_and_the_head_before_it_come_first() -> None:
    model, task = mover_model()
    with workbench.attach(model, Words()) as wb:
        stages = (Stage("logits", "end", name="logits"), Stage("q", "end", name="queries"))
        circuit = find_circuit(wb, task, fraction=0.1, stages=stages, progress=False)
        first, second = circuit.stages
        assert first["chosen"] == ("a1.h0",)
        assert second["chosen"] == ("a0.h2",)
        index = circuit.graph.sender_index
        assert float(first["importance"][index["a1.h0"]]) == pytest.approx(1, abs=0.05)
        assert abs(float(first["importance"][index["a0.h2"]])) < 0.02
        assert float(second["importance"][index["a0.h2"]]) == pytest.approx(1, abs=0.05)
        assert circuit.heads == ("L0H2", "L1H0")
        assert set(circuit.edges) == {"a0.h2->a1.h0<q>", "a1.h0->logits"}


def test_senders_come_before_any_or_all_receivers() -> None:
    model = SlotModel(layers=3, noise=0.3)
    with workbench.attach(model, Words()) as wb:
        scored = {}
        for before in ("any", "all"):
            stages = (Stage(("a1.h0<q>", "a2.h1<q>"), "end", before=before),)
            circuit = find_circuit(wb, random_task(4, 6, 12), stages=stages, fraction=0.1, progress=False)
            known = ~circuit.stages[0]["importance"].isnan()
            scored[before] = {circuit.graph.senders[i] for i in known.nonzero()[:, 0].tolist()}
        assert scored["all"] == {"a0.h0", "a0.h1", "a0.h2"}
        assert scored["any"] == scored["all"] | {"a1.h1", "a1.h2"}
        stages = (Stage(("a1.h0<q>",), before="banana"),)
        with pytest.raises(InterventionError, match="banana"):
            find_circuit(wb, random_task(4, 6, 12), stages=stages, progress=False)


def test_receivers_before_their_senders_and_other_bad_input() -> None:
    with workbench.attach(tiny("gpt2"), Words()) as wb, open_setup(wb, random_task(2, 5, 60)) as setup:
        for paths, says in (
            (Paths(("a0.h1<q>",), (("a1.h0",),)), "comes after the receivers"),
            (Paths(("a0.h1<q>",), (("a0.h0",),)), "comes after the receivers"),
            (Paths(("a9.h1<q>",), (("a0.h0",),)), "no receiver"),
            (Paths(("logits",), (("logits",),)), "no sender"),
            (Paths((), (("a0.h0",),)), "no receiver"),
            (Paths(("logits",), (("a0.h0",),), "early"), "leave out"),
        ):
            with pytest.raises(InterventionError, match=says):
                run_paths(setup, paths, progress=False)
    with workbench.attach(tiny("gpt2"), Words()) as wb:
        stages = (Stage("q", "end", of=((0, 1),)),)
        with pytest.raises(InterventionError, match="first layer"):
            find_circuit(wb, random_task(2, 5, 60), stages=stages, progress=False)
        with pytest.raises(InterventionError, match="comes first"):
            find_circuit(wb, random_task(2, 5, 60), stages=(Stage("q"),), progress=False)
