"""DDTD along the neutral prompts' own trajectory: the pipeline runs, and every Nth step is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stereoclinic.ddtd.lean import Classifier, get_target
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules.composites import get_composite
from stereoclinic.ddtd.step import Measured, Reduce, StepSettings, measure
from stereoclinic.errors import InputError
from stereoclinic.pipelines.bins import bin_of
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.conditions import encode
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.sites import SITE_KINDS, Site, neuron_relevance
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, group_prompts


@dataclass(frozen=True)
class Settings:
    """How the trajectory is run and what is decomposed.

    Args:
        composite: Name of a composite, see `composites.COMPOSITES`, or the path of a TOML file.
        root: "plain" (R_j = a_j g_j), "rooted" at the balanced point (R_j = (a_j - abar_j) g_j), or None for the
            composite's own.
        steps: Number of the scheduler's steps.
        guidance: Guidance scale along the trajectory.
        every: Measure every Nth step.
        bins: Number of timestep bins, T, of equal width; at most as many as measured steps. Where equal width leaves
            one empty, there is one for each measured step.
        kinds: Kinds of sites.
        sites: Module paths of sites, as file names, in place of the table of `pipelines.sites`.
        target: What is decomposed, see `lean.TARGETS`.
        classifier_on: What the target "classifier" sees of the predicted clean image: "pictures" or "latents".
        collateral_every: Measure the off-axis row at every Nth measured step of a bin; it costs a backward pass.
            benchmarks/mitigation/offaxis.py measures what leaving out half of them does to plans.
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
    sites: tuple[str, ...] = ()

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

    def for_step(self, model: nn.Module, classifier: Classifier | None = None) -> StepSettings:
        """The settings of a single step, names looked up.

        Raises:
            InputError: The target is "classifier" and there is none, or the composite does not fit the model.
        """
        if self.target == "classifier" and classifier is None:
            raise InputError("target classifier: no classifier was given; give one with a logit for each group")
        composite, target = get_composite(self.composite), get_target(self.target)
        rooted = (self.root or composite.root) == "rooted"
        return StepSettings(propagate(composite, model), rooted, target, classifier, self.classifier_on)

    def timesteps(self, model: Model) -> Tensor:
        """(M,) the measured timesteps of a pipeline's call, noisiest first."""
        steps = schedule_of(model, self.steps, self.guidance).timesteps
        return torch.tensor(steps[:: self.every], dtype=torch.float64)

    def edges(self, timesteps: Tensor, training_steps: float) -> Tensor:
        """(T + 1,) descending edges of the bins, each of which holds one of the measured timesteps (M,).

        Bins run down from the scheduler's noisiest timestep, or from the first measured one where that is far below it,
        in another unit.

        Raises:
            InputError: Bins of equal width leave one empty, and there are more measured timesteps than bins.
        """
        first = float(timesteps[0])
        top = training_steps if first > 0.01 * training_steps else first * 1.001
        equal = torch.linspace(top, 0, self.bins + 1, dtype=torch.float64)
        held = {bin_of(float(timestep), equal) for timestep in timesteps}
        if len(held) == self.bins:
            return equal
        once = sorted(set(timesteps.tolist()), reverse=True)
        if len(once) > self.bins:
            raise InputError(
                f"{self.bins} bins, but the {len(once)} measured steps fall into {len(held)} of them; use fewer bins,"
                " more steps, or measure more of them"
            )
        inner = [(high + low) / 2 for high, low in pairwise(once)]
        return torch.tensor([max(top, once[0]), *inner, min(0.0, once[-1])], dtype=torch.float64)

    def collateral_weights(self, timesteps: Tensor, edges: Tensor) -> list[float]:
        """Weight of each measured step's off-axis row; 0 where it is not measured.

        Where c of a bin's m steps have a row, its weight is sqrt(m / c), so that squares add up to those of m rows if
        the steps of a bin are alike, as the plan assumes. The c steps are spread over the bin, early and late in it by
        turns, so that neither noisy nor clean steps are favoured over all bins.
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


def walk(
    model: Model,
    sites: list[Site],
    axis: Axis,
    rows: list[Row],
    settings: Settings,
    measured: Callable[[Measured], None],
    classifier: Classifier | None = None,
    portions: AdaptiveBatch | None = None,
    reduce: Reduce = neuron_relevance,
    output: str | None = None,
) -> Any:
    """Run the neutral prompts' own guided trajectory and decompose the target at every Nth step.

    Args:
        model: The frozen pipeline.
        sites: The watched layers of its denoiser.
        axis: The bias axis; its words make the group prompts.
        rows: The samples, with columns `prompt`, `seed` and those of `prompts.COLUMNS`.
        settings: See `Settings`.
        measured: Called with each measured step.
        classifier: For the target "classifier": a logit for each group, in the axis' order.
        portions: How many samples fit through the denoiser together; it learns that.
        reduce: Makes rows of activations and gradients at the sites.
        output: The pipeline's output type, such as "pil"; with None its call ends after the last measured step.

    Returns:
        The pipeline's output, or None.

    Raises:
        InputError: No classifier for the target of that name, a model that predicts the same for every group, or not
            enough memory for one sample.
        RuntimeError: In inference mode, in which no gradient can be had.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("relevance needs gradients: run with Trainer(inference_mode=False)")
    step, portions = replace(settings.for_step(model.network, classifier), reduce=reduce), portions or AdaptiveBatch()
    timesteps = settings.timesteps(model)
    edges = settings.edges(timesteps, model.training_steps)
    weights = iter(settings.collateral_weights(timesteps, edges))

    def visit(call: Call) -> None:
        if call.step % settings.every:
            return
        now = replace(step, off_axis=next(weights))
        parts = portions.each(lambda part: measure(model, call, groups, sites, rows, now, part), len(rows))
        call.reply = torch.cat([conditional for conditional, _, _ in parts])
        if all(unguided is not None for _, unguided, _ in parts):
            call.unguided = torch.cat([unguided for _, unguided, _ in parts if unguided is not None])
        measured(Measured.joined([part for *_, part in parts]))

    last = (len(timesteps) - 1) * settings.every + 1 if output is None else None
    trajectory = Walk(model, rows, settings.steps, settings.guidance, visit=visit, portions=portions, last=last)
    (groups,) = encode_groups(trajectory, rows, [axis])
    return trajectory.run(output or "latent")


def check_prompts(model: Model, axis: Axis, rows: Sequence[Row], guidance: float, steps: int | None = None) -> None:
    """Refuse rows of which two prompts (neutral, or of a group) are the same to the model's text encoder."""
    texts = [[row["prompt"], *group_prompts(row, axis)] for row in rows]
    size = 1 + len(axis)
    conditions, _ = encode(model, [text for prompts in texts for text in prompts], guidance, steps)
    for number, prompts in enumerate(texts):
        for i, j in combinations(range(size), 2):
            if not conditions.differ(number * size + i, number * size + j):
                raise InputError(
                    f"prompt {prompts[j]!r} is the same as {prompts[i]!r} to this model, so the axis has no direction;"
                    f" check the words of axis {axis.name!r}, and that the prompt is not too long for the model"
                )
