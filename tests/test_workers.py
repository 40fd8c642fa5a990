"""Work on workers of Ray: the numbers of this process to the bit, whatever happens to a worker."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.unavailable import unavailable
from workbench import RayWorkers, Variant, Workbench
from workbench.errors import InterventionError, WorkbenchError
from workbench.storage.result import Result
from workbench.workers.packing import names_of, packed, unpacked
from workbench.workers.queue import Queue

TEXT = "John gave a book to Mary. Mary gave a drink to John. " * 8


@pytest.fixture(scope="module")
def workers() -> Iterator[RayWorkers]:
    try:
        import ray
    except ModuleNotFoundError as error:
        unavailable(f"{error}: pip install 'attention-workbench[scale]'")
    with RayWorkers(2) as workers:
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


def sweep(wb: Workbench, task: Any, **how: Any) -> Result:
    heads = [Variant((layer, head), how=way) for layer in (0, 2, 3) for head in (1, 5) for way in ("mean", "resample")]
    return workbench.run_sweep(wb, heads, task.batches(wb.tokenizer, 3), ["logit_diff", "loss"][:1], **how)


def importance(wb: Workbench, task: Any, **how: Any) -> Result:
    batches = list(task.batches(wb.tokenizer, 3))
    return workbench.head_importance(wb, batches, "logit_diff", ["ablation", "gradient"], heads={(0, 1), (2, 3)}, **how)


def circuit(wb: Workbench, task: Any, **how: Any) -> Result:
    return workbench.find_circuit(wb, task, batch_size=3, **how)


def edges(wb: Workbench, task: Any, **how: Any) -> Result:
    return workbench.find_circuit(wb, task, "eap_ig", batch_size=3, steps=2, **how)


def ablations(wb: Workbench, task: Any, **how: Any) -> Result:
    return workbench.ablate_heads(wb, task, "resample", batch_size=3, **how)


def patterns(wb: Workbench, task: Any, **how: Any) -> Result:
    return workbench.patch_heads(wb, task, "pattern", batch_size=3, **how)


def layers(wb: Workbench, task: Any, **how: Any) -> Result:
    return workbench.patch_layers(wb, task, positions=["end"], batch_size=3, **how)


def masks(wb: Workbench, task: Any, **how: Any) -> Result:
    inputs = wb.tokenize("Mary and John went to the store. John gave a drink to")
    return workbench.saliency(wb, inputs, n_masks=40, exact=False, decoding={"max_new_tokens": 2}, **how)


def corpus(wb: Workbench, task: Any, **how: Any) -> Result:
    return workbench.head_atlas_over(wb, [TEXT], tokens=150, length=24, batch=2, recent=4, **how)


WORK = [sweep, importance, circuit, edges, ablations, patterns, layers, masks, corpus]


def same(one: Any, two: Any, at: str = "") -> None:
    """All that two results hold, to the bit; but for when and how long."""
    if isinstance(one, Tensor):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0)), at
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), at
        for name in one:
            if name not in ("captured_at", "seconds"):
                same(one[name], two[name], f"{at}.{name}")
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(two), at
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{at}[{i}]")
    elif isinstance(one, Result):
        same(vars(one), vars(two), type(one).__name__)
    else:
        assert one == two or one != one, at


@pytest.fixture(scope="module")
def here(wb: Workbench, task: Any) -> Callable[[Any], Result]:
    """What this process gives, once."""
    found: dict[Any, Result] = {}

    def of(work: Any) -> Result:
        if work not in found:
            found[work] = work(wb, task, progress=False)
        return found[work]

    return of


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_workers_give_what_this_process_gives(
    workers: RayWorkers, wb: Workbench, task: Any, here: Any, work: Any
) -> None:
    same(here(work), work(wb, task, engine=workers, progress=False))


class Ends(nn.Module):
    """Its process ends at the third forward, the first time that it comes to it, if it is a worker."""

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag, self.driver, self.seen = flag, os.getpid(), 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen += 1
        if self.seen == 3 and os.getpid() != self.driver and not self.flag.exists():
            self.flag.touch()
            os._exit(1)


@pytest.mark.parametrize("work", [sweep, importance, edges, masks, corpus], ids=lambda work: work.__name__)
def test_a_worker_that_ends_costs_nothing_but_its_unit(
    workers: RayWorkers, wb: Workbench, task: Any, here: Any, work: Any, tmp_path: Path
) -> None:
    want, lost = here(work), workers.lost
    hook = wb.model.model.norm.register_forward_hook(Ends(tmp_path / "ended"))
    try:
        found = work(wb, task, engine=workers, progress=False)
    finally:
        hook.remove()
    assert (tmp_path / "ended").exists()
    assert workers.lost == lost + 1
    same(want, found)


def test_draws_of_prompts(workers: RayWorkers, here: Any) -> None:
    found = here(circuit)
    same(workbench.circuit_stability(found, n_bootstrap=4),
         workbench.circuit_stability(found, n_bootstrap=4, engine=workers))  # fmt: skip


class Fails:
    """A metric that fails on a batch of one example as long as a file is there."""

    def __init__(self, flag: Path) -> None:
        self.flag = str(flag)

    def __call__(self, output: Any, batch: Any) -> Tensor:
        if len(batch["input_ids"]) == 1 and os.path.exists(self.flag):
            raise ValueError("not now")
        return output.logits[:, -1, 5]


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


def test_units_of_a_group_go_to_one_worker_until_one_would_be_idle() -> None:
    queue = Queue([(n // 3, n) for n in range(6)], group=lambda unit: unit[0])
    assert [queue.take(worker)[1] for worker in (0, 1, 0, 0, 0)] == [(0, 0), (1, 3), (0, 1), (0, 2), (1, 4)]
    assert queue.put_back(4, (1, 4), 0) == 1
    assert [queue.take(1), queue.take(0), queue.take(0)] == [(4, (1, 4)), (5, (1, 5)), None]
