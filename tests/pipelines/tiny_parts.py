"""The parts that tiny pipelines share: tokenizers, text encoders, autoencoders and U-Nets; nothing is fetched."""

from typing import Any

import diffusers
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

WIDTH = 32  # of text encoders other than CLIP's
CLIP_WIDTH = 16
TEXT_LENGTH = 24  # what prompts are padded to where a pipeline lets us choose

# Where the special tokens of a text go.
CLIP_PATTERN, T5_PATTERN, BEGIN_PATTERN, CHAT_PATTERN = "<s> $A </s>", "$A </s>", "<s> $A", "$A"
SPECIAL_TOKENS = [
    "<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<image>",
]  # fmt: skip
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
# With the words of the axes and of `PORTRAITS`, written out: a new occupation must not change the ids of other words.
WORDS = [
    ".", ",", ":", ";", "-", "'", '"', "!", "?", "\n",
    "a", "an", "and", "at", "by", "for", "in", "of", "on", "the", "this", "to", "with",
    "photo", "photograph", "picture", "portrait", "painting", "image", "drawing", "face", "person", "people", "man",
    "woman", "child", "adult",
    "female", "male", "old", "young", "dark", "light", "skinned", "skin",
    "doctor", "nurse", "teacher", "librarian", "receptionist", "chef", "farmer", "firefighter", "mechanic", "pilot",
    "judge", "executive",
    "black", "white", "red", "green", "blue", "smiling", "standing", "working", "wearing", "hat", "coat", "office",
    "kitchen", "street",
]  # fmt: skip
VOCABULARY = len(SPECIAL_TOKENS) + len(WORDS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(pattern: str = CHAT_PATTERN, length: int = 4096) -> PreTrainedTokenizerFast:
    """One token for each word, punctuation mark and line break.

    Pipelines cut a fixed number of tokens off the front of a chat. A chat has as many here as with Qwen's tokenizer.

    Args:
        pattern: Where the special tokens go.
        length: What a text is padded to where the pipeline names no length.
    """
    ids = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\n|[^\w\s]"), "removed", invert=True)
    words.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL_TOKENS[4:],
        model_max_length=length,
        chat_template=CHAT_TEMPLATE,
    )


def processor() -> transformers.LlavaProcessor:
    """A tokenizer inside a processor. Stands in for Qwen's processors, whose video half needs torchvision."""
    return transformers.LlavaProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(), tokenizer=tokenizer(), chat_template=CHAT_TEMPLATE
    )


def clip(width: int = CLIP_WIDTH, projection: int | None = None, activation: str = "quick_gelu") -> PreTrainedModel:
    """CLIP's text encoder, with a projection to `projection` features if that is given."""
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        **SPECIAL_IDS,
    )
    return transformers.CLIPTextModelWithProjection(config) if projection else transformers.CLIPTextModel(config)


def t5(kind: type[PreTrainedModel] = transformers.T5EncoderModel, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """The encoder of T5 or UMT5."""
    config = kind.config_class(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return kind(config)


def bert() -> PreTrainedModel:
    """BERT."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return transformers.BertModel(config)


def _decoder_config(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        **SPECIAL_IDS,
    }


def language_model(kind: type[PreTrainedModel], layers: int = 2) -> PreTrainedModel:
    """A decoder such as Qwen3, Gemma or Llama. Some pipelines read layers of fixed number: give it as many."""
    return kind(kind.config_class(**_decoder_config(layers)))


def vision_language_model(kind: type[PreTrainedModel], layers: int = 2) -> PreTrainedModel:
    """A decoder next to a vision tower, which a prompt without pictures does not reach."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    text = {**_decoder_config(layers), "rope_parameters": rotary}
    return kind(kind.config_class(text_config=text, vision_config=vision))


def text_parts(encoder: nn.Module, pattern: str, suffix: str = "", length: int = 4096) -> dict[str, Any]:
    """A text encoder and its tokenizer, under the names that pipelines give them."""
    return {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer(pattern, length)}


def clip_parts(suffix: str = "", **config: Any) -> dict[str, Any]:
    """CLIP's text encoder and its tokenizer."""
    return text_parts(clip(**config), CLIP_PATTERN, suffix, TEXT_LENGTH)


def two_clips(first_projection: int | None = None) -> dict[str, Any]:
    """The two CLIP encoders of SDXL and its successors: 8 and 12 wide, the second projected to 20."""
    return {
        **clip_parts(width=8, projection=first_projection),
        **clip_parts("_2", width=12, projection=20, activation="gelu"),
    }


def t5_parts(suffix: str = "", **config: Any) -> dict[str, Any]:
    """T5's encoder and its tokenizer."""
    return text_parts(t5(**config), T5_PATTERN, suffix)


def autoencoder(
    kind: type = diffusers.AutoencoderKL, levels: int = 2, channels: int = 4, **config: Any
) -> diffusers.ModelMixin:
    """Latents at 1 / 2^(levels - 1) of the picture's size."""
    return kind(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def flux_autoencoder(channels: int = 4) -> diffusers.ModelMixin:
    """With the shift and scale of FLUX.1's."""
    return autoencoder(
        channels=channels,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def autoencoder_dc() -> diffusers.ModelMixin:
    """SANA's: a quarter of the picture's size, with linear attention."""
    blocks, widths, layers, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), (8, 8, 8), (1, 1, 1), ((), (), (5,))
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=0.41407,
    )


def video_autoencoder(
    kind: type = diffusers.AutoencoderKLQwenImage, levels: int = 2, **config: Any
) -> diffusers.ModelMixin:
    """Latents at 1 / 2^(levels - 1) of the size. Qwen-Image uses it on single frames."""
    return kind(
        base_dim=8,
        z_dim=4,
        dim_mult=[1] * levels,
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 1),
        latents_mean=[0.1] * 4,
        latents_std=[2.0] * 4,
        **config,
    )


def hunyuan_autoencoder() -> diffusers.ModelMixin:
    """Half of the picture's size."""
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75289,
    )


def movq() -> diffusers.ModelMixin:
    """Kandinsky's: an eighth of the picture's size."""
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        latent_channels=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def unet(width: int, **config: Any) -> diffusers.UNet2DConditionModel:
    """Two levels, the lower one with cross-attention to texts of `width`."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": width,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**{**settings, **config})


def flow(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """The scheduler of most flow models."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def draw(module: nn.Module) -> None:
    """Draw every parameter, so that none is zero or uninitialised and no norm is the identity.

    Published initialisations close gates and output layers: then no prompt changes a prediction. The factor makes every
    pipeline's prediction change by a hundredth or more with one word of the prompt.
    """
    for parameter in module.parameters():
        if parameter.ndim > 1:
            inputs = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1]  # of a convolution, of a layer
            nn.init.normal_(parameter, std=1.25 * inputs**-0.5)
        else:
            norm = bool((parameter == 1).all())
            nn.init.normal_(parameter, mean=float(norm), std=0.1)
