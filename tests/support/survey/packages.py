"""Models of other packages than `transformers`; each raises ModuleNotFoundError where its package is not installed."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from support.judges import judges
from support.linear_layers import (
    EfficientAttention,
    GatedLinearAttention,
    LinearAttention,
    MultiScaleRetention,
    Residual,
    RWKV7Attention,
)
from support.survey.surveyed import LENGTH, Surveyed, normal
from support.zoo.family import ids


def _from(module: str, *absent: str) -> Any:
    """A module. `absent`: packages that it imports for other purposes than its models; they may be missing."""
    stand_ins = {name: mock.MagicMock(__spec__=None) for name in absent if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        with judges():
            return import_module(module)
    finally:  # what else was imported stays: parts of PyTorch cannot be imported twice
        for name in stand_ins:
            sys.modules.pop(name, None)


def _diffusers(name: str, **sizes: Any) -> nn.Module:
    with judges():  # it goes on importing as it is used
        made: nn.Module = getattr(import_module("diffusers"), name)(**sizes)
    return made


def _unet() -> nn.Module:
    return _diffusers(
        "UNet2DConditionModel", sample_size=12, in_channels=4, out_channels=4, cross_attention_dim=24,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8,
    )  # fmt: skip


def _pixart() -> nn.Module:
    return _diffusers(
        "PixArtTransformer2DModel", num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=1, sample_size=10, patch_size=2, cross_attention_dim=32, caption_channels=16,
        use_additional_conditions=False,
    )  # fmt: skip


def _sana() -> nn.Module:
    return _diffusers(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
        num_layers=1, num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32,
        caption_channels=16, sample_size=5, patch_size=1,
    )  # fmt: skip


def _drawn(channels: int, size: int, width: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": normal(2, 7, width), "timestep": torch.tensor([3, 5]),
        "hidden_states": normal(2, channels, size, size),
    }  # fmt: skip


def _x_transformer(**options: Any) -> nn.Module:
    xt = _from("x_transformers")
    layers = xt.Decoder(dim=32, depth=1, heads=4, attn_dim_head=8, **options)
    model: nn.Module = xt.TransformerWrapper(num_tokens=60, max_seq_len=32, attn_layers=layers)
    return model


def _routing() -> nn.Module:
    model: nn.Module = _from("routing_transformer").RoutingTransformerLM(
        num_tokens=60, dim=32, heads=4, depth=1, max_seq_len=36, window_size=6, n_local_attn_heads=2, dim_head=8,
        causal=True,
    )  # fmt: skip
    return model


def _whisper() -> nn.Module:
    whisper = _from("whisper.model", "numba", "tiktoken")
    sizes = whisper.ModelDimensions(
        n_mels=6, n_audio_ctx=22, n_audio_state=32, n_audio_head=4, n_audio_layer=1, n_vocab=60, n_text_ctx=32,
        n_text_state=32, n_text_head=4, n_text_layer=1,
    )  # fmt: skip
    model = whisper.Whisper(sizes)
    nn.init.normal_(model.decoder.positional_embedding)  # it is made of whatever lies in memory
    made: nn.Module = model
    return made


def _vit(module: str, cls: str, **sizes: Any) -> nn.Module:
    made: nn.Module = getattr(_from(f"vit_pytorch.{module}", "torchvision"), cls)(num_classes=5, **sizes)
    return made


def _timm(name: str, **sizes: Any) -> nn.Module:
    from support.vision import timm

    model: nn.Module = timm().create_model(name, num_classes=5, **sizes)
    return model


def _mixer() -> nn.Module:
    from support.vision import timm

    sizes = {"img_size": 96, "patch_size": 32, "embed_dim": 32, "num_blocks": 1}
    model: nn.Module = timm().models.mlp_mixer.MlpMixer(num_classes=5, **sizes)
    return model


class _GatedLinear(nn.Module):
    """A layer around the plain gated linear attention of fla; its own layers need a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = _from("fla.ops.gla.naive").naive_recurrent_gla
        self.qkvg, self.o = nn.Linear(32, 128), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = (t.unflatten(-1, (4, 8)) for t in self.qkvg(x).chunk(4, -1))
        z = self.attend(q, k, v, nn.functional.logsigmoid(g))[0]
        return self.o(z.flatten(2))


_FORM = "as published"  # a layer of the tests: what the package has needs a GPU, or is no package
_PATCHES = {"image_size": 32, "patch_size": 8, "dim": 24, "heads": 4, "mlp_dim": 48}

PACKAGES = [
    Surveyed("UNet", _unet, lambda: {"sample": normal(2, 4, 12, 12), "timestep": torch.tensor(3),
             "encoder_hidden_states": normal(2, 7, 24)}, (12, 6, 36, 7), "diffusers"),
    Surveyed("PixArt", _pixart, lambda: _drawn(4, 10, 16), (25, 7, 5), "diffusers"),
    Surveyed("Sana", _sana, lambda: _drawn(4, 5, 16), (25, 7, 5), "diffusers"),
    Surveyed("x-transformers", _x_transformer, lambda: {"x": ids(2, LENGTH)}, library="x-transformers"),
    Surveyed("x-transformers, sigmoid", lambda: _x_transformer(attn_sigmoid=True), lambda: {"x": ids(2, LENGTH)},
             library="x-transformers"),
    Surveyed("x-transformers, talking heads",
             lambda: _x_transformer(attn_pre_talking_heads=True, attn_post_talking_heads=True, shift_tokens=1),
             lambda: {"x": ids(2, LENGTH)}, library="x-transformers"),
    Surveyed("Routing Transformer", _routing, lambda: {"x": ids(2, 36)}, (36,), "routing-transformer"),
    Surveyed("Whisper of its authors", _whisper, lambda: {"mel": normal(2, 6, 44), "tokens": ids(2, 9)}, (44, 22, 9),
             "openai-whisper"),
    Surveyed("Agent Transformer", lambda: _from("agent_attention_pytorch.agent_transformer").AgentTransformer(
        dim=32, num_agent_tokens=5, depth=1, heads=4, dim_head=8), lambda: {"x": normal(2, LENGTH, 32)},
        (17, 22, 5), "agent-attention-pytorch"),
    Surveyed("HaloNet", lambda: nn.Sequential(_from("halonet_pytorch").HaloAttention(
        dim=24, block_size=3, halo_size=1, dim_head=8, heads=4)), lambda: {"input": normal(2, 24, 9, 9)}, (9, 81),
        "halonet-pytorch"),
    Surveyed("CaiT", lambda: _vit("cait", "CaiT", **_PATCHES, depth=1, cls_depth=1),
             lambda: {"img": normal(2, 3, 32, 32)}, (16, 17), "vit-pytorch"),
    Surveyed("DeepViT", lambda: _vit("deepvit", "DeepViT", **_PATCHES, depth=1),
             lambda: {"img": normal(2, 3, 32, 32)}, (17,), "vit-pytorch"),
    Surveyed("XCiT", lambda: _vit("xcit", "XCiT", **_PATCHES, depth=1, cls_depth=1),
             lambda: {"img": normal(2, 3, 32, 32)}, (16, 17), "vit-pytorch"),
    Surveyed("NesT", lambda: _vit("nest", "NesT", image_size=36, patch_size=3, dim=16, heads=2, num_hierarchies=2,
             block_repeats=(1, 1)), lambda: {"img": normal(2, 3, 36, 36)}, (36, 12, 6), "vit-pytorch"),
    Surveyed("timm ViT", lambda: _timm("vit_tiny_patch16_224", img_size=48, embed_dim=32, depth=2, num_heads=4),
             lambda: {"x": normal(2, 3, 48, 48)}, (10, 48), "timm"),
    Surveyed("DaViT", lambda: _timm("davit_tiny", depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4),
             window_size=3), lambda: {"x": normal(2, 3, 48, 48)}, (12, 6, 144, 36, 9), "timm"),
    Surveyed("MLP-Mixer", _mixer,
             lambda: {"x": normal(2, 3, 96, 96)}, (9,), "timm"),
    Surveyed("Gated linear attention", lambda: nn.Sequential(_GatedLinear()),
             lambda: {"input": normal(2, LENGTH, 32)}, library="fla"),
    Surveyed("GLA", lambda: Residual(GatedLinearAttention()), lambda: {"x": normal(2, LENGTH, 12)}, library=_FORM),
    Surveyed("RetNet", lambda: Residual(MultiScaleRetention()), lambda: {"x": normal(2, LENGTH, 12)}, library=_FORM),
    Surveyed("RWKV-7", lambda: Residual(RWKV7Attention(layer=0)), lambda: {"x": normal(2, LENGTH, 12)}, library=_FORM),
    Surveyed("Efficient attention", lambda: Residual(EfficientAttention()), lambda: {"x": normal(2, 8, 7, 11)},
             (7, 11, 77), _FORM),
    Surveyed("U-Net, linear attention", lambda: Residual(LinearAttention()), lambda: {"x": normal(2, 8, 7, 11)},
             (7, 11, 77), _FORM),
    Surveyed("nn.TransformerDecoder", lambda: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(32, 4, 48, batch_first=True), 1),
        lambda: {"tgt": normal(2, 9, 32), "memory": normal(2, LENGTH, 32)}, (17, 9), "torch"),
    Surveyed("LSTM", lambda: nn.Sequential(nn.Linear(32, 32), nn.LSTM(32, 32, batch_first=True)),
             lambda: {"input": normal(2, LENGTH, 32)}, library="torch"),
]  # fmt: skip
