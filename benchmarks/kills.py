"""Kills a worker of Ray, the driver, or one of two processes of a split model, in the midst of each kind of work.

    python benchmarks/kills.py [KEPT] [--times 20] [--only rank driver worker] [--address …]

Each time somewhere else. What is found in spite of it, or gone on with after it, must be what an undisturbed run gives,
to the bit; the other process of a split model must end with an error within a minute. KEPT is a file that gets a line
for each time; those that it has are not done again, so that a run may be broken off. What it has goes into
docs/benchmarks.md. Processes are forked, since most of the time they would import.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # a busy machine starts slowly

import ray  # noqa: F401  # here, so that forked processes need not import it
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from shared.measuring import say, table, write_section

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the work is that of the tests

import workbench
from support.split_model_ranks import IDS, LENGTHS, Stage, llama
from support.tensor_parallel_ranks import Attention, by_hand
from support.work import WITH_FILES, WORK, Ends, same
from workbench import RayWorkers
from workbench.kernels.sequence_parallel import SplitSequence

HEADING = "Killed in the midst of work"
PATIENCE, STUCK = 60.0, 600.0
DIED, NAMED, TOLD = 9, 10, 11
Killed = dict[str, Any]


def forked(work: Callable[..., int], *given: Any) -> int:
    """A process that does the work and ends with what it gives."""
    pid = os.fork()
    if pid:
        return pid
    try:
        code = work(*given)
    except BaseException:
        traceback.print_exc()
        code = 3
    os._exit(code)


def ended(*pids: int) -> list[int]:
    """How processes ended; those that are stuck are killed."""
    codes, until = {}, time.monotonic() + STUCK
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def prepared() -> tuple[Any, Any]:
    model, tokenizer = workbench.models.load("demo-lm")
    return workbench.attach(model, tokenizer), workbench.tasks.ioi(6, seed=0)


def save_always() -> None:
    """Whatever is done is kept at once."""
    from workbench.analysis.circuits.patching import running
    from workbench.analysis.corpus import run as corpus
    from workbench.analysis.saliency import estimate
    from workbench.sweep import run

    running._SAVE_EVERY = run._SAVE_EVERY = estimate._SAVE_EVERY = corpus._SAVED_EVERY = 0.0


# Workers


def workers_killed(work: dict[str, range], address: str | None) -> Iterator[Killed]:
    """A worker ends at its first, second … forward of each kind of work; the work goes on without it."""
    wb, task = prepared()
    with RayWorkers(2, address=address) as workers, tempfile.TemporaryDirectory() as folder:
        for name, left in work.items():
            want = WORK[name](wb, task, progress=False)
            for turn in left:
                at = 1 if name == "corpus" else 1 + turn % 4  # of two windows, a worker may see but one
                before, ends = workers.lost, Ends(Path(folder, f"{name} {turn}"), at)
                hook = wb.model.transformer.ln_f.register_forward_hook(ends)
                try:
                    same(want, WORK[name](wb, task, engine=workers, progress=False))
                finally:
                    hook.remove()
                yield {"work": name, "killed": workers.lost - before, "same": 1}


# Drivers


def driver(wb: Any, task: Any, name: str, path: str, at: int | None, address: str) -> int:
    """Work on a cluster that keeps everything it does; it ends in the midst of a save, or behind it."""
    from workbench.storage.result import Result

    save_always()
    kept, save = 0, Result.save

    def counted(self: Result, to: Any) -> Path:
        nonlocal kept
        kept += 1
        if at is not None and kept == 1 + at // 2 and at % 2 == 0:
            os._exit(DIED)
        found = save(self, to)
        if at is not None and kept == 1 + at // 2:
            os._exit(DIED)
        return found

    Result.save = counted  # type: ignore[method-assign]
    with RayWorkers(1, address=address) as workers:
        WORK[name](wb, task, engine=workers, resume=path, progress=False)
    Path(f"{path}.saves").write_text(str(kept))
    return 0


@contextmanager
def cluster_of_its_own() -> Iterator[str]:
    """The address of a cluster that another process holds: one that has spoken to a cluster cannot be forked safely."""

    def hold(told: Path) -> int:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        signal.signal(signal.SIGTERM, lambda *_: (cluster.shutdown(), os._exit(0)))
        told.with_suffix(".part").write_text(cluster.address)
        told.with_suffix(".part").rename(told)
        while True:
            signal.pause()

    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "address")
        pid = forked(hold, told)
        try:
            while not told.exists():
                if os.waitpid(pid, os.WNOHANG)[0]:
                    raise SystemExit("the cluster did not start")
                time.sleep(0.1)
            yield told.read_text()
        finally:
            os.kill(pid, signal.SIGTERM)
            ended(pid)


def drivers_killed(work: dict[str, range], address: str | None) -> Iterator[Killed]:
    """The process that an analysis runs in ends; another goes on with its file, without the cluster."""
    wb, task = prepared()
    with nullcontext(address) if address else cluster_of_its_own() as address:
        for name, left in work.items():
            want, saves = WORK[name](wb, task, progress=False), 0
            for turn in (None, *left):  # the first is left alone, and tells how often it saves
                with tempfile.TemporaryDirectory() as folder:
                    path, at = f"{folder}/kept.safetensors", None if turn is None else turn % (2 * saves)
                    [code] = ended(forked(driver, wb, task, name, path, at, address))
                    if turn is None:
                        saves = int(Path(f"{path}.saves").read_text())
                        continue
                    same(want, WORK[name](wb, task, resume=path, progress=False))
                yield {"work": name, "killed": int(code == DIED), "same": 1}


# Processes of a split model


def captures(rank: int, folder: Path, at: int | None) -> None:
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    end_at_exchange(rank, at)
    with torch.no_grad(), workbench.attach(model) as wb:
        for _ in turns(at):
            with wb.capture(["entropy", "received"]) as cap:
                run(model, split)
            cap.gathered(split=split)


def ablations(rank: int, folder: Path, at: int | None) -> None:
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    end_at_exchange(rank, at)
    with torch.no_grad(), workbench.attach(model) as wb, wb.ablate((0, 1)):
        for _ in turns(at):
            run(model, split)


def gradients(rank: int, folder: Path, at: int | None) -> None:
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    end_at_exchange(rank, at)
    with workbench.attach(model) as wb:
        for _ in turns(at):
            with wb.capture(["entropy"], gradients=True):
                run(model, split).sum().backward()


def sweeps(rank: int, folder: Path, at: int | None) -> None:
    """Of a sequence in two parts."""
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    here = torch.arange(split.here.start, split.here.stop)
    batch = {"input_ids": IDS[:, here], "position_ids": here.expand(len(IDS), -1)}
    end_at_exchange(rank, at)
    with workbench.split_over(split):
        swept(model, batch, folder / f"{rank}.safetensors")


def weights(rank: int, folder: Path, at: int | None) -> None:
    """Sweeps of a model whose weights are cut by FSDP2."""
    from torch.distributed.fsdp import fully_shard

    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    end_at_forward(model, rank, at)
    swept(model, {"input_ids": IDS}, folder / f"{rank}.safetensors")


def heads(rank: int, folder: Path, at: int | None) -> None:
    """Sweeps of a model whose heads are split."""
    _, model = by_hand(Attention, counts_its_own=False)
    end_at_forward(model.blocks[1], rank, at)
    swept(model, {"input_ids": IDS}, folder / f"{rank}.safetensors")


def stages(rank: int, folder: Path, at: int | None) -> None:
    """Captures of a model whose layers are split."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = Stage(llama(), rank)
    schedule = ScheduleGPipe(PipelineStage(stage, rank, 2, torch.device("cpu")), 1)
    given = [IDS] if rank == 0 else []
    with torch.no_grad(), workbench.attach(stage) as wb:
        schedule.step(*given)
        end_at_forward(stage, rank, at)
        for _ in turns(at):
            with wb.capture(["entropy"]) as cap:
                schedule.step(*given)
            cap.gathered(stages=SplitSequence.of(1))


RANKS = {one.__name__: one for one in (captures, ablations, gradients, sweeps, weights, heads, stages)}
RESUMED = ("sweeps", "weights", "heads")


def turns(at: int | None) -> Iterator[None]:
    """One; without end where a process is to be killed."""
    yield
    while at is not None:
        yield


def run(model: Any, split: SplitSequence) -> Any:
    here = torch.arange(split.here.start, split.here.stop)
    with workbench.split_over(split):
        return model(input_ids=IDS[:, here], position_ids=here[None], use_cache=False).logits


def swept(model: Any, batch: dict[str, Any], path: Path) -> None:
    save_always()
    variants = [workbench.Variant((layer, head)) for layer in range(2) for head in range(4)]
    with workbench.attach(model) as wb:
        workbench.run_sweep(wb, variants, [batch, batch], last, batched=False, resume=path, progress=False)


def last(output: Any, batch: Any) -> Any:
    return getattr(output, "logits", output)[:, -1, 7].double()


def end_at_exchange(rank: int, at: int | None) -> None:
    """The second process ends when it has exchanged so often."""
    left, begin = at, SplitSequence._begun

    def counted(self: SplitSequence, what: str, send: Any) -> Any:
        nonlocal left
        if rank == 1 and left is not None:
            left -= 1
            if left < 0:
                os._exit(DIED)
        return begin(self, what, send)

    SplitSequence._begun = counted  # type: ignore[method-assign]


def end_at_forward(module: Any, rank: int, at: int | None) -> None:
    left = at

    def hook(module: Any, args: Any) -> None:
        nonlocal left
        if rank == 1 and left is not None:
            left -= 1
            if left < 0:
                os._exit(DIED)

    module.register_forward_pre_hook(hook)  # behind the last forward the other process would miss nothing


def one_of_two(kind: str, rank: int, folder: Path, at: int | None) -> int:
    """A process of a split model; how it ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what torch says of lost connections
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group(
        "gloo", f"file://{folder}/meet {at}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=STUCK)
    )
    began = time.monotonic()
    try:
        RANKS[kind](rank, folder, at)
    except Exception as error:
        if at is None or time.monotonic() - began > PATIENCE:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            return 3
        return NAMED if "process 1 of the group" in str(error) else TOLD
    return 0


def two(kind: str, folder: Path, at: int | None) -> list[int]:
    return ended(*(forked(one_of_two, kind, rank, folder, at) for rank in (0, 1)))


def succeeded(kind: str, codes: list[int], folder: str) -> None:
    if codes != [0, 0]:
        raise SystemExit(f"{kind}: {codes}\n" + "\n".join(p.read_text() for p in Path(folder).glob("*.error")))


def ranks_killed(work: dict[str, range], address: str | None) -> Iterator[Killed]:
    """One of two processes ends; the other says so, and both go on from their files."""
    for kind, left in work.items():
        with tempfile.TemporaryDirectory() as whole:
            codes = two(kind, Path(whole), None)
            succeeded(kind, codes, whole)
            for turn in left:
                found: Killed = {"work": kind, "killed": 1}
                with tempfile.TemporaryDirectory() as folder:
                    told, killed = two(kind, Path(folder), turn)
                    if killed != DIED or told not in (NAMED, TOLD):
                        raise SystemExit(f"{kind}, {turn}: the processes ended with {told} and {killed}")
                    found["named"] = int(told == NAMED)
                    if kind in RESUMED:
                        succeeded(kind, two(kind, Path(folder), None), folder)
                        for rank in ("0.safetensors", "1.safetensors"):
                            same(*(workbench.Sweep.load(Path(each) / rank) for each in (whole, folder)))
                        found["same"] = 1
                yield found


# What is written

WHO = {
    "rank": (ranks_killed, list(RANKS)), "driver": (drivers_killed, list(WITH_FILES)),
    "worker": (workers_killed, list(WORK)),
}  # fmt: skip


def report(kept: list[Killed]) -> None:
    """The section of docs/benchmarks.md."""
    rows = []
    for who, (_, kinds) in WHO.items():
        for kind in kinds:
            mine = [one for one in kept if (one["who"], one["work"]) == (who, kind)]
            if not mine:
                continue
            counts = [sum(one[what] for one in mine) if what in mine[0] else None
                      for what in ("killed", "same", "named")]  # fmt: skip
            rows.append([f"{who}, {kind}", str(len(mine)), *("–" if n is None else str(n) for n in counts)])
    note = (
        "At different places: a worker of Ray in a forward; the driver, before what it keeps is "
        "written or behind it; one of two processes of a split model (gloo), at an exchange or in a forward. Same: "
        "what was found in spite of it, or gone on with from the files, is what an undisturbed run gives, to the bit. "
        "Named: the other process ended within a minute with an error that names the lost one.\n\n"
    )
    write_section(HEADING, note + table(["killed, in", "times", "killed", "same", "named"], rows))


def main() -> None:
    """Kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kept", type=Path, nargs="?", default=Path(__file__).parents[1] / ".cache" / "kills.jsonl")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(WHO), default=list(WHO))
    parser.add_argument("--address", help="of a cluster that runs already, for drivers and workers")
    asked = parser.parse_args()
    asked.kept.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)

    def kept() -> list[Killed]:
        lines = asked.kept.read_text().splitlines() if asked.kept.exists() else []
        return [json.loads(line) for line in lines]

    for who in asked.only:
        kill, kinds = WHO[who]
        done = Counter(one["work"] for one in kept() if one["who"] == who)
        left = {kind: range(done[kind], asked.times) for kind in kinds if done[kind] < asked.times}
        for found in kill(left, asked.address) if left else ():
            say(f"{who}, {found}")
            with asked.kept.open("a") as file:
                file.write(json.dumps({"who": who, **found}) + "\n")
    report(kept())


if __name__ == "__main__":
    main()
