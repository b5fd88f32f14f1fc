"""What is timed: a frozen denoiser with random inputs, and one gradient pass through it.

The full configurations are those that Stable Diffusion 1.5 and SDXL 1.0 were published with; their weights are random
here, which costs the same. `portraits` has its trained weights, `tiny` serves the tests, `transformer` has the blocks
of Stable Diffusion 3 at the size of `portraits`. Of a pipeline in a folder, the problem is what its own call asks of
its denoiser at the first step.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.intercept import Left
from stereoclinic.pipelines.opening import BUILT_IN
from stereoclinic.pipelines.sites import Site
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import load_prompts, with_seeds

#: Name -> (text tokens, configuration) of a UNet; None reads the shipped model.
UNETS: dict[str, tuple[int, dict | None]] = {
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


#: A transformer of 7.8 million parameters.
TRANSFORMER = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 64,
    "caption_projection_dim": 192,
    "pooled_projection_dim": 64,
    "out_channels": 4,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
}
MODELS = (*UNETS, "transformer")


@dataclass
class Problem:
    """One call of a denoiser.

    Args:
        network: Frozen.
        latents: (B, ...).
        states: Text, (B, L, D).
        cotangent: Of the prediction's shape, what it is multiplied with; a target of the toolkit has this shape too.
        given: What the denoiser takes besides.
        names: Of the arguments that latents and states are.
    """

    network: nn.Module
    latents: Tensor
    states: Tensor
    cotangent: Tensor
    given: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, str] = ("sample", "encoder_hidden_states")

    def predict(self, latents: Tensor, states: Tensor) -> Tensor:
        told = dict(zip(self.names, (latents, states), strict=True))
        return tree.sample_of(self.network(**{**self.given, **told, "return_dict": False}))


def build(
    model: str,
    batch: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    call: Mapping[str, Any] | None = None,
) -> Problem:
    """A problem with `batch` samples: random ones, of a model of `MODELS`, or those of a pipeline in a folder.

    Weights are random as well, except those of `portraits` and of pipelines. `call` holds options of a pipeline's call.
    """
    torch.manual_seed(0)
    if model not in MODELS:
        return of_pipeline(Path(model), batch, device, dtype, call)
    tokens, config = UNETS.get(model, (16, TRANSFORMER))
    if config is None:
        network = UNet2DConditionModel.from_pretrained(BUILT_IN[model] / "unet", low_cpu_mem_usage=False)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that 2.6 billion weights are never held twice
        try:
            with torch.device(device):
                network = (UNet2DConditionModel if model in UNETS else SD3Transformer2DModel)(**config)
        finally:
            torch.set_default_dtype(before)
    network = network.to(device, dtype).eval().requires_grad_(False)
    like = {"device": device, "dtype": dtype}
    size, config = network.config.sample_size, network.config
    given: dict[str, Any] = {"timestep": torch.randint(1, 1000, (batch,), device=device)}
    names, width = ("sample", "encoder_hidden_states"), config.get("cross_attention_dim")
    if model not in UNETS:
        names, width = ("hidden_states", "encoder_hidden_states"), config.joint_attention_dim
        given["pooled_projections"] = torch.randn(batch, config.pooled_projection_dim, **like)
    elif config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.full((batch, 6), 1024.0, **like)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, pooled, **like), "time_ids": sizes}
    latents = torch.randn(batch, config.in_channels, size, size, **like)
    states = torch.randn(batch, tokens, width, **like)
    cotangent = torch.randn(batch, config.out_channels, size, size, **like)
    return Problem(network, latents, states, cotangent, given, names)


@torch.no_grad()
def of_pipeline(
    folder: Path, batch: int, device: str, dtype: torch.dtype, call: Mapping[str, Any] | None = None
) -> Problem:
    """What a pipeline's call asks of its denoiser at the first step, of the rows that see the prompt."""
    model = open_model(folder, device, str(dtype).removeprefix("torch."), call=call)
    prompts = load_prompts("portraits")
    rows = list(with_seeds(prompts, 0, -(-batch // len(prompts))))[:batch]
    calls: list[Call] = []

    def visit(call: Call) -> None:
        calls.append(call)
        raise Left

    walk = Walk(model, rows, model.defaults.steps, model.defaults.guidance, visit=visit)
    walk.run()
    given = calls[0].arguments(None, slice(None))
    names = walk.learnt.latents, str(walk.learnt.telling[0])
    latents, states = (given.pop(name) for name in names)
    if not isinstance(latents, Tensor) or not isinstance(states, Tensor):
        raise SystemExit(f"{folder}: its denoiser takes lists, whose gradients are not asked for here")
    problem = Problem(tree.inner(model.network), latents, states, torch.empty(0), given, names)
    problem.cotangent = torch.randn_like(problem.predict(latents, states))
    return problem


def differentiate(
    problem: Problem, sites: list[Site], rules: Callable[[], AbstractContextManager]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor | None]]:
    """One forward and one backward pass, from the target down to every site's input and the latents.

    Args:
        problem: The denoiser and its inputs.
        sites: Watched layers.
        rules: What the forward pass runs in: `contextlib.nullcontext`, or relevance rules.

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
    """A text-to-image pipeline as small as one can be: states drawn at random for each text, and no pictures.

    Args:
        unet: Denoises.
        scheduler: Steps.
        tokens: Of a text.
    """

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
        """What SDXL is told besides: a pooled text and sizes, the same for all."""
        config, like = self.unet.config, {"device": self._execution_device, "dtype": self.unet.dtype}
        if config.addition_embed_type != "text_time":
            return {}
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"text_embeds": torch.ones(count, pooled, **like), "time_ids": torch.full((count, 6), 1024.0, **like)}

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
