"""What more processes bring: workers of Ray on a sweep, a worker that is killed, two processes on one sequence.

    python benchmarks/scale.py [--rounds 5] [--dry]

Arms take turns in one run; every process has one thread. Ratios are medians over rounds, with the smallest and largest,
of seconds, and of the processor time of the busiest process, which other work on the machine does not change. Numbers
of all arms are compared: to the bit for workers, to 1e-5 where sums are split. Writes its part of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
import transformers as hf
from shared.measuring import say, table, timed, write_section

import workbench
from workbench import RayWorkers, Variant
from workbench.kernels.disaggregation import packed, plan
from workbench.kernels.sequence_parallel import SplitSequence
from workbench.workers.documents import PLANNED, ROUND_ROBIN, document_statistics

HEADING = "More processes"
VARIANTS, LONG = 500, 8192
Seconds = dict[str, list[float]]
DOCUMENTS = [8192, 384, 2048, 512, 6144, 256, 1024, 3072, 1280, 768, 4096, 320]


def spread(ratios: list[float]) -> str:
    """Median, with the smallest and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def ratios(seconds: Seconds, slow: str, fast: str) -> list[float]:
    return [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]


def spent(work: Callable[[], object], processes: Sequence[psutil.Process], busiest: list[float]) -> None:
    """Do the work, and add the processor seconds that the busiest of some processes spent on it."""
    before = [sum(each.cpu_times()[:2]) for each in processes]
    work()
    busiest.append(max(sum(each.cpu_times()[:2]) - one for each, one in zip(processes, before, strict=True)))


def measured(arms: dict[str, tuple[Callable[[], object], list[int]]], rounds: int) -> tuple[Seconds, Seconds]:
    """By arm and round: seconds, and processor seconds of the busiest of an arm's processes."""
    busiest: Seconds = {name: [] for name in arms}
    running = {
        name: partial(spent, work, [psutil.Process(pid) for pid in pids], busiest[name])
        for name, (work, pids) in arms.items()
    }
    seconds = timed(running, rounds)
    return seconds, {name: each[1:] for name, each in busiest.items()}


def both(found: tuple[Seconds, Seconds], slow: str, fast: str) -> str:
    """Ratios of seconds and of processor seconds."""
    wall, processor = (spread(ratios(each, slow, fast)) for each in found)
    return f"{wall} times as fast, {processor} by processor time"


def bare(work: Callable[[], object], times: int, n: int) -> None:
    """n processes that share so many calls between them, and nothing else."""
    pids = []
    for _ in range(n):
        pids.append(os.fork())
        if not pids[-1]:
            for _ in range(times // n):
                work()
            os._exit(0)
    if any(os.waitpid(pid, 0)[1] for pid in pids):
        raise SystemExit("a process failed")


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    if not torch.equal(one, two):
        raise SystemExit("workers gave other numbers")


def sweeps(rounds: int) -> list[list[str]]:
    """Two workers against one, and what a killed one costs."""
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=256, n_embd=256, n_layer=6, n_head=8, n_positions=64)).eval()
    wb = workbench.attach(model)
    batches = [{"input_ids": torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    variants = [Variant((layer, head), positions=at) for at in range(11) for layer in range(6) for head in range(8)]
    variants = variants[:VARIANTS]
    ends = Ends(tempfile.mkdtemp())
    hook = model.transformer.ln_f.register_forward_hook(ends)  # does nothing but where it is told to

    def sweep(**how: Any) -> torch.Tensor:
        return workbench.run_sweep(wb, variants, batches, last, memory=1 << 24, progress=False, **how).values

    here = sweep()
    with torch.no_grad():
        forward = partial(model, batches[0]["input_ids"].repeat(8, 1), use_cache=False)  # as many rows as side by side
        alone = timed({"one": lambda: bare(forward, 40, 1), "two": lambda: bare(forward, 40, 2)}, rounds)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with RayWorkers(1) as one, RayWorkers(2) as two:
        for workers in (one, two):
            same(here, sweep(engine=workers))
        began, before = time.perf_counter(), time.process_time()
        found = measured(
            {name: (partial(sweep, engine=workers), workers.pids()) for name, workers in (("one", one), ("two", two))},
            rounds,
        )
        driver = (time.process_time() - before) / (time.perf_counter() - began)
        whole, lost = statistics.median(found[0]["two"]), []
        for turn in range(rounds):
            (Path(ends.folder) / "end").write_text(str(turn))
            began = time.perf_counter()
            same(here, sweep(engine=two))
            lost.append(time.perf_counter() - began)
        n_lost = two.lost
    hook.remove()
    wb.detach()
    return [
        [f"sweep of {VARIANTS} variants, two workers against one", both(found, "one", "two")],
        ["forwards of its model, shared by two processes without Ray, against one: what this machine allows",
         spread(ratios(alone, "one", "two")) + " times as fast"],
        ["processor time of the process that the sweeps ran in", f"{driver:.1%} of a core"],
        [f"the same sweep, one of two workers killed in each of {rounds} runs ({n_lost} units of work done again)",
         spread([each / whole for each in lost]) + " of the time; its start with it"],
    ]  # fmt: skip


class Ends:
    """Ends its worker in the middle of a sweep, once for each time that it is told to."""

    def __init__(self, folder: str) -> None:
        self.folder, self.driver, self.seen = folder, os.getpid(), 0

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.seen += 1
        path = Path(self.folder) / "end"
        if os.getpid() != self.driver and self.seen % 7 == 0 and path.exists():
            try:
                path.unlink()
            except FileNotFoundError:
                return
            os._exit(1)


def last(output: Any, batch: Any) -> torch.Tensor:
    return output.logits[:, -1].double().logsumexp(-1)


def sequence(rounds: int) -> list[list[str]]:
    """Two processes with a part of a sequence each against one with all of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank"]
        ranks = [subprocess.Popen([*command, str(rank), folder, "--rounds", str(rounds)]) for rank in (0, 1)]
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a process failed")
        found = json.loads((Path(folder) / "0.json").read_text())
    return [
        [
            f"capture of `entropy` and `received` at N = {LONG:,}, two processes against one",
            both((found["seconds"], found["busiest"]), "one", "two")
            + f"; {found['bytes'] / 2**20:.1f} MiB sent by each, of which statistics {found['statistics'] / 2**20:.1f}",
        ]
    ]


def rank_main(rank: int, folder: str, rounds: int) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=900)
    )
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LONG,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(256, (1, LONG), generator=torch.Generator().manual_seed(1))
    first = int(LONG * 0.5**0.5)  # half of the pairs of a query and a key that it sees
    split = SplitSequence.of((first, LONG - first)[rank], patience=600)
    here = torch.arange(split.here.start, split.here.stop)
    wb = workbench.attach(model)
    caps: dict[str, Any] = {}
    busiest: Seconds = {"one": [], "two": []}

    def one() -> None:
        began = time.process_time()
        if rank == 0:
            with torch.no_grad(), wb.capture(["entropy", "received"], queries_keys=False) as caps["one"]:
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
        busiest["one"].append(max(split.told(time.process_time() - began)))

    def two() -> None:
        began = time.process_time()
        asked = wb.capture(["entropy", "received"], queries_keys=False)
        with torch.no_grad(), workbench.split_over(split), asked as cap:
            model(input_ids=ids[:, here], position_ids=here[None], use_cache=False, logits_to_keep=1)
        sent = sum(split.sent.n_bytes.values())
        caps["statistics"] = cap.bytes_to_gather(split)
        caps["two"] = cap.gathered(split=split)
        caps["bytes"] = sum(split.sent.n_bytes.values())
        assert caps["bytes"] - sent - caps["statistics"] < 10_000
        split.sent.clear()
        busiest["two"].append(max(split.told(time.process_time() - began)))

    seconds: dict[str, Any] = timed({"one": one, "two": two}, rounds)
    if rank == 0:
        for want, got in zip(caps["one"], caps["two"], strict=True):
            for name in ("entropy", "received"):
                torch.testing.assert_close(got.statistics[name], want.statistics[name], atol=1e-5, rtol=1e-4)
        found = {"seconds": seconds, "busiest": {name: each[1:] for name, each in busiest.items()}}
        Path(folder, "0.json").write_text(json.dumps(found | {name: caps[name] for name in ("bytes", "statistics")}))
    dist.destroy_process_group()


def documents(rounds: int) -> list[list[str]]:
    """Statistics of documents of mixed length on two workers, given out by the planner and in turn."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    names = ["entropy", "distance", "peak_key"]
    with torch.no_grad(), workbench.attach(hf.LlamaForCausalLM(config).eval()) as wb, wb.capture(()) as cap:
        for n in DOCUMENTS:
            wb.model(input_ids=torch.randint(256, (1, n)), use_cache=False, logits_to_keep=1)
    with RayWorkers(2) as two:
        arms = {
            how: (partial(document_statistics, cap.calls, names, engine=two, how=how), two.pids())
            for how in (ROUND_ROBIN, PLANNED)
        }
        found = measured(arms, rounds)
    return [
        [
            f"statistics of {len(DOCUMENTS)} documents on two workers, planned against in turn",
            both(found, ROUND_ROBIN, PLANNED),
        ]
    ]


def balance() -> list[list[str]]:
    """The planner's loads for two devices."""
    made = plan(packed(DOCUMENTS, 2))
    before, after = made.imbalance
    return [
        [
            f"largest load of two devices over the mean, {len(DOCUMENTS)} documents",
            f"{before:.2f}, {after:.3f} as planned",
        ]
    ]


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.rank:
        return rank_main(int(asked.rank[0]), asked.rank[1], asked.rounds)
    rows = [*sequence(asked.rounds), *sweeps(asked.rounds), *documents(asked.rounds), *balance()]
    text = table(["what", "ratio in one run"], rows)
    note = (
        f"Processes of one thread each on two cores, {asked.rounds} rounds in which arms take turns; median, smallest "
        "and largest. Workers give the numbers of one process to the bit.\n\n"
    )
    say(text)
    if not asked.dry:
        write_section(HEADING, note + text)


if __name__ == "__main__":
    main()
