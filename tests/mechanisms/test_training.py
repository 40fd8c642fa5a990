"""The work that is the same for all: what is read, what counts, and that the script trains, saves and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import workbench
from workbench import FormatError, WorkbenchError, mechanisms
from workbench.mechanisms import Place
from workbench.mechanisms.training import ByteLM, Corpus, copying, corpus, load, recall, score, text_batch, train
from workbench.mechanisms.training.__main__ import PLACE, main
from workbench.mechanisms.training.language import PARAMETERS
from workbench.mechanisms.training.text import BOS, HELD_OUT, IGNORE, TUNING, repeated

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


def test_bytes_whose_last_four_came_before_are_found() -> None:
    row = list(b"abcdXabcdYabce")
    found = repeated(torch.tensor([row]))[0]
    assert [at for at, again in enumerate(found.tolist()) if again] == [8]


@pytest.mark.parametrize("name", [one.name for one in mechanisms.list() if one.card.causal != "never"])
def test_any_mechanism_stands_in_a_language_model_of_the_same_size(name: str) -> None:
    torch.manual_seed(0)
    model = ByteLM(PLACE, [name] * 3).eval()
    assert sum(p.numel() for p in model.parameters()) <= PARAMETERS
    tiny = ByteLM(TINY, [name]).eval()
    ids = torch.randint(0, 128, (2, 24), generator=_random())
    with torch.no_grad():
        x = tiny.embed(ids)
        x = x + tiny.position + tiny.smear * F.pad(x, (0, 0, 1, -1))
        torch.testing.assert_close(tiny(ids), F.linear(tiny.norm(x), tiny.embed.weight))  # blocks begin with nothing
        for parameter in tiny.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        with workbench.attach(tiny) as wb, wb.capture(["entropy"]) as cap:
            tiny(ids)
    assert {site.layer for site in cap.sites} == {0}


def test_a_model_learns_and_the_same_seed_learns_the_same() -> None:
    source = _source(b"ab" * 300 + b"\n" + b"ab" * 300)
    source = Corpus(source.ids, torch.arange(0, 500, 2), "")
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = ByteLM(TINY, ["moh"], hidden=16)
        runs.append(train(model, source, steps=30, n=4, every=10, made=0.0))
    assert runs[0].losses == runs[1].losses
    steps, losses = zip(*runs[0].losses, strict=True)
    assert steps == (10, 20, 30)
    assert losses[-1] < 0.5 * losses[0]
    assert not model.training
    with pytest.raises(WorkbenchError, match="steps=0"):
        train(model, source, steps=0)


def test_scores_are_the_losses_and_shares_that_they_are_called() -> None:
    class Even(ByteLM):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 128)

    found = score(Even(TINY, ["sqa"]), corpus("tuning"), n=8)
    assert found["text"] == pytest.approx(torch.tensor(128.0).log().item(), rel=1e-6)
    assert found["repeats"] == pytest.approx(found["text"], rel=1e-6)
    assert found["copy"] == found["recall 8"] == found["recall 26"] == 0  # byte 0 is the likeliest, and never right


def test_the_script_trains_saves_and_loads(tmp_path: Path) -> None:
    made = main(["--layers", "long_lora", "sqa:mha", "--quick", "--out", str(tmp_path / "quick.safetensors")])
    found = load(tmp_path / "quick.safetensors")
    assert (found.facts, found.scores) == (made.facts, made.scores)
    assert found.facts["quick"]
    assert (tmp_path / "quick.safetensors").stat().st_size < 320_000
    assert found.model.layers == ("long_lora", "sqa:mha")
    ids = torch.randint(0, 128, (1, 30), generator=_random())
    assert torch.equal(found.model(ids), made.model(ids))
    (tmp_path / "quick.safetensors").write_bytes(b"no file of ours")
    with pytest.raises(FormatError):
        load(tmp_path / "quick.safetensors")


def test_models_that_cannot_be_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="a language model is causal"):
        ByteLM(Place(16, 4, 24, causal=False), ["sqa"])
    with pytest.raises(WorkbenchError, match='no mechanism "attention"'):
        ByteLM(TINY, ["attention"])
    with pytest.raises(WorkbenchError, match=r"have .* of 150,000 parameters"):
        ByteLM(Place(256, 4, 24), ["sqa:mha"])
    with pytest.raises(WorkbenchError, match=r"1 to 24 tokens"):
        ByteLM(TINY, ["sqa"])(torch.zeros(1, 25, dtype=torch.long))
