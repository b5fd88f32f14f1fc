"""What `locate`, `plan` and `bench` would take here: a few passes are timed, the others are counted (see `cost`)."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from stereoclinic.calls.cost import Cost, Work, drawing, locating, planning
from stereoclinic.ddtd.conservation import kept_storages
from stereoclinic.ddtd.step import measure
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.intercept import Left
from stereoclinic.pipelines.memory import AdaptiveBatch, memory_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, Samples, with_seeds

if TYPE_CHECKING:
    from datasets import Dataset

    from stereoclinic.calls.doctor import DoctorSettings
    from stereoclinic.calls.evaluation import Evaluation
    from stereoclinic.calls.locate import LocateJob
    from stereoclinic.calls.plan import PlanJob

#: A pass shorter than this, in seconds, is timed a second time: the first one includes what is done once. After
#: a longer one no other is made; a backward pass is then taken for two forward passes.
SHORT = 5.0


@dataclass(frozen=True)
class Speed:
    """What one sample takes on this device.

    Attributes:
        forward: Seconds of a forward pass.
        backward: Seconds of a backward pass.
        kept: Bytes that it keeps for its backward pass.
        batch: Samples that were timed together.
        measured: Whether the backward pass was timed.
    """

    forward: float
    backward: float
    kept: int
    batch: int
    measured: bool


@dataclass(frozen=True)
class Price:
    """What a command would take.

    Attributes:
        minutes: Without start-up, decoding, reading and a plan's solver.
        memory: Bytes: the pipeline, a batch, and what is held of all samples; on a CPU also this process as it is.
        disk: Most bytes on disk.
        forward: Forward passes of one sample.
        backward: Backward passes of one sample.
        plain: Forward passes of drawing as many images.
    """

    minutes: float
    memory: int
    disk: int
    forward: int
    backward: int
    plain: int


@dataclass(frozen=True)
class Offer:
    """The price of a command, and the option that would halve its time.

    Attributes:
        price: At the settings given.
        option: Such as "--seeds 8"; empty where no option halves it.
        halved: The price with it.
    """

    price: Price
    option: str = ""
    halved: Price | None = None


@dataclass(frozen=True)
class Duration:
    """What the commands would take; no commands where no relevance step can be made, and `why` says why not.

    Attributes:
        speed: What was timed.
        commands: The offer of each command, by its name.
        assumes: What the offers assume, in words.
    """

    speed: Speed | None = None
    commands: dict[str, Offer] = field(default_factory=dict)
    assumes: str = ""
    why: str = ""


def offer(model: Model, work: Work, speed: Speed, ranks: int = 1) -> Offer:
    """Price some work, and look for the first option, and its largest value, that takes no more than half the time."""
    if model.device.type == "cuda":
        parts = (part for part in model.pipe.components.values() if isinstance(part, torch.nn.Module))
        before = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def seconds(cost: Cost) -> float:
        return (cost.forward * speed.forward + cost.backward * speed.backward) / ranks

    def priced(cost: Cost) -> Price:
        memory = before + cost.batch * speed.kept + cost.held
        counts = (round(count) for count in (cost.forward, cost.backward, cost.plain))
        return Price(seconds(cost) / 60, memory, cost.disk, *counts)

    whole = work.cost()
    for name, values in work.smaller():
        for value in values:
            if seconds(less := work.lowered(name, value).cost()) <= seconds(whole) / 2:
                option = f"--{'limit' if name == 'prompts' else name} {value}"
                return Offer(priced(whole), option, priced(less))
    return Offer(priced(whole))


def locate_offer(job: "LocateJob") -> tuple[Offer, Speed]:
    """What `locate` would take here; its samples are no stream.

    Raises:
        InputError: No step can be measured, for the reason that the command itself would give.
    """
    assert isinstance(job.samples, Samples)
    rows = _first(job.samples, job.settings.batch_size)
    work = locating(job.model, job.axis, job.samples, job.walk, job.settings.batch_size)
    speed = timed(job.model, rows, job.axis, replace(job.walk, target="lean"))
    return offer(job.model, work, speed, job.settings.ranks), speed


def plan_offer(job: "PlanJob") -> tuple[Offer, Speed]:
    """What `plan` would take here; errors as of `locate_offer`."""
    how, settings, rows = job.stepwise, job.settings, _first(job.samples, job.stepwise.batch_size)
    share = 1.0 if job.candidates is None else job.candidates.double().mean().item()
    work = planning(job.model, job.axis, job.samples, how, settings.allocate, job.stay, share, settings.check)
    walk = Settings(steps=how.steps, guidance=how.guidance, sites=how.sites)
    speed = timed(job.model, rows, job.axis, walk)
    return offer(job.model, work, speed, settings.ranks), speed


def bench_offer(job: "Evaluation") -> tuple[Offer, Speed]:
    """What `evaluate` would take here."""
    from stereoclinic.evaluation.experiment import arms_of

    first, settings = job.protocols[0], job.settings
    arms = arms_of(job.model, first, job.masks, settings.strength, settings.force)
    work = drawing(job.model, job.protocols, arms, len(settings.baselines))
    rows = _first(with_seeds(first.prompts, first.seed, first.images), first.batch_size)
    walk = Settings(steps=first.steps, guidance=first.guidance)
    speed = timed(job.model, rows, first.axis, walk, backward=False)
    return offer(job.model, work, speed, settings.ranks), speed


def estimate(model: Model, axis: Axis, prompts: "Dataset", settings: "DoctorSettings", composite: str) -> Duration:
    """Price the commands at their own settings, but for those that `doctor` was given.

    Args:
        model: Opened with the number of steps.
        axis: Of bias.
        prompts: Neutral prompts.
        settings: Of `doctor`.
        composite: Relevance rules of `locate`.
    """
    from stereoclinic.calls.evaluate_settings import EvaluateSettings
    from stereoclinic.calls.locate import LocateSettings, walk_of
    from stereoclinic.calls.plan import AMONG, PlanSettings, others_of, stepwise_of
    from stereoclinic.evaluation.arms import Protocol
    from stereoclinic.evaluation.experiment import arms_of
    from stereoclinic.sns.mask import NeuronMask

    own: dict[str, Any] = {} if settings.seeds is None else {"seeds": settings.seeds}
    locate = LocateSettings(composite=composite, sites=settings.sites, **own)
    plan = PlanSettings(guidance=settings.guidance, sites=settings.sites, **own)
    bench = EvaluateSettings()
    walk, how = walk_of(locate, model), stepwise_of(plan, model, {})
    located, planned = (with_seeds(prompts, each.seed, each.seeds) for each in (locate, plan))
    try:
        speed = timed(model, _first(located, locate.batch_size), axis, walk)
    except InputError as error:
        return Duration(why=str(error))
    watched = find_sites(inner(model.network), patterns=settings.sites)
    one = NeuronMask(
        watched, torch.tensor([float(model.training_steps), 0.0]), torch.ones(1, sum(site.width for site in watched))
    )
    judged = Protocol(
        axis, prompts, settings.images or bench.images or Protocol.images, bench.group_images, bench.seed, how.steps,
        how.guidance, bench.batch_size,
    )  # fmt: skip
    treated = planning(model, axis, planned, how, plan.allocate, others_of(plan, axis), AMONG, plan.check)
    works = {
        "locate": locating(model, axis, located, walk, locate.batch_size),
        "plan": treated,
        "bench": drawing(model, [judged], arms_of(model, judged, {"mask": one})),
    }
    assumes = (
        f"{len(prompts)} prompts, {how.steps} steps, one device, {speed.batch} samples at a time; locate:"
        f" {locate.seeds} seeds, every {walk.every} steps, {walk.composite}, guidance {walk.guidance:g}; plan:"
        f" {plan.seeds} seeds, {treated.treated} treated steps, among {AMONG:.0%} of the neurons, guidance"
        f" {how.guidance:g}, at most; bench: one mask, {judged.images} images per prompt"
    )
    return Duration(speed, {name: offer(model, work, speed) for name, work in works.items()}, assumes)


def timed(model: Model, rows: Sequence[Row], axis: Axis, walk: Settings, backward: bool = True) -> Speed:
    """Time one sample, and then all of these rows together if that is quick and they fit in memory.

    Raises:
        InputError: No step can be measured.
    """
    sites = find_sites(inner(model.network), walk.kinds, walk.sites)
    one = _timed(model, sites, rows[:1], axis, walk, backward)
    room = len(rows) * one.kept < memory_of(model.device) / 2
    if len(rows) == 1 or len(rows) * one.forward > SHORT or not room:
        return one
    try:
        return _timed(model, sites, rows, axis, walk, backward)
    except InputError:  # they do not fit
        return one


def _timed(model: Model, sites: list[Site], rows: Sequence[Row], axis: Axis, walk: Settings, backward: bool) -> Speed:
    """A forward pass for the prompts, and a measured step of `locate` with all of its backward passes."""
    how, found = walk.for_step(model.network), list[Speed]()
    passes = (1 if len(axis) == 2 else len(axis)) + 1  # backward: the leans and the off-axis row

    def clocked(run: Callable[[], object]) -> float:
        def once() -> float:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            began = time.perf_counter()
            AdaptiveBatch(parted=False).each(lambda _: run(), 1)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            return (time.perf_counter() - began) / len(rows)

        first = once()
        return once() if first * len(rows) < SHORT else first

    def visit(call: Call) -> None:
        forward, kept = clocked(call.predict), 0
        long = forward * len(rows) > SHORT
        back = 2 * forward
        if backward and not long:
            with kept_storages(inner(model.network)) as storages:
                measure(model, call, groups, sites, rows, how)
            kept = sum(storage.nbytes() for storage in storages.values()) // len(rows)
            storages.clear()
            step = clocked(lambda: measure(model, call, groups, sites, rows, how))
            back = max((step - (len(axis) + 1) * forward) / passes, forward / 2)
        found.append(Speed(forward, back, kept, len(rows), measured=not long))
        raise Left

    trajectory = Walk(model, rows, walk.steps, walk.guidance, visit=visit)
    (groups,) = encode_groups(trajectory, rows, [axis])
    trajectory.run()
    return found[0]


def _first(samples: Samples, number: int) -> list[Row]:
    return [samples[i] for i in range(min(number, len(samples)))]
