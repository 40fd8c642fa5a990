"""`memory_reading`: what a video tracker reads from each frame that it remembers, at every frame and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.memory.result import MemoryReading
from workbench.analysis.memory.sessions import (
    Held,
    borrowed,
    check_held,
    check_tracker,
    held_by,
    memory_sites,
    prompted,
    watched,
)
from workbench.analysis.profile.measuring import labels_of
from workbench.errors import CaptureError, WorkbenchError, expect
from workbench.kernels.patterns import DENSE_LIMIT
from workbench.session.workbench import Workbench

_SHOWN = 192  # pixels along an edge of a frame that is shown


def memory_reading(
    wb: Workbench, session: Any, frames: Sequence[int] | None = None, *, number: int = 0,
    limit: int | None = DENSE_LIMIT,
) -> MemoryReading:  # fmt: skip
    """What each frame of a video reads from each frame that the tracker remembers: of every head of its memory
    attention, on every cell of the remembered frames and on the pointers to the object.

    Which frame and cell a key is comes from the model's own rule, and is proved at every read: the keys that it was
    given are, number by number, what the session stored of those frames. The session is left as it is. What it has
    tracked already is what is remembered; from the first frame with a prompt on, frames that it has not are tracked.

    Args:
        wb: the tracker, attached: `Sam2Video` of transformers.
        session: of the model's processor, with a video and a prompt.
        frames: at which to read, forwards in time; None for all behind the first prompt.
        number: which object, from 0 in the order in which they were added.
        limit: most bytes of weights that are kept.

    Raises:
        WorkbenchError: no tracker, no prompt, or frames that are none or read nothing. CaptureError: keys that are not
            what was stored, or more weights than the limit.
    """
    expect(Workbench, wb=wb)
    model: Any = wb.model
    check_tracker(model, session, number)
    sites = [site.name for site in memory_sites(list(wb.sites))]
    own, start = borrowed(session), min(prompted(session, number))
    asked = list(range(start + 1, own.num_frames)) if frames is None else sorted(set(frames))
    _check_frames(asked, own, start, number)
    reads: list[Tensor] = []
    places: list[Held] = []
    logits, seen, heads = [], list[Tensor](), []
    with torch.no_grad():
        for frame in range(start, max(asked) + 1):
            if frame not in asked:
                if not any(frame in stored for stored in own.output_dict_per_obj[number].values()):
                    model(own, frame_idx=frame)
                continue
            held = held_by(model, own, frame, number)
            seen.clear()
            with watched(model, seen.append), wb.capture((), sites, limit=limit) as cap:
                out = model(own, frame_idx=frame)
            call = sum(frame not in prompted(own, other) for other in range(number))  # of the objects that read
            check_held(held, own, number, seen[call])
            patterns = [cap[site, call] if call else cap[site] for site in sites]
            heads = [(one.site, h) for one in patterns for h in range(one.shape[1])]
            _check_limit(patterns, len(asked), limit)
            reads.append(torch.cat([one.pattern.dense(limit=limit)[0].float().cpu() for one in patterns]))
            places.append(held)
            logits.append(float(out.object_score_logits.flatten()[number]))
    return _gathered(asked, reads, places, logits, heads, session, sites, dict(cap.provenance))


def _check_frames(asked: Sequence[int], session: Any, start: int, number: int) -> None:
    given = prompted(session, number)
    bad = [t for t in asked if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < session.num_frames]
    if bad or not asked:
        raise WorkbenchError(
            f"the video has {session.num_frames} frames, and no frame {bad[0]}" if bad else "no frame is given",
            hint="frames count from 0",
        )
    early = [t for t in asked if t < start or t in given]
    if early:
        why = "has a prompt" if early[0] in given else f"comes before the first prompt, at frame {start}"
        raise WorkbenchError(f"frame {early[0]} {why}, and reads no memory", hint="take frames behind it")


def _check_limit(patterns: Sequence[Any], n: int, limit: int | None) -> None:
    size = 4 * n * sum(one.shape[1] * one.shape[2] * one.shape[3] for one in patterns)
    if limit is not None and size > limit:
        raise CaptureError(
            f"the weights of {n} frames take {size:,} bytes, more than the limit of {limit:,}",
            hint="fewer frames=, or a larger limit=",
        )


def _gathered(
    frames: Sequence[int], reads: Sequence[Tensor], places: Sequence[Held], logits: Sequence[float],
    heads: Sequence[tuple[Any, int]], session: Any, sites: Sequence[str], provenance: dict[str, Any],
) -> MemoryReading:  # fmt: skip
    rows, columns = places[0].grid
    cells, slots = rows * columns, max(len({*one.maps, *one.pointers}) for one in places)
    n_heads, n_queries = reads[0].shape[:2]
    held = torch.full((len(frames), slots), -1)
    recall = torch.zeros(len(frames), n_heads, n_queries, slots, cells)
    pointers = torch.zeros(len(frames), n_heads, slots)
    mapped = torch.zeros(len(frames), slots, dtype=torch.bool)
    for step, (read, one) in enumerate(zip(reads, places, strict=True)):
        known = sorted({*one.maps, *one.pointers})
        held[step, : len(known)] = torch.tensor(known)
        for i, frame in enumerate(one.maps):
            at = known.index(frame)
            recall[step, :, :, at] += read[..., i * cells : (i + 1) * cells]
            mapped[step, at] = True
        behind = read[..., len(one.maps) * cells :].mean(1)
        for i, frame in enumerate(one.pointers):
            pointers[step, :, known.index(frame)] += behind[:, i * one.n_each : (i + 1) * one.n_each].sum(-1)
    shown = {int(t) for t in held.flatten().tolist() if t >= 0} | set(frames)
    last = max(shown)
    return MemoryReading(
        frames=tuple(frames), labels=labels_of(heads), sites=tuple(site.name for site, _ in heads),
        layers=tuple(site.layer for site, _ in heads), heads=tuple(h for _, h in heads),
        held=held, mapped=mapped, recall=recall, pointers=pointers, grid=torch.tensor((rows, columns)),
        logits=tuple(logits), size=torch.tensor((int(session.video_height), int(session.video_width))),
        pictures=tuple(_picture(session.processed_frames[t]) for t in range(last + 1)), provenance=provenance,
    )  # fmt: skip


def _picture(frame: Tensor) -> Tensor:
    """[row, column, 3] in bytes of a normalised frame [3, row, column], from its least number to its greatest."""
    frame = frame.detach().float().cpu()
    low, high = float(frame.min()), float(frame.max())
    frame = (frame - low) / max(high - low, 1e-9)
    step = max(1, -(-max(frame.shape[1:]) // _SHOWN))
    return (255 * frame[:, ::step, ::step]).round().to(torch.uint8).permute(1, 2, 0).contiguous()
