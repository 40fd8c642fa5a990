"""What one process does in the tests of split sequences: `python -m support.sequence_ranks RANK FOLDER`.

Four processes hold a part each of the same random tensors; the first two of them do the same between themselves. What
each found wrong goes, by case, into `FOLDER/RANK.json`. In the end the last process ends without a word, in the middle
of an exchange, and the others say what they are told.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.lightning import decays, lightning_attention
from workbench.kernels.masks import Mask
from workbench.kernels.sequence_parallel import (
    SplitSequence,
    split_attention,
    split_lightning_attention,
    split_linear_attention,
    split_statistics,
)
from workbench.kernels.softmax import SoftmaxPattern

RANKS = 4
LENGTHS = {4: (5, 9, 1, 8), 2: (12, 7)}
ROWS = ["entropy", "peak", "peak_key", "distance", "sink", "previous", "induction", "effective_keys", "top_keys"]
CASES = ("lasp", "lasp_whole", "gather", "gather_whole", "ring", "ring_whole", "statistics", "traffic", "refused")
Cut = Callable[[Tensor], Tensor]


def tensors(n: int, heads: int = 4, kv: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k and v [2, head, n, 6 or 5] that want gradients, and what the output is weighted with."""
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [draw(2, h, n, d).requires_grad_() for h, d in ((heads, 6), (kv, 6), (kv, 5))]
    return (*leaves, draw(2, heads, n, 5))


def whole(how: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What one process gives."""
    if how == "lasp":
        return lightning_attention(q, k, v, decays(q.shape[1]), chunk=4)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    if how == "lasp_whole":
        return q @ (k.mT @ v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=not how.endswith("whole"))


def parted(how: str, split: SplitSequence, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, of this process's positions."""
    if how == "lasp":
        return split_lightning_attention(q, k, v, split, decays(q.shape[1]), chunk=4)
    if how == "lasp_whole":
        return split_linear_attention(q, k, v, split)
    sent = how.split("_")[0]
    out, lse = split_attention(q, k, v, split, causal=not how.endswith("whole"), how=sent)  # type: ignore[arg-type]
    assert not lse.requires_grad
    return out


def compare(how: str, split: SplitSequence) -> None:
    """Values and gradients of a part are those of the whole, in float64; and values in float32."""
    at = slice(split.here.start, split.here.stop)
    q, k, v, weight = tensors(sum(split.lengths))
    (whole(how, q, k, v) * weight).sum().backward()
    mine = [t.detach()[:, :, at].clone().requires_grad_() for t in (q, k, v)]
    out = parted(how, split, *mine)
    torch.testing.assert_close(out, whole(how, q, k, v).detach()[:, :, at], rtol=1e-12, atol=1e-12)
    (out * weight[:, :, at]).sum().backward()
    for name, part, leaf in zip("qkv", mine, (q, k, v), strict=True):
        torch.testing.assert_close(part.grad, leaf.grad[:, :, at], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: n + m)
    single = [t.detach().float() for t in (q, k, v)]
    found = parted(how, split, *(t[:, :, at] for t in single))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole(how, *single)[:, :, at], rtol=2e-5, atol=2e-5)


def statistics(split: SplitSequence) -> None:
    """Of the part, those of the whole: with the log-sum-exp that the kernel gave, and without."""
    n, at = sum(split.lengths), slice(split.here.start, split.here.stop)
    q, k, v, _ = (t.detach() for t in tensors(n))
    tokens = torch.arange(n).remainder(5).expand(2, n)
    for causal in (True, False):
        names = [*ROWS, "received", "received_mean"]
        want = SoftmaxPattern(q, k, Mask(n, n, causal)).statistics(names, tokens=tokens, n_top=3)
        q_here, k_here = q[:, :, at], k[:, :, at]
        _, lse = split_attention(q_here, k_here, v[:, :, at], split, causal=causal)
        for known in (lse, None):
            found = split_statistics(
                q_here, k_here, names, split, causal=causal, lse=known, tokens=tokens, n_top=3
            )  # fmt: skip
            assert set(found) == set(want)
            for name, value in found.items():
                torch.testing.assert_close(value, want[name][:, :, at], rtol=1e-9, atol=1e-10, equal_nan=True, msg=name)


def traffic(split: SplitSequence) -> None:
    """One operation forward and one backward, whose size does not grow with the sequence."""
    seen = []
    for times in (1, 6):
        longer = SplitSequence(tuple(times * n for n in split.lengths), split.rank, split.group)
        at = slice(longer.here.start, longer.here.stop)
        q, k, v, _ = (t.detach()[:, :, at].clone() for t in tensors(sum(longer.lengths)))
        leaf = q.requires_grad_()
        out = split_lightning_attention(leaf, k, v, longer)
        assert longer.sent.calls == {"all_gather": 1}
        out.sum().backward()
        assert longer.sent.calls == {"all_gather": 2}
        seen.append(longer.sent.n_bytes["all_gather"])
        longer.sent.clear()
        split_attention(q.detach(), k, v, longer)
        assert longer.sent.calls == {"all_gather": 1}
        longer.sent.clear()
        split_attention(q.detach(), k, v, longer, how="ring")
        assert longer.sent.calls == {"send": split.size - 1}
    assert seen[0] == seen[1] == 2 * 2 * 4 * 6 * 5 * 8  # twice, batch · heads · d · width float64


def refused(split: SplitSequence) -> None:
    """Positions that are not the split's, by name; the split asks for lengths once."""
    q, k, v, _ = (t.detach()[:, :, : split.lengths[split.rank] + 1] for t in tensors(sum(split.lengths)))
    for call in (
        lambda: split_attention(q, k, v, split),
        lambda: split_lightning_attention(q, k, v, split),
        lambda: split_statistics(q, k, ["entropy"], split),
        lambda: split_statistics(q, k, ["pooled_mean"], split),
    ):
        try:
            call()
        except CaptureError as error:
            assert "positions" in str(error) or "blocks" in str(error), error  # noqa: PT017
        else:
            raise AssertionError("nothing was said")
    made = SplitSequence.of(split.lengths[split.rank], split.group)
    assert (made.lengths, made.rank) == (split.lengths, split.rank)


def splits(rank: int) -> Iterator[tuple[str, SplitSequence]]:
    """Those that this process takes part in."""
    pair = dist.new_group([0, 1])
    yield "4", SplitSequence(LENGTHS[4], rank)
    if rank < 2:
        yield "2", SplitSequence(LENGTHS[2], rank, pair)


def main(rank: int, folder: Path) -> None:
    """All cases."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=600),
    )
    wrong: dict[str, str] = {}
    for name, split in splits(rank):
        for case in CASES:
            others = {"statistics": statistics, "traffic": traffic, "refused": refused}
            try:
                others[case](split) if case in others else compare(case, split)
            except Exception:
                wrong[f"{case} {name}"] = traceback.format_exc()
    dist.barrier()
    path = folder / f"{rank}.json"
    if rank == RANKS - 1:
        path.write_text(json.dumps({"wrong": wrong, "told": ""}))
        os._exit(0)
    told = ""
    try:
        q, k, v, _ = (t.detach()[:, :, : LENGTHS[4][rank]] for t in tensors(sum(LENGTHS[4])))
        split_lightning_attention(q, k, v, SplitSequence(LENGTHS[4], rank))
    except CaptureError as error:
        told = str(error)
    path.write_text(json.dumps({"wrong": wrong, "told": told}))
    os._exit(0)  # the group cannot be left in good order any more


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
