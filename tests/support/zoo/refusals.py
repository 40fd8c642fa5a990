"""Attention that cannot be captured: each case ends in an error, never in an empty or a wrong capture."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import transformers as hf
from torch import nn

import workbench
from support.backends import flash_packages, on_backend
from support.tiny import VOCABULARY, family, make
from workbench.errors import AttachError, CaptureError, WorkbenchError


@dataclass(frozen=True)
class Refusal:
    """A case that is refused.

    Attributes:
        name: for the test. what: for docs/models.md, with the reason.
        run: attaches and captures.
        error: what it raises, with the beginning of its message.
    """

    name: str
    what: str
    run: Callable[[], None]
    error: type[WorkbenchError]
    message: str


def _capture(model: nn.Module, *args: object, check: bool = True, **inputs: object) -> None:
    with torch.no_grad(), workbench.attach(model, check=check) as wb, wb.capture():
        model(*args, **inputs)


def _falcon(check: bool) -> None:
    from transformers import modeling_flash_attention_utils as flash

    config = make(family("falcon")).config
    config._attn_implementation = "flash_attention_2"
    forward = "transformers.models.falcon.modeling_falcon._flash_attention_forward"
    allowed = mock.patch.object(
        hf.PreTrainedModel, "_check_and_adjust_attn_implementation", return_value="flash_attention_2"
    )
    # The model's file has the function only if flash-attn was there when it was imported.
    with flash_packages(), allowed, mock.patch(forward, flash._flash_attention_forward, create=True):
        flash.lazy_import_flash_attention("flash_attention_2")
        _capture(hf.FalconForCausalLM(config).eval(), **family("falcon").inputs(), check=check)


def _sinks_left_out() -> None:
    with flash_packages():
        _capture(on_backend(make(family("gpt-oss")), "flash_attention_3"), **family("gpt-oss").inputs())


def _longformer() -> None:
    config = hf.LongformerConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16, attention_window=4,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    _capture(hf.LongformerModel(config).eval(), input_ids=family("bert").inputs()["input_ids"])


def _fourier() -> None:
    config = hf.FNetConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16, vocab_size=VOCABULARY)
    _capture(hf.FNetModel(config).eval(), input_ids=family("bert").inputs()["input_ids"])


def _recurrent() -> None:
    _capture(nn.LSTM(8, 8, batch_first=True).eval(), torch.randn(2, 5, 8))


def _nested() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    _capture(model, torch.randn(2, 5, 32), src_key_padding_mask=padding)


REFUSALS = [
    Refusal("falcon-flash", "Falcon, GPT-J, GPT-Neo and Bark on a flash backend: their own code calls the kernel, past "
            "Hugging Face's registry. On their other backends they are captured.",
            lambda: _falcon(True), AttachError, "no attention was found in FalconForCausalLM"),
    Refusal("falcon-flash-unchecked", "The same with `attach(model, check=False)`.",
            lambda: _falcon(False), CaptureError,
            "what its kernel gives could not be placed: its rows come from 2 calls"),
    Refusal("sinks-left-out", "A model with sink logits on a flash kernel that knows of none: `transformers` leaves "
            "them out without a word, and the model then computes something else.",
            _sinks_left_out, CaptureError,
            "the pattern rebuilt for the backend flash_attention_3 is not what it computes"),
    Refusal("longformer", "Longformer: its windows are written out as shifted chunks.",
            _longformer, CaptureError, "no attention call was seen at"),
    Refusal("fnet", "Models without attention, such as FNet.",
            _fourier, AttachError, "no attention was found in FNetModel"),
    Refusal("lstm", "Recurrent layers whose gates depend on the state itself, such as an LSTM's.",
            _recurrent, AttachError, "no attention was found in LSTM"),
    Refusal("nested", "A padded `nn.TransformerEncoder` with nested tensors.",
            _nested, CaptureError, "the layer runs on a nested tensor, whose attention cannot be read"),
]  # fmt: skip
