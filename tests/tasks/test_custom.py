"""A user's own task, docstrings, and the metrics that circuits use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.tiny import family, make
from workbench.errors import TaskError
from workbench.metrics import kl_divergence, last_places, logit_diff, probability
from workbench.tasks import TaskBatch, docstring, from_prompts, pieces


def test_docstrings_differ_in_one_token_and_name_their_positions() -> None:
    task = docstring(50, seed=3)
    assert task.examples == docstring(50, seed=3).examples
    assert len({len(pieces(example.prompt)) for example in task}) == 1
    for example in task:
        words, others = pieces(example.prompt), pieces(example.twin)
        assert [i for i, (a, b) in enumerate(zip(words, others, strict=True)) if a != b] == list(example.changed)
        assert example.word_at("C_def") == example.answer.strip()
        assert example.word_at("C_def", twin=True) == example.wrong[0].strip()
        assert example.word_at("A_def") == example.word_at("A_doc")
        assert example.word_at("B_def") == example.word_at("B_doc")
        assert example.word_at("end") == "param"
        assert words.count(example.answer.strip()) == 1
        assert example.wrong[0].strip() not in words


def test_own_prompts_make_a_task() -> None:
    task = from_prompts(
        ["a b c", "a d c"], ["a x c", "a y c"], [" p", [" q", " r"]], [" s", " t"],
        positions={"second": 1, "own": [0, -1]},
    )  # fmt: skip
    assert task[1].answers == (" q", " r")
    assert task.positions("second") == [1, 1]
    assert task.positions("own") == [0, 2]
    assert task.positions("end") == [2, 2]
    assert task[0].changed == (1,)
    assert task[:1].name == "custom"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"twins": ["a b c"]}, "does not differ"),
        ({"twins": ["a b c d"]}, "has 3 words, its twin 4"),
        ({"twins": []}, "1 prompts and 0 twins"),
        ({"answers": " x"}, "answers is str"),
        ({"answers": [" y"]}, "right and wrong"),
        ({"answers": [[]]}, "no answer"),
        ({"wrong": [()]}, "no wrong answer"),
        ({"prompts": [3]}, "are texts"),
        ({"positions": {"far": 3}}, "has 3 words"),
        ({"positions": {"far": [1, 2]}}, "2 of 1 prompts"),
        ({"prompts": [], "twins": [], "answers": [], "wrong": []}, "no prompt"),
    ],
)
def test_lists_that_make_no_task(change: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"prompts": ["a b c"], "twins": ["a d c"], "answers": [" x"], "wrong": [" y"]}
    from_prompts(**good)
    with pytest.raises(TaskError, match=says):
        from_prompts(**{**good, **change})


def test_metrics_follow_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, clean = (torch.randn(3, 4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    answers, wrong = [[1], [2, 5], [0, 3, 6]], [[0, 4], [1], [2]]
    batch = TaskBatch({}, answers=answers, wrong=wrong)
    last, p = logits[:, -1], logits[:, -1].softmax(-1)
    for i in range(3):
        own, other = (sum(last[i, t].exp() for t in one[i]) for one in (answers, wrong))
        assert float(logit_diff(logits, batch)[i]) == pytest.approx(float(torch.log(own / other)))
        assert float(probability(logits, batch)[i]) == pytest.approx(float(sum(p[i, t] for t in answers[i])))
    q = clean[:, -1].softmax(-1)
    expected = (q * (q / p).log()).sum(-1)
    assert torch.allclose(kl_divergence(logits, batch, clean), expected)
    assert bool((kl_divergence(clean, batch, clean).abs() < 1e-12).all())


WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "rug"]


def _tokenizer(template: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    made = Tokenizer(models.WordLevel(special | {word: i + 4 for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, special[name]) for name in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.mark.parametrize(("template", "before"), [("$A", 0), ("<s> $A", 1), ("$A </s>", 0), ("<s> <s> $A </s>", 2)])
def test_prompts_end_where_they_are_gone_on_from(template: str, before: int) -> None:
    """An end token that a tokenizer puts behind each text is not where the answer comes."""
    tokenizer = _tokenizer(template)
    task = from_prompts(
        ["the cat sat on", "the dog ran on the"], ["the dog sat on", "the cat ran on the"], [" mat", " rug"],
        [" rug", " mat"], positions={"animal": 1},
    )  # fmt: skip
    batch = next(task.batches(tokenizer))
    ends = [row[place] for row, place in zip(batch["input_ids"].tolist(), last_places(batch).tolist(), strict=True)]
    assert tokenizer.convert_ids_to_tokens(ends) == ["on", "the"]
    assert task.positions("animal", tokenizer) == [1 + before] * 2
    encoder = next(task.batches(tokenizer, start_token=2))["input_ids"]  # an encoder reads all of it
    assert encoder[1].tolist() == tokenizer("the dog ran on the")["input_ids"]
    plain = _tokenizer("<s> " * before + "$A" if before else "$A")
    for name in ("llama-gqa", "qwen2", "gpt2"):
        model = make(family(name))
        assert torch.equal(task.logit_diff(model, tokenizer), task.logit_diff(model, plain))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_reads_the_end_token_and_the_decoder_goes_on_from_its_start(name: str) -> None:
    """What T5's and BART's tokenizers put behind a text belongs to what is encoded; nothing is put behind `written`."""
    model, tokenizer = make(family(name)), _tokenizer("$A </s>")
    prompts, twins = ["the cat sat on", "the dog ran on the"], ["the dog sat on", "the cat ran on the"]
    task = from_prompts(prompts, twins, [" mat", " rug"], [" rug", " mat"], written=["on the", "the"])
    found = task.logit_diff(model, tokenizer)
    for i, (prompt, written, right, wrong) in enumerate(
        zip(prompts, ["on the", "the"], ["mat", "rug"], ["rug", "mat"], strict=True)
    ):
        ids = [*tokenizer.convert_tokens_to_ids(prompt.split()), tokenizer.eos_token_id]
        said = [model.config.decoder_start_token_id, *tokenizer.convert_tokens_to_ids(written.split())]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([said])).logits[0, -1]
        first, second = (tokenizer.convert_tokens_to_ids(word) for word in (right, wrong))
        assert float(found[i]) == pytest.approx(float(logits[first] - logits[second]), abs=1e-4)


def test_a_tokenizer_that_hides_where_a_text_ends_is_refused() -> None:
    class Odd:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [5, 6] if add_special_tokens else [7]}

    task = from_prompts(["a b"], ["a c"], [" d"], [" e"])
    with pytest.raises(TaskError, match="its end cannot be told"):
        next(task.batches(Odd()))
