"""How long `locate`, `plan` and `evaluate` would take here: two passes are timed, the others are counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stereoclinic.calls.inputs import every_of, unguided
from stereoclinic.ddtd.step import measure
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.intercept import Left
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.sites import Site
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, Samples
from stereoclinic.sns.stepwise import Stepwise

#: A pass shorter than this, in seconds, is timed a second time: the first one includes what is done once.
SHORT = 5.0


@dataclass(frozen=True)
class Workload:
    """What is located, planned and judged.

    Args:
        axis: The bias axis.
        samples: Samples that relevance is located, and a mask planned, on.
        images: Images per neutral prompt of a bench.
        steps: Number of sampler steps.
        guidance: Guidance scale of the plan and the bench.
        composite: Relevance rules of `locate`.
        sites: Module paths of the layers that are watched; the built-in table if empty.
    """

    axis: Axis
    samples: Samples
    images: int
    steps: int
    guidance: float
    composite: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Duration:
    """Estimated times; None where no relevance step can be made, and `why` says why not.

    Attributes:
        forward_seconds: Of a prediction, per sample.
        relevance_seconds: Of a measured step of `locate`, per sample.
        assumes: What the minutes assume, in words.
    """

    forward_seconds: float | None = None
    relevance_seconds: float | None = None
    locate_minutes: float | None = None
    plan_minutes: float | None = None
    bench_minutes: float | None = None
    assumes: str = ""
    why: str = ""


def estimate(model: Model, sites: list[Site], rows: list[Row], work: Workload) -> Duration:
    """Time one prediction and one relevance step of these rows, and count how many each call makes."""
    scale, every = unguided(model, work.steps), every_of(work.steps)
    settings = Settings(work.composite, None, work.steps, scale, every, sites=work.sites)
    try:
        forward, relevance = timed(model, sites, rows, work.axis, settings)
    except InputError as error:
        return Duration(why=str(error))
    located, drawn = (schedule_of(model, work.steps, each).timesteps for each in (scale, work.guidance))
    blocks = sum(len(call.blocks) for call in learnt_of(model, work.guidance).calls)
    groups, samples, prompts = len(work.axis), len(work.samples), len(work.samples.prompts)
    measured = len(located[::every])
    # A step of `locate` that is not measured is the pipeline's own, without guidance.
    locate = samples * (measured * relevance + ((measured - 1) * every + 1 - measured) * forward)
    # A treated step of `plan`: predictions of the groups, without prompt, as it is and for one direction that is to
    # stay; then in each replan rows (a forward pass and a backward pass a row) and about two predictions that try it.
    plan = Stepwise()
    row = max(relevance - (groups + 1) * forward, forward) / 3  # of a forward and two backward passes
    treated = len(plan.treated(drawn))
    step = (groups + 5) * forward + plan.replans * ((1 + groups) * row + 2 * forward)
    planned = samples * groups * treated * step
    # Untreated, a mask, a random one, the allocation oracle and the reference; group prompts without and with.
    pictures = prompts * (5 * work.images + 2 * 4 * groups)
    judged = len(drawn) * forward * pictures * blocks
    assumes = (
        f"{prompts} prompts, {work.steps} steps, one device, {len(rows)} sample(s) at a time;"
        f" locate: {len(work.samples.seeds)} seeds, every"
        f" {'step' if every == 1 else 'second step'}, {work.composite}, guidance {scale:g};"
        f" plan: the same seeds, {treated} treated steps, guidance {work.guidance:g}, without its solver;"
        f" bench: one mask, {work.images} images per prompt, guidance {work.guidance:g}, without decoding and reading"
    )
    return Duration(forward, relevance, locate / 60, planned / 60, judged / 60, assumes)


def timed(model: Model, sites: list[Site], rows: list[Row], axis: Axis, settings: Settings) -> tuple[float, float]:
    """Seconds per sample of a prediction for the prompts, and of a measured step of `locate`."""
    how, found = settings.for_step(model.network), list[float]()

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
        found.append(clocked(call.predict))
        found.append(clocked(lambda: measure(model, call, groups, sites, rows, how)))
        raise Left

    walk = Walk(model, rows, settings.steps, settings.guidance, visit=visit)
    (groups,) = encode_groups(walk, rows, [axis])
    walk.run()
    forward, relevance = found
    return forward, relevance
