"""Tiny random denoisers of the transformer families of diffusers, and two U-Nets of its own; each with one call."""

# ruff: noqa: C408  (arguments read as they do in a call)

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

SAMPLES, TEXT, SIDE = 2, 5, 4  # rows, text tokens, side of the latents in patches


@dataclass
class Call:
    """One call of a network.

    Attributes:
        network: a diffusers denoiser in float32, frozen.
        kwargs: its arguments; the latents come first.
        text: the arguments that depend on the prompt.
    """

    network: nn.Module
    kwargs: dict[str, Any]
    text: list[Tensor]

    def __call__(self) -> Tensor:
        output = self.network(**self.kwargs, return_dict=False)
        sample = output[0] if isinstance(output, tuple) else output
        return torch.stack(list(sample)) if isinstance(sample, list) else sample

    def to(self, dtype: torch.dtype) -> "Call":
        """The same call in another dtype."""

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype) if value.is_floating_point() else value
            return type(value)(map(cast, value)) if isinstance(value, list | tuple) else value

        given = {id(x): i for i, x in enumerate(self.text)}
        text = [cast(x) for x in self.text]

        def replace(value: Any) -> Any:
            if id(value) in given:
                return text[given[id(value)]]
            return type(value)(map(replace, value)) if isinstance(value, list | tuple) else cast(value)

        return Call(self.network.to(dtype), {key: replace(value) for key, value in self.kwargs.items()}, text)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def _network(kind: str, **config: Any) -> nn.Module:
    """Built from a configuration, no parameter left at zero or one: a rule that forgets it would not be seen."""
    network: nn.Module = getattr(diffusers, kind)(**config)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2 or not parameter.any() or name.endswith("scale_shift_table"):
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return network.requires_grad_(False).eval()


def _packed(width: int, **more: Any) -> dict[str, Any]:
    """Packed latents and token ids, as FLUX.1 takes them."""
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(SIDE).float(), torch.arange(SIDE).float())
    text = _noise(SAMPLES, TEXT, width)
    call = dict(
        hidden_states=_noise(SAMPLES, SIDE * SIDE, 4),
        timestep=torch.tensor([0.7, 0.7]),
        encoder_hidden_states=text,
        img_ids=ids,
        txt_ids=torch.zeros(TEXT, 3),
    )
    return call | more


def flux() -> Call:
    network = _network(
        "FluxTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    kwargs = _packed(12, pooled_projections=_noise(SAMPLES, 8), guidance=torch.tensor([3.5, 3.5]))
    return Call(network, kwargs, [kwargs["encoder_hidden_states"], kwargs["pooled_projections"]])


def flux2() -> Call:
    network = _network(
        "Flux2Transformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    kwargs = _packed(12, guidance=torch.tensor([3.5, 3.5]))
    for name in ("img_ids", "txt_ids"):
        kwargs[name] = torch.nn.functional.pad(kwargs[name], (0, 1))
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def chroma() -> Call:
    network = _network(
        "ChromaTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    kwargs = _packed(12, attention_mask=torch.ones(SAMPLES, TEXT + SIDE * SIDE, dtype=torch.bool))
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def ovis() -> Call:
    network = _network(
        "OvisImageTransformer2DModel", in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    kwargs = _packed(12)
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def bria() -> Call:
    network = _network(
        "BriaTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    kwargs = _packed(12, timestep=torch.tensor([700.0, 700.0]))
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def longcat() -> Call:
    network = _network(
        "LongCatImageTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    kwargs = _packed(12)
    return Call(network, kwargs, [kwargs["encoder_hidden_states"]])


def sd3() -> Call:
    network = _network(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8,
        out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    text, pooled = _noise(SAMPLES, TEXT, 12), _noise(SAMPLES, 8)
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 4, 8, 8), encoder_hidden_states=text, pooled_projections=pooled,
        timestep=torch.tensor([700.0, 700.0]),
    )  # fmt: skip
    return Call(network, kwargs, [text, pooled])


def pixart() -> Call:
    network = _network(
        "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=2, cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=12,
        use_additional_conditions=False, norm_num_groups=4,
    )  # fmt: skip
    text = _noise(SAMPLES, TEXT, 12)
    mask = torch.ones(SAMPLES, TEXT)
    mask[0, -1] = 0
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 4, 8, 8), encoder_hidden_states=text, timestep=torch.tensor([700, 700]),
        encoder_attention_mask=mask, added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip
    return Call(network, kwargs, [text])


def sana() -> Call:
    network = _network(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=12, sample_size=4, patch_size=1, guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    text = _noise(SAMPLES, TEXT, 12)
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 4, 4, 4), encoder_hidden_states=text, timestep=torch.tensor([0.7, 0.7]),
        guidance=torch.tensor([0.5, 0.5]), encoder_attention_mask=torch.ones(SAMPLES, TEXT),
    )  # fmt: skip
    return Call(network, kwargs, [text])


def lumina2() -> Call:
    network = _network(
        "Lumina2Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16), cap_feat_dim=12,
    )  # fmt: skip
    text = _noise(SAMPLES, TEXT, 12)
    mask = torch.ones(SAMPLES, TEXT, dtype=torch.bool)
    mask[0, -2:] = False
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 4, 8, 8), timestep=torch.tensor([0.3, 0.3]), encoder_hidden_states=text,
        encoder_attention_mask=mask,
    )  # fmt: skip
    return Call(network, kwargs, [text])


def z_image() -> Call:
    network = _network(
        "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=12, axes_dims=[8, 4, 4], axes_lens=[128, 16, 16],
    )  # fmt: skip
    text = [_noise(TEXT, 12), _noise(TEXT + 32, 12)]  # of two lengths once padded
    kwargs = dict(x=[_noise(4, 1, 8, 8), _noise(4, 1, 8, 8)], t=torch.tensor([0.3, 0.3]), cap_feats=text)
    return Call(network, kwargs, text)


def qwen() -> Call:
    network = _network(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=1, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = _noise(SAMPLES, TEXT, 12)
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 16, 4), encoder_hidden_states=text, timestep=torch.tensor([0.7, 0.7]),
        encoder_hidden_states_mask=torch.ones(SAMPLES, TEXT, dtype=torch.long),
        img_shapes=[[(1, 4, 4)]] * SAMPLES,
    )  # fmt: skip
    return Call(network, kwargs, [text])


def cogview4() -> Call:
    network = _network(
        "CogView4Transformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, text_embed_dim=12, time_embed_dim=8, condition_dim=4,
        sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    text, size = _noise(SAMPLES, TEXT, 12), torch.tensor([[64.0, 64.0]] * SAMPLES)
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 4, 8, 8), encoder_hidden_states=text, timestep=torch.tensor([700, 700]),
        original_size=size, target_size=size, crop_coords=0 * size,
    )  # fmt: skip
    return Call(network, kwargs, [text])


def hunyuan_image() -> Call:
    network = _network(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=8, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=12,
        text_embed_2_dim=10, rope_axes_dim=(4, 4), guidance_embeds=True,
    )  # fmt: skip
    text, glyphs = _noise(SAMPLES, TEXT, 12), _noise(SAMPLES, 3, 10)
    mask = torch.ones(SAMPLES, TEXT)
    mask[0, -1] = 0
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 4, 4, 4), timestep=torch.tensor([700.0, 700.0]), encoder_hidden_states=text,
        encoder_attention_mask=mask, encoder_hidden_states_2=glyphs, encoder_attention_mask_2=torch.ones(SAMPLES, 3),
        guidance=torch.tensor([3.5, 3.5]),
    )  # fmt: skip
    return Call(network, kwargs, [text, glyphs])


def hunyuan_dit() -> Call:
    network = _network(
        "HunyuanDiT2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=16, num_layers=4, mlp_ratio=2.0, cross_attention_dim=12, cross_attention_dim_t5=16,
        pooled_projection_dim=8, text_len=TEXT, text_len_t5=6, use_style_cond_and_image_meta_size=True,
    )  # fmt: skip
    text, t5 = _noise(SAMPLES, TEXT, 12), _noise(SAMPLES, 6, 16)
    mask = torch.ones(SAMPLES, TEXT)
    mask[0, -1] = 0
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 4, 8, 8), timestep=torch.tensor([700.0, 700.0]), encoder_hidden_states=text,
        text_embedding_mask=mask, encoder_hidden_states_t5=t5, text_embedding_mask_t5=torch.ones(SAMPLES, 6),
        image_meta_size=torch.full((SAMPLES, 6), 64.0), style=torch.zeros(SAMPLES, dtype=torch.long),
        image_rotary_emb=(torch.rand(16, 8), torch.rand(16, 8)),
    )  # fmt: skip
    return Call(network, kwargs, [text, t5])


def auraflow() -> Call:
    network = _network(
        "AuraFlowTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=2,
        num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    text = _noise(SAMPLES, TEXT, 12)
    kwargs = dict(hidden_states=_noise(SAMPLES, 4, 8, 8), encoder_hidden_states=text, timestep=torch.tensor([0.7, 0.7]))
    return Call(network, kwargs, [text])


def hidream() -> Call:
    network = _network(
        "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        num_single_layers=2, attention_head_dim=8, num_attention_heads=2, caption_channels=[12, 10], text_emb_dim=8,
        num_routed_experts=3, num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(4, 4),
        llama_layers=[0, 1, 2, 3],
    )  # fmt: skip
    t5, llama, pooled = _noise(SAMPLES, TEXT, 12), _noise(4, SAMPLES, 6, 10), _noise(SAMPLES, 8)
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 4, 8, 8), timesteps=torch.tensor([700.0, 700.0]), encoder_hidden_states_t5=t5,
        encoder_hidden_states_llama3=llama, pooled_embeds=pooled,
    )  # fmt: skip
    return Call(network, kwargs, [t5, llama, pooled])


def krea2() -> Call:
    network = _network(
        "Krea2Transformer2DModel", in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24, timestep_embed_dim=8, text_hidden_dim=12, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = _noise(SAMPLES, TEXT, 2, 12)
    ids = torch.cat([torch.zeros(TEXT, 3), _packed(12)["img_ids"]])
    mask = torch.ones(SAMPLES, TEXT, dtype=torch.bool)
    mask[0, -1] = False
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 16, 4), encoder_hidden_states=text, timestep=torch.tensor([0.7, 0.7]),
        position_ids=ids, encoder_attention_mask=mask,
    )  # fmt: skip
    return Call(network, kwargs, [text])


def kandinsky5() -> Call:
    network = _network(
        "Kandinsky5Transformer3DModel", in_visual_dim=4, in_text_dim=12, in_text_dim2=8, time_dim=16,
        out_visual_dim=4, patch_size=(1, 2, 2), model_dim=16, ff_dim=24, num_text_blocks=1, num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )  # fmt: skip
    text, pooled = _noise(SAMPLES, TEXT, 12), _noise(SAMPLES, 8)
    kwargs = dict(
        hidden_states=_noise(SAMPLES, 1, 8, 8, 4), encoder_hidden_states=text, timestep=torch.tensor([700.0, 700.0]),
        pooled_projections=pooled, visual_rope_pos=[torch.arange(1), torch.arange(4), torch.arange(4)],
        text_rope_pos=torch.arange(TEXT),
    )  # fmt: skip
    return Call(network, kwargs, [text, pooled])


def kandinsky3() -> Call:
    network = _network(
        "Kandinsky3UNet", in_channels=4, time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2,
        block_out_channels=(8, 8, 8, 8), cross_attention_dim=8, encoder_hid_dim=12,
    )  # fmt: skip
    text = _noise(SAMPLES, TEXT, 12)
    kwargs = dict(
        sample=_noise(SAMPLES, 4, 8, 8), timestep=torch.tensor(700), encoder_hidden_states=text,
        encoder_attention_mask=torch.ones(SAMPLES, TEXT),
    )  # fmt: skip
    return Call(network, kwargs, [text])


def lcm() -> Call:
    """A U-Net that also embeds its guidance scale."""
    network = _network(
        "UNet2DConditionModel", sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4, time_cond_proj_dim=8,
    )  # fmt: skip
    text = _noise(SAMPLES, TEXT, 8)
    kwargs = dict(
        sample=_noise(SAMPLES, 4, 8, 8), timestep=torch.tensor(700), encoder_hidden_states=text,
        timestep_cond=_noise(SAMPLES, 8),
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
