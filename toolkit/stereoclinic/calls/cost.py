"""What `locate`, `plan` and `bench` cost: passes through the denoiser, memory and disk, counted without any of them.

A pass is one of one sample: a batch of 16 counts 16 times. Tests compare the counts with passes that are watched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from stereoclinic.ddtd.lean import get_target
from stereoclinic.ddtd.relevance import shapes_of
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.evaluation.arms import BALANCED
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Samples

if TYPE_CHECKING:
    from stereoclinic.evaluation.arms import Protocol
    from stereoclinic.evaluation.experiment import Arms
    from stereoclinic.sns.stepwise import Stepwise

#: Dampings that a plan's line search tries for each plan of a step: 1.42 on portraits, with 4 samples.
TRIES = 1.4
#: Bytes that a plan keeps of a derivative while it solves: it and a scaled copy, in float64.
SOLVED = 16


@dataclass(frozen=True)
class Cost:
    """What a command takes.

    Attributes:
        forward: Forward passes.
        backward: Backward passes.
        plain: Forward passes that drawing as many images takes, untreated.
        held: Bytes in memory besides the model and a batch.
        disk: Most bytes on disk.
        batch: Samples that keep what a backward pass needs at a time; 0 if there is none.
    """

    forward: float
    backward: float
    plain: float
    held: int
    disk: int
    batch: int = 0


@dataclass(frozen=True)
class Work:
    """What the commands share.

    Args:
        prompts: Number of neutral prompts.
        groups: K, groups of the axis.
        neurons: N, of the model.
        drawn: Forward passes of an untreated image: steps, twice that with guidance.
        batch: Samples at a time.
    """

    prompts: int
    groups: int
    neurons: int
    drawn: int
    batch: int

    def cost(self) -> Cost:
        """Count."""
        raise NotImplementedError

    def smaller(self) -> Iterator[tuple[str, Sequence[int]]]:
        """What could be lowered, best first, and the values it could have, largest work first."""
        raise NotImplementedError

    def lowered(self, name: str, value: int) -> "Work":
        """The same with another value."""
        return replace(self, **{name: value})


@dataclass(frozen=True)
class Locating(Work):
    """`locate`.

    Args:
        seeds: Per prompt.
        labels: Of the prompts.
        steps: Of the sampler.
        every: Every Nth of them is measured.
        bins: Of timesteps.
        blocks: Rows of a sample in a step: 2 with guidance.
        halves: Rows that a backward pass goes through.
    """

    seeds: int
    labels: int
    steps: int
    every: int
    bins: int
    blocks: int = 1
    halves: int = 1

    def cost(self) -> Cost:
        samples, measured = self.prompts * self.seeds, -(-self.steps // self.every)
        bins = min(self.bins, measured)
        in_bins = [measured // bins + (i < measured % bins) for i in range(bins)]
        off_axis = sum(-(-number // Settings.collateral_every) for number in in_bins)
        between = (measured - 1) * (self.every - 1)  # the last measured step is the last one
        leans = 1 if self.groups == 2 else self.groups  # of two groups, one lean is minus the other
        forward = measured * (self.groups + self.blocks) + between * self.blocks
        backward = self.halves * (measured * leans + off_axis)
        shapes = shapes_of(self.labels, bins, self.groups, self.neurons, measured)
        sums = sum(map(prod, shapes.values()))
        # Sums are float64, and the file is float32; an interrupted run keeps sums too.
        return Cost(
            samples * forward, samples * backward, samples * self.drawn, 12 * sums, 12 * sums, min(self.batch, samples)
        )

    def smaller(self) -> Iterator[tuple[str, Sequence[int]]]:
        yield "seeds", range(self.seeds - 1, 0, -1)
        yield "every", [n for n in range(self.every + 1, self.steps) if -(-self.steps // n) >= self.bins]
        yield "prompts", range(self.prompts - 1, 0, -1)


@dataclass(frozen=True)
class Planning(Work):
    """`plan`.

    Args:
        seeds: Per prompt.
        treated: Steps that are planned.
        guided: Whether the pipeline predicts without prompt too.
        stay: Number of groups of each axis to leave as it is.
        trajectories: One for each group, or one that balances.
        replans: Plans of a step, at most.
        among: Share of the neurons that may be damped.
        check: New seeds per prompt.
        to_group: Whether neurons are damped toward a mean of groups.
    """

    seeds: int
    treated: int
    guided: bool
    stay: tuple[int, ...]
    trajectories: int
    replans: int
    among: float
    check: int
    to_group: bool = False

    @property
    def cotangents(self) -> int:
        """Rows of each sample in a step's problem."""
        return self.groups - 1 + self._others

    @property
    def _directions(self) -> int:
        return 1 + self.guided + sum(number - 1 for number in self.stay)

    @property
    def _others(self) -> int:
        return max(1, -(-self._directions // (self.prompts * self.seeds)))

    def cost(self) -> Cost:
        samples = self.prompts * self.seeds
        kept_axes = sum(number * (number - 1) for number in self.stay) / self._directions
        forward = self.guided + self.groups + 1 + self._others * kept_axes + self.replans * (1 + TRIES)
        forward += self.to_group * (self.groups if self.trajectories == 1 else 1)
        backward = self.replans * self.cotangents
        steps = samples * self.treated * self.trajectories
        checked = self.prompts * self.check * self.treated * (self.guided + 1 + self.groups)
        mask = 4 * self.neurons * self.treated * self.trajectories
        rows = samples * self.cotangents * round(self.among * self.neurons)
        return Cost(
            steps * forward + checked, steps * backward, samples * self.drawn, SOLVED * rows + mask, 2 * mask,
            min(self.batch, samples),
        )  # fmt: skip

    def smaller(self) -> Iterator[tuple[str, Sequence[int]]]:
        yield "seeds", range(self.seeds - 1, 0, -1)
        yield "replans", range(self.replans - 1, 0, -1)
        yield "prompts", range(self.prompts - 1, 0, -1)


@dataclass(frozen=True)
class Drawing(Work):
    """`bench`; `drawn` counts all of its guidance scales.

    Args:
        images: Per prompt and arm.
        arms: That draw them.
        scales: Guidance scales.
        grouped: Images that name a group, per prompt.
        unrelated: Images of other prompts.
        picture: Bytes of an image, at eight bits a colour.
        oracle: Further passes of a prompt's image in the balanced oracle.
    """

    images: int
    arms: int
    scales: int
    grouped: int
    unrelated: int
    picture: int
    oracle: int = 0

    @property
    def pictures(self) -> int:
        """Images at one guidance scale."""
        return self.prompts * (self.images * self.arms + self.grouped) + self.unrelated

    def cost(self) -> Cost:
        plain = self.pictures * self.drawn
        stored = self.pictures * self.picture * self.scales
        # All images of a scale are held twice while they are read; the folder of parts goes once they are files.
        held = 2 * self.pictures * self.picture
        return Cost(plain + self.prompts * self.images * self.oracle, 0, plain, held, 2 * stored)

    def smaller(self) -> Iterator[tuple[str, Sequence[int]]]:
        yield "images", range(self.images - 1, 1, -1)
        yield "prompts", range(self.prompts - 1, 0, -1)


def locating(model: Model, axis: Axis, samples: Samples, walk: Settings, batch_size: int) -> Locating:
    """What `locate` does."""
    steps, blocks = _steps(model, walk.steps, walk.guidance)
    own = _steps(model, walk.steps, model.defaults.guidance)
    return Locating(
        len(samples.prompts), len(axis), _neurons(model, walk.sites), own[0] * own[1], batch_size,
        seeds=len(samples.seeds), labels=len(samples.labels), steps=steps, every=walk.every, bins=walk.bins,
        blocks=blocks, halves=2 if get_target(walk.target).halves else 1,
    )  # fmt: skip


def planning(
    model: Model,
    axis: Axis,
    samples: Samples,
    how: "Stepwise",
    allocate: bool,
    stay: Sequence[Axis],
    among: float,
    check: int,
) -> Planning:
    """What `plan` does."""
    timesteps = schedule_of(model, how.steps, how.guidance).timesteps
    steps, blocks = _steps(model, how.steps, how.guidance)
    return Planning(
        len(samples.prompts), len(axis), _neurons(model, how.sites), steps * blocks, how.batch_size,
        seeds=len(samples.seeds), treated=len(how.treated(timesteps)), guided=blocks > 1,
        stay=tuple(len(each) for each in stay), trajectories=len(axis) if allocate else 1, replans=how.replans,
        among=among, check=check, to_group=how.root == "group",
    )  # fmt: skip


def drawing(model: Model, protocols: Sequence["Protocol"], arms: "Arms", baselines: int = 0) -> Drawing:
    """What `evaluate` draws: the same arms at each guidance scale. A baseline counts as an untreated arm."""
    first = protocols[0]
    prompts, every = len(first.prompts), [_steps(model, each.steps, each.guidance) for each in protocols]
    treated = len(arms.grouped) + baselines * bool(first.group_images)
    others = sum(len(arm.samples) for arm in arms.unrelated)
    balanced = any(arm.name == BALANCED for arm in arms.neutral)
    return Drawing(
        prompts, len(first.axis), 0, sum(steps * blocks for steps, blocks in every), first.batch_size,
        images=first.images, arms=len(arms.neutral) + 1 + baselines, scales=len(protocols),
        grouped=treated * len(first.axis) * first.group_images, unrelated=others, picture=_picture(model),
        oracle=balanced * (len(first.axis) - 1) * sum(steps for steps, _ in every),
    )  # fmt: skip


def _steps(model: Model, steps: int, guidance: float) -> tuple[int, int]:
    """Steps of the pipeline's call, and rows of the denoiser for a sample in each."""
    calls = learnt_of(model, guidance, steps).calls
    return len(schedule_of(model, steps, guidance).timesteps), sum(len(call.blocks) for call in calls)


def _neurons(model: Model, patterns: Sequence[str]) -> int:
    return sum(site.width for site in find_sites(inner(model.network), patterns=patterns))


def _picture(model: Model) -> int:
    """Bytes of an image, at eight bits a colour; 0 where the pipeline does not say its size."""
    pipe, call = model.pipe, model.call
    side = getattr(pipe, "default_sample_size", None) or getattr(inner(model.network), "config", {}).get("sample_size")
    own = side * pipe.vae_scale_factor if isinstance(side, int) and hasattr(pipe, "vae_scale_factor") else 0
    return 3 * int(call.get("height", own)) * int(call.get("width", own))
