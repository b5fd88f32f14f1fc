"""Tiny pipelines whose denoiser is a U-Net."""

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tests.pipelines.tiny_parts import (
    CLIP_PATTERN,
    CLIP_WIDTH,
    VOCABULARY,
    WIDTH,
    autoencoder,
    clip,
    clip_parts,
    movq,
    t5_parts,
    tokenizer,
    two_clips,
    unet,
)
from tests.pipelines.tiny_table import BETAS, EIGHTH, SMALL, tiny


def stable_diffusion(kind: type = diffusers.StableDiffusionPipeline, **parts: Any) -> DiffusionPipeline:
    """Stable Diffusion 1, and the classes that are made of its parts."""
    return kind(
        **{
            "vae": autoencoder(),
            **clip_parts(),
            "unet": unet(CLIP_WIDTH),
            "scheduler": diffusers.PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
            **parts,
        }
    )


@tiny("sd1", **SMALL)  # its scheduler takes three steps for two
def sd1() -> DiffusionPipeline:
    return stable_diffusion()


@tiny("sd2", **SMALL)
def sd2() -> DiffusionPipeline:
    return stable_diffusion(
        text_encoder=clip(activation="gelu"),
        unet=unet(CLIP_WIDTH, use_linear_projection=True, upcast_attention=True, attention_head_dim=(1, 2)),
        scheduler=diffusers.DDIMScheduler(
            **BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
        ),
    )


@tiny("sdxl", **SMALL)
def sdxl() -> DiffusionPipeline:
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13),
        unet=unet(
            8 + 12,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 20,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
        **two_clips(),
    )


@tiny("lcm", guidance=8.0, **SMALL)
def lcm() -> DiffusionPipeline:
    return stable_diffusion(
        diffusers.LatentConsistencyModelPipeline,
        unet=unet(CLIP_WIDTH, time_cond_proj_dim=8),
        scheduler=diffusers.LCMScheduler(**BETAS),
    )


@tiny("sd-pag", **SMALL)
def sd_pag() -> DiffusionPipeline:
    """Perturbed attention guidance: a third part of the batch, whose self-attention is the identity."""
    return stable_diffusion(diffusers.StableDiffusionPAGPipeline)


@tiny("ldm", **EIGHTH)  # no latent output
def ldm() -> DiffusionPipeline:
    """The first latent diffusion model. Its denoiser returns an object, not a tuple."""
    text = LDMBertConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=2,
        encoder_ffn_dim=2 * WIDTH,
        encoder_attention_heads=2,
        head_dim=16,
    )
    return diffusers.LDMTextToImagePipeline(
        vqvae=autoencoder(levels=4),
        bert=LDMBertModel(text),
        tokenizer=tokenizer(CLIP_PATTERN),
        unet=unet(WIDTH),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    )


@tiny("if", clean_caption=False, **SMALL)  # no latent output
def deepfloyd_if() -> DiffusionPipeline:
    """The first stage of DeepFloyd IF: in pixels, with a learnt variance."""
    return diffusers.IFPipeline(
        unet=unet(
            32,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="text_proj",
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range"
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **t5_parts(),
    )


@tiny("kandinsky3", **EIGHTH)
def kandinsky3() -> DiffusionPipeline:
    return diffusers.Kandinsky3Pipeline(
        unet=diffusers.Kandinsky3UNet(
            time_embedding_dim=16,
            groups=4,
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(16, 32),
            cross_attention_dim=16,
            encoder_hid_dim=WIDTH,
        ),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        movq=movq(),
        **t5_parts(),
    )
