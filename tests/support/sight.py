"""Tiny random vision-language models with inputs as their processors make them, and the pictures that these are of."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

from support.zoo.family import Family, make

IMAGE, VIDEO, WORDS = 59, 58, 50
_TOWER = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 32}
_TEXT = {**_TOWER, "num_key_value_heads": 2, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "max_position_embeddings": 4096}  # fmt: skip


@dataclass(frozen=True)
class Sight:
    """A kind of vision-language model.

    Attributes:
        build: the model. processor: its image processor.
        sizes: height and width of pictures that together show its ways of cutting them up.
        settings: what the processor is given beside the pictures.
    """

    name: str
    build: Callable[[], nn.Module]
    processor: Callable[[], Any]
    sizes: tuple[tuple[int, int], ...]
    settings: dict[str, Any] = field(default_factory=dict)


def built(one: Sight) -> Any:
    """The model with random weights, none of them zero."""
    return make(Family(one.name, one.build, dict, {}))


def pictures(one: Sight) -> list[np.ndarray[Any, Any]]:
    """Random pictures of the sizes of a kind."""
    return [picture(size, seed) for seed, size in enumerate(one.sizes)]


def picture(size: Sequence[int], seed: int) -> np.ndarray[Any, Any]:
    """A random picture [row, column, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def made(model: Any, one: Sight, images: Sequence[Any]) -> dict[str, Any]:
    """The pictures in a prompt: some words, the tokens of each picture with two words behind, more words."""
    from PIL import Image

    several = [Image.fromarray(image) for image in images]
    given = one.processor()(several, return_tensors="pt", **one.settings)
    inputs = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    inputs.pop("num_crops", None)
    with torch.no_grad():
        counts = [len(part) for part in features(model, inputs)]
    inputs |= prompt(counts)
    taken = inspect.signature(model.forward).parameters
    if "token_type_ids" in taken:
        inputs["token_type_ids"] = inputs["mm_token_type_ids"]
    return {name: value for name, value in inputs.items() if name in taken}


def prompt(counts: Sequence[int], token: int = IMAGE) -> dict[str, Tensor]:
    """Token ids with runs of tokens that stand for pictures."""
    words = torch.randint(3, WORDS, (5 + 2 * len(counts) + 6,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = [1, *words[:4]]
    for n, count in enumerate(counts):
        ids += [token] * count + words[5 + 2 * n : 7 + 2 * n]
    tokens = torch.tensor([ids + words[-6:]])
    types = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": types}


def features(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """The features [token, width] of each picture, as the language model is given them."""
    taken = inspect.signature(model.get_image_features).parameters
    given = {name: value for name, value in inputs.items() if name in taken or name in ("image_grid_thw",)}
    found = model.get_image_features(**given).pooler_output
    if isinstance(found, Tensor):
        found = list(found) if found.dim() == 3 else [found]
    return [part.reshape(-1, part.shape[-1]) for part in found]


def _qwen(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 32}
        vision |= {"out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2, "patch_size": 4}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        text = {**_TEXT, "rope_parameters": rope}
        tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO}
        tokens |= {"vision_start_token_id": 57, "vision_end_token_id": 56}
        if kind == "Qwen2_5_VL":
            vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        else:
            vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
            text |= {"head_dim": 8}
        config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=vision, **tokens)
        model: nn.Module = getattr(hf, f"{kind}ForConditionalGeneration")(config)
        return model

    return build


def _llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**_TOWER, image_size=32, patch_size=8)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**_TEXT), image_token_index=IMAGE,
                            vision_feature_layer=-1)  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _next() -> nn.Module:
    vision = hf.CLIPVisionConfig(**_TOWER, image_size=32, patch_size=8)
    config = hf.LlavaNextConfig(vision_config=vision, text_config=hf.LlamaConfig(**_TEXT), image_token_index=IMAGE,
                                vision_feature_layer=-1, image_grid_pinpoints=_POINTS)  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def _onevision() -> nn.Module:
    vision = hf.SiglipVisionConfig(**_TOWER, image_size=32, patch_size=8, vision_use_head=False)
    config = hf.LlavaOnevisionConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**_TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=_POINTS,
        vision_aspect_ratio="anyres_max_3",
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _internvl() -> nn.Module:
    vision = hf.InternVLVisionConfig(**_TOWER, image_size=[32, 32], patch_size=[4, 4])
    config = hf.InternVLConfig(vision_config=vision, text_config=hf.Qwen2Config(**_TEXT), image_token_id=IMAGE,
                               image_seq_length=16, downsample_ratio=0.5, vision_feature_layer=-1)  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    vision = hf.SiglipVisionConfig(**_TOWER, image_size=32, patch_size=4, vision_use_head=False)
    layers = ["sliding_attention", "full_attention"]
    text = hf.Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=16, layer_types=layers)
    config = hf.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=16, image_token_index=IMAGE,
                             boi_token_index=57, eoi_token_index=56)  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def _idefics3() -> nn.Module:
    vision = {**_TOWER, "image_size": 32, "patch_size": 4}
    config = hf.Idefics3Config(vision_config=vision, text_config=hf.LlamaConfig(**_TEXT), image_token_id=IMAGE,
                               scale_factor=2, pad_token_id=0)  # fmt: skip
    return hf.Idefics3ForConditionalGeneration(config)


_POINTS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32], [96, 96]]


def _pil(name: str, **how: Any) -> Callable[[], Any]:
    def build() -> Any:
        folder, _, kind = name.rpartition(".")
        from importlib import import_module

        return getattr(import_module(f"transformers.models.{folder}.image_processing_pil_{folder}"), kind)(**how)

    return build


_SMALL = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SIGHTS = [
    Sight("qwen2.5-vl", _qwen("Qwen2_5_VL"),
          _pil("qwen2_vl.Qwen2VLImageProcessorPil", patch_size=4, merge_size=2, temporal_patch_size=2,
               size={"shortest_edge": 256, "longest_edge": 2048}), ((50, 33), (24, 61))),
    Sight("qwen3-vl", _qwen("Qwen3VL"),
          _pil("qwen2_vl.Qwen2VLImageProcessorPil", patch_size=4, merge_size=2, temporal_patch_size=2,
               size={"shortest_edge": 256, "longest_edge": 2048}), ((40, 60), (33, 20))),
    Sight("llava", _llava, _pil("clip.CLIPImageProcessorPil", **_SMALL), ((50, 80), (64, 41))),
    Sight("llava-next", _next,
          _pil("llava_next.LlavaNextImageProcessorPil", **_SMALL, image_grid_pinpoints=_POINTS), ((50, 80), (90, 41))),
    Sight("llava-onevision", _onevision,
          _pil("llava_onevision.LlavaOnevisionImageProcessorPil", size={"height": 32, "width": 32},
               image_grid_pinpoints=_POINTS), ((50, 80), (90, 83))),
    Sight("internvl", _internvl,
          _pil("got_ocr2.GotOcr2ImageProcessorPil", size={"height": 32, "width": 32}), ((50, 110), (40, 41)),
          {"crop_to_patches": True, "max_patches": 4}),
    Sight("gemma3", _gemma3, _pil("gemma3.Gemma3ImageProcessorPil", size={"height": 32, "width": 32}),
          ((50, 110), (40, 41)), {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16,
          "pan_and_scan_max_num_crops": 3, "pan_and_scan_min_ratio_to_activate": 1.2}),
    Sight("idefics3", _idefics3,
          _pil("idefics3.Idefics3ImageProcessorPil", size={"longest_edge": 96}, max_image_size={"longest_edge": 32}),
          ((50, 90), (40, 41))),
]  # fmt: skip
