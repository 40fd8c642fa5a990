"""SAM2Long's tree around a random `Sam2Video`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.trackers import session, tracker
from workbench import views
from workbench.analysis.memory import key_factors, track_long
from workbench.errors import WorkbenchError
from workbench.hooks.changes import Changes

GREEDY = {"paths": 1, "floor": -1, "objects": False, "ramp": (1, 1)}


@pytest.fixture(scope="module")
def model() -> Any:
    return tracker()


def hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def test_one_pathway_without_its_rules_is_the_model_itself(model: Any) -> None:
    video, own = session(7), session(7)
    found = track_long(model, video, **GREEDY)
    with torch.no_grad():
        masks = [model(own, frame_idx=t).pred_masks[0, 0] for t in range(7)]
    assert torch.equal(found.masks, torch.stack(masks[1:]))
    assert found.remembered == ((0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 2, 3, 4), (0, 3, 4, 5))
    assert found.frames == (1, 2, 3, 4, 5, 6)
    assert not hooks(model)
    assert video.output_dict_per_obj[0] == {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}


def test_pathways_part_where_nothing_is_certain(model: Any) -> None:
    unsure = track_long(model, session(6), sure=1e9)
    last = [i for i, frame in enumerate(unsure.tree.frames) if frame == 4 and unsure.tree.kept[i] >= 0]
    assert len({tuple(unsure.tree.masks[i] for i in unsure.tree.history(end)) for end in last}) == 3
    assert unsure.tree.scores[unsure.tree.best[-1]] >= max(
        track_long(model, session(6), ramp=(0.95, 1.05), paths=1).tree.scores[-3:]
    )
    sure = track_long(model, session(6), sure=0)
    last = [i for i, frame in enumerate(sure.tree.frames) if frame == 4 and sure.tree.kept[i] >= 0]
    assert len({tuple(sure.tree.masks[i] for i in sure.tree.history(end)) for end in last}) == 1
    assert views.all_of(unsure.tree)[0].to_png()


def test_without_a_good_mask_the_prompt_and_the_last_frame_are_remembered(model: Any) -> None:
    found = track_long(model, session(6), floor=2.0, paths=1)
    assert found.remembered == ((0,), (0, 1), (0, 2), (0, 3), (0, 4))


def test_keys_and_not_values_are_multiplied_by_what_is_seen_of_the_object(model: Any) -> None:
    def read(**more: Any) -> tuple[list[Tensor], list[Tensor]]:
        keys, values = list[Tensor](), list[Tensor]()
        layer = model.memory_attention.layers[0].cross_attn_image
        with Changes() as changes:
            changes.before(layer.k_proj, lambda module, args: keys.append(args[0][0, 0]))
            changes.before(layer.v_proj, lambda module, args: values.append(args[0][0, 0]))
            track_long(model, session(4), **(GREEDY | more))
        return keys, values

    (plain, same), (keys, values) = read(), read(ramp=(0.5, 1.5))
    assert torch.equal(plain[0], keys[0])  # one frame is remembered: nothing to compare
    assert torch.equal(same[1], values[1])
    ratio = (keys[1] / plain[1]).nanmedian(-1).values
    logit = track_long(model, session(4), **GREEDY).tree.logits[0]
    frames = key_factors([10.0, logit], 0.5, 1.5)
    wanted = torch.cat([frames.repeat_interleave(16), frames.repeat_interleave(2)])
    torch.testing.assert_close(ratio, wanted, atol=1e-4, rtol=0)


def test_what_cannot_be_tracked_is_refused(model: Any) -> None:
    two = session(5)
    two.point_inputs_per_obj[0][3] = two.point_inputs_per_obj[0][0]
    for video, more, said in (
        (session(5), {"n_frames": 5}, "4 frames behind the prompt, and not 5"),
        (session(5, prompt=4), {}, "0 frames behind the prompt"),
        (two, {}, r"frames \[0, 3\] have prompts"),
        (session(5), {"paths": 0}, "make no tree"),
    ):
        with pytest.raises(WorkbenchError, match=said):
            track_long(model, video, **more)
    with pytest.raises(WorkbenchError, match="training mode"):
        workbench.track_long(model.train(), session(5))
    model.eval()
