"""Tiny random UNets in double precision, one per mixture of block types, always the same weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from stereoclinic.pipelines.model import Model
from stereoclinic.portraits import model

CROSS, PLAIN = "cross attention", "no attention"
CAPTIONS = ["a photo of an old dark-skinned female doctor", "a young light-skinned male nurse middle-aged"]


def tiny_unet(kind: str = CROSS) -> UNet2DConditionModel:
    """A frozen UNet of two levels on 4 x 8 x 8 latents and (L, 8) text, with cross attention or with none."""
    attention = kind == CROSS
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D" if attention else "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn" if attention else None,
        up_block_types=("CrossAttnUpBlock2D" if attention else "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    # Norm weights start at exactly one and biases at zero, which would hide a rule that forgets them.
    generator = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return unet.double().requires_grad_(False).eval()


def tiny_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents (2, 4, 8, 8), timesteps (2,), text (2, 3, 8)."""
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator)
    text = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator)
    return latent, torch.tensor([3, 700]), text


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """A fresh UNet with cross attention."""
    return tiny_unet()


@pytest.fixture
def plain_unet() -> UNet2DConditionModel:
    """A fresh UNet without attention."""
    return tiny_unet(PLAIN)


@pytest.fixture(params=[CROSS, PLAIN])
def any_unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    """A fresh UNet of each kind."""
    return tiny_unet(request.param)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps, text."""
    return tiny_inputs()


@pytest.fixture(scope="session")
def unet_once() -> UNet2DConditionModel:
    """A shared UNet for tests that only read it (hypothesis asks for more than function scope)."""
    return tiny_unet()


@pytest.fixture(scope="session")
def inputs_once() -> tuple[Tensor, Tensor, Tensor]:
    """Shared inputs for the same tests."""
    return tiny_inputs()


@pytest.fixture(scope="session")
def denoiser() -> Model:
    """The embedded model's architecture with random weights: every part of a real pipeline, nothing learnt."""
    torch.manual_seed(0)
    tokenizer = model.build_tokenizer(CAPTIONS)
    unet = model.build_unet()
    for name, module in unet.named_modules():
        if name.endswith("conv2"):  # training starts these at zero
            module.reset_parameters()
    pipe = model.build_pipeline(model.build_autoencoder(), model.build_text_encoder(tokenizer), tokenizer, unet)
    return Model(pipe.to(dtype=torch.float64), "random")


@pytest.fixture(scope="session")
def little() -> Model:
    """The embedded model's text encoder and autoencoder round a random UNet of two levels, as small as one can be."""
    torch.manual_seed(0)
    tokenizer = model.build_tokenizer(CAPTIONS)
    unet = UNet2DConditionModel(
        sample_size=model.LATENT_SIZE,
        in_channels=model.LATENT_CHANNELS,
        out_channels=model.LATENT_CHANNELS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=model.TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipe = model.build_pipeline(model.build_autoencoder(), model.build_text_encoder(tokenizer), tokenizer, unet)
    return Model(pipe.to(dtype=torch.float64), "random")
