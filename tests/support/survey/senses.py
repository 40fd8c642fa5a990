"""Images, sound, series of numbers, and models of several of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from support.survey.surveyed import LENGTH, TEXT, TOWER, Surveyed, image, normal, uncached
from support.zoo.family import ids

_SOUND = {
    **TOWER, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 5, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def _sound() -> dict[str, Any]:
    return {"input_values": normal(2, 1210)}  # 241 frames, then 59


def _series(steps: int) -> dict[str, Any]:
    return {
        "past_values": normal(2, steps), "past_time_features": normal(2, steps, 1),
        "past_observed_mask": torch.ones(2, steps), "future_values": normal(2, 9),
        "future_time_features": normal(2, 9, 1),
    }  # fmt: skip


def _seen_and_read() -> dict[str, Any]:
    return {"input_ids": ids(2, LENGTH), "pixel_values": normal(2, 3, 24, 24)}


def _florence() -> torch.nn.Module:
    config = hf.Florence2VisionConfig(
        embed_dim=[16, 32], num_heads=[2, 4], num_groups=[2, 4], depths=[1, 1], window_size=3, patch_size=[7, 3],
        patch_stride=[4, 2], patch_padding=[3, 1], patch_prenorm=[False, True],
    )  # fmt: skip
    made: torch.nn.Module = hf.models.florence2.modeling_florence2.Florence2VisionBackbone(config)
    return made


_FORECAST = {
    "prediction_length": 9, "context_length": 18, "num_time_features": 1, "d_model": 32, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "lags_sequence": [1, 2],
}  # fmt: skip

_VISION = {**TOWER, "image_size": 24, "patch_size": 8}

SENSES = [
    Surveyed("ViT", lambda: hf.ViTModel(hf.ViTConfig(**_VISION)), image(24), (10, 24)),
    Surveyed("CLIP", lambda: hf.CLIPModel(hf.CLIPConfig(
        text_config={**TOWER, **TEXT, "max_position_embeddings": 20}, vision_config=_VISION, projection_dim=16)),
        _seen_and_read, (17, 10, 24)),
    Surveyed("SegFormer", lambda: hf.SegformerModel(hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], num_attention_heads=[2, 4],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2])), image(56), (196, 49, 14, 7)),
    Surveyed("PVT", lambda: hf.PvtModel(hf.PvtConfig(
        image_size=56, num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1], hidden_sizes=[16, 32],
        num_attention_heads=[2, 4], patch_sizes=[4, 2], strides=[4, 2], mlp_ratios=[2, 2])),
        image(56), (196, 50, 49, 14, 7)),
    Surveyed("Hiera", lambda: hf.HieraModel(hf.HieraConfig(
        image_size=[56, 56], embed_dim=16, depths=[1, 1], num_heads=[2, 4], num_query_pool=1, query_stride=[2, 2],
        masked_unit_size=[2, 2], masked_unit_attention=[True, False])), image(56), (196, 49, 14, 7)),
    Surveyed("BEiT", lambda: hf.BeitModel(hf.BeitConfig(
        **TOWER, image_size=24, patch_size=8, use_relative_position_bias=True)), image(24), (10,)),
    Surveyed("Florence-2, vision tower", _florence, lambda: {"hidden_states": normal(2, 3, 48, 48)},
             (12, 6, 144, 36, 9)),
    Surveyed("SAM", lambda: hf.SamVisionModel(hf.SamVisionConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, mlp_dim=48, image_size=56,
        patch_size=8, window_size=4, global_attn_indexes=[1], output_channels=12, num_pos_feats=8)),
        image(56), (7, 49, 4)),
    Surveyed("Wav2Vec2", lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**_SOUND)), _sound, (59, 241)),
    Surveyed("HuBERT", lambda: hf.HubertModel(hf.HubertConfig(**_SOUND)), _sound, (59, 241)),
    Surveyed("WavLM", lambda: hf.WavLMModel(hf.WavLMConfig(
        **{**_SOUND, "num_hidden_layers": 2})), _sound, (59, 241)),
    Surveyed("Wav2Vec2-Conformer", lambda: hf.Wav2Vec2ConformerModel(hf.Wav2Vec2ConformerConfig(
        **_SOUND, conv_depthwise_kernel_size=5)), _sound, (59, 241)),
    Surveyed("Audio Spectrogram", lambda: hf.ASTModel(hf.ASTConfig(
        **TOWER, patch_size=8, num_mel_bins=24, max_length=40, frequency_stride=8, time_stride=8)),
        lambda: {"input_values": normal(2, 40, 24)}, (17,)),
    Surveyed("Speech2Text", lambda: hf.Speech2TextModel(hf.Speech2TextConfig(
        encoder_layers=1, decoder_layers=1, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, input_feat_per_channel=20, conv_channels=24, **TEXT)),
        lambda: {"input_features": normal(2, 44, 20), "decoder_input_ids": ids(2, 9), "use_cache": False},
        (44, 22, 11, 9)),
    Surveyed("PatchTST", lambda: hf.PatchTSTModel(hf.PatchTSTConfig(
        num_input_channels=3, context_length=44, patch_length=4, patch_stride=4, num_hidden_layers=2, d_model=32,
        num_attention_heads=4, ffn_dim=48)), lambda: {"past_values": normal(2, 44, 3)}, (11,)),
    Surveyed("Time Series Transformer", lambda: hf.TimeSeriesTransformerModel(hf.TimeSeriesTransformerConfig(
        **_FORECAST)), lambda: {**_series(20), "use_cache": False}, (18, 9)),
    Surveyed("Informer", lambda: hf.InformerModel(hf.InformerConfig(**_FORECAST, sampling_factor=1)),
        lambda: {**_series(20), "use_cache": False}, (18, 9)),
    Surveyed("Autoformer", lambda: hf.AutoformerModel(hf.AutoformerConfig(**_FORECAST, label_length=6)),
        lambda: {**_series(20), "use_cache": False}, (18, 15)),
    Surveyed("Perceiver", lambda: hf.PerceiverModel(hf.PerceiverConfig(
        num_latents=7, d_latents=32, d_model=24, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=4, num_cross_attention_heads=4)), lambda: {"inputs": normal(2, 17, 24)}, (17, 7)),
    Surveyed("ViLT", lambda: hf.ViltModel(hf.ViltConfig(**TOWER, vocab_size=60, image_size=24, patch_size=8)),
        _seen_and_read, (27,)),
    Surveyed("BLIP", lambda: hf.BlipForConditionalGeneration(hf.BlipConfig(
        text_config={**TOWER, **TEXT, "encoder_hidden_size": 32, "projection_dim": 16, "sep_token_id": 2},
        vision_config={**TOWER, "image_size": 24, "patch_size": 8, "projection_dim": 16}, projection_dim=16)),
        _seen_and_read, (17, 10)),
    Surveyed("GIT", lambda: hf.GitModel(hf.GitConfig(
        **TOWER, **TEXT, vision_config={**TOWER, "image_size": 24, "patch_size": 8})),
        lambda: {**_seen_and_read(), "use_cache": False}, (17, 27, 10)),
    Surveyed("Qwen2-VL, text", lambda: hf.Qwen2VLTextModel(hf.Qwen2VLTextConfig(
        **{**TOWER, "num_key_value_heads": 2}, **TEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})), uncached),
]  # fmt: skip
