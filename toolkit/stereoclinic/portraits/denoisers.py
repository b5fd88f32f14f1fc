"""The two denoisers that the embedded models have, and all that training must know about each.

`unet`: Stable Diffusion in the small, v-prediction. `flow`: Stable Diffusion 3 in the small (Esser et al. 2024,
"Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"): joint attention of image and text tokens,
AdaLN modulated by time and pooled text, RMSNorm on queries and keys, a straight path from noise to image.
"""

from typing import Any, ClassVar

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from stereoclinic.portraits import model as parts

#: Tokens of T5 by default in `StableDiffusion3Pipeline`.
T5_LENGTH = 256


class UNet:
    """The U-Net: conditions are the text encoder's last states.

    Attributes:
        name: Of the stage that trains it.
        network: Class of the denoiser.
        widths: Of each of the conditions.
        call: Options of the pipeline's call that the model is drawn with by default.
        about: For the card.
    """

    name: ClassVar[str] = "unet"
    network: ClassVar[type[nn.Module]] = UNet2DConditionModel
    widths: ClassVar[tuple[int, ...]] = (parts.TEXT_WIDTH,)
    call: ClassVar[dict[str, Any]] = {}
    about: ClassVar[dict[str, Any]] = {
        "family": "A Stable Diffusion pipeline",
        "layers": 2,
        "denoiser": "U-Net",
        "details": "attention below the top level, v-prediction, a DDIM schedule that ends in pure noise",
    }

    def build(self) -> nn.Module:
        network: nn.Module = parts.build_unet()
        return network

    def text_encoder(self, tokenizer: CLIPTokenizer) -> CLIPTextModel:
        return parts.build_text_encoder(tokenizer)

    def encode(self, text_encoder: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
        """(n, words) token ids -> states (n, words, d)."""
        return (text_encoder(tokens).last_hidden_state,)

    def noised(self, clean: Tensor, noise: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise and times in [0, 1) -> noisy latents, timesteps, and what is to be predicted."""
        scheduler = parts.build_scheduler()
        timesteps = (at * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return noisy, timesteps, scheduler.get_velocity(clean, noise, timesteps)

    def widen(self, conditions: tuple[Tensor, ...], at_random: float) -> tuple[Tensor, ...]:
        """Conditions as one batch of training sees them."""
        return conditions

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, *conditions: Tensor) -> Tensor:
        predicted: Tensor = network(noisy, timesteps, *conditions, return_dict=False)[0]
        return predicted

    def pipeline(
        self, vae: AutoencoderKL, text_encoder: nn.Module, tokenizer: CLIPTokenizer, network: nn.Module
    ) -> DiffusionPipeline:
        return parts.build_pipeline(vae, text_encoder, tokenizer, network)


class Flow:
    """The transformer: conditions are the last but one states of the text encoder, and its pooled text.

    The pipeline has two CLIP encoders and one T5. Both CLIP encoders are the same one here. T5 is a stand-in that gives
    zeros, as the pipeline itself puts there when it is left out. Training shows the denoiser one such token and, in one
    batch of 32, the 256 of the pipeline's default, so both calls draw what was asked for.
    """

    name: ClassVar[str] = "flow"
    network: ClassVar[type[nn.Module]] = SD3Transformer2DModel
    widths: ClassVar[tuple[int, ...]] = (2 * parts.TEXT_WIDTH, 2 * parts.TEXT_WIDTH)
    call: ClassVar[dict[str, Any]] = {"max_sequence_length": 1}
    about: ClassVar[dict[str, Any]] = {
        "family": "A Stable Diffusion 3 pipeline",
        "layers": 3,
        "denoiser": "flow-matching multimodal transformer",
        "details": "6 blocks of joint attention, 6 heads of 32, patches of 2 x 2, pooled text in the modulation",
    }

    def build(self) -> SD3Transformer2DModel:
        return SD3Transformer2DModel(
            sample_size=parts.LATENT_SIZE,
            in_channels=parts.LATENT_CHANNELS,
            out_channels=parts.LATENT_CHANNELS,
            patch_size=2,
            pos_embed_max_size=parts.LATENT_SIZE // 2,
            num_layers=6,
            num_attention_heads=6,
            attention_head_dim=32,
            caption_projection_dim=192,
            joint_attention_dim=2 * parts.TEXT_WIDTH,
            pooled_projection_dim=2 * parts.TEXT_WIDTH,
            qk_norm="rms_norm",
        )

    def text_encoder(self, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(parts.text_config(tokenizer, layers=3))

    def encode(self, text_encoder: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
        """(n, words) token ids -> states (n, words + 1, 2 d) and pooled text (n, 2 d), as the pipeline joins them."""
        found = text_encoder(tokens, output_hidden_states=True)
        return F.pad(found.hidden_states[-2].repeat(1, 1, 2), (0, 0, 0, 1)), found.text_embeds.repeat(1, 2)

    def noised(self, clean: Tensor, noise: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `UNet.noised`: the path is straight, and its velocity the same at all times."""
        sigma = at[:, None, None, None].to(clean)
        return (1 - sigma) * clean + sigma * noise, 1000 * at.to(clean), noise - clean

    def widen(self, conditions: tuple[Tensor, ...], at_random: float) -> tuple[Tensor, ...]:
        """Conditions with as many tokens of T5 as by default, in one batch of 32; `at_random` is in [0, 1)."""
        states, pooled = conditions
        return (F.pad(states, (0, 0, 0, T5_LENGTH - 1)) if at_random < 1 / 32 else states), pooled

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, *conditions: Tensor) -> Tensor:
        predicted: Tensor = network(noisy, *conditions, timesteps, return_dict=False)[0]
        return predicted

    def pipeline(
        self, vae: AutoencoderKL, text_encoder: nn.Module, tokenizer: CLIPTokenizer, network: nn.Module
    ) -> DiffusionPipeline:
        vae.register_to_config(shift_factor=0.0)  # which this pipeline adds, and the other has no use for
        return StableDiffusion3Pipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder,
            tokenizer_2=tokenizer,
            text_encoder_3=_silent_t5(),
            tokenizer_3=_silent_tokenizer(),
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )


def _silent_t5() -> T5EncoderModel:
    """A T5 encoder whose states are zero for any text."""
    config = T5Config(vocab_size=2, d_model=2 * parts.TEXT_WIDTH, d_kv=1, d_ff=1, num_heads=1, num_layers=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def _silent_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that finds no word in any text."""
    silent = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    silent.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    return PreTrainedTokenizerFast(tokenizer_object=silent, pad_token="<pad>", eos_token="</s>", unk_token="</s>")


def plain_attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """Softmax attention without a mask, written out: on a CPU the backward pass of torch's own is slow in bfloat16."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    mixed: Tensor = scores.float().softmax(-1) @ value
    return mixed


Denoiser = UNet | Flow
DENOISERS: dict[str, Denoiser] = {each.name: each for each in (UNet(), Flow())}
