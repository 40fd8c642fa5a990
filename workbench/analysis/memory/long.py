"""`track_long`: SAM2Long's memory tree around a video tracker of transformers, of any weights, without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.memory.sessions import Held, borrowed, check_tracker, held_by, prompted
from workbench.analysis.memory.tree import MemoryTree, Node, Seen, grow_memory_tree, key_factors, memory_frames
from workbench.errors import WorkbenchError, expect
from workbench.hooks.changes import Changes

_PROMPTED = 10.0  # what the object's logit counts for on the frame with the prompt


@dataclass(frozen=True)
class Tracked:
    """What the tree made of a video.

    Attributes:
        tree: all masks that were weighed. frames: of the video, those of the tree. masks: [frame, row, column] logits
            of the pathway that is believed. remembered: of each frame of it, which were read, the prompt's first.
    """

    tree: MemoryTree
    frames: tuple[int, ...]
    masks: Tensor
    remembered: tuple[tuple[int, ...], ...]


def track_long(
    model: nn.Module, session: Any, n_frames: int | None = None, *, paths: int = 3, sure: float = 2.0,
    floor: float = 0.1, objects: bool = True, ramp: tuple[float, float] = (0.95, 1.05), distinct: bool = False,
    number: int = 0,
) -> Tracked:  # fmt: skip
    """Follow an object through a video with several pathways of memory (SAM2Long, arXiv 2410.16268).

    Each pathway remembers its own masks: of frames whose mask is likely good, with the object there, by their rank, the
    newest first. Keys of a remembered frame are multiplied by `key_factors` of the object's logits; values are not.
    With `paths=1, floor=-1, objects=False, ramp=(1, 1)` it is the model's own greedy tracking. The session is left as
    it is. Everything runs in float as the model does, and what a hook changed is undone at the end.

    Args:
        model: `Sam2VideoModel` of transformers, in evaluation mode. session: with a video and a prompt.
        n_frames: how many frames behind the first prompt; None for all. paths, sure, distinct: as `grow_memory_tree`.
        floor: least predicted overlap of a frame that is remembered. objects: whether the object has to be there.
        ramp: factors of the keys on which the object is seen least, and most. number: which object, from 0.

    Raises:
        WorkbenchError: no tracker, no prompt, no frame behind it, more than one frame with a prompt, or pathways that
            are none.
    """
    expect(nn.Module, model=model)
    tracker: Any = model
    check_tracker(model, session, number)
    given = prompted(session, number)
    if len(given) > 1:
        raise WorkbenchError(f"frames {sorted(given)} have prompts", hint="the tree begins behind one prompt")
    start = min(given)
    n = session.num_frames - 1 - start if n_frames is None else n_frames
    if not 1 <= n <= session.num_frames - 1 - start:
        raise WorkbenchError(
            f"the video has {session.num_frames - 1 - start} frames behind the prompt, and not {n}",
            hint="a session with more frames, or n_frames=",
        )
    if model.training:
        raise WorkbenchError("the tracker is in training mode", hint="model.eval()")
    own = borrowed(session)
    with torch.no_grad():
        if start not in own.output_dict_per_obj[number]["cond_frame_outputs"]:
            tracker(own, frame_idx=start)
        pathway = _Pathway(tracker, own, start, number, floor, 0.0 if objects else -inf, ramp)
        tree = grow_memory_tree(pathway.see, n, paths=paths, sure=sure, distinct=distinct)
    best = tree.best
    return Tracked(
        tree, tuple(range(start + 1, start + 1 + n)),
        torch.stack([pathway.made[i]["pred_masks"][0, 0].float().cpu() for i in best]),
        tuple(pathway.read[i] for i in best),
    )  # fmt: skip


class _Pathway:
    """What the tracker makes of a frame with the memory of a history."""

    def __init__(
        self, model: Any, session: Any, start: int, number: int, floor: float, there: float, ramp: tuple[float, float]
    ) -> None:
        self.model, self.session, self.start, self.number = model, session, start, number
        self.floor, self.there, self.ramp = floor, there, ramp
        self.stored = session.output_dict_per_obj[number]
        self.made: list[dict[str, Any]] = []  # in the order in which they become nodes
        self.read: list[tuple[int, ...]] = []  # frames that were read for each

    def see(self, frame: int, history: tuple[Node, ...]) -> Seen:
        """As `grow_memory_tree` asks for it."""
        at = self.start + 1 + frame
        n = max(self.model.num_maskmem, self.model.config.max_object_pointers_in_encoder)
        kept = memory_frames(history, self.floor, spatial=n, there=self.there)
        by_frame = {node.frame: node for node in history}
        # The tracker remembers by how long ago a frame was: the newest takes the place of the frame before.
        self.stored["non_cond_frame_outputs"] = {at - rank: by_frame[t].value for rank, t in enumerate(kept, 1)}
        true = {at - rank: self.start + 1 + t for rank, t in enumerate(kept, 1)} | {self.start: self.start}
        logits = {at - rank: by_frame[t].logit for rank, t in enumerate(kept, 1)} | {self.start: _PROMPTED}
        held = held_by(self.model, self.session, at, self.number)
        self._check(held, at)
        factors = self._factors(held, logits)
        decoded: list[tuple[dict[str, Any], Any]] = []

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            decoded.append((kwargs, output))

        with _multiplied(self.model, factors), Changes() as changes:
            changes.after(self.model.mask_decoder, keep, with_kwargs=True)
            self.model._run_single_frame_inference(
                inference_session=self.session, obj_idx=self.number, frame_idx=at, batch_size=1,
                is_init_cond_frame=False, point_inputs=None, mask_inputs=None, reverse=False,
            )  # fmt: skip
        kwargs, (_, overlaps, _, logit) = decoded[0]
        several = overlaps.shape[-1]
        made = [self._mask(kwargs, mask, several, at) for mask in range(several)]
        self.made += made
        frames = tuple(true[t] for t in held.maps)
        self.read += [frames] * several
        return Seen([float(one) for one in overlaps.flatten()], float(logit.flatten()[0]), made)

    def _check(self, held: Held, at: int) -> None:
        """One prompt, whose map and pointer come first."""
        if not held.maps or held.maps[0] != self.start:
            raise WorkbenchError(f"at frame {at} the prompt's frame {self.start} is not the first that is read")

    def _factors(self, held: Held, logits: dict[int, float]) -> Tensor:
        """[key] by what the keys are multiplied."""
        cells = held.grid[0] * held.grid[1]
        maps = key_factors([logits[t] for t in held.maps], *self.ramp).repeat_interleave(cells)
        return torch.cat(
            [maps, key_factors([logits[t] for t in held.pointers], *self.ramp).repeat_interleave(held.n_each)]
        )

    def _mask(self, decoder: dict[str, Any], mask: int, several: int, at: int) -> dict[str, Any]:
        """What the tracker stores of one of the masks, with its memory."""

        def prefer(module: nn.Module, args: Any, output: Any) -> Any:
            masks, overlaps, tokens, logit = output
            first = torch.zeros_like(overlaps)
            first[..., mask] = 1.0
            return masks, first, tokens, logit

        embeddings = [*decoder["high_resolution_features"], decoder["image_embeddings"]]
        with Changes() as changes:
            changes.after(self.model.mask_decoder, prefer)
            out = self.model._single_frame_forward(image_embeddings=embeddings, multimask_output=several > 1)
        made = {name: out[name] for name in ("pred_masks", "object_pointer", "high_res_masks", "object_score_logits")}
        self.stored["non_cond_frame_outputs"][at] = made
        self.model._batch_encode_memories(
            self.session, at, [self.number], [out.high_res_masks], [out.object_score_logits], [False]
        )
        del self.stored["non_cond_frame_outputs"][at]
        return made


@contextmanager
def _multiplied(model: Any, factors: Tensor) -> Iterator[None]:
    """Keys of the memory attention, before their projection, times a factor each."""

    def scale(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        key = kwargs["key"]
        return args, kwargs | {"key": key * factors.to(key)[:, None]}

    with Changes() as changes:
        if bool((factors != 1).any()):
            for layer in model.memory_attention.layers:
                changes.before(layer.cross_attn_image, scale, with_kwargs=True)
        yield
