"""Work on workers of Ray: the numbers of this process, whatever happens to a worker."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import workbench
from support.forks import forks
from support.unavailable import unavailable
from support.work import WORK, Ends, Fails, same
from workbench import RayWorkers, Variant, Workbench
from workbench.errors import CaptureError, InterventionError, WorkbenchError
from workbench.kernels.softmax import SoftmaxPattern
from workbench.storage.result import Result
from workbench.workers.documents import document_statistics, shares_of
from workbench.workers.packing import names_of, packed, unpacked
from workbench.workers.queue import Queue
from workbench.workers.ray_workers import _Flight

PRESENT = (
    "jsonschema", "torch._dynamo", "transformers.models.gpt2.modeling_gpt2", "workbench.workers.worker",
    "workbench.sweep",
)  # fmt: skip
"""What every worker imports, and what takes seconds. Not Ray: its connections do not live on in forks."""
WORKER = "ray._private.workers.default_worker"


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayWorkers]:
    """Two workers of Ray, forked where their imports are there already; so are those in the place of lost ones.

    Ray starts workers with the interpreter that it runs in, and knows them by what they say of themselves.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        unavailable(f"{error}: pip install 'attention-workbench[scale]'")
    folder = tmp_path_factory.mktemp("workers")
    with forks(folder, *PRESENT) as command, RayWorkers(2) as workers:
        python = folder / "python"
        forked, plain = (shlex.join(each) for each in ([*command, WORKER], [sys.executable]))
        python.write_text(
            f'#!/bin/sh\ncase "$1" in *default_worker.py) shift; exec {forked} "$@";; *) exec {plain} "$@";; esac\n'
        )
        python.chmod(0o755)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "executable", str(python))
            assert workers.n_workers == 2
        yield workers
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def wb() -> Iterator[Workbench]:
    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb:
        yield wb
        wb.check_idle()


@pytest.fixture(scope="module")
def task() -> Any:
    return workbench.tasks.ioi(6, seed=0)


@pytest.fixture(scope="module")
def here(wb: Workbench, task: Any) -> Callable[[Any], Result]:
    """What this process gives, once."""
    found: dict[str, Result] = {}

    def of(work: str) -> Result:
        if work not in found:
            found[work] = WORK[work](wb, task, progress=False)
        return found[work]

    return of


@pytest.mark.parametrize("work", WORK)
def test_workers_give_what_this_process_gives(
    workers: RayWorkers, wb: Workbench, task: Any, here: Any, work: str
) -> None:
    same(here(work), WORK[work](wb, task, engine=workers, progress=False))


@pytest.mark.parametrize("work", ["sweep", "importance", "edges", "masks", "corpus"])
def test_a_worker_that_ends_costs_nothing_but_its_unit(
    workers: RayWorkers, wb: Workbench, task: Any, here: Any, work: str, tmp_path: Path
) -> None:
    want, lost = here(work), workers.lost
    hook = wb.model.transformer.ln_f.register_forward_hook(Ends(tmp_path / "ended"))
    try:
        found = WORK[work](wb, task, engine=workers, progress=False)
    finally:
        hook.remove()
    assert (tmp_path / "ended").exists()
    assert workers.lost == lost + 1
    same(want, found)


@pytest.mark.parametrize(
    "of_circuit",
    [
        lambda wb, task, found, **how: workbench.circuit_stability(found, n_bootstrap=4, **how),
        lambda wb, task, found, **how: workbench.circuit_faithfulness(wb, found, task, batch_size=3, **how),
        lambda wb, task, found, **how: workbench.faithfulness_curve(wb, found, task, fractions=[0.1, 0.5], **how),
    ],
    ids=["stability", "faithfulness", "curve"],
)
def test_circuits_are_judged_by_workers(
    workers: RayWorkers, wb: Workbench, task: Any, here: Any, of_circuit: Callable[..., Result]
) -> None:
    found = here("circuit")
    same(of_circuit(wb, task, found), of_circuit(wb, task, found, engine=workers))


def test_what_is_done_is_kept_and_gone_on_with_here(
    workers: RayWorkers, wb: Workbench, task: Any, tmp_path: Path
) -> None:
    ids = [batch["input_ids"] for batch in task.batches(wb.tokenizer, 2)]
    batches = [{"input_ids": one} for one in (*ids[:2], ids[2][:1])]
    variants, path, flag = [Variant((layer, 1)) for layer in range(3)], tmp_path / "sweep.safetensors", tmp_path / "no"
    metric = Fails(flag)
    want = workbench.run_sweep(wb, variants, batches, metric, progress=False)
    flag.touch()
    with pytest.raises(ValueError, match="not now") as raised:
        workbench.run_sweep(wb, variants, batches, metric, engine=workers, resume=path, progress=False)
    notes = " ".join(raised.value.__notes__)
    assert "worker of Ray" in notes
    assert "resume= goes on" in notes
    done = workbench.Sweep.load(path).done
    assert bool(done.any())
    assert not bool(done[:, 2].any())
    flag.unlink()
    same(want, workbench.run_sweep(wb, variants, batches, metric, resume=path, progress=False))


def test_what_cannot_be_sent_is_named(workers: RayWorkers, wb: Workbench, task: Any) -> None:
    lock = threading.Lock()
    batches = list(task.batches(wb.tokenizer, 3))
    with pytest.raises(WorkbenchError, match="cannot be sent to workers"):
        workbench.run_sweep(
            wb, [Variant((0, 1))], batches, lambda output, batch: (lock, output.logits[:, -1, 0])[1], engine=workers,
            progress=False,
        )  # fmt: skip
    with pytest.raises(InterventionError, match="one edge after another"):
        workbench.find_circuit(wb, task, "acdc", engine=workers)


def test_a_cluster_that_is_not_there(workers: RayWorkers, wb: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(WorkbenchError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        RayWorkers(1, address="127.0.0.1:1").send(wb)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkbenchError, match=r"attention-workbench\[scale\]"):
        RayWorkers(1).send(wb)
    with pytest.raises(WorkbenchError, match="no engine"):
        workbench.run_sweep(wb, [Variant((0, 1))], [{"input_ids": torch.tensor([[1, 2]])}], "loss", engine="dask")
    with pytest.raises(WorkbenchError, match="cannot be"):
        RayWorkers(0)


def test_workers_that_there_is_no_room_for(workers: RayWorkers, wb: Workbench) -> None:
    for asked, says in (({"workers": 500}, "room for"), ({"workers": 1, "memory": 100}, "a worker may take 100")):
        with pytest.raises(WorkbenchError, match=says):
            RayWorkers(**asked).send(wb)
    with pytest.raises(WorkbenchError, match="have 1 gpus"):
        RayWorkers(1, gpus=1).send(wb)


def test_functions_refer_to_the_model_of_a_worker(wb: Workbench) -> None:
    names = names_of(wb)
    head = wb.model.get_submodule("lm_head")
    text = packed((head, head.weight, wb), {id(one): name for name, one in names.items()})
    assert len(text) < 1000
    other = {name: object() for name in names}
    assert unpacked(text, other)[2] is other["workbench"]
    assert [type(one) for one in unpacked(packed([torch.ones(2)]))] == [torch.Tensor]


def test_a_lost_worker_that_cannot_be_replaced_is_said() -> None:
    class Lost(Exception):
        pass

    def get(reference: object) -> None:
        raise Lost("the worker died")

    tasks = iter(("first", "again"))
    wait = lambda several, **how: ([one for one in several if one == "first"], [])  # noqa: E731
    ray = SimpleNamespace(wait=wait, get=get, exceptions=SimpleNamespace(RayError=Lost))
    worker = SimpleNamespace(run=SimpleNamespace(remote=lambda *given: next(tasks)))
    cluster = SimpleNamespace(ray=ray, workers=lambda: [worker], replace=lambda number: "starting", patience=7.0)
    owner = SimpleNamespace(lost=0)
    flight = _Flight(owner, cluster, (), Queue([1]), True, retries=3)
    with pytest.raises(WorkbenchError, match="no worker started within 7 s"):
        list(flight.results())
    assert owner.lost == 1


def test_units_of_a_group_go_to_one_worker_until_one_would_be_idle() -> None:
    queue = Queue([(n // 3, n) for n in range(6)], group=lambda unit: unit[0])
    assert [queue.take(worker)[1] for worker in (0, 1, 0, 0, 0)] == [(0, 0), (1, 3), (0, 1), (0, 2), (1, 4)]
    assert queue.put_back(4, (1, 4), 0) == 1
    assert [queue.take(1), queue.take(0), queue.take(0)] == [(4, (1, 4)), (5, (1, 5)), None]


def test_documents_are_computed_by_whoever_has_room(workers: RayWorkers, wb: Workbench) -> None:
    """Rows of documents, cut by the planner, are those of their captures."""
    ids = torch.randint(3, 300, (1, 96), generator=torch.Generator().manual_seed(2))
    names = ["entropy", "peak_key", "distance"]
    with torch.no_grad(), wb.capture(names) as cap:
        for n in (96, 7, 31, 12, 50, 9):
            wb.model(input_ids=ids[:, :n], use_cache=False)
    for how in ("planned", "round-robin"):
        found = document_statistics(cap.calls, names, engine=workers, how=how)
        for one, want in zip(found, cap.calls, strict=True):
            for site in want:
                for name in names:
                    torch.testing.assert_close(
                        one[site.site.name][name], site.statistics[name], atol=1e-5, rtol=1e-5, equal_nan=True
                    )
    with pytest.raises(CaptureError, match="sums over queries"):
        document_statistics(cap.calls, ["received"], engine=workers)
    with pytest.raises(CaptureError, match="planned or round-robin"):
        document_statistics(cap.calls, names, engine="local", how="by hand")


def test_planned_shares_are_even() -> None:
    lengths = [2048, 96, 512, 128, 1536, 64, 256, 768]
    pattern = SoftmaxPattern(*torch.zeros(2, 1, 2, 4, 8))
    loads = {how: [sum(item.pairs for item in items) for items in shares_of(lengths, 2, how, pattern)]
             for how in ("planned", "round-robin")}  # fmt: skip
    assert max(loads["planned"]) <= 1.1 * sum(loads["planned"]) / 2
    assert max(loads["round-robin"]) > 1.5 * sum(loads["round-robin"]) / 2
    assert sum(loads["planned"]) == sum(loads["round-robin"]) == sum(n * (n + 1) // 2 for n in lengths)
