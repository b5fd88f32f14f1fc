"""DDTD along a trajectory: the neutral prompt's own, and what is measured at each so-many-th step of it.

x_T --(t)--> x_t --> measured step (see `step`): the guided prediction, and relevance
                 \\-> step in between: the guided prediction alone
             --scheduler--> x of the next t
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor, nn

from stereoclinic.axes import Axis
from stereoclinic.ddtd.composites import get_composite
from stereoclinic.ddtd.memory import Portions
from stereoclinic.ddtd.neurons import SITE_KINDS, Site, neuron_relevance
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.step import How, Measured, Reduce, States, measure
from stereoclinic.ddtd.target import Classifier, get_target
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.denoisers.sampling import predict_guided
from stereoclinic.errors import InputError
from stereoclinic.prompts import Row, group_prompts

__all__ = ["Measured", "Settings", "bin_of", "check_prompts", "walk"]


@dataclass(frozen=True)
class Settings:
    """How the trajectory is walked and what is decomposed.

    Args:
        composite: Name of a composite, see `composites.COMPOSITES`, or the path of a TOML file that holds one.
        root: "plain" (R_j = a_j g_j), "rooted" at the balanced point (R_j = (a_j - abar_j) g_j), or None for the
            composite's own.
        steps: Of the scheduler.
        guidance: Scale along the trajectory.
        every: Measure each `every`-th step.
        bins: Timestep bins of equal width, T.
        kinds: Kinds of sites.
        target: What is decomposed, see `target.TARGETS`.
        classifier_on: What the target "classifier" looks at: the "pictures" or the "latents" that a prediction
            amounts to.
        collateral_every: Measure the off-axis row at each so-many-th measured step of a bin; it costs a backward pass.
            What leaving half of them out does to plans is asked by benchmarks/mitigation/offaxis.py.
    """

    composite: str = "gradient"  # benchmarks/faithfulness chose it
    root: str | None = None
    steps: int = 20
    guidance: float = 1.0
    every: int = 1
    bins: int = 5
    kinds: tuple[str, ...] = tuple(SITE_KINDS)
    target: str = "lean"
    classifier_on: str = "pictures"
    collateral_every: int = 2

    def __post_init__(self) -> None:
        get_composite(self.composite)
        get_target(self.target)
        if self.root not in ("plain", "rooted", None):
            raise InputError(f"root {self.root!r}: expected plain or rooted")
        if self.classifier_on not in ("pictures", "latents"):
            raise InputError(f"classifier on {self.classifier_on!r}: expected pictures or latents")
        for name in ("steps", "every", "bins", "collateral_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected 1 or more")

    def how(self, model: nn.Module, classifier: Classifier | None = None) -> How:
        """The settings of a single step of a model, names looked up.

        Raises:
            InputError: The target is "classifier", and there is none; or the composite does not fit the model.
        """
        if self.target == "classifier" and classifier is None:
            raise InputError("target classifier: no classifier was given; give one that tells the groups apart")
        composite, target = get_composite(self.composite), get_target(self.target)
        rooted = (self.root or composite.root) == "rooted"
        return How(propagate(composite, model), rooted, target, self.guidance, classifier, self.classifier_on)

    def edges(self, training_steps: int) -> Tensor:
        """(T + 1,) descending timesteps that part the bins."""
        return torch.linspace(training_steps, 0, self.bins + 1, dtype=torch.float64)

    def check_bins(self, timesteps: Tensor, edges: Tensor) -> None:
        """Raises InputError when a bin holds no measured timestep: nothing could be planned for it."""
        held = {bin_of(float(timestep), edges) for timestep in timesteps[:: self.every]}
        if len(held) < self.bins:
            raise InputError(
                f"{self.bins} bins, but the {len(timesteps[:: self.every])} measured steps fall into {len(held)} of"
                " them; use fewer bins, more steps, or measure more of them"
            )

    def collateral_weights(self, timesteps: Tensor, edges: Tensor) -> list[float]:
        """What each measured step's off-axis row counts; 0 where it is not measured.

        Where c of a bin's m steps have one it counts sqrt(m / c), so that squares add up to what m rows would, as far
        as steps of a bin resemble each other; the plan takes them for alike anyway. The c are spread over the bin, and
        lie early and late in it by turns, so that neither the noisier nor the cleaner steps are favoured over all bins.

        Args:
            timesteps: (M,) measured timesteps.
            edges: (T + 1,) of the bins.
        """
        by_bin: dict[int, list[int]] = {}
        for i, timestep in enumerate(timesteps.tolist()):
            by_bin.setdefault(bin_of(timestep, edges), []).append(i)
        weights = [0.0] * len(timesteps)
        for turn, members in enumerate(by_bin.values()):
            m = len(members)
            c = -(-m // self.collateral_every)
            for j in range(c):
                weights[members[int((j + (0.25, 0.75)[turn % 2]) * m / c)]] = (m / c) ** 0.5
        return weights


def bin_of(timestep: float, edges: Tensor) -> int:
    """The bin i with edges[i] > t >= edges[i + 1]; timesteps beyond the ends belong to the end bins."""
    inner = edges[1:-1].tolist()
    return sum(timestep < edge for edge in inner)


def walk(
    denoiser: Denoiser,
    sites: list[Site],
    axis: Axis,
    rows: list[Row],
    settings: Settings,
    classifier: Classifier | None = None,
    portions: Portions | None = None,
    reduce: Reduce = neuron_relevance,
) -> Generator[Measured, None, Tensor]:
    """Follow the neutral prompts' own guided trajectory and decompose the target at each measured step.

    Args:
        denoiser: The frozen model.
        sites: The watched layers of `denoiser.unet`.
        axis: The bias axis; its words make the group prompts.
        rows: The samples, with columns `prompt`, `seed` and those of `prompts.COLUMNS`.
        settings: See `Settings`.
        classifier: For the target "classifier": a logit for each group, in the axis' order.
        portions: How many samples fit through the model together; found out, and kept there.
        reduce: Makes rows of what the relevance pass leaves at the sites.

    Returns:
        The latents (B, C, h, w) that the trajectory ends in, once it is walked.

    Raises:
        InputError: No classifier for the target of that name, a model that predicts the same for every group, or not
            enough memory for one sample.
        RuntimeError: In inference mode, in which no gradient can be had.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("relevance needs gradients: run with Trainer(inference_mode=False)")
    how, portions = replace(settings.how(denoiser.unet, classifier), reduce=reduce), portions or Portions()
    with torch.no_grad():
        timesteps = denoiser.timesteps(settings.steps)
        generators = denoiser.generators(rows)
        latents = denoiser.noise(rows)
        states = _encode(denoiser, rows, axis)
    edges = settings.edges(denoiser.pipe.scheduler.config.num_train_timesteps)
    weights = iter(settings.collateral_weights(timesteps[:: settings.every], edges))
    for i, timestep in enumerate(timesteps):
        if i % settings.every == 0:
            how = replace(how, off_axis=next(weights))
            guided, measured = _measured(denoiser, sites, rows, latents, timestep, states, how, portions)
            yield measured
        else:
            guided = _guided(denoiser, latents, timestep, states, settings.guidance, portions)
        with torch.no_grad():
            latents = denoiser.step(guided, timestep, latents, generators)
    return latents


def check_prompts(denoiser: Denoiser, axis: Axis, rows: Sequence[Row]) -> None:
    """Refuse prompts in which a group is not told from another, or from none: nothing would point its way.

    Raises:
        InputError: Two of a row's prompts are the same to the model's text encoder.
    """
    texts = [[row["prompt"], *group_prompts(row, axis)] for row in rows]
    encoded = denoiser.encode([text for each in texts for text in each]).unflatten(0, (len(rows), -1))
    for each, states in zip(texts, encoded, strict=True):
        for i, j in combinations(range(len(each)), 2):
            if torch.equal(states[i], states[j]):
                raise InputError(
                    f"prompt {each[j]!r} is the same as {each[i]!r} to this model, so the axis has no direction; check"
                    f" the words of axis {axis.name!r}, and that the prompt is not too long for the model"
                )


def _encode(denoiser: Denoiser, rows: list[Row], axis: Axis) -> States:
    by_group = [group_prompts(row, axis) for row in rows]
    return States(
        neutral=denoiser.encode([row["prompt"] for row in rows]),
        empty=denoiser.encode([""] * len(rows)),
        groups=torch.stack([denoiser.encode([each[k] for each in by_group]) for k in range(len(axis))]),
    )


def _measured(
    denoiser: Denoiser,
    sites: list[Site],
    rows: list[Row],
    latents: Tensor,
    timestep: Tensor,
    states: States,
    how: How,
    portions: Portions,
) -> tuple[Tensor, Measured]:
    def part(own: slice) -> tuple[Tensor, Measured]:
        return measure(denoiser, sites, rows[own], latents[own], timestep, states[own], how)

    guided, measured = zip(*portions.each(part, len(rows)), strict=True)
    return torch.cat(guided), Measured.joined(list(measured))


@torch.no_grad()
def _guided(
    denoiser: Denoiser, latents: Tensor, timestep: Tensor, states: States, guidance: float, portions: Portions
) -> Tensor:
    def part(own: slice) -> Tensor:
        return predict_guided(denoiser, latents[own], timestep, states.neutral[own], states.empty[own], guidance)

    return torch.cat(portions.each(part, len(latents)))
