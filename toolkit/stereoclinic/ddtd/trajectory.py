"""DDTD along a trajectory: at each measured step, group passes and one relevance pass for the neutral prompt.

x_T --(t)--> x_t --> group passes (no gradient)   fbar, d_g, abar
                \\-> neutral pass, watched         S_g, then R_j = (a_j - abar_j) g_j, and an off-axis row
                \\-> guided step of the neutral prompt to the next x
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.ddtd.composites import get_composite
from stereoclinic.ddtd.neurons import SITE_KINDS, Site, Watch, neuron_relevance, to_neurons
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.target import group_directions, lean, off_axis_cotangent
from stereoclinic.denoisers.sampling import guide
from stereoclinic.denoisers.stable_diffusion import StableDiffusion
from stereoclinic.errors import InputError
from stereoclinic.prompts import group_prompts


@dataclass(frozen=True)
class Settings:
    """How the trajectory is walked and what is decomposed.

    Args:
        composite: Name of a composite, see `composites.COMPOSITES`.
        root: "plain" (R_j = a_j g_j) or "rooted" at the balanced point (R_j = (a_j - abar_j) g_j).
        steps: Of the scheduler.
        guidance: Scale along the trajectory.
        every: Measure each `every`-th step.
        bins: Timestep bins of equal width, T.
        kinds: Kinds of sites.
    """

    composite: str = "epsilon-cp"
    root: str = "plain"
    steps: int = 20
    guidance: float = 1.0
    every: int = 1
    bins: int = 5
    kinds: tuple[str, ...] = tuple(SITE_KINDS)

    def __post_init__(self) -> None:
        get_composite(self.composite)
        if self.root not in ("plain", "rooted"):
            raise InputError(f"root {self.root!r}: expected plain or rooted")
        if min(self.steps, self.every, self.bins) < 1:
            raise InputError(f"steps {self.steps}, every {self.every} and bins {self.bins} must be 1 or more")

    def edges(self, training_steps: int) -> Tensor:
        """(T + 1,) descending timesteps that part the bins."""
        return torch.linspace(training_steps, 0, self.bins + 1, dtype=torch.float64)

    @property
    def measured_steps(self) -> int:
        return len(range(0, self.steps, self.every))

    def check_bins(self, timesteps: Tensor, edges: Tensor) -> None:
        """Raises InputError when a bin holds no measured timestep: nothing could be planned for it."""
        held = {bin_of(float(timestep), edges) for timestep in timesteps[:: self.every]}
        if len(held) < self.bins:
            raise InputError(
                f"{self.bins} bins, but the {self.measured_steps} measured steps fall into {len(held)} of them;"
                " use fewer bins, more steps, or measure more of them"
            )


def bin_of(timestep: float, edges: Tensor) -> int:
    """The bin i with edges[i] > t >= edges[i + 1]; timesteps beyond the ends belong to the end bins."""
    inner = edges[1:-1].tolist()
    return sum(timestep < edge for edge in inner)


@dataclass(frozen=True)
class Measured:
    """One measured step of a batch. Sizes: K groups, B samples, N neurons."""

    timestep: float
    lean: Tensor  # (K, B)
    relevance: Tensor  # (K, B, N)
    collateral: Tensor  # (B, N)
    means: Tensor  # (K, B, N)


def walk(
    denoiser: StableDiffusion, sites: list[Site], axis: Axis, rows: list[dict], settings: Settings
) -> Iterator[Measured]:
    """Follow the neutral prompts' own guided trajectory and decompose the lean at each measured step.

    Args:
        denoiser: The frozen model.
        sites: The watched layers of `denoiser.unet`.
        axis: The bias axis; its words make the group prompts.
        rows: The samples, with columns `prompt`, `seed` and those of `prompts.COLUMNS`.
        settings: See `Settings`.

    Raises:
        RuntimeError: In inference mode, in which no gradient can be had.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("relevance needs gradients: run with Trainer(inference_mode=False)")
    with torch.no_grad():
        timesteps = denoiser.timesteps(settings.steps)
        latents = denoiser.noise(rows)
        neutral = denoiser.encode([row["prompt"] for row in rows])
        empty = denoiser.encode([""] * len(rows))
        by_group = [group_prompts(row, axis) for row in rows]
        groups = torch.stack([denoiser.encode([each[k] for each in by_group]) for k in range(len(axis))])
    for i, timestep in enumerate(timesteps):
        unconditional = None
        if settings.guidance > 1:
            with torch.no_grad():
                unconditional = denoiser.predict(latents, timestep, empty)
        if i % settings.every == 0:
            conditional, measured = _measure(denoiser, sites, rows, latents, timestep, neutral, groups, settings)
            yield measured
        else:
            with torch.no_grad():
                conditional = denoiser.predict(latents, timestep, neutral)
        with torch.no_grad():
            latents = denoiser.step(guide(conditional, unconditional, settings.guidance), timestep, latents)


def _measure(
    denoiser: StableDiffusion,
    sites: list[Site],
    rows: list[dict],
    latents: Tensor,
    timestep: Tensor,
    neutral: Tensor,
    groups: Tensor,
    settings: Settings,
) -> tuple[Tensor, Measured]:
    predictions, means = [], []
    roots: dict[str, Tensor] = {}
    with torch.no_grad(), Watch(denoiser.unet, sites) as watch:
        for states in groups:
            predictions.append(denoiser.predict(latents, timestep, states))
            means.append(_position_means(watch.activations, sites))
            if settings.root == "rooted":
                for name, activation in watch.activations.items():
                    share = activation / len(groups)
                    roots[name] = roots[name] + share if name in roots else share
    balanced, directions = group_directions(torch.stack(predictions))
    cotangent = off_axis_cotangent(directions, rows, float(timestep))

    with torch.enable_grad(), Watch(denoiser.unet, sites) as watch:
        with propagate(settings.composite):
            conditional = denoiser.predict(latents.detach().requires_grad_(), timestep, neutral)
        leans = lean(conditional, balanced, directions)  # (K, B)
        targets = [each.sum() for each in leans]
        inputs = [watch.activations[site.name] for site in sites]

        def decompose(target: Tensor, rooted: bool) -> Tensor:
            grads = torch.autograd.grad(target, inputs, retain_graph=True, allow_unused=True)
            return neuron_relevance(watch.activations, grads, sites, roots if rooted else None)

        rooted = settings.root == "rooted"
        if len(groups) == 2:  # d_2 = -d_1, so the second lean and its relevance come for free
            relevance = [first := decompose(targets[0], rooted), -first]
        else:
            relevance = [decompose(target, rooted) for target in targets]
        collateral = decompose((conditional * cotangent).sum(), rooted)
    measured = Measured(float(timestep), leans.detach(), torch.stack(relevance), collateral, torch.stack(means))
    return conditional.detach(), measured


def _position_means(activations: dict[str, Tensor], sites: list[Site]) -> Tensor:
    """(B, N): the mean of each neuron over positions."""
    means = []
    for site in sites:
        activation = activations[site.name]
        channels = 1 if site.kind == "conv" else -1
        positions = activation.numel() // (activation.shape[0] * activation.shape[channels])
        means.append(to_neurons(activation, site.kind) / positions)
    return torch.cat(means, dim=1)
