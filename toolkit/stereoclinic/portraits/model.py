"""The parts of the embedded model, sized to ship in a wheel and to run on two cores.

A Stable Diffusion pipeline in the small: 64 x 64 images, 16 x 16 x 6 latents, a two-layer CLIP text encoder with a
vocabulary of the world's own words, a UNet with attention below its top level, DDIM with v-prediction. Predicting v on
a schedule that ends in pure noise makes the first step's prediction the mean image of the prompt, so the lean means
something from the first step on (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed").
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stereoclinic.io.files import write_text

LATENT_CHANNELS = 6
LATENT_SIZE = 16
TEXT_WIDTH = 96
TEXT_LENGTH = 16
_SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the captions is one token; any other text falls back to its bytes.

    Words are merged from the left in alphabetical order, so the same captions give the same ids in every process.
    """
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    words = sorted({word for caption in captions for word, _ in split.pre_tokenize_str(caption.lower())})
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # as the tokenizer will: earlier merges first
            symbols = _merged(symbols, pair)
        while len(symbols) > 1:
            merges[symbols[0], symbols[1]] = None
            symbols = _merged(symbols, (symbols[0], symbols[1]))
    tokens = [*_SPECIAL, *bytes_, *(byte + "</w>" for byte in bytes_), *map("".join, merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=TEXT_LENGTH)


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def text_config(tokenizer: CLIPTokenizer, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=TEXT_WIDTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer))


def build_autoencoder() -> AutoencoderKL:
    """Three levels down to 16 x 16. Residual blocks begin as the identity, which trains far faster on few samples."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )
    _begin_as_identity(model)
    return model


def build_unet() -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers means the number of heads
        norm_num_groups=16,
    )
    _begin_as_identity(model)
    return model


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # what StableDiffusionPipeline insists on; trailing spacing has no use for it
        clip_sample=False,
    )


def _begin_as_identity(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def build_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_in_half(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline with half precision weights that opens in float32 where no dtype is asked for.

    diffusers opens its parts in float32 then, but transformers follows the dtype in the text encoder's configuration.
    """
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    for path in folder.glob("text_encoder*/config.json"):
        write_text(path, json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2))


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Fold the latents' mean and scale into the two 1 x 1 convolutions, so that each channel has mean 0, variance 1.

    Args:
        vae: Changed in place; its images stay the same.
        latents: (n, C, h, w) posterior means of drawings.
    """
    mean = latents.mean(dim=(0, 2, 3))
    std = latents.std(dim=(0, 2, 3))
    channels = len(mean)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    outer.bias += (outer.weight[:, :, 0, 0] * mean).sum(1)
    outer.weight *= std[None, :, None, None]
    inner.bias[:channels] -= mean
    inner.bias[:channels] /= std
    inner.weight[:channels] /= std[:, None, None, None]
    inner.bias[channels:] -= 2 * std.log()
