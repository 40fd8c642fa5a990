"""Images, and images with text."""

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from support.zoo.family import EVERY_BACKEND, ONE_TOWER, SPECIAL, VOCABULARY, Family, Truth, ids, padded, pixels
from support.zoo.twins import eager_modules, eager_outputs, unfused

_TOWER = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 32}
_IMAGE_TOKEN = 59


def _vit() -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(**_TOWER, image_size=32, patch_size=8))


def _dinov2() -> nn.Module:
    return hf.Dinov2Model(
        hf.Dinov2Config(
            num_hidden_layers=2, num_attention_heads=4, hidden_size=32, mlp_ratio=2, image_size=28, patch_size=7
        )
    )


def _swin() -> nn.Module:
    # 9 x 9 patches in windows of 3 x 3, the second layer's windows shifted; then 5 x 5, padded to 6 x 6.
    return hf.SwinModel(
        hf.SwinConfig(image_size=36, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=3)
    )


def _clip() -> nn.Module:
    text = {**_TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 20, **SPECIAL}
    vision = {**_TOWER, "image_size": 32, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _llava() -> nn.Module:
    vision = hf.SiglipVisionConfig(**_TOWER, image_size=24, patch_size=8, vision_use_head=False)
    text = hf.LlamaConfig(**_TOWER, num_key_value_heads=2, vocab_size=VOCABULARY, **SPECIAL)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=_IMAGE_TOKEN, vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )  # fmt: skip


def _timm(fused: bool) -> nn.Module:
    from support.vision import vision_transformer

    model: nn.Module = vision_transformer().VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5, mlp_ratio=2
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def _clip_inputs() -> dict[str, Any]:
    tokens = ids(2, 11)
    tokens[:, -1] = 2
    return {"input_ids": tokens, "attention_mask": padded(tokens, "left"), **pixels(32)}


def _clip_truth(model: Any, inputs: dict[str, Any]) -> Truth:
    output = eager_outputs(model, inputs)
    return {"text": output.text_model_output.attentions, "vision": output.vision_model_output.attentions}


def _llava_inputs() -> dict[str, Any]:
    tokens = ids(2, 17).clamp(max=_IMAGE_TOKEN - 1)
    tokens[:, 2:11] = _IMAGE_TOKEN  # 3 x 3 patches
    return {"input_ids": tokens, **pixels(24)}


def _images() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


VISION = [
    Family("vit", _vit, lambda: pixels(32), ONE_TOWER, label="ViT", backends=EVERY_BACKEND),
    Family("dinov2", _dinov2, lambda: pixels(28), ONE_TOWER, label="DINOv2", backends=EVERY_BACKEND),
    Family("swin", _swin, lambda: pixels(36), {"encoder": ("", "window")}, truth=eager_modules("encoder"),
           label="Swin",
           note="shifted windows; the batch of a site is image x window", backends=("sdpa", "eager")),
    Family("clip", _clip, _clip_inputs, {"text": ("text_model", "self"), "vision": ("vision_model", "self")},
           truth=_clip_truth, label="CLIP", note="two towers", backends=EVERY_BACKEND),
    Family("llava", _llava, _llava_inputs,
           {"model.vision_tower": ("vision_tower", "self"), "model.language_model": ("language_model", "self")},
           truth=eager_modules("model.vision_tower", "model.language_model"), label="LLaVA",
           note="SigLIP tower, Llama with image tokens", backends=EVERY_BACKEND),
    Family("timm-vit-fused", lambda: _timm(True), _images, ONE_TOWER, truth=unfused, label="timm ViT"),
    Family("timm-vit-unfused", lambda: _timm(False), _images, ONE_TOWER, truth=unfused, label="timm ViT",
           note="also with attention written out (fused_attn off)"),
]  # fmt: skip
