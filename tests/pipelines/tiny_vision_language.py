"""Tiny pipelines whose denoiser is a transformer that reads a vision language model."""

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from diffusers.guiders import AdaptiveProjectedMixGuidance
from tests.pipelines.tiny_language import flux2_transformer
from tests.pipelines.tiny_parts import (
    BEGIN_PATTERN,
    CHAT_PATTERN,
    CLIP_WIDTH,
    WIDTH,
    autoencoder,
    clip_parts,
    flow,
    flux_autoencoder,
    hunyuan_autoencoder,
    processor,
    t5,
    text_parts,
    video_autoencoder,
    vision_language_model,
)
from tests.pipelines.tiny_table import DOUBLE_AND_SINGLE, HEADS, PACKED, ROPE, SMALL, TEXT, tiny


@tiny("flux2", max_sequence_length=64, **SMALL)  # room for its system message
def flux2() -> DiffusionPipeline:
    return diffusers.Flux2Pipeline(
        transformer=flux2_transformer(guidance_embeds=True),
        scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder(diffusers.AutoencoderKLFlux2),
        text_encoder=vision_language_model(transformers.Mistral3ForConditionalGeneration, layers=30),
        tokenizer=processor(),
    )


@tiny("longcat", enable_prompt_rewrite=False, **SMALL)
def longcat() -> DiffusionPipeline:
    return diffusers.LongCatImagePipeline(
        transformer=diffusers.LongCatImageTransformer2DModel(
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, **{**PACKED, "in_channels": 64}
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux_autoencoder(channels=16),
        text_processor=processor(),
        **text_parts(vision_language_model(transformers.Qwen2_5_VLForConditionalGeneration), CHAT_PATTERN),
    )


@tiny("bria-fibo-2", **SMALL)
def bria_fibo_2() -> DiffusionPipeline:
    return diffusers.BriaFibo2Pipeline(
        transformer=diffusers.BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=5,  # each takes one of the five text inputs
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=3 * WIDTH,
            injection_layer_ids=(0, 1, 2, 3, 4),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=4,
            gist_min_text_len=8,
            gist_max_text_len=64,
            axes_dims=(4, 6, 6),
            axes_lens=(256, 32, 32),
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder(diffusers.AutoencoderKLFlux2),
        text_encoder=vision_language_model(transformers.Qwen3VLForConditionalGeneration, layers=36),
        processor=processor(),
    )


# Guides if it has a negative prompt. One string for a batch makes the unconditional condition a batch of one.
@tiny("qwen-image", guidance=None, true_cfg_scale=3.0, negative_prompt=" ", **SMALL)
def qwen_image() -> DiffusionPipeline:
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=WIDTH, **HEADS, **ROPE
        ),
        scheduler=flow(use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=0.02),
        vae=video_autoencoder(),
        **text_parts(vision_language_model(transformers.Qwen2_5_VLForConditionalGeneration), CHAT_PATTERN),
    )


# To guide it needs `true_cfg_scale` and one negative prompt for each prompt. With its cache on, which is the default,
# its denoiser is no function of its arguments.
@tiny("qwen-image-21", guidance=None, use_kv_cache=False, height=32, width=32)
def qwen_image_21() -> DiffusionPipeline:
    return diffusers.QwenImage21Pipeline(
        transformer=diffusers.QwenImage21Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, context_in_dim=WIDTH, **HEADS, **ROPE
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=video_autoencoder(diffusers.AutoencoderKLQwenImage21, levels=5, decoder_base_dim=8),
        text_encoder=vision_language_model(transformers.Qwen3VLForConditionalGeneration),
        processor=processor(),
    )


def hunyuan_image_like(guider: AdaptiveProjectedMixGuidance | None, **transformer: Any) -> DiffusionPipeline:
    return diffusers.HunyuanImagePipeline(
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=WIDTH,
            rope_axes_dim=(8, 8),
            **DOUBLE_AND_SINGLE,
            **HEADS,
            **transformer,
        ),
        scheduler=flow(shift=5.0),
        vae=hunyuan_autoencoder(),
        guider=guider,
        **text_parts(vision_language_model(transformers.Qwen2_5_VLForConditionalGeneration), CHAT_PATTERN),
        text_encoder_2=t5(vocabulary=384),
        tokenizer_2=transformers.ByT5Tokenizer(),
    )


@tiny("hunyuan-image", guidance=None, **SMALL)
def hunyuan_image() -> DiffusionPipeline:
    """Its guidance scale is a component's. 19 MB, for its second text projection is 2048 wide."""
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_scale=3.0)
    return hunyuan_image_like(guider, text_embed_2_dim=WIDTH)


@tiny("hunyuan-image-distilled", guidance=None, distilled_guidance_scale=3.25, **SMALL)
def hunyuan_image_distilled() -> DiffusionPipeline:
    """Is told the next timestep too."""
    return hunyuan_image_like(None, guidance_embeds=True, use_meanflow=True)


@tiny("krea2", **TEXT, **SMALL)
def krea2() -> DiffusionPipeline:
    return diffusers.Krea2Pipeline(
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_key_value_heads=1,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=WIDTH,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=64,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            **HEADS,
            **ROPE,
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=video_autoencoder(),
        **text_parts(vision_language_model(transformers.Qwen3VLModel), CHAT_PATTERN),
        text_encoder_select_layers=(1, 2),
    )


# The smallest of its fixed sizes; other sizes are replaced. Its result is in `.image`, not `.images`.
@tiny("kandinsky5", height=1408, width=640, **TEXT)
def kandinsky5() -> DiffusionPipeline:
    return diffusers.Kandinsky5T2IPipeline(
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=CLIP_WIDTH,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
        ),
        scheduler=flow(),
        vae=autoencoder(levels=4, mid_block_add_attention=False),
        text_encoder=vision_language_model(transformers.Qwen2_5_VLForConditionalGeneration),
        tokenizer=processor(),
        **clip_parts("_2"),
    )


@tiny("ernie-image", **SMALL)
def ernie_image() -> DiffusionPipeline:
    return diffusers.ErnieImagePipeline(
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=64,
            in_channels=16,
            out_channels=16,
            text_in_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
        scheduler=flow(),
        vae=autoencoder(diffusers.AutoencoderKLFlux2),
        **text_parts(vision_language_model(transformers.Mistral3Model), BEGIN_PATTERN),
    )


@tiny("nucleus-moe", max_sequence_length=104, **SMALL)  # room for its system prompt, a multiple of 8
def nucleus_moe() -> DiffusionPipeline:
    """Its second block has experts."""
    return diffusers.NucleusMoEImagePipeline(
        transformer=diffusers.NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=16,
            num_key_value_heads=1,
            joint_attention_dim=WIDTH,
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
            **ROPE,
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=video_autoencoder(),
        text_encoder=vision_language_model(transformers.Qwen3VLForConditionalGeneration, layers=9),
        processor=processor(),
    )


# A guidance scale would contradict the default of `guidance_schedule`, which has one scale for each step.
@tiny("ideogram4", guidance=None, guidance_schedule=[3.0, 3.0], **TEXT, **SMALL)
def ideogram4() -> DiffusionPipeline:
    """Two denoisers: `transformer` reads the prompt, `unconditional_transformer` does not."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "intermediate_size": 64,
        "adaln_dim": 16,
        "llm_features_dim": 13 * WIDTH,
        "mrope_section": (4, 2, 2),
        **HEADS,
    }
    return diffusers.Ideogram4Pipeline(
        transformer=diffusers.Ideogram4Transformer2DModel(**config),
        unconditional_transformer=diffusers.Ideogram4Transformer2DModel(**config),
        scheduler=flow(shift=1.0),
        vae=autoencoder(diffusers.AutoencoderKLFlux2),
        **text_parts(vision_language_model(transformers.Qwen3VLModel, layers=36), CHAT_PATTERN),
    )
