"""Tiny pipelines whose denoiser is a transformer that reads a language model."""

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from tests.pipelines.tiny_parts import (
    BEGIN_PATTERN,
    CHAT_PATTERN,
    WIDTH,
    autoencoder,
    autoencoder_dc,
    flow,
    flux_autoencoder,
    language_model,
    text_parts,
    video_autoencoder,
)
from tests.pipelines.tiny_t5 import cogview_transformer
from tests.pipelines.tiny_table import DOUBLE_AND_SINGLE, EIGHTH, HEADS, PACKED, SMALL, TEXT, tiny


def flux2_transformer(guidance_embeds: bool) -> diffusers.ModelMixin:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
        **DOUBLE_AND_SINGLE,
        **HEADS,
    )


def flux2_klein_like(kind: type) -> DiffusionPipeline:
    return kind(
        transformer=flux2_transformer(guidance_embeds=False),
        scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder(diffusers.AutoencoderKLFlux2),
        **text_parts(language_model(transformers.Qwen3ForCausalLM, layers=27), CHAT_PATTERN),
    )


@tiny("flux2-klein", **TEXT, **SMALL)
def flux2_klein() -> DiffusionPipeline:
    return flux2_klein_like(diffusers.Flux2KleinPipeline)


@tiny("flux2-klein-kv", guidance=None, **TEXT, **SMALL)
def flux2_klein_kv() -> DiffusionPipeline:
    """Caches the keys and values of pictures that it is given, if any. Distilled: no guidance."""
    return flux2_klein_like(diffusers.Flux2KleinKVPipeline)


@tiny("ovis", **TEXT, **SMALL)
def ovis() -> DiffusionPipeline:
    return diffusers.OvisImagePipeline(
        transformer=diffusers.OvisImageTransformer2DModel(out_channels=16, joint_attention_dim=WIDTH, **PACKED),
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux_autoencoder(),
        **text_parts(language_model(transformers.Qwen3Model), CHAT_PATTERN),
    )


# An empty negative prompt would be token 128000, which this vocabulary lacks.
@tiny("bria-fibo", negative_prompt="the", **TEXT, **EIGHTH)
def bria_fibo() -> DiffusionPipeline:
    return diffusers.BriaFiboPipeline(
        transformer=diffusers.BriaFiboTransformer2DModel(
            joint_attention_dim=2 * WIDTH, text_encoder_dim=WIDTH, **{**PACKED, "in_channels": 4}
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=video_autoencoder(diffusers.AutoencoderKLWan, levels=5),
        **text_parts(language_model(transformers.SmolLM3ForCausalLM), CHAT_PATTERN),
    )


def sana_like(kind: type, scheduler: diffusers.SchedulerMixin, **transformer: Any) -> DiffusionPipeline:
    return kind(
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=WIDTH,
            sample_size=8,
            **HEADS,
            **transformer,
        ),
        scheduler=scheduler,
        vae=autoencoder_dc(),
        **text_parts(language_model(transformers.Gemma2Model), BEGIN_PATTERN),
    )


@tiny("sana", use_resolution_binning=False, height=32, width=32, **TEXT)
def sana() -> DiffusionPipeline:
    return sana_like(
        diffusers.SanaPipeline,
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


# Two is the only number of steps that its default intermediate timestep allows.
@tiny("sana-sprint", use_resolution_binning=False, height=32, width=32, **TEXT)
def sana_sprint() -> DiffusionPipeline:
    return sana_like(
        diffusers.SanaSprintPipeline,
        diffusers.SCMScheduler(prediction_type="trigflow"),
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1000.0,
    )


@tiny("lumina", clean_caption=False, **EIGHTH)
def lumina() -> DiffusionPipeline:
    return diffusers.LuminaPipeline(
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=WIDTH,
        ),
        scheduler=flow(),
        vae=autoencoder(levels=4),
        **text_parts(language_model(transformers.GemmaModel), BEGIN_PATTERN),
    )


@tiny("lumina2", max_sequence_length=48, **EIGHTH)  # room for its system prompt
def lumina2() -> DiffusionPipeline:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 16, 16),
            cap_feat_dim=WIDTH,
        ),
        scheduler=flow(shift=6.0),
        vae=autoencoder(levels=4, scaling_factor=0.3611, shift_factor=0.1159),
        **text_parts(language_model(transformers.Gemma2Model), BEGIN_PATTERN),
    )


def z_image_like(kind: type, siglip_feat_dim: int | None = None, **parts: Any) -> DiffusionPipeline:
    return kind(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            siglip_feat_dim=siglip_feat_dim,
            axes_dims=[4, 6, 6],
            axes_lens=[512, 32, 32],
        ),
        scheduler=flow(),
        vae=flux_autoencoder(),
        **text_parts(language_model(transformers.Qwen3Model), CHAT_PATTERN),
        **parts,
    )


@tiny("z-image", **TEXT, **SMALL)
def z_image() -> DiffusionPipeline:
    """Its call overwrites the list of prompts that it is given."""
    return z_image_like(diffusers.ZImagePipeline)


@tiny("z-image-omni", **TEXT, **SMALL)
def z_image_omni() -> DiffusionPipeline:
    """Takes pictures too. Its conditions are lists of lists."""
    vision = transformers.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=4
    )
    return z_image_like(
        diffusers.ZImageOmniPipeline,
        siglip_feat_dim=16,
        siglip=transformers.Siglip2VisionModel(vision),
        siglip_processor=transformers.Siglip2ImageProcessorPil(),
    )


@tiny("cogview4", **TEXT, **SMALL)
def cogview4() -> DiffusionPipeline:
    return diffusers.CogView4Pipeline(
        transformer=cogview_transformer(diffusers.CogView4Transformer2DModel, rope_axes_dim=(8, 8)),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        vae=autoencoder(),
        **text_parts(language_model(transformers.GlmModel), BEGIN_PATTERN),
    )
