"""PyTorch's own attention modules: the path they take must not change, and every path must be seen."""

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.against_eager import ROWS
from workbench.kernels.statistics import dense

D, HEADS = 16, 4
UPPER = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])


def _inputs(length: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(seed))


def _attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(D, HEADS, batch_first=True, **options).eval()


def _layer(**options: object) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(D, HEADS, 32, batch_first=True, **options).eval()


ATTENTION_CALLS = {
    "self": {},
    "no weights": {"need_weights": False},
    "causal": {"attn_mask": UPPER},
    "float mask": {"attn_mask": torch.randn(5, 5)},
    "mask per head": {"attn_mask": UPPER.expand(2 * HEADS, 5, 5)},
    "padding": {"key_padding_mask": PADDING},
    "both": {"key_padding_mask": PADDING, "attn_mask": UPPER},
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("options", ATTENTION_CALLS.values(), ids=ATTENTION_CALLS.keys())
def test_attention_statistics_are_those_of_the_returned_weights(options: dict[str, object], mode: type) -> None:
    model, x = _attention(), _inputs()
    with mode():
        weights = model(x, x, x, **{**options, "need_weights": True, "average_attn_weights": False})[1]
        bare = model(x, x, x, **options)[0]
        with workbench.attach(model) as wb:
            assert wb.verify(x, x, x, **options).raise_if_failed().ok
            with wb.capture([*ROWS, "received"]) as capture:
                observed = model(x, x, x, **options)[0]
    assert torch.equal(bare, observed)
    seen = capture.sites[0]
    assert (seen.n_heads, seen.d_head) == (HEADS, D // HEADS)
    got = capture[seen]
    want = dense(weights.detach(), [*ROWS, "received"], got.pattern.mask)
    for name, value in want.items():
        torch.testing.assert_close(getattr(got, name).double(), value, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_cross_attention_of_another_length() -> None:
    model, x, memory = _attention(), _inputs(), _inputs(3, seed=1)
    weights = model(x, memory, memory, average_attn_weights=False)[1]
    with workbench.attach(model) as wb, wb.capture(["entropy", "received"]) as capture:
        model(x, memory, memory)
    torch.testing.assert_close(capture[0].pattern.dense(), weights.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    "mask", [{}, {"src_mask": UPPER}, {"src_key_padding_mask": PADDING}], ids=["none", "mask", "pad"]
)
@torch.no_grad()
def test_encoder_layer_stays_on_its_native_path(norm_first: bool, activation: str, mask: dict[str, Tensor]) -> None:
    model, x = _layer(norm_first=norm_first, activation=activation), _inputs()
    bare = model(x, **mask)
    with workbench.attach(model) as wb:
        found = wb.verify(x, **mask)
        with wb.capture() as capture:
            observed = model(x, **mask)
    assert found.ok, found.table
    assert torch.equal(bare, observed)
    assert capture["self_attn"].kernel == "transformer_encoder_layer_fwd"


def test_the_native_path_differs_from_the_other_one() -> None:
    """Otherwise the test above would hold for a tap that leaves the native path."""
    model, x = _layer(), _inputs(seed=3)
    with torch.no_grad():
        native = model(x)
    assert not torch.equal(native, model(x).detach())


@torch.no_grad()
def test_transformer_with_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(D, HEADS, 2, 2, 32, batch_first=True).eval()
    x, y = _inputs(), _inputs(4, seed=1)
    bare = model(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4))
    with workbench.attach(model) as wb, wb.capture() as capture:
        observed = model(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4))
    assert torch.equal(bare, observed)
    assert [site.alias for site in capture.sites] == [
        "encoder.0.attn", "encoder.1.attn", "decoder.0.attn", "decoder.0.cross_attn", "decoder.1.attn",
        "decoder.1.cross_attn",
    ]  # fmt: skip
    assert capture["decoder.1.cross_attn"].shape == (2, HEADS, 4, 5)


@torch.no_grad()
def test_nested_tensors_are_refused_by_name() -> None:
    layer = _layer()
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).eval()
    with workbench.attach(model) as wb, pytest.raises(workbench.CaptureError, match="nested") as caught, wb.capture():
        model(_inputs(), src_key_padding_mask=PADDING)
    assert "enable_nested_tensor=False" in str(caught.value)
