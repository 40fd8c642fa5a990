"""Video sessions of trackers such as `Sam2Video`: copies to run on, and which frame and cell each key of a read is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError, WorkbenchError
from workbench.hooks.changes import Changes

_NEEDED = ("memory_attention", "_gather_memory_frame_outputs", "_get_object_pointers", "backbone_feature_sizes")


@dataclass(frozen=True)
class Held:
    """What the keys of a read are, in their order: maps of frames, then pointers to the object.

    Attributes:
        maps: the frame of each map; each has `grid` cells, row after row. grid: rows and columns.
        pointers: the frame of each pointer. n_each: tokens of a pointer.
    """

    maps: tuple[int, ...]
    grid: tuple[int, int]
    pointers: tuple[int, ...]
    n_each: int

    @property
    def n_keys(self) -> int:
        """How many keys that makes."""
        return len(self.maps) * self.grid[0] * self.grid[1] + len(self.pointers) * self.n_each


def check_tracker(model: nn.Module, session: Any, number: int = 0) -> dict[str, dict[int, Any]]:
    """What a session has stored of an object.

    Returns:
        "cond_frame_outputs", of frames with a prompt, and "non_cond_frame_outputs": frame -> what was stored.

    Raises:
        WorkbenchError: no tracker with a memory, no session of one, no such object, or no frame with a prompt yet.
    """
    lacking = [name for name in _NEEDED if not hasattr(model, name)]
    if lacking:
        raise WorkbenchError(
            f"a {type(model).__name__} has no {lacking[0]}: its memory cannot be told",
            hint="a video tracker of transformers with a memory of frames, such as Sam2VideoModel",
        )
    if not hasattr(session, "output_dict_per_obj") or session.processed_frames is None:
        raise WorkbenchError(
            f"a {type(session).__name__} is no session with a video",
            hint="processor.init_video_session(video=…), or Sam2VideoInferenceSession(video=…)",
        )
    if number not in session.output_dict_per_obj:
        raise WorkbenchError(
            f"the session has {session.get_obj_num()} objects, and no object {number}", hint="numbers count from 0"
        )
    stored: dict[str, dict[int, Any]] = session.output_dict_per_obj[number]
    if not prompted(session, number):
        raise WorkbenchError("no frame says which object to follow", hint="add points or a mask to a frame first")
    return stored


def borrowed(session: Any) -> Any:
    """A copy of a session to run on, which leaves the session as it is; tensors are shared."""
    own = copy(session)
    own.cache = copy(session.cache)
    own.cache._vision_features = dict(session.cache._vision_features)
    own.obj_with_new_inputs = list(session.obj_with_new_inputs)
    own.frames_tracked_per_obj = {number: dict(frames) for number, frames in session.frames_tracked_per_obj.items()}
    own.output_dict_per_obj = {
        number: {name: {t: dict(out) for t, out in frames.items()} for name, frames in stored.items()}
        for number, stored in session.output_dict_per_obj.items()
    }
    return own


def prompted(session: Any, number: int) -> set[int]:
    """The frames with a prompt for an object."""
    known = session.output_dict_per_obj[number]["cond_frame_outputs"]
    return {*known, *session.point_inputs_per_obj[number], *session.mask_inputs_per_obj[number]}


def held_by(model: Any, session: Any, frame: int, number: int = 0) -> Held:
    """Which frame each key stands for when a frame is read, as the model itself gathers them.

    Raises:
        WorkbenchError: nothing is remembered.
    """
    stored = session.output_dict_per_obj[number]
    if not stored["cond_frame_outputs"]:
        raise WorkbenchError(f"nothing is remembered at frame {frame}", hint="run the frame with the prompt first")
    known = {id(out): t for frames in stored.values() for t, out in frames.items()}
    maps = [known[id(out)] for _, out in model._gather_memory_frame_outputs(session, number, frame) if out is not None]
    device = session.inference_device
    offsets, tokens, _ = model._get_object_pointers(session, number, frame, session.num_frames, device)
    rows, columns = model.backbone_feature_sizes[-1]
    n_each = max(1, model.hidden_dim // model.mem_dim) if tokens else 1
    return Held(tuple(maps), (int(rows), int(columns)), tuple(frame - offset for offset in offsets), n_each)


def check_held(held: Held, session: Any, number: int, memory: Tensor) -> None:
    """Raise a CaptureError where what the model read is not what the session stored of those frames, key by key.

    Args:
        memory: [key, 1, width] as the memory attention was given it.
    """
    stored = session.output_dict_per_obj[number]
    both = {t: out for frames in stored.values() for t, out in frames.items()}
    parts = [both[t]["maskmem_features"] for t in held.maps]
    wanted = torch.cat([part.to(memory) for part in parts])
    n = len(wanted)
    pointers = [both[t]["object_pointer"].to(memory).reshape(-1, 1, memory.shape[-1]) for t in held.pointers]
    wanted = torch.cat([wanted, *pointers])
    if (
        held.n_keys != len(memory)
        or n != len(held.maps) * held.grid[0] * held.grid[1]
        or not torch.equal(wanted, memory)
    ):
        raise CaptureError(
            f"the {len(memory)} keys that were read are not the cells and pointers of frames {list(held.maps)}",
            hint="a tracker that keeps its memory in another way cannot be told apart yet",
        )


@contextmanager
def watched(model: Any, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand on [key, 1, width] what each read of the memory is given."""

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        take(kwargs["memory"] if "memory" in kwargs else args[1])

    with Changes() as changes:
        changes.before(model.memory_attention, see, with_kwargs=True)
        yield


def memory_sites(sites: Sequence[Any]) -> list[Any]:
    """The sites that read the memory.

    Raises:
        CaptureError: there are none.
    """
    found = [site for site in sites if site.kind == "memory"]
    if not found:
        raise CaptureError("no attention of the model reads a memory of frames", hint="wb.sites has the kinds")
    return found
