"""Retrieval and streaming scores, compared with the definitions on whole maps in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.tiny import eager_twin, family, make
from support.zoo.family import ids
from workbench import CaptureError, RetrievalScores, StreamingScores, attach, retrieval_scores, streaming_scores
from workbench.kernels.patterns import Pattern


def _maps(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """[head, query, key] of each layer."""
    with torch.no_grad():
        return [a[0] for a in eager_twin(model)(input_ids=tokens[None], output_attentions=True).attentions]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_retrieval_by_hand(name: str) -> None:
    model = make(family(name)).double()
    needle = [41, 7, 7, 30, 12]
    prompts = [[5, 9, *needle, 8, 20, 31], [*needle, *ids(1, 9)[0].tolist()]]
    answers = [needle, [7, 30, 50]]
    with attach(model) as wb:
        found = retrieval_scores(wb, prompts, answers, needle=[needle, needle])
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = torch.tensor(prompt + answer)
        start = 2 if i == 0 else 0
        maps = torch.cat(_maps(model, tokens))
        for head, a in enumerate(maps):
            copied = set()
            for at, written in enumerate(answer, len(prompt)):
                key = int(a[at - 1].argmax())
                if start <= key < start + 5 and int(tokens[key]) == written:
                    copied.add(key)
            assert float(found.scores[head, i]) == pytest.approx(len(copied) / 5)
    assert found.needles == (5, 5)
    assert found.lengths == (10, 14)
    assert found.answers == (5, 3)
    assert float(found.scores.max()) > 0  # random models copy now and then, so that this is no test of zeros


def test_a_planted_retrieval_head_is_found() -> None:
    """One head asks for the position seven before, where the next token of the needle stands; the other is flat."""
    n, vocabulary = 16, 16
    config = hf.GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=vocabulary, n_positions=n, bos_token_id=1,
                           eos_token_id=2)  # fmt: skip
    model = hf.GPT2LMHeadModel(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        block = model.transformer.h[0]
        block.ln_1.weight.fill_(1)
        model.transformer.wte.weight[:, :16] = torch.eye(16)
        model.transformer.wpe.weight[:, 16:32] = torch.eye(16)
        # The first head has channels 0 to 31: the query at i is what the key at i − 7 is.
        for i in range(7, n):
            block.attn.c_attn.weight[16 + i, i - 7] = 30
        block.attn.c_attn.weight[16:32, 64:80] = 30 * torch.eye(16)
    needle = [4, 9, 3, 12]
    prompt = [*needle, 5, 6, 8, 2]  # the needle at 0 to 3; its first token is written from position 7, and so on
    with attach(model) as wb:
        found = retrieval_scores(wb, prompt, needle)
    assert float(found.scores[0, 0]) == 1
    assert float(found.scores[1, 0]) <= 0.25  # flat rows have their first key as the largest


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_streaming_by_hand(name: str) -> None:
    model = make(family(name)).double()
    tokens, sinks, recent = ids(1, 90)[0][:60], 3, 5
    with attach(model) as wb:
        found = streaming_scores(wb, [tokens, tokens[:31]], sinks=sinks, recent=recent)
        with torch.no_grad(), wb.capture((), values=True) as cap:
            model(input_ids=tokens[None], use_cache=False)
    at = 0
    for site in cap:
        a = site.pattern.dense()[0].double()  # equal to the model's own, as other tests show
        v = site.pattern.values[0].double().repeat_interleave(len(a) // site.pattern.values.shape[1], 0)
        i, j = torch.arange(60)[:, None], torch.arange(60)
        first, near = (j < sinks) & (j <= i), (j >= sinks) & (j <= i) & (i - j < recent)
        lost = sinks + recent
        on_sinks, on_near = (a * first).sum(-1)[:, lost:], (a * near).sum(-1)[:, lost:]
        kept = a * (first | near)
        made, z = (kept / kept.sum(-1, keepdim=True)) @ v, a @ v
        error = ((z - made)[:, lost:].square().sum((1, 2)) / z[:, lost:].square().sum((1, 2))).sqrt()
        heads = slice(at, at + len(a))
        close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found.sink[heads, 0], on_sinks.mean(-1), **close)
        torch.testing.assert_close(found.near[heads, 0], on_near.mean(-1), **close)
        torch.testing.assert_close(found.error[heads, 0], error, **close)
        at += len(a)
    assert found.lengths == (60, 31)


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss"])
def test_a_softmax_over_the_kept_keys_is_what_is_measured(name: str) -> None:
    """The same from scores: softmax over sinks and recent keys alone, and over sink logits where there are some."""
    model, tokens = make(family(name)), ids(1, 40)[0]
    with attach(model) as wb:
        found = streaming_scores(wb, tokens, sinks=2, recent=4)
        with torch.no_grad(), wb.capture((), values=True) as cap:
            model(input_ids=tokens[None], use_cache=False)
    pattern = cap[-1].pattern  # gpt-oss has windows in the layer before
    facts, state = pattern.state()
    q, k, v = (each[0].double() for each in (state["q"], state["k"], pattern.values))
    group = len(q) // len(k)
    scores = q @ k.repeat_interleave(group, 0).mT * facts["scale"]
    i, j = torch.arange(40)[:, None], torch.arange(40)
    logits = state["sinks"] if "sinks" in state else torch.full((len(q),), -torch.inf)
    z = []
    for seen in (j <= i, (j <= i) & ((j < 2) | (i - j < 4))):
        whole = torch.cat([scores.masked_fill(~seen, -torch.inf), logits.double()[:, None, None].expand(-1, 40, 1)], -1)
        z.append((whole.softmax(-1)[..., :-1] @ v.repeat_interleave(group, 0))[:, 6:])
    error = ((z[0] - z[1]).square().sum((1, 2)) / z[0].square().sum((1, 2))).sqrt()
    torch.testing.assert_close(found.error[-len(error) :, 0], error, rtol=1e-3, atol=1e-5)


def test_no_map_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pattern, "dense", lambda *_, **__: pytest.fail("a dense map"))
    with attach(make(family("gpt2"))) as wb:
        tokens = ids(1, 40)[0]
        streaming_scores(wb, tokens, sinks=2, recent=4)
        retrieval_scores(wb, tokens[:30], tokens[30:], needle=tokens[:5])


def test_bad_input_is_named() -> None:
    tokens = ids(1, 20)[0].tolist()
    with attach(make(family("gpt2"))) as wb:
        with pytest.raises(CaptureError, match="needle of prompt 0 is not in it"):
            retrieval_scores(wb, tokens, [59, 59, 59])
        with pytest.raises(CaptureError, match="2 answers for 1 prompts"):
            retrieval_scores(wb, tokens, [[5], [6]])
        with pytest.raises(CaptureError, match="both texts, or both ids"):
            retrieval_scores(wb, tokens, "word")
        with pytest.raises(CaptureError, match="no tokenizer"):
            retrieval_scores(wb, "a prompt", " word")
        with pytest.raises(CaptureError, match="prompt 0 has 20 tokens"):
            streaming_scores(wb, tokens, sinks=4, recent=16)
        with pytest.raises(CaptureError, match="recent from 1"):
            streaming_scores(wb, tokens, recent=0)
        with pytest.raises(CaptureError, match="no prompts"):
            streaming_scores(wb, [])
    for name, said in (("vit", "does not run on token ids alone"), ("mamba", "no self-attention")):
        with attach(make(family(name))) as wb, pytest.raises(CaptureError, match=said):
            streaming_scores(wb, tokens, sinks=1, recent=2)
    with attach(make(family("llava"))) as wb:  # its vision tower does not fire
        assert len(streaming_scores(wb, tokens, sinks=1, recent=2).layers) < sum(site.n_heads or 0 for site in wb.sites)
    with attach(make(family("t5"))) as wb, pytest.raises(CaptureError, match="not of an encoder-decoder"):
        streaming_scores(wb, tokens, sinks=1, recent=2)


def test_texts_and_results(tmp_path: Path) -> None:
    """Heads of demo-lm that copy a repeated text are those of the layer with its induction heads."""
    model, tokenizer = workbench.models.load("demo-lm")
    words = [workbench.tasks.induction(1, seed=seed)[0].prompt.split()[:24] for seed in range(3)]
    prompts = [" ".join([*w, w[0]]) for w in words]
    answers = [" " + " ".join(w[1:16]) for w in words]
    with attach(model, tokenizer) as wb:
        found = retrieval_scores(wb, prompts, answers)
        streaming = streaming_scores(wb, [p + a for p, a in zip(prompts, answers, strict=True)], sinks=2, recent=8)
        with pytest.raises(CaptureError, match="changes the tokens of the prompt"):
            retrieval_scores(wb, prompts[0], "")
    assert found.needles == found.answers == (15, 15, 15)
    assert min(found.right) > 0.9
    best = found.table.head(6)
    assert set(best["layer"]) == {1}
    assert float(found.table["score"].iloc[-1]) == 0
    again = RetrievalScores.load(found.save(tmp_path / "r.safetensors"))
    assert again.table.equals(found.table)
    other = StreamingScores.load(streaming.save(tmp_path / "s.safetensors"))
    assert other.table.equals(streaming.table)
    for result in (found, streaming):
        assert "48 heads, 3 prompts" in repr(result)
        assert len(result.to_png()) > 1000
        assert "<html" in str(result.to_html())
