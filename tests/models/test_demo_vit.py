"""The demonstration ViT: its card, its images, its training, and that it is observed exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from support.judges import judges, missing
from workbench.errors import WorkbenchError
from workbench.models import card, digits, examples, load
from workbench.models import loading as loading_module
from workbench.models.train_demo_vit import accuracy, new_model, train, vary

FOLDER = Path(loading_module.__file__).parent / "shipped" / "demo-vit"


def _like_the_data_set(n: int = 1797) -> torch.Tensor:
    """Rows of 64 counts and a digit, of the data set's shape and range."""
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 17, (n, 64), generator=random)
    return torch.cat([counts, torch.arange(n)[:, None] % 10], dim=1)


def test_it_loads_ready_to_use_and_is_small() -> None:
    model, processor = load("demo-vit")
    assert processor is None
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    files = list(FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) <= 3e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_card_agrees_with_the_file() -> None:
    model, _ = load("demo-vit")
    facts = card("demo-vit")
    assert facts["accuracy"]["held_out"] >= 0.97
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["megabytes"] == pytest.approx((FOLDER / "model.safetensors").stat().st_size / 1e6, abs=0.01)
    assert len(facts["loss_by_epoch"]) == facts["epochs"]


def test_the_card_s_accuracy_is_measured_again_where_the_data_are_at_hand() -> None:
    with judges():
        try:
            counts, labels = digits.read_counts()
        except WorkbenchError as error:  # the digits come with scikit-learn
            missing(error)
    _, held_out = digits.split()
    model, _ = load("demo-vit")
    found = accuracy(model, digits.to_pixels(counts[held_out]), labels[held_out])
    assert found == pytest.approx(card("demo-vit")["accuracy"]["held_out"], abs=0.003)
    shipped = examples()
    assert torch.equal(shipped.pixel_values[0], digits.to_pixels(counts[held_out][labels[held_out] == 0][:1])[0])


def test_examples_are_images_it_can_read() -> None:
    images = examples("demo-vit")
    assert images.pixel_values.shape == (40, 1, 16, 16)
    assert images.labels.tolist() == list(range(10)) * 4
    assert images.pixel_values.min() == -1
    assert images.pixel_values.max() <= 1
    model, _ = load("demo-vit")
    assert accuracy(model, *images) >= 0.9
    with pytest.raises(WorkbenchError, match="no images ship"):
        examples("demo-lm")


def test_split_parts_the_images() -> None:
    learnt, held_out = digits.split()
    assert len(held_out) == 500
    assert torch.cat([learnt, held_out]).sort().values.tolist() == list(range(1797))


def test_counts_are_read_and_other_files_refused(tmp_path: Path) -> None:
    table = _like_the_data_set()
    path = tmp_path / "optdigits.tes"
    path.write_text("\n".join(",".join(map(str, row)) for row in table.tolist()))
    counts, labels = digits.read_counts(path)
    assert torch.equal(counts.flatten(1).long(), table[:, :64])
    assert torch.equal(labels, table[:, 64])
    path.write_text("\n".join(",".join(map(str, row)) for row in table[:20].tolist()))
    with pytest.raises(WorkbenchError, match="not the data set"):
        digits.read_counts(path)


def test_variation_keeps_the_range_and_differs_by_image() -> None:
    images = examples().pixel_values[:1].expand(3, -1, -1, -1)
    varied = vary(images, torch.Generator().manual_seed(0))
    assert varied.shape == images.shape
    assert varied.min() >= -1.0001
    assert varied.max() <= 1.0001
    assert not torch.equal(varied[0], varied[1])
    assert torch.equal(varied, vary(images, torch.Generator().manual_seed(0)))


def test_training_repeats_to_the_bit_and_lowers_the_loss() -> None:
    images = examples()
    first, second = (new_model(3, n_layer=1, d_model=16) for _ in range(2))
    losses = [train(model, *images, seed=1, epochs=8, batch=20) for model in (first, second)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_is_observed_exactly() -> None:
    model, _ = load("demo-vit")
    images = examples().pixel_values[:2]
    with workbench.attach(model) as wb:
        with wb.capture() as cap:
            seen = model(pixel_values=images).logits
        assert len(cap.sites) == 4
        assert cap[0].pattern.shape == (2, 4, 65, 65)
    assert torch.equal(seen, model(pixel_values=images).logits)
