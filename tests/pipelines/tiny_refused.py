"""Tiny pipelines that are not one denoiser from texts to pictures, and are refused."""

import diffusers
import transformers
from diffusers import DiffusionPipeline
from tests.pipelines.tiny_parts import (
    CHAT_PATTERN,
    CLIP_PATTERN,
    CLIP_WIDTH,
    TEXT_LENGTH,
    WIDTH,
    autoencoder,
    clip,
    flow,
    movq,
    processor,
    t5_parts,
    text_parts,
    tokenizer,
    unet,
    video_autoencoder,
    vision_language_model,
)
from tests.pipelines.tiny_table import EIGHTH, HEADS, REFUSED, SMALL, TEXT, tiny
from tests.pipelines.tiny_unets import stable_diffusion


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
