"""One `Metric` for tasks, importance, circuits and sweeps: each name means the same numbers wherever it is given."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.modeling_outputs import MaskedLMOutput

import workbench
from support.circuits import Words, random_task, tiny
from support.tiny import family, make
from workbench.analysis.circuits.engine.edges import run_nodes
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.errors import TaskError
from workbench.metrics import METRICS, Metric, TaskBatch, as_metric, as_metrics
from workbench.metrics.divergences import jensen_shannon, kullback_leibler

OF_LOGITS = [name for name, metric in METRICS.items() if metric.from_logits]


def batch_and_logits() -> tuple[TaskBatch, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = TaskBatch({"input_ids": ids}, answers=[[2, 3], [1]], wrong=[[0], [4]])
    now, clean = (SimpleNamespace(logits=torch.randn(2, 3, 8, generator=generator)) for _ in range(2))
    return batch, now, clean


def test_ready_metrics_are_what_their_names_say() -> None:
    batch, now, clean = batch_and_logits()
    last, before = (output.logits[:, -1].double().softmax(-1) for output in (now, clean))
    right = torch.stack([last[0, [2, 3]].sum(), last[1, 1]])
    wrong = torch.stack([last[0, 0], last[1, 4]])
    middle = (last + before) / 2
    expected = {
        "loss": -right.log(), "probability": right, "logit_diff": (right / wrong).log(),
        "accuracy": torch.tensor([float(last[0].argmax()) in (2, 3), float(last[1].argmax()) == 1]).double(),
        "kl_divergence": (before * (before / last).log()).sum(-1),
        "js_divergence": ((last * (last / middle).log()).sum(-1) + (before * (before / middle).log()).sum(-1)) / 2,
    }  # fmt: skip
    assert set(OF_LOGITS) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(METRICS[name](now, batch, clean).double(), values, atol=1e-6, rtol=1e-5)


def test_divergences_take_logits_that_rule_a_class_out() -> None:
    sure, even = torch.tensor([0.0, -1e9]), torch.tensor([0.0, 0.0])
    assert float(kullback_leibler(even, sure)) == pytest.approx(math.log(2))
    assert float(jensen_shannon(sure, sure)) == 0


def test_harm_is_positive_where_the_model_got_worse() -> None:
    better, worse = torch.tensor([2.0]), torch.tensor([1.0])
    assert METRICS["logit_diff"].harm(edited=worse, clean=better) > 0
    assert METRICS["loss"].harm(edited=better, clean=worse) > 0
    assert METRICS["kl_divergence"].harm(edited=worse, clean=torch.zeros(1)) > 0


def test_names_functions_and_metrics_become_the_same_metric() -> None:
    for name, metric in METRICS.items():
        assert as_metric(name) is as_metric(metric) is as_metric(metric.function) is metric
    assert as_metric("loss", "mine").name == "mine"
    own = as_metrics({"a": lambda output, batch: output, "b": Metric("c", len, higher_is_better=False)})
    assert [(name, metric.name, metric.sign) for name, metric in own.items()] == [("a", "a", 1), ("b", "b", -1)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("los", 'no metric "los"'),
        (3, "is int"),
        ([], "no metric"),
        (["loss", "loss"], "same name"),
        ({"a": 1}, '"a" is int'),
    ],
)
def test_what_is_no_metric_is_refused(given: Any, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        as_metrics(given)


def test_a_metric_must_give_a_number_for_each_example() -> None:
    with pytest.raises(TaskError, match=r"gave \[\], expected one real number for each of the 2"):
        Metric("total", lambda output, batch: output.sum()).examples(torch.ones(2), {}, 2)
    with pytest.raises(TaskError, match="gave float"):
        Metric("total", lambda output, batch: 1.0).examples(torch.ones(2), {}, 2)  # type: ignore[arg-type,return-value]


def test_batches_without_targets_are_refused() -> None:
    logits = torch.zeros(2, 3, 5)
    with pytest.raises(TaskError, match="cannot be told"):
        METRICS["loss"](logits, {"pixel_values": torch.zeros(2, 1)})
    with pytest.raises(TaskError, match="example 1 has no place"):
        METRICS["loss"](
            logits, {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
        )


def _masked_lm() -> hf.BertForMaskedLM:
    config = hf.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    return hf.BertForMaskedLM(config).eval()


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "t5", "bart"])
def test_losses_of_labelled_tokens_are_the_model_s_own(name: str) -> None:
    """Masked language models and encoder-decoders say tokens at their own place, even where labels repeat the input."""
    model = _masked_lm() if name == "bert" else make(family(name))
    ids = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    some = ids.masked_fill(torch.arange(7) % 3 != 1, -100)
    for labels in (ids, some):
        batch = {"input_ids": ids, "labels": labels}
        with torch.no_grad():
            output = model(**batch)
        torch.testing.assert_close(METRICS["loss"](output, batch).mean(), output.loss, atol=1e-5, rtol=1e-5)


def test_masked_language_models_need_labels_and_take_no_prompts_to_go_on_from() -> None:
    ids, now, clean = torch.tensor([[5, 6, 7]]), *(MaskedLMOutput(logits=torch.randn(1, 3, 9)) for _ in range(2))
    with pytest.raises(TaskError, match="predicts tokens in their place: put the masked tokens into labels"):
        METRICS["loss"](now, {"input_ids": ids})
    by_hand = kullback_leibler(now.logits, clean.logits).mean(-1)
    torch.testing.assert_close(METRICS["kl_divergence"](now, {"input_ids": ids}, clean), by_hand)
    batch = TaskBatch({"input_ids": ids}, answers=[[2]], wrong=[[3]], continued=True)
    with pytest.raises(TaskError, match="predicts the tokens it is given"):
        METRICS["logit_diff"](now, batch)


@pytest.fixture(scope="module")
def grouped() -> Any:
    with workbench.attach(tiny("llama-gqa"), Words()) as wb:
        yield wb


@pytest.mark.parametrize("name", OF_LOGITS)
def test_every_analysis_measures_the_same(grouped: Any, name: str) -> None:
    task = random_task(6, 7, 60, lengths=2)
    batches = list(task.batches(grouped.tokenizer, size=4))
    swept = workbench.run_sweep(grouped, [workbench.Variant("L0H1")], batches, name, progress=False)
    importance = workbench.head_importance(grouped, batches, name, "zero", heads="L0H1", progress=False)
    metric = METRICS[name]
    torch.testing.assert_close(importance.examples("zero")[0], metric.harm(swept.values[0, 0], swept.clean[0]))
    with open_setup(grouped, task, name, batch_size=4) as setup:
        head = torch.ones(1, len(setup.graph.senders), dtype=torch.bool)
        head[0, setup.graph.sender_index["a0.h1"]] = False
        values = run_nodes(setup, head, "zero", progress=False)
    torch.testing.assert_close(values[0], swept.values[0, 0], atol=1e-6, rtol=1e-5)


def test_circuits_refuse_metrics_of_hidden_states(grouped: Any) -> None:
    with pytest.raises(TaskError, match='"representation" reads more'):
        workbench.find_circuit(grouped, random_task(3, 6, 60), "eap", metric="representation", progress=False)
