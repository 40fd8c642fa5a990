"""What cannot be explained is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import workbench
from support.encoder_decoders import HYPOTHESIS, encoder_decoder
from support.tiny import family, make
from support.toy_speech import identity_speech
from workbench import saliency
from workbench.analysis.saliency.normalising import paired_min_max, pool, spread_out, standardised
from workbench.analysis.saliency.segments import runs
from workbench.errors import WorkbenchError


def refused(words: str, name: str = "whisper", change: Any = None, method: str = "spes", **options: Any) -> None:
    model, inputs = encoder_decoder(name)
    given = inputs if change is None else change(inputs)
    with workbench.attach(model) as wb, pytest.raises(WorkbenchError, match=words):
        saliency(wb, given, method, **({"hypothesis": HYPOTHESIS, "progress": False} | options))


def test_models_and_inputs() -> None:
    model = make(family("gpt2"))
    with workbench.attach(model) as wb, pytest.raises(WorkbenchError, match="no encoder-decoder"):
        workbench.cross_attention(wb, {"input_ids": torch.tensor([[3, 4]])})
    refused("silent", change=lambda inputs: {"input_features": torch.zeros(1, 8, 40)})
    refused("has 60 frames, the model takes 40", change=lambda inputs: {"input_features": torch.randn(1, 8, 60)})
    refused("have 20 frames, the model wants 40", change=lambda inputs: {"input_features": torch.randn(1, 8, 20)})
    refused("one example", change=lambda inputs: {"input_features": torch.randn(2, 8, 40)})
    refused("which axis", change=lambda inputs: {"input_features": torch.randn(1, 9, 40)})
    refused("no input to explain", change=lambda inputs: {"mel": torch.randn(1, 8, 40)})
    refused("raw samples", change=lambda inputs: {"input_values": torch.randn(1, 400)})
    refused("41 of 40 positions", frames=41)
    refused("0 of 40 positions", change=lambda inputs: inputs | {"attention_mask": torch.zeros(1, 40)})
    refused("text is empty", "bart", change=lambda inputs: {"input_ids": torch.zeros(1, 0, dtype=torch.long)})
    refused("the input has the id 999", "bart", change=lambda inputs: {"input_ids": torch.tensor([[999]])})


def test_hypotheses() -> None:
    refused("hypothesis is empty", hypothesis=torch.tensor([2]))
    refused("hypothesis is empty", hypothesis=torch.zeros(0, dtype=torch.long))
    refused("prompt is empty", prompt=[])


def test_arguments() -> None:
    refused('did you mean "occlusion"', method="oclusion")
    refused("score is one of", score="kld")
    refused("too few for a standard error", n_masks=5)
    refused("a probability", p=1.5)
    refused("no baseline 'median'", baseline="median")
    refused("no baseline 'min' for the encoder", method="encoder_output", baseline="min")
    refused("for tokens there is zero, mean, pad", "bart", baseline="min")
    refused("batch_size", batch_size=0)
    refused("takes no window", window=(1, 1))
    refused("at is", method="encoder_output", at="input")
    refused("segments are integers", segments=torch.zeros(40, 9, dtype=torch.long))
    refused("too many masks to enumerate", method="encoder_output", exact=True)
    refused("granularities are numbers", granularities=(0,))
    refused("too few for Kernel SHAP", method="kernel_shap", n_masks=40)


def test_a_model_in_training_answers_at_random() -> None:
    model, inputs = encoder_decoder("bart")
    with workbench.attach(model.train()) as wb, pytest.raises(WorkbenchError, match="train mode"):
        saliency(wb, inputs, hypothesis=HYPOTHESIS)


def test_a_result_without_sums_cannot_be_resumed() -> None:
    model, inputs = identity_speech(14, 2)
    common: dict[str, Any] = {"hypothesis": torch.tensor([0, 2]), "progress": False, "time_axis": 1}
    with workbench.attach(model, check=False) as wb:
        found = saliency(wb, inputs, "gradient_x_input", **common)
        with pytest.raises(WorkbenchError, match="holds no running sums"):
            saliency(wb, inputs, "encoder_output", resume=found, **common)


def test_pooling_needs_windows_that_fit() -> None:
    maps = torch.rand(2, 10, 3)
    with pytest.raises(WorkbenchError, match="4 encoder positions do not divide 10 input frames"):
        pool(maps, 4)
    with pytest.raises(WorkbenchError, match="pooling is one of"):
        pool(maps, 5, how="median")
    with pytest.raises(WorkbenchError, match="are not 3 windows"):
        pool(maps, 3, length=20, out_length=10)


def test_pooling_against_loops() -> None:
    maps = torch.rand(2, 11, 3, generator=torch.Generator().manual_seed(0))
    wanted = {
        "max": lambda cells: cells.max(),
        "mean": lambda cells: cells.mean(),
        "max_time": lambda cells: cells.amax(0).mean(),
        "max_frequency": lambda cells: cells.amax(1).mean(),
    }
    for how, of in wanted.items():
        found = pool(maps, 3, length=20, out_length=5, how=how)  # windows of four frames, the last one cut
        for k in range(2):
            for j in range(3):
                assert float(found[k, j]) == pytest.approx(float(of(maps[k, 4 * j : 4 * j + 4])))
    assert spread_out(torch.tensor([[1.0, 2.0]]), (3, 2), 2).tolist() == [[[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]]


def test_constant_maps_become_zeros() -> None:
    constant = torch.full((2, 5), 0.3)
    assert not standardised(constant).any()
    assert not paired_min_max(constant, None)[0].any()
    assert runs(7, 3)[0].tolist() == [0, 0, 0, 1, 1, 2, 2]
