"""One small piece of each kind of work that an engine can take over, on demo-lm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import workbench
from workbench import Variant, Workbench
from workbench.storage.result import Result

TEXT = "John gave a book to Mary. Mary gave a drink to John. " * 8


def sweep(wb: Workbench, task: Any, **how: Any) -> Result:
    heads = [Variant((layer, head), how=way) for layer in (0, 2, 3) for head in (1, 5) for way in ("mean", "resample")]
    return workbench.run_sweep(wb, heads, task.batches(wb.tokenizer, 3), "logit_diff", **how)


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


WORK = {one.__name__: one for one in (sweep, importance, circuit, edges, ablations, patterns, layers, masks, corpus)}
WITH_FILES = ("sweep", "importance", "patterns", "layers", "masks", "corpus")


def same(one: Any, two: Any, at: str = "") -> None:
    """All that two results hold, to the bit, but for when they were made and how long it took."""
    if isinstance(one, Tensor):
        assert one.shape == two.shape, at
        assert bool(((one == two) | ((one != one) & (two != two))).all()), at
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), at
        for name in one:
            if name not in ("captured_at", "created", "seconds"):
                same(one[name], two[name], f"{at}.{name}")
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(two), at
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{at}[{i}]")
    elif isinstance(one, Result):
        same(vars(one), vars(two), type(one).__name__)
    else:
        assert one == two or one != one, at


class Ends:
    """A forward hook in which a worker ends, when it comes to a forward, once.

    Args:
        flag: a file that is made then. at: the forward of the worker, from 1.
    """

    def __init__(self, flag: Path, at: int = 1) -> None:
        self.flag, self.at, self.driver, self.seen = flag, at, os.getpid(), 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen += 1
        if self.seen < self.at or os.getpid() == self.driver:
            return
        try:
            os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))  # by one worker alone
        except FileExistsError:
            return
        os._exit(1)


class Fails:
    """A metric that fails on a batch of one example as long as a file is there."""

    def __init__(self, flag: Path) -> None:
        self.flag = str(flag)

    def __call__(self, output: Any, batch: Any) -> Tensor:
        if len(batch["input_ids"]) == 1 and os.path.exists(self.flag):
            raise ValueError("not now")
        return output.logits[:, -1, 5]
