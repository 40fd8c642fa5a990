"""A tiny random `Sam2Video`, and a video in which a square goes to the right, with a session that follows it."""

from typing import Any

import torch
from torch import Tensor


def tracker(seed: int = 0, **more: Any) -> Any:
    """Random weights, all of them drawn, so that memory, pointers and times are told apart."""
    from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig

    wide = 128
    hiera = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[64, 64], blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 2], global_attention_blocks=[],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=hiera, backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=wide,
    )  # fmt: skip
    config = Sam2VideoConfig(
        vision_config=vision, image_size=64,
        prompt_encoder_config={"hidden_size": wide, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": wide, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        memory_attention_hidden_size=wide, memory_attention_num_layers=2, memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[4, 4], memory_encoder_hidden_size=wide, mask_downsampler_embed_dim=wide,
        memory_fuser_embed_dim=wide, memory_fuser_intermediate_dim=32, memory_fuser_num_layers=1,
        **{"num_maskmem": 4, "max_object_pointers_in_encoder": 6} | more,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sam2VideoModel._from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def video(n: int = 9) -> Tensor:
    """[frame, 3, 64, 64] a bright square on noise."""
    made = 0.3 * torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for t in range(n):
        made[t, :, 24:40, 4 + 5 * t : 20 + 5 * t] += 2.0
    return made


def session(n: int = 9, prompt: int = 0, objects: int = 1) -> Any:
    """With a point in the square for each object."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    made = Sam2VideoInferenceSession(video=video(n), video_height=64, video_width=64, dtype=torch.float32)
    for k in range(objects):
        number = made.obj_id_to_idx(k + 1)
        at = torch.tensor([[[[12.0 + 5 * prompt + k, 32.0]]]])
        labels = torch.ones(1, 1, 1, dtype=torch.int32)
        made.add_point_inputs(number, prompt, {"point_coords": at, "point_labels": labels})
    made.obj_with_new_inputs = list(range(1, objects + 1))
    return made
