"""A whole pipeline round a UNet of two levels, for what masks do to pipelines."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel


@pytest.fixture(scope="module")
def original(denoiser):
    """A pipeline around a tiny UNet, in double precision."""
    torch.manual_seed(0)
    config = denoiser.network.config
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    parts = {**denoiser.pipe.components, "unet": unet.double().eval().requires_grad_(False)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
