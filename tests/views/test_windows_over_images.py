"""Windows put together over an image are what each patch is made of, as gradients show; seams are where they meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import workbench
from support.browser import WatchedPage
from support.unavailable import unavailable
from support.vision import timm
from workbench import ReportError, mechanisms
from workbench.mechanisms import Place
from workbench.views import Windows, image_attention
from workbench.views.image_attention.windows import place


def _swin(size: int = 40) -> nn.Module:
    """Patches of 10 × 10, filled up to 12 × 12, in windows of 3; then of 5 × 5."""
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=size, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=3
    )
    return transformers.SwinModel(config).eval()


def _reached(give: Any, x: Tensor) -> Tensor:
    """[patch, patch] bool: which patches of x move each patch of what is given."""
    x = x.detach().requires_grad_()
    y = give(x)
    rows = []
    for i in range(y.shape[1]):
        (gradient,) = torch.autograd.grad(y[0, i].square().sum(), x, retain_graph=True)
        rows.append(gradient[0].abs().sum(-1))
    size = torch.stack(rows)
    return size > 1e-20 * size.max()  # what a mask of −100 leaves is nothing


def _pixels(size: int = 40, n: int = 2) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def _captured(model: nn.Module, *given: Tensor) -> workbench.Capture:
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture([], values=True) as cap:
        model(*given)
    return cap


@pytest.mark.parametrize(("size", "side"), [(40, 10), (36, 9)], ids=["filled up", "whole"])
def test_swin_s_windows_lie_where_gradients_say(size: int, side: int) -> None:
    model = _swin(size).double()
    pixels = _pixels(size).double()
    seen: list[Tensor] = []
    blocks = model.encoder.layers[0].blocks  # type: ignore[union-attr]
    for block in blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cap = _captured(model, pixels)
    for i, shift in enumerate((0, 1)):
        found = place(cap[i], Windows(grid=(side, side)))
        assert found.grid == (side, side)
        want = [at + shift for at in range(0, 12, 3) if 0 < at + shift < side]
        assert found.seams == (want, want)
        dense = found.pattern.dense()
        assert dense.shape == (2, 2, side**2, side**2)
        moved = _reached(lambda x, i=i: blocks[i](x, (side, side))[0], seen[i][:1])  # type: ignore[index]
        assert torch.equal((dense[0] > 1e-20).any(0) | torch.eye(side**2, dtype=torch.bool), moved)
        if side == 9 or shift:
            torch.testing.assert_close(dense.sum(-1), torch.ones(2, 2, side**2, dtype=torch.float64))
        else:  # some of the weight is on what fills up
            assert bool((dense.sum(-1) <= 1 + 1e-9).all())
            assert float(dense[0, 0, -1].sum()) < 1 - 1e-3
    assert place(cap[1], Windows(grid=(side, side), shift=1)).seams == found.seams


def test_windows_of_our_own_are_put_together_image_by_image() -> None:
    torch.manual_seed(0)
    grid = (5, 7)
    layer = mechanisms.get("davit-windows").build(Place(16, 2, 35, causal=False, grid=grid), window=3).double()
    x = torch.randn(3, 35, 16, dtype=torch.float64)
    cap = _captured(layer, x)
    found = place(cap[0], Windows(grid=grid))
    assert found.seams == ([3], [3, 6])
    assert torch.equal((found.pattern.dense()[0] > 0).any(0), _reached(layer, x[:1]))
    for i in range(3):  # examples stay apart, in their order
        alone = place(_captured(layer, x[i : i + 1])[0], Windows(grid=grid)).pattern
        torch.testing.assert_close(found.pattern.dense()[i], alone.dense()[0])


class _Halo(nn.Module):
    """Blocks of 2 × 2 patches read one patch around them; what lies outside takes part as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q, self.kv, self.o = nn.Linear(8, 8, bias=False), nn.Linear(8, 16, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        image = x.mT.unflatten(2, (4, 6))
        blocks, around = (
            F.unfold(image, size, stride=2, padding=(size - 2) // 2)
            .unflatten(1, (8, -1))
            .permute(0, 3, 2, 1)
            .flatten(0, 1)
            for size in (2, 4)
        )
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (self.q(blocks), *self.kv(around).chunk(2, -1)))
        y = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = y.unflatten(0, (len(x), 2, 3)).unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return out.flatten(1, 2)


def test_windows_with_a_halo_reach_over_their_seams() -> None:
    torch.manual_seed(0)
    layer = _Halo().double()
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    cap = _captured(layer, x)
    assert cap[0].site.kind == "halo"
    found = place(cap[0], Windows(grid=(4, 6)))
    assert found.seams == ([2], [2, 4])
    assert torch.equal((found.pattern.dense()[0] > 0).any(0), _reached(layer, x[:1]))
    whole = mechanisms.get("halo").build(Place(16, 2, 36, causal=False, grid=(6, 6)), block=3)
    cap = _captured(whole, torch.randn(2, 36, 16))
    assert place(cap[0], Windows(window=3)).seams == ([3], [3])
    assert place(cap[0], Windows(window=3)).pattern.shape == (2, 2, 36, 36)


def test_a_view_has_the_map_of_the_whole_image_and_its_seams(tmp_path: Path) -> None:
    model, pixels = _swin(36), _pixels(36)
    cap = _captured(model, pixels)
    view = image_attention(cap, pixels, windows=Windows())
    facts = view.spec.facts
    assert facts["grid"] == [9, 9]
    assert [each["seams"] for each in facts["heads"]] == [[[3, 6], [3, 6]]] * 2 + [[[1, 4, 7], [1, 4, 7]]] * 2
    dense = place(cap[1], Windows()).pattern.dense()
    held = (view.spec.blocks["weights"].astype(np.float64) / 255) ** 2
    assert np.abs(held[:, 2:] - dense.numpy()).max() < 0.004
    assert "1 site of another grid is left out" in " ".join(view.spec.notes)
    assert "Lines are where windows meet" in view.spec.caption
    assert Path(view.to_png(tmp_path / "windows.png")).stat().st_size > 0


def test_the_shift_of_timm_s_windows_is_found() -> None:
    try:
        made = timm().models.swin_transformer.SwinTransformer
    except ModuleNotFoundError as error:
        unavailable(str(error))
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    cap = _captured(made(num_classes=3, **sizes).eval(), _pixels(48))
    assert [place(cap[i], Windows()).seams for i in range(2)] == [([4, 8], [4, 8]), ([2, 6, 10], [2, 6, 10])]


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        (Windows(grid=(9, 12)), "9 × 12 patches are 12 windows of 3, and it has 9"),
        (Windows(window=2), "windows of 2 × 2 patches do not have 9 queries and 9 keys"),
        (Windows(shift=2), "shifted by 2 and 2 hide other keys than these do"),
    ],
)
def test_windows_that_are_not_the_model_s_are_refused(windows: Windows, said: str) -> None:
    model, pixels = _swin(36), _pixels(36)
    cap = _captured(model, pixels)
    with pytest.raises(ReportError, match=said):
        image_attention(cap, pixels, windows=windows)
    with pytest.raises(ReportError, match="windows tell where patches are"):
        image_attention(cap, pixels, windows=Windows(), grid=(9, 9))
    with pytest.raises(ReportError, match="has another grid than"):
        image_attention(cap, pixels, windows=Windows(), sites=[1, 2])
    plain = mechanisms.get("sqa").build(Place(8, 2, 16, causal=False), "mha")
    with pytest.raises(ReportError, match="does not show its windows"):
        place(_captured(plain, torch.randn(1, 16, 8))[0], Windows())


@pytest.mark.browser
def test_seams_are_drawn(page: WatchedPage, tmp_path: Path) -> None:
    model, pixels = _swin(36), _pixels(36)
    view = image_attention(_captured(model, pixels), pixels, windows=Windows())
    page.page.goto(Path(view.to_html(tmp_path / "windows.html")).as_uri() + "#L0H0,q=0,x=0")
    page.page.wait_for_selector("html[data-ready]")
    count = """() => {
        const canvas = document.querySelector(".detail canvas"), ink = canvas.getContext("2d");
        const {data} = ink.getImageData(0, Math.round(canvas.height / 2), canvas.width, 1);
        const bright = [];
        for (let x = 0; x < canvas.width; x++)
            if (data[4 * x] > 190 && data[4 * x + 1] > 190 && data[4 * x + 2] > 190) bright.push(9 * x / canvas.width);
        return bright;
    }"""
    for address, want in (("#L0H0,x=0", (3, 6)), ("#L1H0,x=0", (1, 4, 7))):
        page.page.evaluate("hash => { location.hash = hash; }", address)
        page.page.get_by_label("Show").select_option("both")
        found = sorted({round(at) for at in page.page.evaluate(count)})
        assert found == list(want)
    page.assert_clean()
