"""The work that is the same for all: what is read, what counts, and that the script trains, saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import workbench
from workbench import FormatError, TaskError, WorkbenchError, mechanisms
from workbench.mechanisms import Place
from workbench.mechanisms.training import (
    ByteLM,
    Corpus,
    PatchModel,
    copying,
    corpus,
    induction_batch,
    load,
    mqar_batch,
    needle,
    recall,
    run_work,
    scenes,
    score_images,
    score_induction,
    score_mqar,
    score_text,
    size_of,
    text_batch,
    train,
    width_for,
)
from workbench.mechanisms.training.__main__ import main
from workbench.mechanisms.training.stack import PARAMETERS
from workbench.mechanisms.training.text import BOS, HELD_OUT, IGNORE, TUNING, VOCABULARY, repeated
from workbench.mechanisms.training.work import PLACES

TINY = Place(16, 4, 24, rotary=True)


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _source(text: bytes) -> Corpus:
    ids = torch.tensor(list(text))
    return Corpus(ids, (ids == 10).nonzero().flatten() + 1, "")


def test_no_held_out_module_is_trained_on() -> None:
    parts = {split: corpus(split) for split in ("training", "tuning", "held out")}
    assert len({part.digest for part in parts.values()}) == 3
    assert not set(HELD_OUT) & set(TUNING)
    training = bytes(parts["training"].ids.tolist())
    for line in (b"def heappushpop(heap, item):", b"class TextWrapper:", b"def bisect_right(a, x, lo=0, hi=None"):
        assert line not in training
    assert b"def heappushpop(heap, item):" in bytes(parts["held out"].ids.tolist())
    assert all(int(part.ids.max()) <= 127 and int(part.ids.min()) > 0 for part in parts.values())
    with pytest.raises(WorkbenchError, match='no split "test"'):
        corpus("test")


def test_rows_of_code_begin_at_a_line_and_labels_are_the_next_byte() -> None:
    source = _source(b"one\n" + b"abcdefgh\n" * 40)
    inputs, labels = text_batch(source, 5, 20, _random())
    assert inputs.shape == labels.shape == (5, 20)
    assert torch.equal(inputs[:, 0], torch.full((5,), BOS))
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert all(bytes(row[:8].tolist()) == b"abcdefgh" for row in labels)
    mixed, _ = text_batch(source, 8, 20, _random(), made=0.5)
    assert len(mixed) == 8
    assert sum(bytes(row[1:9].tolist()) == b"abcdefgh" for row in mixed) == 4


def test_what_counts_in_recall_and_copying_can_be_known() -> None:
    inputs, labels = recall(20, 41, _random())
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        seen: dict[int, int] = {}
        for at in range(1, len(row)):
            letter, digit = row[at], wanted[at]
            if at % 2:
                assert chr(letter).isalpha()
                assert (digit == IGNORE) == (letter not in seen)
                assert digit in (IGNORE, seen.get(letter))
                if at + 1 < len(row):
                    seen[letter] = row[at + 1]
            else:
                assert digit == IGNORE
    inputs, labels = copying(20, 40, _random())
    assert torch.equal(inputs[:, 0], torch.full((20,), BOS))
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        counts = [at for at, byte in enumerate(wanted) if byte != IGNORE]
        period = counts[0] - 1
        assert 4 <= period <= 20
        assert all(wanted[at] == row[at + 1 - period] for at in counts)
        assert counts == list(range(counts[0], 40))


def test_each_key_is_asked_for_again_and_its_value_counts() -> None:
    inputs, labels = mqar_batch(9, 64, _random(), (2, 4, 8))
    assert inputs.shape == labels.shape == (9, 64)
    assert [int(n) for n in (labels != IGNORE).sum(1)] == [2] * 3 + [4] * 3 + [8] * 3
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        n = sum(each != IGNORE for each in wanted)
        values = dict(zip(row[0 : 2 * n : 2], row[1 : 2 * n : 2], strict=True))
        assert {row[at]: each for at, each in enumerate(wanted) if each != IGNORE} == values
        assert max(row) < VOCABULARY
    again, _ = mqar_batch(9, 64, _random(), (2, 4, 8))
    assert torch.equal(again, inputs)
    with pytest.raises(TaskError, match="16 pairs and their questions need an even length of at least 64"):
        mqar_batch(1, 62, _random(), (16,))


@pytest.mark.parametrize("length", [11, 64])
def test_a_string_of_different_letters_comes_again_and_counts_from_its_second_letter(length: int) -> None:
    inputs, labels = induction_batch(40, length, _random())
    periods = set()
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        counts = [at for at, each in enumerate(wanted) if each != IGNORE]
        period = counts[0]
        assert len(set(row[:period])) == period
        assert counts == list(range(period, length))
        assert [wanted[at] for at in counts] == [row[at - period + 1] for at in counts]
        periods.add(period)
    assert min(periods) == 4
    assert max(periods) <= max(4, 3 * length // 8)
    assert len(periods) > 5 or length == 11
    with pytest.raises(WorkbenchError, match="length=10 is not one of 11 up"):
        induction_batch(1, 10, _random())


@pytest.mark.parametrize("work", ["mqar", "induction"])
def test_any_mechanism_recalls_and_copies_alone(work: str, tmp_path: Path) -> None:
    found = run_work(work, ["aaren"] * 2, quick=True)
    names = {"mqar": ["4 pairs", "8 pairs", "16 pairs", "far"], "induction": ["copy", "copy far"]}[work]
    assert list(found.scores) == names
    again = load(found.save(tmp_path / "one.safetensors"))
    assert again.facts["work"] == work
    score = score_mqar if work == "mqar" else score_induction
    assert score(again.model, 8) == pytest.approx(found.scores)


def test_scores_are_shares_of_what_is_asked_for() -> None:
    class Knows(torch.nn.Module):
        """Says the token behind the last place where this one stood before; of what is asked for late nothing."""

        place = Place(8, 1, 64)

        def __init__(self, until: int) -> None:
            super().__init__()
            self.until = until

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*ids.shape, VOCABULARY)
            for row, tokens in enumerate(ids.tolist()):
                last: dict[int, int] = {}
                for at, token in enumerate(tokens[: self.until]):
                    if token in last:
                        logits[row, at, tokens[last[token] + 1]] = 1.0
                    last[token] = at
            return logits

    assert score_mqar(Knows(64), 6) == {"4 pairs": 1.0, "8 pairs": 1.0, "16 pairs": 1.0, "far": 1.0}  # type: ignore[arg-type]
    late = score_mqar(Knows(48), 6)  # type: ignore[arg-type]
    assert late["far"] == 0.0 < late["4 pairs"]
    assert score_induction(Knows(64), 30) == {"copy": 1.0, "copy far": 1.0}  # type: ignore[arg-type]
    early = score_induction(Knows(14), 30)  # type: ignore[arg-type]
    assert early["copy far"] == 0.0 < early["copy"]


@pytest.mark.parametrize("length", [41, 128])
def test_a_needle_lies_where_it_is_said_and_is_asked_for_at_the_end(length: int) -> None:
    n_pairs = length // 2
    for depth in (0.0, 0.3, 0.99):
        inputs, labels = needle(20, length, _random(), depth)
        assert inputs.shape == labels.shape == (20, 2 * n_pairs)
        at = 1 + 2 * int(depth * (n_pairs - 1))
        for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
            letter = row[-1]
            assert [place for place, byte in enumerate(row) if byte == letter] == [at, 2 * n_pairs - 1]
            assert wanted == [IGNORE] * (2 * n_pairs - 1) + [row[at + 1]]


def test_models_are_as_large_as_asked_for() -> None:
    plain = size_of("text", ["sqa:mha"] * 3)
    for layers in (["sqa"] * 3, ["aaren", "sqa:mha", "aaren"], ["rcmha"] * 3):
        hidden = width_for("text", layers, plain)
        assert size_of("text", layers, hidden) <= plain < size_of("text", layers, hidden + 1)
    with pytest.raises(WorkbenchError, match="of 20,000 parameters"):
        width_for("text", ["sqa:mha"] * 3, 20_000)
    with pytest.raises(WorkbenchError, match='work="sound"'):
        width_for("sound", ["sqa"], plain)


def test_bytes_whose_last_four_came_before_are_found() -> None:
    row = list(b"abcdXabcdYabce")
    found = repeated(torch.tensor([row]))[0]
    assert [at for at, again in enumerate(found.tolist()) if again] == [8]


@pytest.mark.parametrize("name", [one.name for one in mechanisms.list() if one.card.causal != "never"])
def test_any_mechanism_stands_in_a_language_model_of_the_same_size(name: str) -> None:
    torch.manual_seed(0)
    model = ByteLM(PLACES["text"], [name] * 3).eval()
    assert sum(p.numel() for p in model.parameters()) <= PARAMETERS
    tiny = ByteLM(TINY, [name]).eval()
    ids = torch.randint(0, 128, (2, 24), generator=_random())
    with torch.no_grad():
        x = tiny.embed(ids)
        x = x + tiny.position + tiny.smear * F.pad(x, (0, 0, 1, -1))
        if isinstance(getattr(tiny.stack.blocks[0].mixer, "out", None), torch.nn.Linear):  # blocks begin with nothing
            torch.testing.assert_close(tiny(ids), F.linear(tiny.norm(x), tiny.embed.weight))
        for parameter in tiny.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        with workbench.attach(tiny) as wb, wb.capture(["entropy"]) as cap:
            tiny(ids)
    assert {site.layer for site in cap.sites} == {0}


def test_a_model_learns_and_the_same_seed_learns_the_same() -> None:
    source = Corpus(torch.tensor(list(b"ab" * 300)), torch.arange(0, 500, 2), "")
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = ByteLM(TINY, ["moh"], hidden=16)
        runs.append(train(model, lambda random: text_batch(source, 4, 24, random), steps=30, every=10))
    assert runs[0].losses == runs[1].losses
    steps, losses = zip(*runs[0].losses, strict=True)
    assert steps == (10, 20, 30)
    assert losses[-1] < 0.5 * losses[0]
    assert not model.training
    with pytest.raises(WorkbenchError, match="steps=0"):
        train(model, lambda random: text_batch(source, 4, 24, random), steps=0)


def test_scores_are_the_losses_and_shares_that_they_are_called() -> None:
    class Even(ByteLM):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 128)

    found = score_text(Even(TINY, ["sqa"]), corpus("tuning"), n=8)
    assert found["text"] == pytest.approx(torch.tensor(128.0).log().item(), rel=1e-6)
    assert found["repeats"] == pytest.approx(found["text"], rel=1e-6)
    assert found["copy"] == found["recall 8"] == found["recall 26"] == 0  # byte 0 is the likeliest, and never right


def test_the_script_trains_saves_and_loads(tmp_path: Path) -> None:
    size = ["--parameters", "100000"]
    path = str(tmp_path / "quick.safetensors")
    made = main(["text", "--layers", "long_lora", "sqa:mha", *size, "--quick", "--out", path])
    found = load(tmp_path / "quick.safetensors")
    assert (found.facts, found.scores) == (made.facts, made.scores)
    assert found.facts["quick"]
    assert 99_000 < found.facts["parameters"] <= 100_000
    assert (tmp_path / "quick.safetensors").stat().st_size <= 300_000
    assert found.model.stack.layers == ("long_lora", "sqa:mha")
    ids = torch.randint(0, 128, (1, 30), generator=_random())
    assert torch.equal(found.model(ids), made.model(ids))
    (tmp_path / "quick.safetensors").write_bytes(b"no file of ours")
    with pytest.raises(FormatError):
        load(tmp_path / "quick.safetensors")


def test_an_image_model_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    made = main(["images", "--layers", "agent", "halo", "--quick", "--out", str(tmp_path / "quick.safetensors")])
    found = load(tmp_path / "quick.safetensors")
    images = scenes(3, _random()).images
    assert torch.equal(found.model(images), made.model(images))
    assert set(found.scores) == {"1 digit", "3 digits"}
    assert made.facts["parameters"] <= PARAMETERS
    with torch.no_grad(), workbench.attach(found.model) as wb, wb.capture(["entropy"]) as cap:
        found.model(images)
    assert [cap[site.name].shape for site in cap.sites] == [(3, 4, 64, 64)] * 2


def test_a_scene_shows_the_digit_of_the_square_s_colour_where_it_says() -> None:
    drawn = scenes(50, _random(), n_digits=1, noise=0.0)
    for image, (row, column), (top, left) in zip(
        drawn.images, drawn.centres.tolist(), drawn.squares.tolist(), strict=True
    ):
        bright = image - image.amin((1, 2), keepdim=True)
        colour = bright[:, top - 4 : top + 4, left - 4 : left + 4]
        assert colour.std((1, 2)).max() < 1e-6  # one colour all over
        digit = bright[:, row - 3 : row + 4, column - 2 : column + 3]
        ink = digit.sum(0) > 0.1
        assert 7 <= ink.sum() < 35
        torch.testing.assert_close(digit[:, ink], colour[:, 0, :1].expand(-1, int(ink.sum())))
    glyphs = {}
    for image, label, (row, column) in zip(drawn.images, drawn.classes.tolist(), drawn.centres.tolist(), strict=True):
        patch = image[:, row - 3 : row + 4, column - 2 : column + 3].sum(0)
        shape = (patch > patch.min() + 0.1).int().flatten().tolist()
        assert glyphs.setdefault(label, shape) == shape
    assert len({tuple(shape) for shape in glyphs.values()}) == len(glyphs) == 10
    three = scenes(400, _random(), n_digits=3)
    assert (three.classes.bincount(minlength=10) > 15).all()
    with pytest.raises(WorkbenchError, match="n_digits=4"):
        scenes(1, _random(), n_digits=4)


def test_scores_of_images_are_shares_of_right_answers() -> None:
    class Three(PatchModel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.full((len(images),), 3), 10).float()

    place = PLACES["images"]
    found = score_images(Three(place, ["sqa"]), n=64)
    random = _random(99)
    assert found["1 digit"] == pytest.approx((scenes(64, random, 1).classes == 3).float().mean().item())
    assert found["3 digits"] == pytest.approx((scenes(64, random, 3).classes == 3).float().mean().item())


def test_models_that_cannot_be_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="the images have 8 × 8 patches"):
        PatchModel(Place(16, 2, 36, causal=False, grid=(6, 6)), ["sqa"])
    with pytest.raises(WorkbenchError, match=r"images must be \[batch, 3, 32, 32\]"):
        PatchModel(PLACES["images"], ["sqa"])(torch.zeros(1, 3, 28, 28))
    with pytest.raises(WorkbenchError, match="at least one layer"):
        ByteLM(TINY, [])
    with pytest.raises(WorkbenchError, match="a language model is causal"):
        ByteLM(Place(16, 4, 24, causal=False), ["sqa"])
    with pytest.raises(WorkbenchError, match='no mechanism "attention"'):
        ByteLM(TINY, ["attention"])
    with pytest.raises(WorkbenchError, match=r"have .* of 145,000 parameters"):
        ByteLM(Place(256, 4, 24), ["sqa:mha"])
    with pytest.raises(WorkbenchError, match=r"1 to 24 tokens"):
        ByteLM(TINY, ["sqa"])(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": "sqa"}, 'layers="sqa" is one name'),
        ({"hidden": -1}, "hidden=-1 is not one of 0 up"),
        ({"hidden": 0.5}, "hidden is a whole number, not 0.5"),
        ({"steps": 1.5}, "steps is a whole number, not 1.5"),
        ({"steps": 0}, "steps=0 is not one of 1 up"),
        ({"rows": 0}, "rows=0 is not one of 1 up"),
        ({"rate": float("nan")}, "rate is a finite number above 0, not nan"),
        ({"rate": 0}, "rate is a finite number above 0, not 0"),
        ({"seed": "a"}, "seed is a whole number, not 'a'"),
        ({"split": "test"}, 'no split "test"'),
        ({"work": ["text"]}, r"work=\"\['text'\]\" is not known"),
    ],
)
def test_what_a_run_cannot_take_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"work": "mqar", "layers": ["sqa"], **options}
    with pytest.raises(WorkbenchError, match=said):
        run_work(**given)


def test_rows_that_cannot_be_drawn_are_refused_by_name() -> None:
    for refused, said in (
        (lambda: needle(2, 64, _random(), 1.5), "depth=1.5 is no share"),
        (lambda: recall(2, 64, _random(), 99), "n_keys=99 is not one of 1 to 52"),
        (lambda: mqar_batch(2, 64, _random(), ()), "names no number of pairs"),
        (lambda: width_for("text", ["sqa"], 1.5e5), "parameters is a whole number"),  # type: ignore[arg-type]
    ):
        with pytest.raises(WorkbenchError, match=said):
            refused()
