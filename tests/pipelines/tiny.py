"""Tiny random pipelines of the text-to-image classes of diffusers, made from configurations; nothing is fetched.

    pipe = build("flux")
    pipe(prompt=["a photo of a doctor"], num_inference_steps=TINY["flux"].steps, **TINY["flux"].call)

Each has the features of the published model: norms of queries and keys, gates, modulation by pooled text, refiners.
Where a comment says nothing else, its call takes a list of prompts, a generator for each, and `output_type="latent"`.

Left out, because they need a package that the tests do not install: OmniGen (torchvision), PRX (ftfy), Kolors
(sentencepiece) and Cosmos 2 (cosmos_guardrail). GLM-Image is left out because it is two models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tests.pipelines.tiny_parts import (
    BEGIN_PATTERN,
    CHAT_PATTERN,
    CLIP_PATTERN,
    CLIP_WIDTH,
    TEXT_LENGTH,
    VOCABULARY,
    WIDTH,
    autoencoder,
    autoencoder_dc,
    bert,
    clip,
    clip_parts,
    draw,
    flow,
    flux_autoencoder,
    hunyuan_autoencoder,
    language_model,
    movq,
    processor,
    t5,
    t5_parts,
    text_parts,
    tokenizer,
    two_clips,
    unet,
    video_autoencoder,
    vision_language_model,
)


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline and how to call it.

    Attributes:
        name: Short name.
        make: Makes the pipeline; `build` then draws its weights.
        steps: Number of steps that suits it.
        guidance: Guidance scale at which the class's own guidance runs. None: do not pass `guidance_scale`.
        call: Further options of its call.
    """

    name: str
    make: Callable[[], DiffusionPipeline]
    steps: int
    guidance: float | None
    call: Mapping[str, Any]


TINY: dict[str, Tiny] = {}
REFUSED: dict[str, Tiny] = {}  # what is not one denoiser from texts to pictures

Make = Callable[[], DiffusionPipeline]


def tiny(
    name: str, guidance: float | None = 3.0, steps: int = 2, table: dict[str, Tiny] = TINY, **call: Any
) -> Callable[[Make], Make]:
    """Enter a function that makes a pipeline into a table."""

    def enter(make: Make) -> Make:
        table[name] = Tiny(name, make, steps, guidance, call)
        return make

    return enter


def build(name: str) -> DiffusionPipeline:
    """Make a pipeline, always with the same weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = (TINY | REFUSED)[name].make()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                draw(part.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(name: str, folder: Path | str) -> Path:
    """Write a pipeline, so that `DiffusionPipeline.from_pretrained(folder)` opens it."""
    build(name).save_pretrained(folder)
    return Path(folder)


SMALL = {"height": 16, "width": 16}
EIGHTH = {"height": 64, "width": 64}  # for pipelines that divide by eight whatever their autoencoder does
TEXT = {"max_sequence_length": TEXT_LENGTH}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = {"axes_dims_rope": (4, 6, 6)}
DOUBLE_AND_SINGLE = {"num_layers": 1, "num_single_layers": 1}
PACKED = {"in_channels": 16, **DOUBLE_AND_SINGLE, **HEADS, **ROPE}  # FLUX.1 and its kin: 2 x 2 latents are a token


# U-Nets


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


# Transformers that read T5, CLIP or BERT


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


# Transformers that read a language model


def flux2_transformer(guidance_embeds: bool) -> diffusers.ModelMixin:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
        **DOUBLE_AND_SINGLE,
        **HEADS,
    )


@tiny("flux2", max_sequence_length=64, **SMALL)  # room for its system message
def flux2() -> DiffusionPipeline:
    return diffusers.Flux2Pipeline(
        transformer=flux2_transformer(guidance_embeds=True),
        scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder(diffusers.AutoencoderKLFlux2),
        text_encoder=vision_language_model(transformers.Mistral3ForConditionalGeneration, layers=30),
        tokenizer=processor(),
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


@tiny("cogview4", **TEXT, **SMALL)
def cogview4() -> DiffusionPipeline:
    return diffusers.CogView4Pipeline(
        transformer=cogview_transformer(diffusers.CogView4Transformer2DModel, rope_axes_dim=(8, 8)),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        vae=autoencoder(),
        **text_parts(language_model(transformers.GlmModel), BEGIN_PATTERN),
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


# Refused


@tiny("img2img", table=REFUSED, **SMALL)
def img2img() -> DiffusionPipeline:
    return stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline)


@tiny("inpaint", table=REFUSED, **SMALL)
def inpaint() -> DiffusionPipeline:
    return stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet=unet(CLIP_WIDTH, in_channels=9))


@tiny("controlnet", table=REFUSED, **SMALL)
def controlnet() -> DiffusionPipeline:
    net = diffusers.ControlNetModel.from_unet(unet(CLIP_WIDTH), conditioning_embedding_out_channels=(8, 8))
    return stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=net)


@tiny("kandinsky22", table=REFUSED, **EIGHTH)
def kandinsky22() -> DiffusionPipeline:
    """A prior makes the embedding of a picture from the text; the decoder reads nothing else."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return diffusers.KandinskyV22CombinedPipeline(
        unet=unet(
            16, out_channels=8, encoder_hid_dim=16, encoder_hid_dim_type="image_proj", addition_embed_type="image"
        ),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=False),
        movq=movq(),
        prior_prior=diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=TEXT_LENGTH
        ),
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        prior_text_encoder=clip(projection=16),
        prior_tokenizer=tokenizer(CLIP_PATTERN, TEXT_LENGTH),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        prior_image_processor=transformers.CLIPImageProcessorPil(),
    )


@tiny("wan", table=REFUSED, num_frames=5, **TEXT, **SMALL)
def wan() -> DiffusionPipeline:
    """Videos."""
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=1, **HEADS
        ),
        scheduler=flow(),
        vae=video_autoencoder(diffusers.AutoencoderKLWan),
        **t5_parts(kind=transformers.UMT5EncoderModel),
    )


@tiny("dit", table=REFUSED)
def dit() -> DiffusionPipeline:
    """Classes of ImageNet instead of texts."""
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=8, in_channels=4, out_channels=8, num_layers=1, norm_num_groups=4, **HEADS
        ),
        vae=autoencoder(),
        scheduler=diffusers.DDIMScheduler(),
    )


@tiny("dreamlite", table=REFUSED, height=32, width=32)
def dreamlite() -> DiffusionPipeline:
    """One prompt a call; refuses a list."""
    return diffusers.DreamLitePipeline(
        unet=diffusers.DreamLiteUNetModel(
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=2 * 8,
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        processor=processor(),
        **text_parts(vision_language_model(transformers.Qwen3VLForConditionalGeneration), CHAT_PATTERN),
    )
