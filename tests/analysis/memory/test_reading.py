"""What a tracker reads of remembered frames: equal to eager attention, with the frame and the cell of every key."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.trackers import session, tracker
from workbench import views
from workbench.analysis.memory.result import PARTS
from workbench.errors import CaptureError, WorkbenchError
from workbench.hooks.changes import Changes

SITES = [f"memory_attention.layers.{i}.cross_attn_image" for i in range(2)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tracker()


@pytest.fixture(scope="module")
def reading(model: Any) -> workbench.MemoryReading:
    with workbench.attach(model) as wb:
        assert [site.name for site in wb.sites if site.kind == "memory"] == SITES
        return workbench.memory_reading(wb, session())


def eager_rows(frame: int) -> list[Tensor]:
    """[query, key] of each layer, as eager attention gives them at a frame."""
    twin, video, found = tracker(), session(), []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[1][0, 0])

    with torch.no_grad(), Changes() as changes:
        for t in range(frame):
            twin(video, frame_idx=t)
        twin.set_attn_implementation("eager")
        for name in SITES:
            changes.after(twin.get_submodule(name), keep)
        twin(video, frame_idx=frame)
    return found


@pytest.mark.parametrize("frame", [2, 7])
def test_every_key_has_its_frame_and_cell(reading: workbench.MemoryReading, frame: int) -> None:
    """The prompt's map, those of up to three frames before, the oldest first; two tokens of each pointer behind."""
    maps = [0, *range(max(1, frame - 3), frame)]
    pointers = [0, *range(frame - 1, max(0, frame - 6), -1)]
    step = reading.frames.index(frame)
    held = reading.held[step].tolist()
    for head, rows in enumerate(eager_rows(frame)):
        assert rows.shape == (16, 16 * len(maps) + 2 * len(pointers))
        for i, t in enumerate(maps):
            read = reading.recall[step, head, :, held.index(t)]
            torch.testing.assert_close(read, rows[:, 16 * i : 16 * i + 16], atol=2e-5, rtol=0)
        behind = rows[:, 16 * len(maps) :].mean(0).view(-1, 2).sum(-1)
        for i, t in enumerate(pointers):
            torch.testing.assert_close(reading.pointers[step, head, held.index(t)], behind[i], atol=2e-5, rtol=0)
    assert set(reading.remembered(frame)) == {*maps, *pointers}
    assert {t for t, there in zip(held, reading.mapped[step].tolist(), strict=True) if there} == set(maps)


def test_weights_sum_to_one_and_the_session_stays_as_it_was(model: Any, reading: workbench.MemoryReading) -> None:
    total = (reading.weights + reading.pointers).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    untouched = session()
    with torch.no_grad():
        for t in range(4):
            model(untouched, frame_idx=t)
    before = {t: dict(out) for t, out in untouched.output_dict_per_obj[0]["non_cond_frame_outputs"].items()}
    with workbench.attach(model) as wb:
        found = workbench.memory_reading(wb, untouched, [3, 5])
    after = untouched.output_dict_per_obj[0]["non_cond_frame_outputs"]
    assert {t: {k: id(v) for k, v in out.items()} for t, out in before.items()} == {
        t: {k: id(v) for k, v in out.items()} for t, out in after.items()
    }
    torch.testing.assert_close(found.recall[0], reading.recall[2][..., : found.recall.shape[3], :])
    assert not model.memory_attention._forward_pre_hooks


def test_the_second_of_two_objects(model: Any) -> None:
    with workbench.attach(model) as wb:
        both = workbench.memory_reading(wb, session(objects=2), [4], number=1)
        alone = session(objects=2)
        for stored in (alone.point_inputs_per_obj, alone.output_dict_per_obj, alone.mask_inputs_per_obj,
                       alone.frames_tracked_per_obj):  # fmt: skip
            stored[0] = stored.pop(1)
        alone.obj_ids, alone._obj_idx_to_id = [2], {0: 2}
        one = workbench.memory_reading(wb, alone, [4])
        first = workbench.memory_reading(wb, session(objects=2), [4])
    torch.testing.assert_close(both.recall, one.recall, atol=1e-6, rtol=0)
    assert not torch.allclose(both.recall, first.recall, atol=1e-3)


def test_a_pixel_recalls_what_its_cell_reads(reading: workbench.MemoryReading, tmp_path: Path) -> None:
    found = reading.recall_of(7, [(3, 60), (40, 20)], of=[0, 6])
    assert found.positions == (12, 6)
    step = reading.frames.index(7)
    slots = [reading.held[step].tolist().index(t) for t in (0, 6)]
    for row, cell in enumerate(found.positions):
        torch.testing.assert_close(found.weights[row].unflatten(1, (2, 16)), reading.recall[step][:, cell, slots])
    assert found.parts == PARTS
    torch.testing.assert_close(found.masses.sum(-1), torch.ones(2, 2))
    assert found.boxes[16 + 6].tolist() == [32, 16, 48, 32]
    again = workbench.MemoryReading.load(reading.save(tmp_path / "memory.safetensors"))
    assert again.table.equals(reading.table)
    torch.testing.assert_close(again.read(7, 6), reading.read(7, 6))
    titles = [view.spec.title for view in views.all_of(again)]
    assert titles == ["Memory timeline", "What frame 8 recalls"]
    assert views.all_of(again)[1].to_png()


def test_frames_that_the_memory_no_longer_holds(reading: workbench.MemoryReading) -> None:
    with pytest.raises(WorkbenchError, match="the memory does not hold frame 1 at frame 7") as caught:
        reading.read(7, 1)
    assert "0, 2, 3, 4, 5, 6" in str(caught.value)
    with pytest.raises(WorkbenchError, match="of frame 2 the memory at frame 7 holds a pointer, and no map"):
        reading.recall_of(7, [(1, 1)], of=[2])
    with pytest.raises(WorkbenchError, match="the memory does not hold frame 8"):
        reading.recall_of(7, [(1, 1)], of=[8])


def test_frames_and_pixels_that_are_none(model: Any, reading: workbench.MemoryReading) -> None:
    with pytest.raises(WorkbenchError, match="nothing was read at frame 0"):
        reading.remembered(0)
    with pytest.raises(WorkbenchError, match=r"pixel \(64, 3\) lies outside"):
        reading.recall_of(7, [(64, 3)])
    with pytest.raises(WorkbenchError, match="no pixel is given"):
        reading.recall_of(7, [])
    with workbench.attach(model) as wb:
        for frames, said in (
            ([9], "the video has 9 frames, and no frame 9"), ([], "no frame is given"), ([0], "frame 0 has a prompt"),
        ):  # fmt: skip
            with pytest.raises(WorkbenchError, match=said):
                workbench.memory_reading(wb, session(), frames)
        with pytest.raises(WorkbenchError, match="frame 1 comes before the first prompt, at frame 2"):
            workbench.memory_reading(wb, session(prompt=2), [1])
        with pytest.raises(CaptureError, match="more than the limit"):
            workbench.memory_reading(wb, session(12), limit=100_000)


def test_sessions_and_models_that_do_not_fit(model: Any) -> None:
    lost = session()
    lost.point_inputs_per_obj[0] = {}
    with workbench.attach(model) as wb:
        with pytest.raises(WorkbenchError, match="has 1 objects, and no object 1"):
            workbench.memory_reading(wb, session(), number=1)
        with pytest.raises(WorkbenchError, match="no frame says which object to follow"):
            workbench.memory_reading(wb, lost)
        with pytest.raises(WorkbenchError, match="is no session with a video"):
            workbench.memory_reading(wb, "video.mp4")
    other = workbench.attach(nn.MultiheadAttention(8, 2))
    with other as wb, pytest.raises(WorkbenchError, match="has no memory_attention"):
        workbench.memory_reading(wb, session())


def test_keys_that_are_not_what_was_stored_are_refused(model: Any) -> None:
    def shuffled(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"memory": kwargs["memory"].roll(1, 0)}

    with workbench.attach(model) as wb, Changes() as changes:
        changes.before(model.memory_attention, shuffled, with_kwargs=True)
        with pytest.raises(CaptureError, match="are not the cells and pointers of frames"):
            workbench.memory_reading(wb, session(), [2])
