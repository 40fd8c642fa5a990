"""Models of diffusers: attention in processors, and through a dispatch function with a table of backends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import workbench
from support.judges import judges, missing

Made = tuple[nn.Module, dict[str, Any]]


def _unet(diffusers: Any) -> Made:
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 16,
    }  # fmt: skip
    sizes = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "attention_head_dim": 8}
    model = diffusers.UNet2DConditionModel(**blocks, **sizes)
    inputs = {"sample": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 32)}
    return model, inputs | {"timestep": torch.tensor(3)}


def _pixart(diffusers: Any) -> Made:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=32, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 16)}
    return model, inputs | {"timestep": torch.tensor([3, 5])}


def _flux(diffusers: Any) -> Made:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 7, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip
    return model, inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (_unet, {(2, 8, 64, 64): 4, (2, 8, 64, 7): 4}),
        (_pixart, {(2, 4, 16, 16): 2, (2, 4, 16, 7): 2}),
        (_flux, {(1, 2, 23, 23): 2}),
    ],
    ids=["unet", "pixart", "flux"],
)
@torch.no_grad()
def test_sites_are_known_before_anything_has_run(make: Callable[[Any], Made], shapes: dict[Any, int]) -> None:
    torch.manual_seed(0)
    with judges():
        try:
            import diffusers
        except ModuleNotFoundError as error:
            missing(error)
        model, inputs = make(diffusers)
    with workbench.attach(model.eval()) as wb:
        before = [site.name for site in wb.sites]
        verification = wb.verify(**inputs).raise_if_failed()
    assert sorted(before) == sorted(check["site"] for check in verification.checks)
    found = [tuple(check["shape"]) for check in verification.checks]
    assert {shape: found.count(shape) for shape in found} == shapes


def _sana(diffusers: Any) -> Made:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=16,
        sample_size=5, patch_size=1,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 5, 5), "encoder_hidden_states": torch.randn(2, 7, 16)}
    return model, inputs | {"timestep": torch.tensor([3, 5])}


def _sana_autoencoder(diffusers: Any) -> Made:
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

    layer = SanaMultiscaleLinearAttention(16, 16, attention_head_dim=8, norm_type="rms_norm", residual_connection=True)
    return torch.nn.Sequential(layer), {"input": torch.randn(2, 16, 4, 5)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "shape", "width"),
    [(_sana, (2, 4, 25, 25), 8), (_sana_autoencoder, (2, 4, 20, 20), 8)],
    ids=["transformer", "autoencoder"],
)
@torch.no_grad()
def test_linear_attention_over_images(make: Callable[[Any], Made], shape: tuple[int, ...], width: int) -> None:
    """Its map is proved, rows sum to one, and a head is switched off as by hand."""
    torch.manual_seed(0)
    with judges():
        try:
            import diffusers
        except ModuleNotFoundError as error:
            missing(error)
        model, inputs = make(diffusers)
    with workbench.attach(model.eval()) as wb:
        assert not wb.look(**inputs).unread or make is _sana  # that has a convolution over positions in its MLP
        verified = wb.verify(**inputs).raise_if_failed()
        read = [check for check in verified.checks if check["kernel"] == "linear_attention"]
        assert [tuple(check["shape"]) for check in read] == [shape] * len(read)
        site = read[0]["site"]
        with wb.capture(["entropy", "received"], sites=site, z=True, values=True) as cap:
            model(**inputs)
        pattern = cap[site].pattern
        sums = pattern.dense().sum(-1)
        alive = (pattern.q > 0).any(-1)  # others have no weight
        torch.testing.assert_close(sums, alive.to(sums), atol=1e-4, rtol=0)
        assert pattern.normalised == bool(alive.all())
        torch.testing.assert_close(pattern.apply(pattern.values), cap[site].z.transpose(1, 2), atol=1e-5, rtol=1e-4)
        module = model.get_submodule(site)
        project = module.to_out[0] if make is _sana else module.to_out

        def without(_: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            z = given[0].clone()
            z[..., width : 2 * width] = 0
            return (z,)

        handle = project.register_forward_pre_hook(without)
        wanted = model(**inputs)
        handle.remove()
        with wb.ablate({(site, 1)}, how="zero"):
            ablated = model(**inputs)
    wanted, ablated = (out if isinstance(out, torch.Tensor) else out.sample for out in (wanted, ablated))
    torch.testing.assert_close(ablated, wanted, atol=1e-5, rtol=1e-4)
