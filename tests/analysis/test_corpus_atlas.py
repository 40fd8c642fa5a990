"""The atlas of heads over a corpus: planted heads lead in their score, and numbers are those of plain definitions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import workbench
from workbench import CaptureError, CorpusAtlas, CorpusAtlasInterrupted, FormatError, WorkbenchError
from workbench.analysis.corpus import run, running
from workbench.analysis.corpus.measuring import SCORES
from workbench.analysis.corpus.texts import Frame

VOCABULARY, LENGTH, WIDTH = 12, 24, 40
PLANTED = {"induction": 0, "previous": 1, "sink": 2, "duplicate": 3}


class Planted(nn.Module):
    """One layer whose heads look where they are told: at what followed a copy, before, at the first key, at copies.

    The fifth looks at all keys alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.embed = 5, nn.Embedding(VOCABULARY, 8)
        self.v_proj, self.o_proj = nn.Linear(8, self.heads * WIDTH), nn.Linear(self.heads * WIDTH, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        b, n = input_ids.shape
        token = F.one_hot(input_ids, WIDTH).float()
        place = F.one_hot(torch.arange(n), WIDTH).float().expand(b, -1, -1)
        shifted, nothing = token.roll(1, 1), torch.zeros_like(token)
        shifted[:, 0] = 0
        earlier = place.roll(-1, 1)  # the place after each
        first = place[:, :1].expand(-1, n, -1)
        q = torch.stack([token, place, first, token, nothing], 1) * 8
        k = torch.stack([shifted, earlier, place, token, nothing], 1) * 8
        v = self.v_proj(self.embed(input_ids)).view(b, n, self.heads, WIDTH).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(z.transpose(1, 2).flatten(2))


def _corpus(n: int, seed: int = 0) -> Tensor:
    """Ids in which pieces come again."""
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randint(0, VOCABULARY, (7,), generator=draw) for _ in range(5)]
    return torch.cat([parts[i] for i in torch.randint(0, 5, (n // 7 + 1,), generator=draw).tolist()])[:n]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return Planted().eval()


def _atlas(corpus: Any, **how: Any) -> CorpusAtlas:
    with workbench.attach(_model()) as wb:
        given = {"length": LENGTH, "recent": 4, "sinks": 1, "progress": False, "tokens": None} | how
        return workbench.head_atlas_over(wb, corpus, **given)


@pytest.fixture(scope="module")
def atlas() -> CorpusAtlas:
    return _atlas(_corpus(50 * LENGTH + 5))


def test_planted_heads_lead(atlas: CorpusAtlas) -> None:
    assert atlas.n_tokens == 50 * LENGTH
    assert atlas.complete
    for score, head in PLANTED.items():
        assert atlas.leading(score, 1) == [(0, head)], score
        assert atlas.scores[SCORES.index(score), head] > 0.4
    assert atlas.leading("retrieval", 1) == [(0, PLANTED["induction"])]
    with pytest.raises(WorkbenchError, match="no score"):
        atlas.leading("copying")


def test_scores_are_those_of_plain_loops(atlas: CorpusAtlas) -> None:
    """Windows 0 and 7, from dense maps and their definitions, row by row."""
    ids = _corpus(50 * LENGTH + 5)[: 50 * LENGTH].view(50, LENGTH)
    model = _model()
    for window in (0, 7):
        row = ids[window].tolist()
        with workbench.attach(model) as wb, wb.capture(()) as cap:
            model(ids[window : window + 1])
        weights = cap[0].pattern.dense()[0].double()
        for head in range(5):
            a = weights[head]
            means: dict[str, list[float]] = {name: [] for name in SCORES}
            for i in range(LENGTH):
                copies = [j for j in range(i) if row[j] == row[i]]
                if copies:
                    means["induction"].append(float(sum(a[i, j + 1] for j in copies)))
                    means["duplicate"].append(float(sum(a[i, j] for j in copies)))
                if i:
                    means["previous"].append(float(a[i, i - 1]))
                    means["sink"].append(float(a[i, 0]))
                if i >= 5:
                    means["streaming"].append(float(a[i, :1].sum() + a[i, max(1, i - 3) : i + 1].sum()))
                if i + 1 < LENGTH and row[i + 1] in row[: i + 1]:
                    means["retrieval"].append(float(row[int(a[i].argmax())] == row[i + 1]))
            for s, name in enumerate(SCORES):
                if head == 4 and name == "retrieval":
                    continue  # all keys are alike: which is the largest is chance
                wanted = np.mean(means[name]) if means[name] else np.nan
                assert float(atlas.windows[window, s, head]) == pytest.approx(wanted, abs=1e-5, nan_ok=True), (
                    name,
                    head,
                )


def test_deciles_drift_and_examples(atlas: CorpusAtlas) -> None:
    assert int(atlas.entropies.sum()) == 5 * atlas.n_tokens
    even = atlas.deciles("entropy")[4]  # ln of the number of keys, of which all lengths are as frequent
    wanted = torch.arange(1, LENGTH + 1).double().log().quantile(torch.arange(1, 10).double() / 10)
    assert (even - wanted).abs().max() < 0.2
    assert (atlas.deciles("distance")[PLANTED["previous"], 1:8] - 1).abs().max() < 0.1
    with pytest.raises(WorkbenchError, match="entropy and distance"):
        atlas.deciles("peak")
    assert atlas.drift.abs().nan_to_num(0).max() < 0.4
    changed = _atlas([_corpus(20 * LENGTH), torch.arange(20 * LENGTH) % VOCABULARY])
    score = SCORES.index("retrieval")  # the second half repeats all of itself
    assert changed.drift[score, 0] > 5 * changed.drift_error[score, 0]
    first = atlas.examples[atlas.examples["head"] == PLANTED["induction"]].iloc[0]
    assert first.weight > 0.5
    ids = _corpus(50 * LENGTH + 5)[: 50 * LENGTH].view(50, LENGTH)[first.window]
    assert ids[first.key - 1] == ids[first["query"]]
    assert f"⟦{int(ids[first.key])}⟧" in first.text
    assert f"⟦{int(ids[first['query']])}⟧" in first.text


def test_saved_resumed_interrupted(tmp_path: Path, atlas: CorpusAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, path = _corpus(50 * LENGTH + 5), tmp_path / "atlas.safetensors"
    monkeypatch.setattr("workbench.analysis.corpus.run._SAVED_EVERY", 0.0)

    def broken() -> Any:
        yield corpus[: 20 * LENGTH]
        raise KeyboardInterrupt

    with pytest.raises(CorpusAtlasInterrupted, match=r"384 tokens are done; it is in .*atlas") as caught:
        _atlas(broken(), resume=path)
    assert caught.value.partial is not None
    assert not CorpusAtlas.load(path).complete
    with pytest.raises(FormatError, match="another corpus"):
        _atlas(_corpus(50 * LENGTH, seed=1), resume=path)
    with pytest.raises(FormatError, match="sinks"):
        _atlas(corpus, resume=path, sinks=2)
    for _ in range(2):  # the second has nothing left to do
        whole = _atlas(corpus, resume=path)
        again = CorpusAtlas.load(path)
        for found in (whole, again):
            assert found.complete
            for name in ("windows", "entropies", "distances", "weights"):
                torch.testing.assert_close(getattr(found, name), getattr(atlas, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("holder", "name"), [(run, "measure"), (running.Words, "around")])
def test_an_interrupt_at_any_step_can_be_gone_on_from(
    holder: Any, name: str, tmp_path: Path, atlas: CorpusAtlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, path, plain = _corpus(50 * LENGTH + 5), tmp_path / "atlas.safetensors", getattr(holder, name)
    calls: list[int] = []

    def interrupted(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return plain(*given)

    after = 10**9
    monkeypatch.setattr(holder, name, interrupted)
    _atlas(corpus)
    after, calls = len(calls), []  # the last one, so that batches are done before
    with pytest.raises(CorpusAtlasInterrupted):
        _atlas(corpus, resume=path)
    assert 0 < len(CorpusAtlas.load(path).windows) < 50
    whole = _atlas(corpus, resume=path)
    for each in ("windows", "entropies", "distances", "weights"):
        torch.testing.assert_close(getattr(whole, each), getattr(atlas, each), rtol=0, atol=0, equal_nan=True)


def test_bad_corpora(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="1 windows"):
        _atlas(_corpus(LENGTH + 3))
    with pytest.raises(CaptureError, match="no tokenizer"):
        _atlas("some text")
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(CaptureError, match=r"a\.txt is no UTF-8, at byte 2"):
        _atlas(tmp_path)
    with pytest.raises(CaptureError, match="cannot be read"):
        _atlas([tmp_path / "none.txt"])
    with pytest.warns(UserWarning, match="ended after 72 of 240"):
        assert _atlas(_corpus(3 * LENGTH), tokens=10 * LENGTH).n_tokens == 3 * LENGTH
    assert _atlas(_corpus(30 * LENGTH), tokens=10 * LENGTH + 3).n_tokens == 10 * LENGTH
    with pytest.raises(CaptureError, match="recent is at least 1"):
        _atlas(_corpus(99), recent=0)


class _Tokenizer:
    """Letters are ids; 0 stands before a text and 1 behind it."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [2 + ord(letter) % 10 for letter in text]
        return {"input_ids": [0, *ids, 1] if add_special_tokens else ids}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "<>abcdefghij"[ids[0]]


def test_texts_and_what_stands_around_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("dedg" * 30)
    (tmp_path / "b.txt").write_text("gfed" * 30)
    model = _model()
    with workbench.attach(model, _Tokenizer()) as wb:
        assert Frame.of(wb) == Frame((0,), (1,))
        how: dict[str, Any] = {"length": LENGTH, "progress": False, "tokens": None, "recent": 4}
        found = workbench.head_atlas_over(wb, tmp_path, **how)
        assert found.n_tokens == 240 // (LENGTH - 2) * (LENGTH - 2)
        assert "⟦" in found.examples.text[0]
        assert workbench.head_atlas_over(wb, ["dedg" * 30, "gfed" * 30], **how).windows.equal(found.windows)


def test_duo_attention_round_trip(atlas: CorpusAtlas, tmp_path: Path) -> None:
    folder = atlas.to_duo_attention(tmp_path / "duo")
    scores, sinks, recent = workbench.analysis.corpus.read_duo_attention(folder)
    assert (sinks, recent) == (1, 4)
    assert torch.allclose(scores, 1 - atlas.scores[SCORES.index("streaming")][None], atol=1e-12)
    theirs = np.clip(np.loadtxt(folder / "full_attention_heads.tsv", dtype=float, delimiter="\t", ndmin=2), 0, 1)
    assert (theirs == scores.numpy()).all()  # as DuoAttention and kvpress read it
    assert json.loads((folder / "config.json").read_text()) == {"sink_size": 1, "recent_size": 4}
    (folder / "full_attention_heads.tsv").write_text("a\tb\n")
    with pytest.raises(FormatError, match="no matrix"):
        workbench.analysis.corpus.read_duo_attention(folder)
    with pytest.raises(FormatError, match="no scores"):
        workbench.analysis.corpus.read_duo_attention(tmp_path)


def test_page(atlas: CorpusAtlas, tmp_path: Path) -> None:
    views = workbench.views.all_of(atlas)
    assert [view.spec.kind for view in views] == ["head_atlas", "table", "table"]
    assert {row["label"].split(" · ")[1] for row in views[2].spec.facts["rows"]} <= {"1", "2", "3", "4"}
    page = Path(atlas.to_html(tmp_path / "atlas.html"))
    assert page.stat().st_size < 15e6
    assert atlas.table.shape[0] == 5
    assert "induction L0H0" in repr(atlas)
