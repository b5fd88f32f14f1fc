"""Tiny pipelines whose denoiser is a transformer that reads T5, CLIP or BERT."""

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from tests.pipelines.tiny_parts import (
    BEGIN_PATTERN,
    CLIP_PATTERN,
    CLIP_WIDTH,
    WIDTH,
    autoencoder,
    bert,
    clip_parts,
    flow,
    flux_autoencoder,
    language_model,
    t5_parts,
    text_parts,
    two_clips,
)
from tests.pipelines.tiny_table import DOUBLE_AND_SINGLE, HEADS, PACKED, ROPE, SMALL, TEXT, tiny


@tiny("sd3", **TEXT, **SMALL)
def sd3() -> DiffusionPipeline:
    """Stable Diffusion 3.5 medium: its first block attends to the picture twice."""
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=12 + 20,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
            **HEADS,
        ),
        scheduler=flow(),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        **two_clips(first_projection=12),
        **t5_parts("_3"),
    )


def flux_like(guidance_embeds: bool) -> DiffusionPipeline:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            joint_attention_dim=WIDTH, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=guidance_embeds, **PACKED
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux_autoencoder(),
        **clip_parts(),
        **t5_parts("_2"),
    )


@tiny("flux", **TEXT, **SMALL)
def flux() -> DiffusionPipeline:
    return flux_like(guidance_embeds=True)


@tiny("flux-schnell", guidance=0.0, **TEXT, **SMALL)
def flux_schnell() -> DiffusionPipeline:
    return flux_like(guidance_embeds=False)


@tiny("chroma", **TEXT, **SMALL)
def chroma() -> DiffusionPipeline:
    return diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            joint_attention_dim=WIDTH,
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
            **PACKED,
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux_autoencoder(),
        **t5_parts(),
    )


@tiny("bria", **TEXT, **SMALL)
def bria() -> DiffusionPipeline:
    return diffusers.BriaPipeline(
        transformer=diffusers.BriaTransformer2DModel(joint_attention_dim=WIDTH, **PACKED),
        scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1),
        **t5_parts(),
    )


def pixart(kind: type, sample_size: int) -> DiffusionPipeline:
    return kind(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=sample_size,
            num_layers=2,
            num_attention_heads=3,
            attention_head_dim=8,
            cross_attention_dim=24,
            caption_channels=WIDTH,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=autoencoder(),
        **t5_parts(),
    )


@tiny("pixart-alpha", use_resolution_binning=False, clean_caption=False, **TEXT, **SMALL)
def pixart_alpha() -> DiffusionPipeline:
    return pixart(diffusers.PixArtAlphaPipeline, sample_size=128)  # at 128 it is told the resolution


@tiny("pixart-sigma", use_resolution_binning=False, clean_caption=False, **TEXT, **SMALL)
def pixart_sigma() -> DiffusionPipeline:
    return pixart(diffusers.PixArtSigmaPipeline, sample_size=8)


@tiny("aura-flow", **TEXT, **SMALL)
def aura_flow() -> DiffusionPipeline:
    return diffusers.AuraFlowPipeline(
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pos_embed_max_size=16,
            **HEADS,
        ),
        scheduler=flow(shift=1.73),
        vae=autoencoder(),
        **t5_parts(kind=transformers.UMT5EncoderModel),
    )


@tiny("hunyuan-dit", use_resolution_binning=False, **SMALL)
def hunyuan_dit() -> DiffusionPipeline:
    return diffusers.HunyuanDiTPipeline(
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            hidden_size=32,
            cross_attention_dim=WIDTH,
            cross_attention_dim_t5=WIDTH,
            pooled_projection_dim=16,
            **HEADS,
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1
        ),
        vae=autoencoder(),
        **text_parts(bert(), CLIP_PATTERN),
        **t5_parts("_2"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def cogview_transformer(kind: type, **config: Any) -> diffusers.ModelMixin:
    return kind(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        **HEADS,
        **config,
    )


@tiny("cogview3-plus", **TEXT, **SMALL)
def cogview3_plus() -> DiffusionPipeline:
    return diffusers.CogView3PlusPipeline(
        transformer=cogview_transformer(diffusers.CogView3PlusTransformer2DModel),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="linspace",
        ),
        vae=autoencoder(),
        **t5_parts(),
    )


@tiny("hidream", **TEXT, **SMALL)
def hidream() -> DiffusionPipeline:
    """Whatever size is asked for, it draws 128 x 128 latents."""
    return diffusers.HiDreamImagePipeline(
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=4,  # published: 2, which here would be 4096 tokens
            in_channels=4,
            caption_channels=[WIDTH, WIDTH],
            text_emb_dim=12 + 20,
            llama_layers=[0, 1],
            **DOUBLE_AND_SINGLE,
            **HEADS,
            **ROPE,
        ),
        scheduler=flow(),
        vae=flux_autoencoder(),
        **two_clips(first_projection=12),
        **t5_parts("_3"),
        **text_parts(language_model(transformers.LlamaForCausalLM), BEGIN_PATTERN, "_4"),
    )
