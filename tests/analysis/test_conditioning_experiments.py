"""Conditioning on rules, where the answers are known, and in the context of the demonstration model; MQAR."""

from __future__ import annotations

import pytest
import torch

import workbench
from workbench.analysis.conditioning.experiments import Conditioning
from workbench.analysis.conditioning.schedules import SCHEDULES
from workbench.errors import CaptureError, TaskError, WorkbenchError
from workbench.tasks import mqar, mqar_tokens


def test_delta_conditions_as_rescorla_and_wagner_say():
    found = workbench.conditioning(rules=("hebb", "delta"), trials=20, d=256, progress=False)
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
    assert control == pytest.approx(0.5, abs=0.1)
    assert found.curves["overexpectation"][1, 0, -1].item() == pytest.approx(0.5, abs=0.1)
    assert found.silent[found.experiments.index("latent_inhibition")]
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
