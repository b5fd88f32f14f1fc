"""How faithful is relevance on this model? Random groups of neurons are silenced, and forecasts judged by what happens.

    forecast    minus the sum of R_j over the group            one relevance step for each composite
    truth       the lean without the group, minus the lean     one forward pass for each group

A composite's figure is the correlation of the two over random groups of one size, at one point (a sample at a step),
averaged over axis groups, points and sizes. All composites are compared on the same groups.

References:
    Bhatt, Weller, Moura 2020, Evaluating and Aggregating Feature-based Model Explanations, definition 3.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stereoclinic.ddtd.lean import check_told_apart, group_directions, lean
from stereoclinic.ddtd.propagate import eagerly
from stereoclinic.ddtd.step import StepSettings, measure
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError, UncoveredOperation, first_line
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.conditions import Conditions
from stereoclinic.pipelines.hooks import Hooks
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.sites import Site, by_layer, find_sites
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, Samples, generator
from stereoclinic.sns.damp import by_channel, damp
from stereoclinic.sns.stepwise import Stepwise
from stereoclinic.statistics.intervals import Interval, PairedDifference, mean_change, mean_interval


@dataclass(frozen=True)
class Trial:
    """What is silenced, and where.

    Args:
        samples: Number of samples: one for each neutral prompt, or more where there are fewer prompts.
        points: Number of steps, spread over those that a plan treats.
        sizes: Of the groups, as fractions of all neurons.
        groups: Number of random groups of each size, for each sample and step.
    """

    samples: int = 12
    points: int = 3
    sizes: tuple[float, ...] = (1 / 256, 1 / 32, 1 / 4)
    groups: int = 16

    def rows(self, samples: Samples) -> list[Row]:
        """The samples, spread over the prompts; further seeds where there are too few prompts."""
        prompts = len(samples.prompts)
        if prompts < self.samples:
            return samples[: self.samples]
        return [samples[i * prompts // self.samples] for i in range(self.samples)]

    def steps(self, treated: int) -> list[int]:
        """The middles of equal parts of the first `treated` steps."""
        points = min(self.points, treated)
        return [(2 * i + 1) * treated // (2 * points) for i in range(points)]

    def counts(self, neurons: int) -> list[int]:
        """Neurons in a group of each size."""
        return [max(1, round(size * neurons)) for size in self.sizes]


@dataclass(frozen=True)
class Ranked:
    """A composite's figure.

    Attributes:
        composite: Its name.
        correlation: Of forecast and truth; the interval is over prompts. Higher is better, 1 is perfect.
        difference: From the best composite's; None for the best.
        by_size: The correlation for each size of group.
    """

    composite: str
    correlation: Interval
    difference: PairedDifference | None
    by_size: list[float]


def silenced(network: nn.Module, sites: Sequence[Site], factors: Tensor) -> Hooks:
    """Hooks that damp the neurons of each row of a batch by factors (B, N).

    Raises:
        InputError: In a pass, a layer sees other rows than the batch has.
    """
    spans = by_layer(sites)
    tables = {layer: by_channel([factors], placed, network)[0] for layer, placed in spans.items()}

    def act(layer: str, x: Tensor) -> Tensor:
        if len(factors) not in (1, len(x)):
            raise InputError(
                f"layer {layer!r} ran on {len(x)} rows of a batch of {len(factors)}; give --batch-size 1, or disable"
                " chunking over it"
            )
        return damp(x, tables[layer].to(x), spans[layer][0][0].dim)

    return Hooks(network, list(spans), act)


class Silencing:
    """Forecasts and true changes of the lean, at a few points of a trajectory.

    Args:
        model: The pipeline.
        axis: The bias axis, of K groups.
        rows: B samples.
        walk: Steps, guidance, sites and root. The lean is measured whatever its target is.
        composites: Names and TOML files.
        trial: What is silenced.

    Attributes:
        timesteps: Of the M points.
        forecast: By composite, (K, B, M, sizes, groups), float64.
        truth: Of the same shape.
        refused: Composite -> why it cannot be measured on this model.
    """

    def __init__(
        self, model: Model, axis: Axis, rows: Sequence[Row], walk: Settings, composites: Iterable[str], trial: Trial
    ) -> None:
        self.model, self.axis, self.rows, self.walk, self.trial = model, axis, list(rows), walk, trial
        self.sites = find_sites(inner(model.network), patterns=walk.sites)
        self.neurons = sum(site.width for site in self.sites)
        timesteps = schedule_of(model, walk.steps, walk.guidance).timesteps
        self.steps = trial.steps(len(Stepwise().treated(timesteps)))
        self.timesteps = [timesteps[step] for step in self.steps]
        self.composites, self.refused = dict[str, StepSettings](), dict[str, str]()
        for name in composites:
            try:
                how = replace(walk, composite=name, target="lean").for_step(model.network)
            except InputError as error:
                self.refused[name] = str(error)
            else:
                self.composites[name] = replace(how, off_axis=0.0)
        shape = (len(axis), len(rows), len(self.steps), len(trial.sizes), trial.groups)
        self.truth = torch.zeros(shape, dtype=torch.float64)
        self.forecast = {name: torch.zeros(shape, dtype=torch.float64) for name in self.composites}

    @property
    def points(self) -> int:
        """Samples times steps."""
        return len(self.rows) * len(self.steps)

    @property
    def silences(self) -> int:
        """Random groups at each point."""
        return self.trial.groups * len(self.trial.sizes)

    def passes(self) -> tuple[int, int]:
        """Forward and backward passes of one sample that `run` makes; the walk from point to point is not counted."""
        groups = len(self.axis)
        forward = 1 + groups + self.silences + len(self.composites) * (1 + groups)
        return self.points * forward, self.points * len(self.composites) * (1 if groups == 2 else groups)

    def run(self, portions: AdaptiveBatch, progress: Callable[[int], object] = lambda count: None) -> None:
        """Measure.

        Args:
            portions: How many samples fit through the denoiser together.
            progress: Called with the number of samples after each relevance step and each group.

        Raises:
            InputError: The model predicts the same for all groups' prompts, or values that are not finite.
        """

        def visit(call: Call) -> None:
            if call.step in self.steps:
                portions.each(lambda part: self._at(call, groups, part, progress), len(self.rows))

        last = self.steps[-1] + 1
        walk = Walk(
            self.model, self.rows, self.walk.steps, self.walk.guidance, visit=visit, portions=portions, last=last
        )
        (groups,) = encode_groups(walk, self.rows, [self.axis])
        with eagerly():
            walk.run()

    def _at(self, call: Call, groups: Sequence[Conditions], part: slice, progress: Callable[[int], object]) -> None:
        """Measure some samples at one of the steps."""
        rows, m = self.rows[part], self.steps.index(call.step)
        balanced, directions = group_directions(call.compare(groups, part))
        prediction = call.predict(part=part)
        check_told_apart(prediction, directions, rows, call.timestep)
        before = lean(prediction, balanced, directions)
        relevance = self._relevance(call, groups, part)
        progress(len(rows) * len(relevance))
        random = [generator(row, f"silenced at step {call.step}") for row in rows]
        for g in range(self.trial.groups):
            order = torch.stack([torch.randperm(self.neurons, generator=each) for each in random])
            for s, count in enumerate(self.trial.counts(self.neurons)):
                silent = torch.zeros(order.shape).scatter_(1, order[:, :count], 1.0).to(before.device)  # (n, N)
                with silenced(inner(self.model.network), self.sites, 1 - silent):
                    after = lean(call.predict(part=part), balanced, directions)
                self.truth[:, part, m, s, g] = (after - before).double().cpu()
                for name, each in relevance.items():
                    self.forecast[name][:, part, m, s, g] = -(each * silent).sum(2).double().cpu()
                progress(len(rows))

    def _relevance(self, call: Call, groups: Sequence[Conditions], part: slice) -> dict[str, Tensor]:
        """(K, n, N) of each composite that fits the model."""
        found = {}
        for name, how in [each for each in self.composites.items() if each[0] not in self.refused]:
            try:
                measured = measure(self.model, call, groups, self.sites, self.rows, how, part)[-1]
            except UncoveredOperation as error:
                self.refused[name] = first_line(error).partition(";")[0]
                continue
            if measured.faults:
                self.refused[name] = (
                    f"at timestep {call.timestep:g}, {next(iter(measured.faults.values()))}: not finite"
                )
            else:
                found[name] = measured.relevance
        return found

    def ranking(self) -> list[Ranked]:
        """The composites, most faithful first.

        Raises:
            InputError: None can be measured, or leans are not finite where neurons are silenced.
        """
        if not self.truth.isfinite().all():
            raise InputError("leans are not finite where neurons are silenced; try --dtype float32 or bfloat16")
        labels = [row["label"] for row in self.rows]
        which = torch.tensor([labels.index(label) for label in labels])
        found = {
            name: correlation(forecast, self.truth).mean((0, 2))  # (B, sizes)
            for name, forecast in self.forecast.items()
            if name not in self.refused
        }
        if not found:
            raise InputError("no composite can be measured on this model: " + next(iter(self.refused.values())))
        by_prompt = {
            name: torch.stack([each[which == i].mean() for i in which.unique()])[None] for name, each in found.items()
        }
        names = sorted(found, key=lambda name: -float(by_prompt[name].mean()))
        best = by_prompt[names[0]]
        return [
            Ranked(
                name,
                mean_interval(by_prompt[name]) if best.numel() > 1 else Interval(float(best)),
                None if name == names[0] else mean_change(best, by_prompt[name]),
                found[name].mean(0).tolist(),
            )
            for name in names
        ]


def correlation(forecast: Tensor, truth: Tensor) -> Tensor:
    """Pearson's over the last dimension, (..., n) and (..., n) -> (...); 0 where one of the two does not vary."""
    one, other = (each - each.mean(-1, keepdim=True) for each in (forecast, truth))
    return torch.nn.functional.cosine_similarity(one, other, dim=-1, eps=1e-30)
