"""Conditioning on rules, where the answers are known, and in the context of the demonstration model; MQAR."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers as hf

import workbench
from support.tiny import family, make
from workbench.analysis.conditioning.experiments import Conditioning
from workbench.analysis.conditioning.in_context import run_model
from workbench.analysis.conditioning.schedules import SCHEDULES, schedules
from workbench.errors import CaptureError, TaskError, WorkbenchError
from workbench.tasks import mqar, mqar_tokens
from workbench.tasks.induction import WORDS


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Hundreds of small writes: on a busy machine several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_delta_conditions_as_rescorla_and_wagner_say():
    found = workbench.conditioning(rules=("hebb", "delta"), trials=12, d=128, repeats=32, progress=False)
    effect = dict(zip(found.experiments, found.effect.tolist(), strict=True))
    assert tuple(effect) == SCHEDULES
    assert effect["acquisition"] == [1, 1]
    assert effect["extinction"] == [0, 1]
    assert effect["blocking"] == [0, 1]
    assert effect["overshadowing"] == [0, 1]
    assert effect["overexpectation"] == [-1, 1]
    assert effect["latent_inhibition"] == [0, 0]
    blocked, control = found.curves["blocking"][1, :, -1].tolist()
    assert abs(blocked) < 0.05
    grown = found.curves["blocking"][0, 0]  # Hebb's rule: once with each of the twelve compounds, whatever A knows
    assert grown[12].item() == pytest.approx(0.0, abs=0.5)
    assert grown[-1].item() == pytest.approx(12.0, abs=0.8)
    assert control == pytest.approx(0.5, abs=0.1)
    assert found.curves["overexpectation"][1, 0, -1].item() == pytest.approx(0.5, abs=0.1)
    assert [name for name, why in zip(found.experiments, found.silent, strict=True) if why] == [
        "second_order", "latent_inhibition",
    ]  # fmt: skip
    assert found.best is None


def test_acquisition_under_delta_is_a_geometric_approach():
    found = workbench.conditioning(
        experiments=["acquisition"], rules=("delta",), trials=6, options={"delta": {"rate": 0.25}}, progress=False
    )
    wanted = 1 - 0.75 ** torch.arange(7, dtype=torch.float64)
    torch.testing.assert_close(found.curves["acquisition"][0, 0], wanted)


def test_in_context(tmp_path):
    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb:
        found = workbench.conditioning(
            wb, experiments=["acquisition", "latent_inhibition"], rules=("delta", "softmax"), trials=4, repeats=16,
            progress=False,
        )  # fmt: skip
        with pytest.raises(CaptureError, match="context has 128"):
            workbench.conditioning(wb, experiments="acquisition", trials=70, repeats=2, progress=False)
        with pytest.raises(CaptureError, match="4 different tokens cannot be drawn from 3"):
            workbench.conditioning(wb, experiments="acquisition", cues=[5, 6, 7], progress=False)
    assert found.subjects == ("delta", "softmax", "model")
    assert found.effect[0, -1] == 1
    assert found.curves["acquisition"].shape == (3, 2, 5)
    assert set(found.correlation) == {"delta", "softmax"}
    again = Conditioning.load(found.save(tmp_path / "conditioning.safetensors"))
    assert torch.equal(again.contrast, found.contrast)
    assert again.phases == found.phases


def _gpt2() -> torch.nn.Module:
    return make(family("gpt2"))


def test_in_context_is_the_probability_after_each_trial_by_itself():
    model, trials = _gpt2(), schedules(2)["overexpectation"].experimental
    with workbench.attach(model) as wb:
        found = run_model(wb, trials, "A", range(3, 20), range(20, 40), repeats=3, seed=5, batch=4)
    generator = torch.Generator().manual_seed(5)  # the same draws, one after the other
    for strengths in found:
        a, b, *_ = (3 + torch.randperm(17, generator=generator)[:4]).tolist()
        outcome, _ = (20 + torch.randperm(20, generator=generator)[:2]).tolist()
        context: list[int] = []
        for i, trial in enumerate((None, *trials)):
            if trial is not None:
                order = torch.randperm(len(trial.cues), generator=generator).tolist()
                context += [{"A": a, "B": b}[trial.cues[j]] for j in order] + [outcome]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*context, a]])).logits[0, -1].double()
            assert strengths[i].item() == pytest.approx(logits.softmax(-1)[outcome].item(), rel=1e-4)


def test_agreement_is_over_what_the_theory_speaks_of():
    settings = {"rules": ("hebb", "delta"), "trials": 2, "repeats": 4, "progress": False}
    cues = {"cues": range(3, 30), "outcomes": range(30, 60)}
    with workbench.attach(_gpt2()) as wb:
        spoken = workbench.conditioning(wb, experiments=["acquisition", "blocking"], **cues, **settings)
        every = workbench.conditioning(
            wb, experiments=["acquisition", "blocking", "second_order", "latent_inhibition"], **cues, **settings
        )
        silent = workbench.conditioning(wb, experiments="second_order", **cues, **settings)
    assert every.agreement == spoken.agreement
    assert every.correlation == spoken.correlation
    for s, rule in enumerate(settings["rules"]):
        same = (spoken.effect[:, s] == spoken.effect[:, -1]).double().mean().item()
        assert spoken.agreement[rule] == pytest.approx(same)
    assert silent.agreement == silent.correlation == {}
    assert silent.best is None


@pytest.mark.parametrize(
    ("name", "says"), [("bert", "change with later tokens"), ("t5", "encoder would be given nothing")]
)
def test_experiments_in_context_need_a_causal_language_model(name, says):
    model = hf.BertForMaskedLM(make(family("bert")).config).eval() if name == "bert" else make(family(name))
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match=says):
        workbench.conditioning(wb, experiments="blocking", trials=1, repeats=2, progress=False)


def test_the_words_of_mqar_are_cues():
    """Shown often enough, a key's value is what the demonstration model expects after the key."""
    model, tokenizer = workbench.models.load("demo-lm")
    ids = [
        [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        for words in (WORDS[:36], WORDS[36:])
    ]
    assert all(len(one) == 1 for side in ids for one in side)
    cues, outcomes = ([one[0] for one in side] for side in ids)
    with workbench.attach(model, tokenizer) as wb:
        found = workbench.conditioning(
            wb, experiments="acquisition", rules=("delta",), trials=4, cues=cues, outcomes=outcomes, repeats=16,
            progress=False,
        )  # fmt: skip
    assert found.effect[0, -1] == 1
    assert found.curves["acquisition"][-1, 0, -1] > found.curves["acquisition"][-1, 0, 0]


def test_bad_experiments():
    with pytest.raises(WorkbenchError, match='did you mean "blocking"'):
        workbench.conditioning(experiments="bloking", progress=False)
    with pytest.raises(WorkbenchError, match=r"reaches \d\.\d* and must stay below 2"):
        workbench.conditioning(
            experiments="blocking", rules=("delta",), options={"delta": {"rate": 1.2}}, progress=False
        )


def test_mqar_asks_for_the_value_of_the_key():
    for example in mqar(30, 0, pairs=5, asked=3):
        words = example.prompt.split()
        shown = dict(zip(words[:10:2], words[1:10:2], strict=True))
        assert example.answer == f" {shown[words[-1]]}"
        assert example.wrong != example.answers
        assert [words[i] == w for i, w in enumerate(example.twin.split())].count(False) == 1
        assert words[example.positions["key"]] == words[-1]


def test_mqar_tokens():
    ids, labels = mqar_tokens(50, 0, length=64, pairs=16, vocab=256)
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        shown = dict(zip(row[:32:2], row[1:32:2], strict=True))
        asked = [i for i, x in enumerate(label) if x != -100]
        assert len(shown) == len(asked) == 16
        assert all(label[i] == shown[row[i]] for i in asked)
        assert min(asked) >= 32
    assert ids[:, :32:2].max() < 128 <= ids[:, 1:32:2].min()
    with pytest.raises(TaskError, match="at least 68"):
        mqar_tokens(1, 0, length=64, pairs=17)
    with pytest.raises(TaskError, match="99 pairs"):
        mqar(1, 0, pairs=99)
