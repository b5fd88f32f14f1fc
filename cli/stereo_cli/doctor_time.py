"""How long `stereo locate`, `plan` and `bench` would take here: two passes timed, and the others counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stereoclinic.pipelines import Model
    from stereoclinic.pipelines.sites import Site
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.prompts.sets import Row, Samples

#: A pass that takes less is timed once more: the first one pays for what is done once.
SHORT = 5.0


@dataclass(frozen=True)
class Workload:
    """What is to be located, planned and judged.

    Args:
        axis: The bias axis.
        samples: That relevance is located, and a treatment planned, on.
        images: A neutral prompt, of a bench.
        steps: Of the scheduler.
        guidance: Scale of a plan and a bench.
        composite: Relevance rules of `stereo locate`.
        sites: As --sites.
    """

    axis: "Axis"
    samples: "Samples"
    images: int
    steps: int
    guidance: float
    composite: str
    sites: tuple[str, ...]


def estimate(model: "Model", sites: "list[Site]", rows: "list[Row]", work: Workload) -> dict[str, Any]:
    """Seconds of one denoising step and one relevance step of a sample, minutes of each command, and what they assume.

    All of it is None where a relevance step cannot be made; `why` then says why not.
    """
    from stereo_cli import common
    from stereoclinic.ddtd.trajectory import Settings
    from stereoclinic.errors import InputError
    from stereoclinic.pipelines.learn import learnt_of
    from stereoclinic.pipelines.schedule import schedule_of
    from stereoclinic.sns.stepwise import Stepwise

    scale, every = common.unguided(model, work.steps), common.every_of(work.steps)
    settings = Settings(work.composite, None, work.steps, scale, every, sites=work.sites)
    try:
        forward, relevance = _timed(model, sites, rows, work, settings)
    except InputError as error:
        names = ("forward_seconds", "relevance_seconds", "locate_minutes", "plan_minutes", "bench_minutes")
        return {**dict.fromkeys(names), "assumes": "", "why": str(error)}
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
    # Untreated, a mask, a random one, two oracles, other seeds and the reference; group prompts without and with.
    pictures = prompts * (7 * work.images + 2 * 4 * groups)
    balanced = prompts * work.images * (groups - 1)  # more predictions of the balanced oracle at each step
    judged = len(drawn) * forward * (pictures * blocks + balanced)
    assumes = (
        f"{prompts} prompts, {work.steps} steps, one device, {len(rows)} sample(s) at a time;"
        f" locate: {len(work.samples.seeds)} seeds, every"
        f" {'step' if every == 1 else 'second step'}, {work.composite}, guidance {scale:g};"
        f" plan: the same seeds, {treated} treated steps, guidance {work.guidance:g}, without its solver;"
        f" bench: one mask, {work.images} images per prompt, guidance {work.guidance:g}, without decoding and reading"
    )
    return {
        "forward_seconds": forward,
        "relevance_seconds": relevance,
        "locate_minutes": locate / 60,
        "plan_minutes": planned / 60,
        "bench_minutes": judged / 60,
        "assumes": assumes,
        "why": "",
    }


def _timed(
    model: "Model", sites: "list[Site]", rows: "list[Row]", work: Workload, settings: Any
) -> tuple[float, float]:
    """Seconds per sample of a prediction for the prompts, and of a measured step of `stereo locate`."""
    import torch

    from stereoclinic.ddtd.step import measure
    from stereoclinic.pipelines.call import Call
    from stereoclinic.pipelines.intercept import Left
    from stereoclinic.pipelines.memory import AdaptiveBatch
    from stereoclinic.pipelines.watch import Walk, encode_groups

    how, found = settings.how(model.network), list[float]()

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
    (groups,) = encode_groups(walk, rows, [work.axis])
    walk.run()
    forward, relevance = found
    return forward, relevance
