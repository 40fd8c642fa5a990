"""The pattern atlas: pooling, names of planted patterns, planted families told apart, content, saving, refusals."""

from __future__ import annotations

from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import workbench
from workbench import PatternAtlas, pattern_atlas
from workbench.analysis.atlas.clusters import components, k_means
from workbench.analysis.atlas.names import NAMES, dependence, suggest
from workbench.analysis.atlas.pooling import SCORES, overlaps, pool
from workbench.analysis.profile.places import Places
from workbench.capture.capture import Capture
from workbench.capture.site_capture import Forward, SiteCapture
from workbench.errors import FormatError, WorkbenchError
from workbench.hooks.sites import Site, Sites
from workbench.kernels.masks import Mask, causal
from workbench.kernels.patterns import DensePattern
from workbench.models import examples, load

N = 40
FAMILIES = ("diagonal", "stripe", "block", "uniform", "content")


def captured(weights: Tensor, mask: Mask | None = None) -> Capture:
    """A capture of one site with this pattern [batch, head, query, key]."""
    site = Site("attn", 0, "self", weights.shape[1], weights.shape[1], 4)
    held = SiteCapture(site, tuple(weights.shape), {}, "none", lazy=DensePattern(weights, mask))  # type: ignore[arg-type]
    return Capture([Forward(0, {"attn": held})], Sites([site]), {})


def rand_index(a: list[int], b: list[int]) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985), by its definition over pairs."""
    both = sum(comb(sum((x, y) == (i, j) for x, y in zip(a, b, strict=True)), 2) for i in set(a) for j in set(b))
    first, second = (sum(comb(labels.count(i), 2) for i in set(labels)) for labels in (a, b))
    expected = first * second / comb(len(a), 2)
    return (both - expected) / ((first + second) / 2 - expected)


def planted(n_each: int = 5, n_inputs: int = 4, n: int = N, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Patterns [input, head, n, n] of five families with noise, and each head's family."""
    random = torch.Generator().manual_seed(seed)
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    base = {
        "diagonal": 8.0 * (i == j),
        "stripe": 7.0 * ((j == n // 4) | (j == n // 2)),
        "block": 6.0 * (i * 4 // n == j * 4 // n),
        "uniform": torch.zeros(n, n),
        "content": torch.zeros(n, n),
    }
    heads, labels = [], []
    for number, name in enumerate(FAMILIES):
        for _ in range(n_each):
            loud = 4.0 if name == "content" else 0.4
            noise = torch.randn(n_inputs, n, n, generator=random, dtype=torch.float64)
            heads.append((base[name] + loud * noise).softmax(-1))
            labels.append(number)
    order = torch.randperm(len(heads), generator=random).tolist()
    return torch.stack([heads[k] for k in order], 1), [labels[k] for k in order]


@pytest.fixture(scope="module")
def atlas() -> tuple[PatternAtlas, list[int]]:
    weights, labels = planted()
    return pattern_atlas(captured(weights), n_clusters=5, epochs=15, progress=False), labels


def test_rand_index_of_known_partitions() -> None:
    assert rand_index([0, 0, 1, 1], [5, 5, 3, 3]) == 1
    assert rand_index([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(0.5714, abs=1e-4)
    assert rand_index([0, 1, 0, 1], [0, 0, 1, 1]) == pytest.approx(-0.5)


def test_planted_families_are_told_apart(atlas: tuple[PatternAtlas, list[int]]) -> None:
    found, labels = atlas
    assert rand_index(labels, found.clusters.tolist()) > 0.9
    assert found.losses[-1] < found.losses[0]


def test_clusters_and_heads_get_the_planted_names(atlas: tuple[PatternAtlas, list[int]]) -> None:
    found, labels = atlas
    wanted = dict(enumerate(("self", "vertical stripe", "block", "uniform", "content")))
    names = list(zip(labels, found.head_names, strict=True))
    for family in (0, 1, 3, 4):
        assert {name for label, name in names if label == family} == {wanted[family]}
        cluster = found.clusters[labels.index(family)]
        assert found.cluster_names[cluster] == wanted[family]
    by_family = [found.content_dependence[[label == f for label in labels]].mean().item() for f in range(5)]
    assert max(range(5), key=lambda f: by_family[f]) == 4


@pytest.mark.parametrize("n_examples", [1, 3])
def test_a_single_token_names_no_head(n_examples: int) -> None:
    found = pattern_atlas(captured(torch.ones(n_examples, 2, 1, 1)), 2, epochs=1, progress=False)
    assert found.head_names == ("not named",) * 2
    assert found.cluster_names == ("not named",)
    assert found.unnamed == ("L0H0", "L0H1")
    assert "2 heads show nothing" in repr(found)
    assert any("2 heads without a name" in note for note in found.view().spec.notes)


@pytest.mark.slow
def test_all_names_of_images_are_told_apart_by_map_and_name() -> None:
    random = torch.Generator().manual_seed(0)
    base = {**kinds_of_image(8, 8), "content": torch.zeros(64, 64, dtype=torch.bool)}
    heads, labels = [], []
    for name, pairs in base.items():
        for _ in range(3):
            noise = (4.0 if name == "content" else 0.4) * torch.randn(3, 64, 64, generator=random, dtype=torch.float64)
            raised = 0.0 if name == "uniform" else 5.0 * pairs.double()
            heads.append((raised + noise).softmax(-1))
            labels.append(name)
    cap = captured(torch.stack(heads, 1))
    found = pattern_atlas(cap, len(base), (8, 8), progress=False)
    numbers = [list(base).index(name) for name in labels]
    assert rand_index(numbers, found.clusters.tolist()) > 0.9
    assert list(found.head_names) == labels


def test_new_patterns_are_encoded_with_a_saved_atlas(atlas: tuple[PatternAtlas, list[int]], tmp_path: Path) -> None:
    found, labels = atlas
    loaded = PatternAtlas.load(found.save(tmp_path / "atlas"))
    weights, _ = planted()
    again = loaded.encode(captured(weights))
    assert torch.equal(again.latents, found.sample_latents)
    assert torch.equal(again.xy, found.sample_xy)
    assert torch.equal(again.head_clusters, found.clusters)
    assert torch.equal(again.error, found.error)
    family = {labels[k]: int(c) for k, c in enumerate(found.clusters)}
    others, new_labels = planted(n_each=3, n=56, seed=9)  # another length, other noise
    new = loaded.encode(captured(others))
    hits = [family[label] == c for label, c in zip(new_labels, new.head_clusters.tolist(), strict=True)]
    assert sum(hits) >= 0.8 * len(hits)
    assert new.clusters.shape == (4, 15)
    assert loaded.decode(new.latents).shape == (4, 15, 32, 32)


def test_the_same_seed_gives_the_same_atlas(tmp_path: Path) -> None:
    weights, _ = planted(2, 2)
    digests = []
    for seed in (1, 1, 2):
        path = pattern_atlas(captured(weights), 3, epochs=2, seed=seed, progress=False).save(tmp_path / "one")
        with safe_open(path, framework="pt") as file:
            digests.append(file.metadata()["sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_changed_file_is_refused(tmp_path: Path) -> None:
    weights, _ = planted(1, 1)
    path = pattern_atlas(captured(weights), 2, epochs=1, progress=False).save(tmp_path / "atlas")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match="changed"):
        PatternAtlas.load(path)


def test_shapes_and_table(atlas: tuple[PatternAtlas, list[int]]) -> None:
    found, _ = atlas
    assert found.patterns.shape == (25, 32, 32)
    assert found.sample_latents.shape == (4, 25, 32)
    torch.testing.assert_close(found.latents, found.sample_latents.mean(0))
    torch.testing.assert_close(found.xy, found.sample_xy.mean(0))
    assert found.cluster_patterns.shape == (5, 32, 32)
    assert sorted(label for c in range(5) for label in found.members(c)) == sorted(found.labels)
    table = found.table
    assert len(table) == 25
    assert table["is_vertical_stripe"].tolist() == found.evidence[:, NAMES.index("vertical stripe")].tolist()
    with pytest.raises(WorkbenchError, match="no cluster 7"):
        found.members(7)


# Pooling


@pytest.mark.parametrize("n", [5, 16, 21, 300])
def test_pooling_keeps_the_mass_of_rows(n: int) -> None:
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 2, n, n, generator=random, dtype=torch.float64).softmax(-1)
    seen = pool(DensePattern(weights), Places(1, n, text=True), 16)
    torch.testing.assert_close(seen.maps.sum(-1), torch.ones(2, 2, 16))
    if n == 16:
        torch.testing.assert_close(seen.maps, weights.float())
    if n == 300:
        naive = torch.zeros(16, 16, dtype=torch.float64)
        fine = weights[0, 1].repeat_interleave(4, 0).repeat_interleave(4, 1) / 4  # 1200 = 75 · 16 parts
        for a in range(16):
            for b in range(16):
                naive[a, b] = fine[a * 75 : a * 75 + 75, b * 75 : b * 75 + 75].sum() / 75
        torch.testing.assert_close(seen.maps[0, 1].double(), naive, atol=1e-6, rtol=1e-5)


def test_padding_and_prefix_are_left_out_of_the_square() -> None:
    n = 8
    weights = torch.randn(1, 1, n, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64).softmax(-1)
    padded = torch.zeros(1, 1, n + 3, n + 3, dtype=torch.float64)
    padded[..., 3:, 3:] = weights
    mask = Mask(n + 3, n + 3, tensor=(torch.arange(n + 3) >= 3)[None, None, None])
    wanted = pool(DensePattern(weights), Places(1, n, text=True), 8)
    found = pool(DensePattern(padded, mask), Places(1, n + 3, text=True), 8)
    torch.testing.assert_close(found.maps, wanted.maps)
    names = [SCORES.index(name) for name in ("self", "previous", "next", "uniform", "vertical stripe")]
    torch.testing.assert_close(found.scores[..., names], wanted.scores[..., names])
    image = pool(DensePattern(padded), Places(2, 4, prefix=3), 8)
    torch.testing.assert_close(image.maps, wanted.maps)
    assert overlaps(torch.tensor([[False, True, True]]), 2)[0].tolist() == [[0, 1, 0], [0, 0, 1]]


# Names


def kinds_of_image(rows: int = 4, columns: int = 8) -> dict[str, Tensor]:
    n = rows * columns
    r, c = torch.arange(n) // columns, torch.arange(n) % columns
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    same_row = r[i] == r[j]
    return {
        "self": i == j,
        "previous": same_row & (c[j] == (c[i] - 1).clamp(min=0)),
        "next": same_row & (c[j] == (c[i] + 1).clamp(max=columns - 1)),
        "row": same_row,
        "column": c[i] == c[j],
        "block": ((r[i] - r[j]).abs() <= 1) & ((c[i] - c[j]).abs() <= 1),
        "vertical stripe": (j == 5) | (j == 17),
        "uniform": torch.ones(n, n, dtype=torch.bool),
    }


@pytest.mark.parametrize("name", SCORES)
def test_planted_kinds_of_images_are_named(name: str) -> None:
    weights = kinds_of_image()[name].double()
    weights = (weights / weights.sum(-1, keepdim=True)).expand(2, 1, -1, -1)
    found = pool(DensePattern(weights), Places(4, 8), 16)
    evidence = [*found.scores[0, 0].tolist(), dependence(found.maps).item()]
    assert evidence[-1] == 0
    assert suggest(evidence) == name
    if name == "uniform":
        assert evidence == pytest.approx([0] * 7 + [1, 0], abs=1e-9)


@pytest.mark.parametrize(("name", "back"), [("self", 0), ("previous", 1)])
def test_planted_kinds_of_causal_text_are_named(name: str, back: int) -> None:
    n = 12
    i = torch.arange(n)
    weights = torch.zeros(1, 1, n, n)
    weights[0, 0, i, (i - back).clamp(min=0)] = 1
    found = pool(DensePattern(weights, causal(n)), Places(1, n, text=True), 8)
    at = SCORES.index(name)
    assert found.scores[0, 0, at] == pytest.approx(1)
    assert found.scores[0, 0, SCORES.index("row")].isnan()
    assert suggest([*found.scores[0, 0].tolist(), float("nan")]) == name


def test_causal_uniform_attention_is_uniform() -> None:
    n = 12
    weights = torch.ones(n, n, dtype=torch.float64).tril()
    weights = (weights / weights.sum(-1, keepdim=True))[None, None]
    found = pool(DensePattern(weights, causal(n)), Places(1, n, text=True), 8)
    evidence = [*found.scores[0, 0].tolist(), 0.0]
    assert suggest(evidence) == "uniform"
    assert evidence[SCORES.index("vertical stripe")] == pytest.approx(0, abs=1e-12)


def test_content_dependence_is_that_of_its_definition() -> None:
    maps = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    maps[:, 1] = maps[0, 1]
    found = dependence(maps)
    assert found[1] == pytest.approx(0, abs=1e-7)
    mean = maps[:, 2].double().mean(0)
    wanted = (
        sum(((m.double() - mean).square().sum() ** 0.5).item() for m in maps[:, 2]) / 5 / mean.square().sum() ** 0.5
    )
    assert found[2].item() == pytest.approx(wanted.item())
    assert dependence(maps[:1]).isnan().all()


# Clusters and components


def test_k_means_finds_separate_clouds_in_order_of_size() -> None:
    random = torch.Generator().manual_seed(0)
    sizes, centres = (9, 6, 3), torch.tensor([[0.0, 0], [9, 0], [0, 9]], dtype=torch.float64)
    points = torch.cat(
        [c + torch.randn(n, 2, generator=random, dtype=torch.float64) / 3 for n, c in zip(sizes, centres, strict=True)]
    )
    found, which = k_means(points, 3, seed=0)
    assert which.tolist() == [0] * 9 + [1] * 6 + [2] * 3
    torch.testing.assert_close(found[1], points[9:15].mean(0))
    same, one = k_means(torch.ones(4, 2, dtype=torch.float64), 3, seed=0)
    assert len(same) == 1
    assert one.tolist() == [0] * 4


def test_components_are_those_of_the_covariance() -> None:
    points = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.diag(
        torch.tensor([5.0, 3, 1, 0.1], dtype=torch.float64)
    )
    mean, axes, share = components(points)
    values, vectors = torch.linalg.eigh(torch.cov(points.T))
    torch.testing.assert_close(mean, points.mean(0))
    torch.testing.assert_close(share, values.flip(0)[:2] / values.sum())
    torch.testing.assert_close(
        (axes @ vectors.flip(1)[:, :2]).abs(), torch.eye(2, dtype=torch.float64), atol=1e-8, rtol=0
    )
    assert components(points[:1])[2].tolist() == [0, 0]


# A model, and refusals


def test_atlas_of_the_demonstration_vit() -> None:
    model, _ = load("demo-vit")
    images = examples().pixel_values
    with workbench.attach(model) as wb, wb.capture(statistics=[]) as cap:
        model(pixel_values=images[:4])
        model(pixel_values=images[4:6])
    found = pattern_atlas(cap, epochs=2, progress=False)
    assert (found.kind, found.grid, found.prefix) == ("image", (8, 8), 1)
    assert found.error.shape == (6, 16)
    dense = torch.cat([call[2].pattern.dense() for call in cap.calls]).double()[:, :, 1:, 1:]
    wanted = dense.unflatten(-1, (32, 2)).sum(-1).unflatten(-2, (32, 2)).mean(-2).mean(0)
    torch.testing.assert_close(found.patterns[8:12].double(), wanted, atol=1e-6, rtol=1e-5)


def test_bad_arguments_are_refused(atlas: tuple[PatternAtlas, list[int]]) -> None:
    cap = captured(planted(1, 1)[0])
    with pytest.raises(WorkbenchError, match="multiple of 8"):
        pattern_atlas(cap, size=20)
    bad: dict[str, Any]
    for bad in ({"n_clusters": 0}, {"epochs": 1.5}, {"width": True}):
        with pytest.raises(WorkbenchError, match="whole number"):
            pattern_atlas(cap, **bad)
    with pytest.raises(WorkbenchError, match="does not match 40 tokens"):
        pattern_atlas(cap, grid=(7, 7))
    with pytest.raises(WorkbenchError, match="an atlas of text patterns, the capture is of image"):
        atlas[0].encode(cap, grid=(5, 8))
    assert pattern_atlas(cap, n_clusters=50, epochs=1, progress=False).n_clusters <= 5
