"""What is timed: a frozen denoiser with random inputs, and one gradient pass through it.

The configurations `sd15` and `sdxl` are those that Stable Diffusion 1.5 and SDXL 1.0 were published with; their weights
are random here, which takes the same time. The embedded models have their trained weights; `tiny` is for the tests.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.sites import Site

#: Embedded model -> text tokens.
EMBEDDED = {"portraits": 16, "portraits-flow": 17}
#: Name -> (text tokens, configuration) of a UNet with random weights.
UNETS: dict[str, tuple[int, dict[str, Any]]] = {
    "tiny": (
        3,
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
    ),
    "sd15": (
        77,
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
    ),
    "sdxl": (
        77,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}
MODELS = (*EMBEDDED, *UNETS)


@dataclass
class Problem:
    """One call of a denoiser.

    Args:
        network: Frozen.
        latents: (B, C, h, w).
        states: Text, (B, L, D).
        cotangent: What the prediction is multiplied with, in its shape; stands for the lean.
        given: Further arguments of the denoiser.
    """

    network: nn.Module
    latents: Tensor
    states: Tensor
    cotangent: Tensor
    given: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, latents: Tensor, states: Tensor) -> Tensor:
        return self.network(latents, encoder_hidden_states=states, **self.given).sample


def pooled_width(config: Any) -> int:
    """Width of SDXL's pooled text; 0 for models without one."""
    if config.get("addition_embed_type") != "text_time":
        return 0
    return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim


def build(model: str, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    """A problem with `batch` random samples. Weights are random too, except those of the embedded models."""
    torch.manual_seed(0)
    if model in EMBEDDED:
        tokens, network = EMBEDDED[model], open_model(model).network
    else:
        tokens, config = UNETS[model]
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that 2.6 billion weights are never held twice
        try:
            with torch.device(device):
                network = UNet2DConditionModel(**config)
        finally:
            torch.set_default_dtype(before)
    network = network.to(device, dtype).eval().requires_grad_(False)
    like, config, size = {"device": device, "dtype": dtype}, network.config, network.config.sample_size
    given: dict[str, Any] = {"timestep": torch.randint(1, 1000, (batch,), device=device)}
    if width := pooled_width(config):
        sizes = torch.full((batch, 6), 1024.0, **like)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, width, **like), "time_ids": sizes}
    if width := config.get("pooled_projection_dim"):
        given["pooled_projections"] = torch.randn(batch, width, **like)
    latents = torch.randn(batch, config.in_channels, size, size, **like)
    width = config.get("joint_attention_dim") or config.cross_attention_dim
    states = torch.randn(batch, tokens, width, **like)
    cotangent = torch.randn(batch, config.out_channels, size, size, **like)
    return Problem(network, latents, states, cotangent, given)


def differentiate(
    problem: Problem, sites: list[Site], rules: Callable[[], AbstractContextManager]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor | None]]:
    """One forward and one backward pass, from the target down to every site's input and the latents.

    Args:
        problem: The denoiser and its inputs.
        sites: Watched layers.
        rules: The context of the forward pass: `contextlib.nullcontext`, or relevance rules.

    Returns:
        The sites' activations, and their gradients.
    """
    with Watch(problem.network, sites) as watch:
        latents = problem.latents.detach().requires_grad_()
        with rules():
            prediction = problem.predict(latents, problem.states)
        names, inputs = list(watch.activations), [*watch.activations.values(), latents]
        grads = torch.autograd.grad(prediction, inputs, problem.cotangent, allow_unused=True)
        return dict(watch.activations), dict(zip(names, grads, strict=False))


class RandomText(DiffusionPipeline):
    """A minimal text-to-image pipeline: random text states for each text, latents instead of pictures."""

    def __init__(self, unet: nn.Module, scheduler: Any, tokens: int = 2) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(tokens=tokens)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(B, L, D), by the digest of each text."""
        shape, states = (self.config.tokens, self.unet.config.cross_attention_dim), []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
            states.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        return torch.stack(states).to(self._execution_device, self.unet.dtype)

    def added(self, count: int) -> dict[str, Tensor]:
        """SDXL's pooled text and sizes, the same for all."""
        like = {"device": self._execution_device, "dtype": self.unet.dtype}
        if not (width := pooled_width(self.unet.config)):
            return {}
        return {"text_embeds": torch.ones(count, width, **like), "time_ids": torch.full((count, 6), 1024.0, **like)}

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: list[torch.Generator] | None = None,
        output_type: str = "latent",
    ) -> StableDiffusionPipelineOutput:
        device, config, guided = self._execution_device, self.unet.config, guidance_scale > 1
        states = self.encode([*([""] * len(prompt) if guided else []), *prompt])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (len(prompt), config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator, torch.device(device), self.unet.dtype)
        for t in self.scheduler.timesteps:
            seen = torch.cat([latents, latents]) if guided else latents
            prediction = self.unet(
                self.scheduler.scale_model_input(seen, t), t, states, added_cond_kwargs=self.added(len(seen))
            ).sample
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(prediction, t, latents, return_dict=False)[0]
        return StableDiffusionPipelineOutput(images=latents, nsfw_content_detected=None)


def random_text(model: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> RandomText:
    """A pipeline around a UNet of `UNETS`."""
    return RandomText(build(model, 1, device, dtype).network, DDIMScheduler(), UNETS[model][0])
