"""Does relevance add up? The conservation check: one relevance step, balanced at every cut through the UNet.

The target is <f, v> with f the prediction and v = f held constant: its total ||f||^2 is far from zero. A composite that
conserves misses it by rounding alone, at every cut of ``cuts``. `epsilon-attnlrp` does not conserve, for softmax holds
a bias term that no rule of it accounts for (Achtibat et al. 2024, section 3.3.1), and plain gradients conserve nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from stereoclinic.ddtd import rules
from stereoclinic.ddtd.composites import Composite, get_composite
from stereoclinic.ddtd.cuts import Cut, Ledger, dot
from stereoclinic.ddtd.propagate import survey
from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from stereoclinic.denoisers.base import Denoiser

#: How far relevance may miss the target by rounding, by the dtype that the model runs in; measured in tests/ddtd.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
PROMPTS = ("a photo of a doctor", "a photo of a nurse")


@dataclass(frozen=True)
class Conservation:
    """The outcome of `check`.

    Attributes:
        composite: the rules, by name.
        dtype: what the prediction was made in.
        batch: samples in the pass.
        seed: of the random latents.
        timestep: where on the schedule.
        total: the target, ||f||^2 summed over the batch.
        cuts: one for each block, first to last; empty where the prediction is not finite.
        uncovered: how often each operation came that has no rule, by its name; it was passed by its own gradient.
        fault: what is not a number, and where; None if all is well.
        kept_bytes: what one sample keeps in memory from the forward pass to the relevance pass.
        exact: whether the composite conserves by definition, so that more than rounding is a fault.
    """

    composite: str
    dtype: torch.dtype
    batch: int
    seed: int
    timestep: float
    total: float
    cuts: tuple[Cut, ...]
    uncovered: dict[str, int]
    fault: str | None
    kept_bytes: int
    exact: bool

    @property
    def rounding(self) -> float:
        """The error up to which relevance counts as conserved."""
        return ROUNDING.get(self.dtype, 0.0)

    @property
    def error(self) -> float:
        """The largest error of any cut; infinite where there is none to show."""
        return max((cut.error for cut in self.cuts), default=math.inf)

    @property
    def conserves(self) -> bool:
        """Whether relevance adds up, to the rounding of the model's dtype, at every cut."""
        return self.error <= self.rounding


def check(
    model: "nn.Module | Denoiser",
    composite: Composite | str | Path = "epsilon-cp",
    *,
    seed: int = 0,
    batch: int = 2,
    timestep: float | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> Conservation:
    """Propagate the relevance of one prediction, on noise, and balance it at every cut.

    The model is left as it came, and runs in its own dtype: float64 tells a rule that does not conserve from rounding.

    Args:
        model: a denoiser, or a bare UNet2DConditionModel, which gets random text states.
        composite: a composite, the name of one, or a .toml file.
        seed: of the latents (B, C, h, w), standard normal, and of a bare UNet's text states.
        batch: samples.
        timestep: the nearest one on the denoiser's own schedule is taken; None is the noisiest, where noise is what
            the model expects.
        prompts: what a denoiser is asked for, in turn.

    Raises:
        InputError: no such composite; not a UNet; batch below 1; the prediction is zero.
    """
    composite = composite if isinstance(composite, Composite) else get_composite(composite)
    if batch < 1:
        raise InputError(f"batch {batch}: expected at least 1 sample")
    bare = isinstance(model, nn.Module)
    unet = cast(nn.Module, model if bare else model.unet)
    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wrapped
    ledger = Ledger(unet, composite.by_terms)
    generator = torch.Generator().manual_seed(seed)
    if bare:
        at, run = _random_call(cast(nn.Module, model), unet, generator, batch, timestep)
    else:
        at, run = _denoiser_call(cast("Denoiser", model), generator, batch, timestep, prompts)
    mode = survey(composite, unet)
    cuts: tuple[Cut, ...] = ()
    with torch.enable_grad(), ledger, _kept(unet) as kept:
        with mode:
            f = run()
        total, fault = float(dot(f, f)), ledger.fault
        if fault is None and not math.isfinite(total):
            fault = "the prediction holds NaN or infinity"
        if total == 0:
            raise InputError("the prediction is zero everywhere: nothing to decompose; are the weights loaded?")
        if fault is None:
            cuts = ledger.balance(f, total)
    for cut in reversed(cuts):
        if fault is None and not math.isfinite(cut.sum):
            fault = f"relevance turns NaN or infinite in `{cut.before}`"
    kept_bytes = sum(storage.nbytes() for storage in kept.values()) // batch
    exact = composite.strict and composite.rules.get("attention") is rules.attention_cp
    return Conservation(
        composite.name, f.dtype, batch, seed, at, total, cuts, dict(mode.uncovered), fault, kept_bytes, exact
    )


@contextmanager
def _kept(unet: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """What is kept for the backward pass, by address: each storage once, weights not at all."""
    own = {x.untyped_storage().data_ptr() for x in (*unet.parameters(), *unet.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x.detach()  # the tensor itself would hold on to the node that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def _denoiser_call(
    denoiser: "Denoiser", generator: torch.Generator, batch: int, timestep: float | None, prompts: Sequence[str]
) -> tuple[float, Callable[[], Tensor]]:
    """The timestep, and the denoiser's prediction for noise and its own encoding of the prompts."""
    timesteps = denoiser.timesteps(denoiser.defaults.steps)
    at = timesteps[0] if timestep is None else timesteps[(timesteps - timestep).abs().argmin()]
    states = denoiser.encode([prompts[i % len(prompts)] for i in range(batch)])
    noise = torch.randn(batch, *denoiser.latent_shape, generator=generator, dtype=torch.float32)
    latents = (noise * denoiser.pipe.scheduler.init_noise_sigma).to(denoiser.device, denoiser.unet.dtype)
    return float(at), lambda: denoiser.predict(latents, at, states)


def _random_call(
    model: nn.Module, unet: nn.Module, generator: torch.Generator, batch: int, timestep: float | None
) -> tuple[float, Callable[[], Tensor]]:
    """The timestep, and a bare UNet's prediction for latents and text states that are all noise."""
    config: Any = unet.config
    weight = next(unet.parameters())

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float32).to(weight.device, weight.dtype)

    size = config.sample_size or 32
    height, width = (size, size) if isinstance(size, int) else size
    dims = config.encoder_hid_dim or config.cross_attention_dim
    text = noise(77, dims if isinstance(dims, int) else dims[0])
    added = None
    if config.addition_embed_type == "text_time":  # SDXL: a pooled text, and six sizes
        sizes = torch.tensor([[8 * height, 8 * width, 0, 0, 8 * height, 8 * width]]).expand(batch, 6)
        pooled = noise(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        added = {"text_embeds": pooled, "time_ids": sizes.to(pooled)}
    elif config.addition_embed_type not in (None, "text") or unet.class_embedding is not None:
        kind = config.addition_embed_type or "class labels"
        raise InputError(f"this UNet takes conditions ({kind}) that cannot be made up here; pass a denoiser")
    latents = noise(config.in_channels, height, width)
    at = 999.0 if timestep is None else float(timestep)
    return at, lambda: model(latents, at, encoder_hidden_states=text, added_cond_kwargs=added).sample
