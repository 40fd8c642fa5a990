"""SAM2Act's memory bank and finer heat maps, and the videos on which SAM2Long's tree is tried."""

from dataclasses import replace

import pytest
import torch

import workbench
from workbench.errors import WorkbenchError
from workbench.mechanisms.remembering import (
    TRACKERS,
    ConvexUp,
    MemoryBank,
    Mover,
    draw_episodes,
    draw_video,
    follow,
    frame_weights,
    solved,
    train,
)
from workbench.mechanisms.remembering.heatmaps import combined

GRID, WIDTH = (3, 4), 16


def bank(size: int = 3) -> MemoryBank:
    torch.manual_seed(0)
    return MemoryBank(WIDTH, GRID, memory=8, size=size).eval()


def cells(seed: int, views: int = 2, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(views, 12, width, generator=torch.Generator().manual_seed(seed))


def frames(n: int) -> list[torch.Tensor]:
    return [cells(10 + i, width=8) for i in range(n)]


@torch.no_grad()
def test_what_is_read_of_each_frame_sums_to_one_and_is_a_site_of_memory() -> None:
    made = bank()
    with workbench.attach(made) as wb, wb.capture() as cap:
        made(cells(0), frames(3))
    sites = [site for site in cap.sites if site.kind == "memory"]
    assert [site.name for site in sites] == [f"memory_attention.{i}.cross_attn" for i in range(2)]
    for site in sites:
        weights = frame_weights(cap[site].pattern.dense(), 3)
        assert weights.shape == (2, 1, 12, 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 12))


@torch.no_grad()
def test_an_empty_bank_gives_back_what_it_was_given() -> None:
    assert torch.equal(bank()(cells(0), []), cells(0))


@torch.no_grad()
def test_the_order_of_frames_matters_through_how_long_ago_they_were() -> None:
    made, (a, b, c) = bank(), frames(3)
    assert not torch.allclose(made(cells(0), [a, b, c]), made(cells(0), [c, a, b]), atol=1e-4)
    made.ago.zero_()
    torch.testing.assert_close(made(cells(0), [a, b, c]), made(cells(0), [c, a, b]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_frame_that_is_there_twice_shares_its_weight() -> None:
    made, (a, b) = bank(), frames(2)
    made.ago.zero_()
    with workbench.attach(made) as wb, wb.capture() as cap:
        made(cells(0), [a, b, a])
    weights = frame_weights(cap["memory_attention.0.cross_attn"].pattern.dense(), 3)
    torch.testing.assert_close(weights[..., 0], weights[..., 2])


@torch.no_grad()
def test_only_the_newest_frames_are_read() -> None:
    made, many = bank(3), frames(6)
    assert torch.equal(made(cells(0), many), made(cells(0), many[3:]))
    assert not torch.equal(made(cells(0), many), made(cells(0), many[2:5]))


def test_views_do_not_mix() -> None:
    made, x, kept = bank(), cells(0).requires_grad_(), [one.requires_grad_() for one in frames(2)]
    made(x, kept)[0].sum().backward()
    for one in (x, *kept):
        assert one.grad is not None
        assert float(one.grad[0].abs().sum()) > 0
        assert float(one.grad[1].abs().sum()) == 0


@torch.no_grad()
def test_a_cell_that_is_like_the_goal_is_recalled_from_its_frame() -> None:
    """A planted key: queries and keys along one direction, which only cell 5 of the frame two steps ago has."""
    made = bank()
    layer = made.memory_attention[0].cross_attn
    for one in (layer.q_proj, layer.k_proj):
        one.weight.zero_()
        one.bias.zero_()
    layer.q_proj.bias.fill_(3.0)
    layer.k_proj.weight[:, 0] = 3.0
    layer.angles.zero_()
    kept = [torch.zeros(2, 12, 8) for _ in range(3)]
    kept[1][:, 5, 0] = 2.0
    with workbench.attach(made) as wb, wb.capture() as cap:
        made(cells(0), kept)
    weights = cap["memory_attention.0.cross_attn"].pattern.dense()
    assert float(frame_weights(weights, 3)[..., 1].min()) > 0.99
    assert int(weights[0, 0, 0].argmax()) == 12 + 5


@torch.no_grad()
def test_what_was_decided_is_written_where_it_was() -> None:
    made, heat = bank(), torch.full((2, 6, 8), -9.0)
    made.fuse.weight.zero_()
    heat[:, 2:4, 4:6] = 9.0  # cell (1, 2)
    changed = (made.written(cells(0), heat) - made.written(cells(0), torch.full((2, 6, 8), -9.0))).abs().sum(-1)
    assert changed.argmax(1).tolist() == [6, 6]
    assert int((changed > 1e-6).sum()) == 2


@torch.no_grad()
def test_finer_pixels_are_convex_combinations_of_nine() -> None:
    torch.manual_seed(0)
    up, x = ConvexUp(5, 2), torch.randn(2, 5, 4, 3)
    shares, values = up.shares(x), up.content(x)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 4, 4, 3))
    made = up(x)
    assert made.shape == (2, 2, 8, 6)
    near = torch.nn.functional.unfold(torch.nn.functional.pad(values, (1, 1, 1, 1), mode="replicate"), 3)
    near = near.view(2, 2, 9, 4, 3)
    for bound, sign in ((near.amax(2), 1), (near.amin(2), -1)):
        wide = bound.repeat_interleave(2, -1).repeat_interleave(2, -2)
        assert bool((sign * (wide - made) >= -1e-6).all())
    up.weights.weight.zero_()
    up.weights.bias.zero_()
    mean = near.mean(2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(up(x), mean)
    one = torch.zeros(1, 9, 4, 2, 2)
    one[:, 4] = 1.0  # the middle alone
    torch.testing.assert_close(
        combined(torch.arange(4.0).view(1, 1, 2, 2), one)[0, 0, ::2, ::2], torch.arange(4.0).view(2, 2)
    )


def test_without_skips_the_picture_does_not_reach_the_finer_map() -> None:
    """What comes from the stem past the patches: none of it without skips."""
    frame = draw_episodes(2, 0).frames[:, 0]
    for arm, reached in (("no skips", False), ("memory", True)):
        torch.manual_seed(0)
        model = Mover(arm).eval()
        with torch.no_grad():
            model.patch.weight.zero_()
        model.step(frame, 0, []).sum().backward()
        grad = model.stem.weight.grad
        assert (grad is not None and float(grad.abs().sum()) > 0) == reached


def test_episodes_hide_the_pad_that_the_block_was_on() -> None:
    drawn = draw_episodes(30, 1)
    assert torch.equal(drawn.goals[:, 0], drawn.goals[:, 2])
    for i in range(30):
        x, y = (drawn.goals[i, 0] - 0.5).round().long().tolist()
        assert float(drawn.frames[i, 0, 1, y, x]) > 0.5  # the block is there
        assert float(drawn.frames[i, 2, 1, y, x]) < 0.5  # and no more
    model = train("no memory", steps=2)
    assert set(solved(model, drawn)) == {"block", "button", "put back", "all"}
    with pytest.raises(WorkbenchError, match="no arm"):
        Mover("none")
    with pytest.raises(WorkbenchError, match="remembers nothing"):
        MemoryBank(8, (2, 2), size=0)
    with pytest.raises(WorkbenchError, match="multiple of 4"):
        MemoryBank(6, (2, 2))


@pytest.mark.parametrize("tracker", TRACKERS)
def test_what_is_never_hidden_and_looks_like_nothing_else_is_followed(
    tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.mechanisms.remembering import occlusion

    for name in ("_DRIFT", "_ALIKE", "_NOISE"):
        monkeypatch.setattr(occlusion, name, 0.0)
    for seed in range(5):
        video = draw_video(seed)
        assert not video.visible[4:, 0].all()
        tree, rate = follow(replace(video, visible=torch.ones_like(video.visible)), tracker)
        assert rate == 1.0
        assert tree.paths == (3 if tracker == "tree" else 1)
