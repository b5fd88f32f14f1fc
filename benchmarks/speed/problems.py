"""What is timed: a frozen UNet of a known family with random inputs, and one gradient pass through it.

The full configurations are those that Stable Diffusion 1.5 and SDXL 1.0 were published with; their weights are random
here, which costs the same. `portraits` has its trained weights, `tiny` serves the tests.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from stereoclinic.ddtd.neurons import Site, Watch
from stereoclinic.denoisers.loading import BUILT_IN

#: Name -> (text tokens, configuration); None reads the shipped model.
MODELS: dict[str, tuple[int, dict | None]] = {
    "portraits": (16, None),
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


@dataclass
class Problem:
    """One call of a UNet.

    Args:
        unet: Frozen.
        latents: (B, C, h, w).
        timestep: (B,).
        states: Text, (B, L, D).
        added: What SDXL takes besides, or None.
        cotangent: (B, C, h, w), what the prediction is multiplied with; a target of the toolkit has this shape too.
    """

    unet: UNet2DConditionModel
    latents: Tensor
    timestep: Tensor
    states: Tensor
    added: dict[str, Tensor] | None
    cotangent: Tensor

    def predict(self, latents: Tensor, states: Tensor) -> Tensor:
        return self.unet(
            latents, self.timestep, encoder_hidden_states=states, added_cond_kwargs=self.added, return_dict=False
        )[0]


def build(model: str, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """A problem with `batch` random samples; the model's weights are random too, except those of `portraits`."""
    torch.manual_seed(seed)
    tokens, config = MODELS[model]
    if config is None:
        unet = UNet2DConditionModel.from_pretrained(BUILT_IN[model] / "unet", low_cpu_mem_usage=False)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that 2.6 billion weights are never held twice
        try:
            with torch.device(device):
                unet = UNet2DConditionModel(**config)
        finally:
            torch.set_default_dtype(before)
    unet = unet.to(device, dtype).eval().requires_grad_(False)
    like = {"device": device, "dtype": dtype}
    size, channels = unet.config.sample_size, unet.config.in_channels
    added = None
    if unet.config.addition_embed_type == "text_time":
        times = 6 * unet.config.addition_time_embed_dim
        pooled = unet.config.projection_class_embeddings_input_dim - times
        added = {"text_embeds": torch.randn(batch, pooled, **like), "time_ids": torch.full((batch, 6), 1024.0, **like)}
    return Problem(
        unet,
        torch.randn(batch, channels, size, size, **like),
        torch.randint(1, 1000, (batch,), device=device),
        torch.randn(batch, tokens, unet.config.cross_attention_dim, **like),
        added,
        torch.randn(batch, unet.config.out_channels, size, size, **like),
    )


def differentiate(
    problem: Problem, sites: list[Site], rules: Callable[[], AbstractContextManager]
) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
    """One forward and one backward pass, from the target down to every site's input and the latents.

    Args:
        problem: The UNet and its inputs.
        sites: Watched layers, S of them.
        rules: What the forward pass runs in: `contextlib.nullcontext`, or relevance rules.

    Returns:
        The sites' activations, and S + 1 gradients, the latents' last.
    """
    with Watch(problem.unet, sites) as watch:
        latents = problem.latents.detach().requires_grad_()
        with rules():
            prediction = problem.predict(latents, problem.states)
        inputs = [*(watch.activations[site.name] for site in sites), latents]
        grads = torch.autograd.grad(prediction, inputs, problem.cotangent, allow_unused=True)
        return watch.activations, grads
