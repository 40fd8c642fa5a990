"""Attention profiles: closed forms, a naive definition in float64, grids of several models, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import Tensor

import workbench
from support.tiny import ZOO, make
from support.unavailable import unavailable
from workbench import AttentionProfile, attention_profile
from workbench.analysis.profile.places import Places, bins
from workbench.analysis.profile.sums import _KEYS, _QUERIES
from workbench.capture.capture import Capture
from workbench.capture.site_capture import Forward, SiteCapture
from workbench.errors import CaptureError, WorkbenchError
from workbench.hooks.sites import Site, Sites
from workbench.kernels.masks import Mask, causal
from workbench.kernels.patterns import DensePattern
from workbench.storage import files


def captured(weights: Tensor, mask: Mask | None = None, kind: Any = "self", **provenance: Any) -> Capture:
    """A capture of one site with this pattern [batch, head, query, key]."""
    site = Site("attn", 0, kind, weights.shape[1], weights.shape[1], 4)
    shape = tuple(weights.shape)
    held = SiteCapture(site, shape, {}, "none", lazy=DensePattern(weights, mask))
    return Capture([Forward(0, {"attn": held})], Sites([site]), dict(provenance))


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * scores).softmax(-1)


def chebyshev(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Hops and Euclidean distances [patch, patch], cell by cell."""
    at = [(r, c) for r in range(rows) for c in range(columns)]
    hops = [[max(abs(a - c), abs(b - d)) for c, d in at] for a, b in at]
    far = [[math.hypot(a - c, b - d) for c, d in at] for a, b in at]
    return torch.tensor(hops), torch.tensor(far, dtype=torch.float64)


def test_uniform_attention_on_a_grid() -> None:
    g = 5
    n = g * g
    found = attention_profile(captured(torch.full((1, 2, n, n), 1 / n, dtype=torch.float64)), (g, g))
    pairs = torch.zeros(g, dtype=torch.float64)
    for dx in range(-g + 1, g):
        for dy in range(-g + 1, g):
            pairs[max(abs(dx), abs(dy))] += (g - abs(dx)) * (g - abs(dy))
    torch.testing.assert_close(found.mass[0], pairs / n**2)
    assert found.mass.sum(1).tolist() == pytest.approx([1, 1])
    assert found.of("entropy").tolist() == pytest.approx([math.log(n)] * 2)
    assert found.of("normalised_entropy").tolist() == pytest.approx([1, 1])
    assert found.density[0].tolist() == pytest.approx([1 / n] * g)
    assert found.of("mean_distance")[0] == pytest.approx(chebyshev(g, g)[1].mean().item())
    assert found.offsets.shape == (2, 2 * g - 1, 2 * g - 1)
    assert found.offsets.sum((1, 2)).tolist() == pytest.approx([1, 1])


def test_identity_and_shift_on_a_grid() -> None:
    rows, columns, (dy, dx) = 4, 5, (1, -2)
    n = rows * columns
    shift = torch.zeros(n, n, dtype=torch.float64)
    inside = []
    for r in range(rows):
        for c in range(columns):
            if 0 <= r + dy < rows and 0 <= c + dx < columns:
                shift[r * columns + c, (r + dy) * columns + c + dx] = 1
                inside.append(r * columns + c)
    weights = torch.stack([torch.eye(n, dtype=torch.float64), shift])[None]
    found = attention_profile(captured(weights), (rows, columns))
    assert found.mass[0].tolist() == [1, 0, 0, 0, 0]
    assert found.of("entropy")[0] == 0
    assert found.of("mean_distance")[0] == 0
    assert found.mass[1, 2].item() == pytest.approx(len(inside) / n)
    assert found.mass[1, [0, 1, 3, 4]].tolist() == [0, 0, 0, 0]
    assert found.of("mean_distance")[1] == pytest.approx(math.hypot(dy, dx))
    assert found.of("distance_spread")[1] == pytest.approx(0, abs=1e-6)
    where = found.offsets[1].nonzero().tolist()
    assert where == [[rows - 1 + dy, columns - 1 + dx]]


def test_causal_uniform_attention_has_the_closed_forms_of_xue_et_al() -> None:
    n = 8
    weights = torch.ones(n, n, dtype=torch.float64).tril()
    weights = (weights / weights.sum(1, keepdim=True)).expand(1, 3, n, n)
    found = attention_profile(captured(weights, causal(n)))
    assert found.kind == "text"
    assert found.of("sink")[0] == pytest.approx(0.33973, abs=1e-5)
    assert found.of("total_entropy")[0] == pytest.approx(10.6046, abs=1e-4)
    assert found.of("concentration")[0] == pytest.approx(1.6486, abs=1e-4)
    local = [found.of(f"local_{k}")[0].item() for k in range(3)]
    assert local == pytest.approx([0.3397, 0.2454, 0.2030], abs=1e-4)
    assert found.of("head_diversity").tolist() == [0, 0, 0]
    assert found.of("normalised_entropy")[0] == pytest.approx(1)
    assert found.of("cls_to_patches").isnan().all()


def test_head_diversity_is_the_spread_across_heads_over_causal_cells() -> None:
    n = 7
    weights = random_rows(2, 3, n, n).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    found = attention_profile(captured(weights, causal(n)))
    cells = torch.ones(n, n).tril() > 0
    wanted = 2 / (n * (1 + n)) * weights.std(1, correction=0)[:, cells].sum(-1)
    at = found.measures.index("head_diversity")
    torch.testing.assert_close(found.examples[:, :, at], wanted[:, None].expand(-1, 3))


@pytest.mark.parametrize("sink", ["separate", "drop"])
def test_images_agree_with_the_definitions(sink: Any) -> None:
    rows, columns, prefix = 3, 4, 2
    n = rows * columns
    weights = random_rows(3, 2, n + prefix, n + prefix)
    found = attention_profile(captured(weights), (rows, columns), sink)
    assert found.prefix == prefix
    a = weights[:, :, prefix:, prefix:]
    w = a / a.sum(-1, keepdim=True) if sink == "drop" else a
    hops, far = chebyshev(rows, columns)
    for k in range(columns):
        assert found.mass_examples[:, :, k].flatten().tolist() == pytest.approx(
            ((w * (hops == k)).sum((-1, -2)) / n).flatten().tolist()
        )
        torch.testing.assert_close(found.density[:, k], w[:, :, hops == k].mean((0, 2)))
    row = w if sink == "drop" else weights[:, :, prefix:]
    mean = (w * far).sum((-1, -2)) / w.sum((-1, -2))
    wanted = {
        "mean_distance": mean,
        "distance_spread": ((w * far**2).sum((-1, -2)) / w.sum((-1, -2)) - mean**2).sqrt(),
        "entropy": -(row * row.log()).sum(-1).mean(-1),
        "normalised_entropy": -(row * row.log()).sum(-1).mean(-1) / math.log(row.shape[-1]),
        "total_entropy": -(weights * weights.log())[:, :, prefix:].sum((-1, -2)),
        "concentration": (weights[:, :, prefix:] ** 2).sum((-1, -2)).sqrt(),
        "head_diversity": weights[:, :, prefix:].std(1, correction=0).mean((-1, -2))[:, None].expand(3, 2),
        "sink": weights[:, :, prefix:, :prefix].sum(-1).mean(-1),
        "patches_to_cls": weights[:, :, prefix:, 0].mean(-1),
        "cls_to_patches": weights[:, :, 0, prefix:].sum(-1),
        **{f"local_{b}": a.diagonal(-b, -2, -1).mean(-1) for b in range(4)},
    }
    assert set(wanted) == set(found.measures)
    for i, name in enumerate(found.measures):
        torch.testing.assert_close(found.examples[..., i], wanted[name], msg=name)
    if sink == "separate":
        torch.testing.assert_close(found.mass.sum(1) + found.of("sink"), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("sink", ["separate", "keep", "drop"])
def test_padded_text_agrees_with_the_definitions(sink: Any) -> None:
    n, lengths = 11, (11, 8)
    seen = torch.zeros(2, 1, n, n, dtype=torch.bool)
    for b, length in enumerate(lengths):  # padded on the left
        seen[b, 0, :, n - length :] = True
    seen &= torch.ones(n, n, dtype=torch.bool).tril()
    weights = random_rows(2, 2, n, n) * seen
    weights = torch.nan_to_num(weights / weights.sum(-1, keepdim=True))
    found = attention_profile(captured(weights, Mask(n, n, tensor=seen)), sink=sink)
    hops = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    for b, length in enumerate(lengths):
        first = n - length
        a = weights[b, :, first:, first:]
        w = a.clone()
        if sink != "keep":
            w[..., 0] = 0
        if sink == "drop":
            w = torch.nan_to_num(w / w.sum(-1, keepdim=True))
        near = hops[first:, first:]
        for i, (low, high) in enumerate(found.bins):
            part = (w * ((near >= low) & (near <= high))).sum((-1, -2)) / length
            torch.testing.assert_close(found.mass_examples[b, :, i], part)
        values = dict(zip(found.measures, found.examples[b].unbind(-1), strict=True))
        torch.testing.assert_close(values["sink"], a[..., 0].mean(-1))
        torch.testing.assert_close(values["mean_distance"], (w * near).sum((-1, -2)) / w.sum((-1, -2)))
        torch.testing.assert_close(values["local_1"], a.diagonal(-1, -2, -1).sum(-1) / (length - 1))
        entropy = -torch.xlogy(w, w).sum(-1) if sink == "drop" else -torch.xlogy(a, a).sum(-1)
        counted = entropy[:, 1:] if sink == "drop" else entropy
        torch.testing.assert_close(values["entropy"], counted.sum(-1) / length)


def test_measures_that_do_not_apply_to_an_example_are_left_out_of_its_means() -> None:
    n, lengths = 5, (5, 1, 4, 5)  # a text of one token has only its sink, and no token before it
    seen = torch.ones(4, 1, n, n, dtype=torch.bool).tril()
    for b, length in enumerate(lengths):
        seen[b, :, :, : n - length] = False
    weights = random_rows(4, 2, n, n) * seen
    weights = torch.nan_to_num(weights / weights.sum(-1, keepdim=True))
    found = attention_profile(captured(weights, Mask(n, n, tensor=seen)))
    each = found.examples[..., found.measures.index("local_3")]
    assert each.isnan()[:, 0].tolist() == [False, True, False, False]
    known = each[[0, 2, 3]]
    torch.testing.assert_close(found.of("local_3"), known.mean(0))
    torch.testing.assert_close(found.spread("local_3"), known.std(0))
    wide = 4.302653 * known.std(0) / 3**0.5  # Student's t of three
    torch.testing.assert_close(found.interval("local_3").T, torch.stack([known.mean(0) - wide, known.mean(0) + wide]))
    assert found.interval("cls_to_patches").isnan().all()


def test_tiles_make_no_difference() -> None:
    n = _KEYS + 37
    assert n > 2 * _QUERIES
    weights = random_rows(1, 2, n, n).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    found = attention_profile(captured(weights, causal(n)), sink="keep")
    distances = (torch.arange(n)[:, None] - torch.arange(n)).double().abs()
    torch.testing.assert_close(found.of("mean_distance"), (weights[0] * distances).sum((-1, -2)) / n)
    for i, (low, high) in enumerate(found.bins):
        part = weights[0] * ((distances >= low) & (distances <= high))
        torch.testing.assert_close(found.mass[:, i], part.sum((-1, -2)) / n)
    middle = found.offsets.shape[-1] // 2
    torch.testing.assert_close(found.offsets[:, 0, middle - 2], weights[0].diagonal(-2, -2, -1).sum(-1) / n)


def test_bins_cover_every_distance_once() -> None:
    for farthest in range(70):
        for text in (True, False):
            covered = [k for low, high in bins(farthest, text) for k in range(low, high + 1)]
            assert covered == list(range(farthest + 1))


def test_places_without_square_grids() -> None:
    places = Places(2, 3, prefix=1)
    assert places.length == 7
    index = places.offsets(slice(1, 7), slice(1, 7))
    assert (places.hops()[index] == chebyshev(2, 3)[0]).all()
    torch.testing.assert_close(places.distances()[index], chebyshev(2, 3)[1])


# Models


_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 32}


def _vision_models() -> dict[str, tuple[Any, tuple[int, int], int]]:
    wide = {**_SMALL, "image_size": 24, "patch_size": 8}
    return {
        "vit": (hf.ViTModel(hf.ViTConfig(**_SMALL, image_size=(24, 16), patch_size=8)), (3, 2), 1),
        "deit": (hf.DeiTModel(hf.DeiTConfig(**wide)), (3, 3), 2),
        "dinov2": (
            hf.Dinov2Model(hf.Dinov2Config(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, mlp_ratio=2,
                                           image_size=21, patch_size=7)), (3, 3), 1,
        ),
        "registers": (
            hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(
                num_hidden_layers=2, num_attention_heads=4, hidden_size=32, mlp_ratio=2, image_size=21, patch_size=7,
                num_register_tokens=3)), (3, 3), 4,
        ),
        "siglip": (hf.SiglipVisionModel(hf.SiglipVisionConfig(**wide, vision_use_head=False)), (3, 3), 0),
        "clip": (hf.CLIPVisionModel(hf.CLIPVisionConfig(**wide)), (3, 3), 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "registers", "siglip", "clip"])
def test_grid_and_prefix_are_found(name: str) -> None:
    model, grid, prefix = _vision_models()[name]
    model.eval()
    size = model.config.image_size
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    with workbench.attach(model) as wb, wb.capture(statistics=[]) as cap:
        model(pixel_values=torch.randn(2, 3, high, wide))
    found = attention_profile(cap)
    assert (found.kind, found.grid, found.prefix) == ("image", grid, prefix)
    assert found.labels[:5] == ("L0H0", "L0H1", "L0H2", "L0H3", "L1H0")
    dense = cap[1].pattern.dense().double()
    torch.testing.assert_close(found.of("sink")[4:], dense[:, :, prefix:, :prefix].sum(-1).mean((0, 2)))
    assert bool(found.of("cls_to_patches").isnan().all()) == (prefix == 0)


def test_grid_of_timm_is_found() -> None:
    one = next(f for f in ZOO if f.name.startswith("timm"))
    try:
        model = make(one)
    except ModuleNotFoundError as error:
        unavailable(str(error))
    with workbench.attach(model) as wb, wb.capture() as cap:
        model(**one.inputs())
    found = attention_profile(cap)
    assert (found.grid, found.prefix) == ((4, 4), 1)


def test_text_model_with_several_forwards_of_different_length() -> None:
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=32)).eval()
    with workbench.attach(model) as wb, wb.capture() as cap:
        model(torch.randint(40, (2, 9)))
        model(torch.randint(40, (1, 20)))
    found = attention_profile(cap)
    assert found.examples.shape[:2] == (3, 4)
    assert found.grid == (1, 20)
    dense = [call[1].pattern.dense().double() for call in cap.calls]
    sinks = torch.cat([d[..., 0].mean(-1) for d in dense])
    at = found.measures.index("sink")
    torch.testing.assert_close(found.examples[:, 2:, at], sinks)
    torch.testing.assert_close(found.spread("sink")[2:], sinks.std(0))
    ends = found.interval("sink")
    assert (ends[:, 0] <= found.of("sink")).all()
    assert (ends[:, 1] >= found.of("sink")).all()
    torch.testing.assert_close(ends[:, 1] - ends[:, 0], 2 * 4.302653 * found.spread("sink") / 3**0.5)


# Bad input, files, repetition


def test_bad_grids_are_refused() -> None:
    cap = captured(random_rows(1, 2, 10, 10))
    with pytest.raises(WorkbenchError, match=r"4 x 4 patches does not match 10 tokens"):
        attention_profile(cap, (4, 4))
    with pytest.raises(WorkbenchError, match=r"3 x 3 patches and 2 before them does not match"):
        attention_profile(cap, (3, 3), prefix=2)
    with pytest.raises(WorkbenchError, match="two numbers"):
        attention_profile(cap, (3, 0))
    with pytest.raises(WorkbenchError, match='not "square"'):
        attention_profile(cap, "square")  # type: ignore[arg-type]
    with pytest.raises(WorkbenchError, match="no place on the grid"):
        attention_profile(cap, (3, 3), "keep")
    told = captured(random_rows(1, 2, 10, 10), patches={"grid": [4, 4], "prefix": 1})
    with pytest.raises(WorkbenchError, match="does not match 10 tokens") as caught:
        attention_profile(told)
    assert "tokens" in (caught.value.hint or "")
    assert attention_profile(told, "tokens").kind == "text"


def test_bad_arguments_and_captures_are_refused() -> None:
    cap = captured(random_rows(1, 2, 6, 6))
    with pytest.raises(WorkbenchError, match="sink is one of"):
        attention_profile(cap, sink="off")  # type: ignore[arg-type]
    with pytest.raises(WorkbenchError, match="level"):
        attention_profile(cap, level=2)
    with pytest.raises(CaptureError, match="as many queries as keys"):
        attention_profile(captured(random_rows(1, 2, 1, 6)))
    with pytest.raises(CaptureError, match="no self-attention"):
        attention_profile(captured(random_rows(1, 2, 6, 6), kind="cross"))
    with pytest.raises(CaptureError, match="kind cross"):
        attention_profile(captured(random_rows(1, 2, 6, 6), kind="cross"), sites=[0])
    broken = random_rows(1, 2, 6, 6)
    broken[0, 0, 2, 2] = torch.nan
    with pytest.raises(CaptureError, match="weights"):
        attention_profile(captured(broken))
    found = attention_profile(cap)
    with pytest.raises(WorkbenchError, match='no "entropi"'):
        found.of("entropi")
    with pytest.raises(WorkbenchError, match='no head "L3H0"'):
        found.row("L3H0")


def digest(path: Path) -> str:
    """The digest in a file; that the file has these bytes is checked when it is read."""
    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["sha256"])


def test_profile_is_saved_and_repeats_to_the_bit(tmp_path: Path) -> None:
    cap = captured(random_rows(4, 2, 10, 10))
    found, again = (attention_profile(cap, (3, 3)) for _ in range(2))
    assert digest(found.save(tmp_path / "a")) == digest(again.save(tmp_path / "b"))
    loaded = AttentionProfile.load(tmp_path / "a")
    assert loaded.bins == found.bins
    header, tensors = files.read(tmp_path / "a", found.form)  # an older file says how its intervals were drawn
    older = {"fields": dict(header.value["fields"]) | {"seed": 3, "n_bootstrap": 1000}}
    files.write(tmp_path / "older", found.form, older, tensors)
    assert torch.equal(AttentionProfile.load(tmp_path / "older").examples, found.examples)
    assert torch.equal(loaded.interval("entropy"), found.interval("entropy"))
    assert torch.equal(loaded.offsets, found.offsets)
    table, trend = found.table, found.trend
    assert list(table["label"]) == ["L0H0", "L0H1"]
    assert table["mass_1"].tolist() == found.mass[:, 1].tolist()
    part = trend[(trend["measure"] == "entropy")].iloc[0]
    assert part["mean"] == pytest.approx(found.of("entropy").mean().item())
    one = attention_profile(captured(random_rows(1, 2, 10, 10)), (3, 3))
    assert one.interval("entropy").isnan().all()
    assert one.spread("entropy").isnan().all()
