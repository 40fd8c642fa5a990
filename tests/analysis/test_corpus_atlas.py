"""The atlas of heads over a corpus: planted heads lead in their score, and numbers are those of plain definitions."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import workbench
from support.judges import missing, part
from support.tiny import small_llama, some_ids
from workbench import CaptureError, Circuit, CorpusAtlas, CorpusAtlasInterrupted, FormatError, WorkbenchError
from workbench.analysis.corpus import run, running
from workbench.analysis.corpus.measuring import SCORES
from workbench.analysis.corpus.texts import Frame

VOCABULARY, LENGTH, WIDTH = 12, 24, 40
RESUMED = ("windows", "entropies", "distances", "totals", "weights", "places", "example_ids")
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
            for name in RESUMED:
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
    for each in RESUMED:
        torch.testing.assert_close(getattr(whole, each), getattr(atlas, each), rtol=0, atol=0, equal_nan=True)


def test_of_equal_looks_the_first_stay_also_where_it_was_gone_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus that says everything several times over: its windows are told apart by their place alone."""
    corpus, path = _corpus(20 * LENGTH).view(20, LENGTH)[torch.arange(40) * 7 % 20].flatten(), tmp_path / "atlas"
    whole = _atlas(corpus, n_examples=6, batch=4)
    windows, weights = whole.places[..., 0], whole.weights
    tied = (weights[:, 1:] == weights[:, :-1]) & (weights[:, 1:] >= 0)
    assert tied.any()
    assert (windows[:, 1:] > windows[:, :-1])[tied].all()
    monkeypatch.setattr("workbench.analysis.corpus.run._SAVED_EVERY", 0.0)

    def broken() -> Any:
        yield corpus[: 17 * LENGTH]
        raise KeyboardInterrupt

    with pytest.raises(CorpusAtlasInterrupted):
        _atlas(broken(), resume=path, n_examples=6, batch=4)
    again = _atlas(corpus, resume=path, n_examples=6, batch=4)
    for each in RESUMED:
        torch.testing.assert_close(getattr(again, each), getattr(whole, each), rtol=0, atol=0, equal_nan=True)


def test_bad_corpora(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="1 windows"):
        _atlas(_corpus(LENGTH + 3))
    with pytest.raises(CaptureError, match="no tokenizer"):
        _atlas("some text")
    with pytest.raises(CaptureError, match="not None"):
        _atlas(None)
    with (
        workbench.attach(_model(), _Tokenizer()) as wb,
        pytest.raises(CaptureError, match=r"half of a character, U\+D800 at 2"),
    ):
        workbench.head_atlas_over(wb, ["ab\ud800"], length=LENGTH, progress=False)
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(CaptureError, match=r"a\.txt is no UTF-8, at byte 2"):
        _atlas(tmp_path)
    with pytest.raises(CaptureError, match="no UTF-8") as caught:
        _atlas([_corpus(20 * LENGTH), tmp_path / "a.txt"], resume=tmp_path / "atlas")
    assert "resume= goes on from it" in caught.value.__notes__[0]
    assert len(CorpusAtlas.load(tmp_path / "atlas").windows) == 16  # two whole batches
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


def test_unknown_words_are_no_copies(atlas: CorpusAtlas) -> None:
    """Token 3 as that of unknown words: what its rows gave is not counted, all else stays."""
    unknown, model = 3, _model()
    corpus = _corpus(50 * LENGTH + 5)
    windows = corpus[: 50 * LENGTH].view(50, LENGTH)
    with workbench.attach(model, SimpleNamespace(unk_token_id=unknown, decode=lambda ids, **_: str(ids[0]))) as wb:
        found = workbench.head_atlas_over(wb, corpus, length=LENGTH, recent=4, sinks=1, progress=False, tokens=None)
        with wb.capture((), limit=None) as cap:
            model(windows)
    assert found.n_unknown == int((windows == unknown).sum())
    assert f"{found.n_unknown / found.n_tokens:.0%} of them unknown" in repr(found)
    weights = cap[0].pattern.dense()[7].double()
    row = windows[7].tolist()
    copies = {i: [j for j in range(i) if row[j] == row[i]] for i in range(LENGTH) if row[i] != unknown}
    wanted = torch.stack([weights[:, i, at].sum(-1) for i, at in copies.items() if at]).mean(0)
    torch.testing.assert_close(found.windows[7, SCORES.index("duplicate")].double(), wanted, atol=1e-5, rtol=0)
    for name in ("previous", "sink", "streaming"):
        assert torch.equal(found.windows[:, SCORES.index(name)], atlas.windows[:, SCORES.index(name)])
    for h, e in (found.weights >= 0).nonzero().tolist():
        window, query, key = found.places[h, e].tolist()
        assert unknown not in (windows[window, query], windows[window, key])


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


def test_mib_round_trip(atlas: CorpusAtlas, tmp_path: Path) -> None:
    """Of a model whose heads share keys; MIB's own reader wants an edge for each head, with a number."""
    model = small_llama()
    with workbench.attach(model) as wb:
        found = workbench.head_atlas_over(wb, some_ids(1, 90)[0], length=30, recent=4, progress=False, tokens=None)
        path = found.to_mib(tmp_path / "heads.json", wb, "previous", 3)
        with pytest.raises(WorkbenchError, match="of another model"):
            atlas.to_mib(tmp_path / "none.json", wb)
    read = Circuit.from_mib(path)
    assert set(read.heads) == {f"L{layer}H{head}" for layer, head in found.leading("previous", 3)}
    assert not read.edges_in.any()
    assert read.edge_scores.isnan().all()
    for h, (layer, head) in enumerate(zip(found.layers, found.numbers, strict=True)):
        score = read.node_scores[read.graph.sender_index[f"a{layer}.h{head}"]]
        assert score == found.scores[SCORES.index("previous"), h]
    told = json.loads(path.read_text())
    assert "score" not in told["nodes"]["m0"]
    assert "a0.h1->a1.h3<k>" in told["edges"]
    assert all(edge["score"] == 0 for edge in told["edges"].values())
    again = found.to_mib(tmp_path / "again.json", read, "previous", 3)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(WorkbenchError, match="not those of this model's graph"):
        atlas.to_mib(tmp_path / "none.json", read)


def test_kvpress_reads_the_scores(atlas: CorpusAtlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own press, with our folder where it would ask the network for DuoAttention's; it also caches what it read."""
    caching = SimpleNamespace(LRUCache=lambda maxsize: {}, cached=lambda cache, key: lambda function: function)
    monkeypatch.setitem(sys.modules, "cachetools", caching)
    try:
        module = part("kvpress.presses.duo_attention_press")
    except ImportError as error:
        missing(error)
    folder = atlas.to_duo_attention(tmp_path / "duo")

    class Answer:
        def __init__(self, url: str) -> None:
            self.text = (folder / url.rsplit("/", 1)[1]).read_text()

        def json(self) -> Any:
            return json.loads(self.text)

    model = nn.Module()
    model.config = SimpleNamespace(name_or_path="ours")
    monkeypatch.setattr(module.requests, "get", Answer)
    monkeypatch.setitem(module.PATTERNS_DICT, "ours", "ours")
    sinks, recent, scores = module.DuoAttentionPress.load_attention_pattern(model)
    ours, *sizes = workbench.analysis.corpus.read_duo_attention(folder)
    assert [sinks, recent] == sizes
    assert (np.atleast_2d(scores) == ours.numpy()).all()


def test_headvis_round_trip(atlas: CorpusAtlas, tmp_path: Path) -> None:
    """Numbers over all positions, from dense maps; windows whose weights are those of the maps."""
    model, windows = _model(), _corpus(50 * LENGTH).view(50, LENGTH)
    with workbench.attach(model) as wb:
        folder = atlas.to_headvis(tmp_path / "ours", wb, dataset="pieces")
        with wb.capture((), limit=None) as cap:
            model(windows)
    weights = cap[0].pattern.dense().double()
    at = torch.arange(LENGTH)
    apart = (at[:, None] - at).abs().double()
    distance = (weights * apart).sum(-1)
    wanted = {
        "self_attention_score": weights.diagonal(dim1=-2, dim2=-1).mean((0, 2)),
        "prev_token_score": weights.diagonal(-1, -2, -1).mean((0, 2)),
        "pattern_entropy": -weights.xlogy(weights).sum(-1).mean((0, 2)),
        "qk_distance": distance.mean((0, 2)),
        "qk_distance_variance": (weights * apart.square()).sum((0, 2, 3)) / (50 * LENGTH) - distance.mean((0, 2)) ** 2,
        "induction_score": atlas.scores[SCORES.index("induction")],
        "streaming_score": atlas.scores[SCORES.index("streaming")],
    }
    found = workbench.analysis.corpus.read_headvis(folder)
    assert found["head"].tolist() == list(range(5))
    for name, each in wanted.items():
        np.testing.assert_allclose(found[name], each, atol=1e-4, err_msg=name)
    assert found.copying_score.isna().all()  # it has no embedding that is a site's
    for row in found.itertuples():
        told = json.loads((folder / "heads" / f"L{row.layer}H{row.head}.json").read_text())
        assert [one["sequence_id"] for one in told["sequences"]] == [
            w for w in atlas.places[row.head, :, 0].tolist() if w >= 0
        ]
        if not told["sequences"]:
            assert row.head in (PLANTED["sink"], 4)  # the other looks at all keys alike, the first among them
            continue
        for one in told["sequences"]:
            own = weights[one["sequence_id"], row.head].flatten()[one["attention_indices"]]
            np.testing.assert_allclose(one["attention_values"], own, atol=1e-4)
            assert one["tokens"] == [str(i) for i in windows[one["sequence_id"]].tolist()]
        assert sum(told["qk_distance_histogram"]["bin_values"]) == pytest.approx(
            sum(sum(one["attention_values"]) for one in told["sequences"]), abs=0.01
        )
        assert told["top_key_tokens"][0]["weight"] >= told["top_key_tokens"][-1]["weight"] > 0
    config = json.loads((folder / "config.json").read_text())
    run = config["pipeline_config"]  # without which Neuronpedia imports nothing
    assert (run["dataset_name"], run["n_sequences"], run["seq_len"], run["dtype"]) == ("pieces", 50, LENGTH, "float32")
    assert run["model_name"] == config["model_name"] == "Planted"
    assert run["attn_implementation"]


def test_headvis_without_the_model_and_with_another(atlas: CorpusAtlas, tmp_path: Path) -> None:
    folder = atlas.to_headvis(tmp_path / "numbers")
    assert json.loads((folder / "heads" / "L0H0.json").read_text())["sequences"] == []
    other = _model()
    with torch.no_grad():
        other.embed.weight.add_(1)
    with workbench.attach(other) as wb, pytest.raises(WorkbenchError, match="another model"):
        atlas.to_headvis(tmp_path / "other", wb)
    twice = replace(atlas, numbers=(0, 1, 2, 3, 3))
    with pytest.raises(WorkbenchError, match="L0H3 are several heads"):
        twice.to_headvis(tmp_path / "twice")
    with pytest.raises(FormatError, match="no folder of HeadVis"):
        workbench.analysis.corpus.read_headvis(tmp_path)
    (folder / "scatter_data.json").write_text('[{"layer": 0, "head": -1}]')
    with pytest.raises(FormatError, match="a whole number"):
        workbench.analysis.corpus.read_headvis(folder)


def test_page(atlas: CorpusAtlas, tmp_path: Path) -> None:
    views = workbench.views.all_of(atlas)
    assert [view.spec.kind for view in views] == ["head_atlas", "table", "table"]
    assert {row["label"].split(" · ")[1] for row in views[2].spec.facts["rows"]} <= {"1", "2", "3", "4"}
    page = Path(atlas.to_html(tmp_path / "atlas.html"))
    assert page.stat().st_size < 15e6
    assert atlas.table.shape[0] == 5
    assert "induction L0H0" in repr(atlas)
