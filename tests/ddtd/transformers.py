"""Tiny random denoisers of the transformer families of diffusers, and two U-Nets of its own; each with one call."""

# ruff: noqa: C408  (arguments read as they do in a call)

from collections.abc import Callable

import torch
from tests.ddtd.denoisers import SAMPLES, SIDE, TEXT, Call, build_network, noise, packed


def flux() -> Call:
    network = build_network(
        "FluxTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    kwargs = packed(12, pooled_projections=noise(SAMPLES, 8), guidance=torch.tensor([3.5, 3.5]))
    return Call(network, kwargs, [kwargs["encoder_hidden_states"], kwargs["pooled_projections"]])


def flux2() -> Call:
    network = build_network(
        "Flux2Transformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    kwargs = packed(12, guidance=torch.tensor([3.5, 3.5]))
    for name in ("img_ids", "txt_ids"):
        kwargs[name] = torch.nn.functional.pad(kwargs[name], (0, 1))
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def chroma() -> Call:
    network = build_network(
        "ChromaTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    kwargs = packed(12, attention_mask=torch.ones(SAMPLES, TEXT + SIDE * SIDE, dtype=torch.bool))
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def ovis() -> Call:
    network = build_network(
        "OvisImageTransformer2DModel", in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    kwargs = packed(12)
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def bria() -> Call:
    network = build_network(
        "BriaTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    kwargs = packed(12, timestep=torch.tensor([700.0, 700.0]))
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def longcat() -> Call:
    network = build_network(
        "LongCatImageTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    kwargs = packed(12)
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def sd3() -> Call:
    network = build_network(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8,
        out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    text, pooled = noise(SAMPLES, TEXT, 12), noise(SAMPLES, 8)
    kwargs = dict(
        hidden_states=noise(SAMPLES, 4, 8, 8), encoder_hidden_states=text, pooled_projections=pooled,
        timestep=torch.tensor([700.0, 700.0]),
    )  # fmt: skip
    return Call(network, kwargs, [text, pooled])


def pixart() -> Call:
    network = build_network(
        "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=2, cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=12,
        use_additional_conditions=False, norm_num_groups=4,
    )  # fmt: skip
    text = noise(SAMPLES, TEXT, 12)
    mask = torch.ones(SAMPLES, TEXT)
    mask[0, -1] = 0
    kwargs = dict(
        hidden_states=noise(SAMPLES, 4, 8, 8), encoder_hidden_states=text, timestep=torch.tensor([700, 700]),
        encoder_attention_mask=mask, added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip
    return Call(network, kwargs, [text])


def sana() -> Call:
    network = build_network(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=12, sample_size=4, patch_size=1, guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    text = noise(SAMPLES, TEXT, 12)
    kwargs = dict(
        hidden_states=noise(SAMPLES, 4, 4, 4), encoder_hidden_states=text, timestep=torch.tensor([0.7, 0.7]),
        guidance=torch.tensor([0.5, 0.5]), encoder_attention_mask=torch.ones(SAMPLES, TEXT),
    )  # fmt: skip
    return Call(network, kwargs, [text])


def lumina2() -> Call:
    network = build_network(
        "Lumina2Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16), cap_feat_dim=12,
    )  # fmt: skip
    text = noise(SAMPLES, TEXT, 12)
    mask = torch.ones(SAMPLES, TEXT, dtype=torch.bool)
    mask[0, -2:] = False
    kwargs = dict(
        hidden_states=noise(SAMPLES, 4, 8, 8), timestep=torch.tensor([0.3, 0.3]), encoder_hidden_states=text,
        encoder_attention_mask=mask,
    )  # fmt: skip
    return Call(network, kwargs, [text])


def z_image() -> Call:
    network = build_network(
        "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=12, axes_dims=[8, 4, 4], axes_lens=[128, 16, 16],
    )  # fmt: skip
    text = [noise(TEXT, 12), noise(TEXT + 32, 12)]  # of two lengths once padded
    kwargs = dict(x=[noise(4, 1, 8, 8), noise(4, 1, 8, 8)], t=torch.tensor([0.3, 0.3]), cap_feats=text)
    return Call(network, kwargs, text)


def qwen() -> Call:
    network = build_network(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=1, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = noise(SAMPLES, TEXT, 12)
    kwargs = dict(
        hidden_states=noise(SAMPLES, 16, 4), encoder_hidden_states=text, timestep=torch.tensor([0.7, 0.7]),
        encoder_hidden_states_mask=torch.ones(SAMPLES, TEXT, dtype=torch.long),
        img_shapes=[[(1, 4, 4)]] * SAMPLES,
    )  # fmt: skip
    return Call(network, kwargs, [text])


def cogview4() -> Call:
    network = build_network(
        "CogView4Transformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, text_embed_dim=12, time_embed_dim=8, condition_dim=4,
        sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    text, size = noise(SAMPLES, TEXT, 12), torch.tensor([[64.0, 64.0]] * SAMPLES)
    kwargs = dict(
        hidden_states=noise(SAMPLES, 4, 8, 8), encoder_hidden_states=text, timestep=torch.tensor([700, 700]),
        original_size=size, target_size=size, crop_coords=0 * size,
    )  # fmt: skip
    return Call(network, kwargs, [text])


def hunyuan_image() -> Call:
    network = build_network(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=8, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=12,
        text_embed_2_dim=10, rope_axes_dim=(4, 4), guidance_embeds=True,
    )  # fmt: skip
    text, glyphs = noise(SAMPLES, TEXT, 12), noise(SAMPLES, 3, 10)
    mask = torch.ones(SAMPLES, TEXT)
    mask[0, -1] = 0
    kwargs = dict(
        hidden_states=noise(SAMPLES, 4, 4, 4), timestep=torch.tensor([700.0, 700.0]), encoder_hidden_states=text,
        encoder_attention_mask=mask, encoder_hidden_states_2=glyphs, encoder_attention_mask_2=torch.ones(SAMPLES, 3),
        guidance=torch.tensor([3.5, 3.5]),
    )  # fmt: skip
    return Call(network, kwargs, [text, glyphs])


def hunyuan_dit() -> Call:
    network = build_network(
        "HunyuanDiT2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=16, num_layers=4, mlp_ratio=2.0, cross_attention_dim=12, cross_attention_dim_t5=16,
        pooled_projection_dim=8, text_len=TEXT, text_len_t5=6, use_style_cond_and_image_meta_size=True,
    )  # fmt: skip
    text, t5 = noise(SAMPLES, TEXT, 12), noise(SAMPLES, 6, 16)
    mask = torch.ones(SAMPLES, TEXT)
    mask[0, -1] = 0
    kwargs = dict(
        hidden_states=noise(SAMPLES, 4, 8, 8), timestep=torch.tensor([700.0, 700.0]), encoder_hidden_states=text,
        text_embedding_mask=mask, encoder_hidden_states_t5=t5, text_embedding_mask_t5=torch.ones(SAMPLES, 6),
        image_meta_size=torch.full((SAMPLES, 6), 64.0), style=torch.zeros(SAMPLES, dtype=torch.long),
        image_rotary_emb=(torch.rand(16, 8), torch.rand(16, 8)),
    )  # fmt: skip
    return Call(network, kwargs, [text, t5])


def auraflow() -> Call:
    network = build_network(
        "AuraFlowTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=2,
        num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    text = noise(SAMPLES, TEXT, 12)
    kwargs = dict(hidden_states=noise(SAMPLES, 4, 8, 8), encoder_hidden_states=text, timestep=torch.tensor([0.7, 0.7]))
    return Call(network, kwargs, [text])


def hidream() -> Call:
    network = build_network(
        "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        num_single_layers=2, attention_head_dim=8, num_attention_heads=2, caption_channels=[12, 10], text_emb_dim=8,
        num_routed_experts=3, num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(4, 4),
        llama_layers=[0, 1, 2, 3],
    )  # fmt: skip
    t5, llama, pooled = noise(SAMPLES, TEXT, 12), noise(4, SAMPLES, 6, 10), noise(SAMPLES, 8)
    kwargs = dict(
        hidden_states=noise(SAMPLES, 4, 8, 8), timesteps=torch.tensor([700.0, 700.0]), encoder_hidden_states_t5=t5,
        encoder_hidden_states_llama3=llama, pooled_embeds=pooled,
    )  # fmt: skip
    return Call(network, kwargs, [t5, llama, pooled])


def krea2() -> Call:
    network = build_network(
        "Krea2Transformer2DModel", in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24, timestep_embed_dim=8, text_hidden_dim=12, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = noise(SAMPLES, TEXT, 2, 12)
    ids = torch.cat([torch.zeros(TEXT, 3), packed(12)["img_ids"]])
    mask = torch.ones(SAMPLES, TEXT, dtype=torch.bool)
    mask[0, -1] = False
    kwargs = dict(
        hidden_states=noise(SAMPLES, 16, 4), encoder_hidden_states=text, timestep=torch.tensor([0.7, 0.7]),
        position_ids=ids, encoder_attention_mask=mask,
    )  # fmt: skip
    return Call(network, kwargs, [text])


def kandinsky5() -> Call:
    network = build_network(
        "Kandinsky5Transformer3DModel", in_visual_dim=4, in_text_dim=12, in_text_dim2=8, time_dim=16,
        out_visual_dim=4, patch_size=(1, 2, 2), model_dim=16, ff_dim=24, num_text_blocks=1, num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )  # fmt: skip
    text, pooled = noise(SAMPLES, TEXT, 12), noise(SAMPLES, 8)
    kwargs = dict(
        hidden_states=noise(SAMPLES, 1, 8, 8, 4), encoder_hidden_states=text, timestep=torch.tensor([700.0, 700.0]),
        pooled_projections=pooled, visual_rope_pos=[torch.arange(1), torch.arange(4), torch.arange(4)],
        text_rope_pos=torch.arange(TEXT),
    )  # fmt: skip
    return Call(network, kwargs, [text, pooled])


def kandinsky3() -> Call:
    network = build_network(
        "Kandinsky3UNet", in_channels=4, time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2,
        block_out_channels=(8, 8, 8, 8), cross_attention_dim=8, encoder_hid_dim=12,
    )  # fmt: skip
    text = noise(SAMPLES, TEXT, 12)
    kwargs = dict(
        sample=noise(SAMPLES, 4, 8, 8), timestep=torch.tensor(700), encoder_hidden_states=text,
        encoder_attention_mask=torch.ones(SAMPLES, TEXT),
    )  # fmt: skip
    return Call(network, kwargs, [text])


def lcm() -> Call:
    """A U-Net that also embeds its guidance scale."""
    network = build_network(
        "UNet2DConditionModel", sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4, time_cond_proj_dim=8,
    )  # fmt: skip
    text = noise(SAMPLES, TEXT, 8)
    kwargs = dict(
        sample=noise(SAMPLES, 4, 8, 8), timestep=torch.tensor(700), encoder_hidden_states=text,
        timestep_cond=noise(SAMPLES, 8),
    )  # fmt: skip
    return Call(network, kwargs, [text])


FAMILIES: dict[str, Callable[[], Call]] = {
    "FLUX.1": flux,
    "FLUX.2": flux2,
    "SD3": sd3,
    "Chroma": chroma,
    "PixArt": pixart,
    "SANA": sana,
    "Lumina 2": lumina2,
    "Z-Image": z_image,
    "Qwen-Image": qwen,
    "CogView4": cogview4,
    "HunyuanImage": hunyuan_image,
    "HunyuanDiT": hunyuan_dit,
    "AuraFlow": auraflow,
    "HiDream": hidream,
    "Krea 2": krea2,
    "Ovis": ovis,
    "Bria": bria,
    "LongCat": longcat,
    "Kandinsky 5": kandinsky5,
    "Kandinsky 3": kandinsky3,
    "LCM": lcm,
}


def tiny(family: str) -> Call:
    """The call of a family, always the same."""
    torch.manual_seed(0)
    return FAMILIES[family]()
