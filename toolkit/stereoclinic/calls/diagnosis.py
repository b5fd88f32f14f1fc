"""The results of `doctor`: the model, its neurons, the conservation check, memory and time."""

import math
import shlex
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor

from stereoclinic.calls.doctor import DoctorSettings
from stereoclinic.calls.duration import Duration, estimate
from stereoclinic.calls.faithfulness import Faithfulness, rank_composites
from stereoclinic.calls.inputs import call_of, neutral_prompts, open_named, unguided
from stereoclinic.calls.locate import LocateSettings
from stereoclinic.calls.settings import call_texts
from stereoclinic.calls.work import Reporter
from stereoclinic.ddtd.conservation import Conservation, check
from stereoclinic.ddtd.rules.composites import Composite, get_composite
from stereoclinic.ddtd.rules.operations import tensors
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.intercept import Left, Watcher, call_pipeline
from stereoclinic.pipelines.learn import PROMPTS, Learnt, learnt_of
from stereoclinic.pipelines.memory import AdaptiveBatch, memory_needed
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.sets import with_seeds
from stereoclinic.runtime.devices import device_of, devices_here

_DEFAULT_COMPOSITE = "epsilon-cp"
_BATCH: int = LocateSettings.model_fields["batch_size"].default


@dataclass(frozen=True)
class ModelFacts:
    """What the model is, where it is, and how its pipeline calls the denoiser.

    Attributes:
        draws: Whether the scheduler draws noise at every step.
        latents: Shape of one sample's latents.
        conditions: The denoiser's arguments that depend on the prompt.
        calls: Of each call in a step: which blocks of its rows see the prompt.
        timesteps: Of the scheduler.
        told: What the denoiser is told at each of them; empty where it is told none.
    """

    name: str
    folder: str | None
    family: str
    unet: str
    parameters: int
    dtype: str
    scheduler: str
    added: str | None
    prediction: str
    draws: bool
    steps: int
    guidance: float
    call: dict[str, Any]
    latents: list[int]
    conditions: list[str]
    calls: list[list[bool]]
    timesteps: list[float]
    told: list[float]


@dataclass(frozen=True)
class Neurons:
    """How many sites and neurons there are: in all, by kind, and by kind and stream."""

    kinds: dict[str, dict[str, int]]
    streams: list[dict[str, Any]]
    sites: int
    neurons: int


@dataclass(frozen=True)
class ConservationFacts:
    """The conservation check; numbers that are not finite are None.

    Attributes:
        total: The target, the squared norm of the prediction.
        cuts: Shares of the target that cross each cut or enter behind it, their sum and its error.
        absorbs: Whether layers with a rule of their own absorb relevance.
        meaning: What the largest error says, in words.
    """

    composite: str
    dtype: str
    samples: int
    total: float | None
    cuts: list[dict[str, Any]]
    error: float | None
    conserves: bool
    absorbs: bool
    meaning: str
    fault: str | None
    timestep: float
    seed: int


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Attributes:
        memory: Bytes of one relevance step: the denoiser's weights, and what a sample keeps.
        devices: Of this machine: name, what it is, its memory in bytes where it is known, and whether it was used.
        uncovered: Operations without a rule -> how often they ran.
        supported: Whether the model is supported with these rules.
        verdict: The same in words.
        next: The command to run next.
        faithfulness: The composites, ranked; None unless asked for.
    """

    model: ModelFacts
    neurons: Neurons
    uncovered: dict[str, int]
    conservation: ConservationFacts
    memory: dict[str, int]
    devices: list[dict[str, Any]]
    time: Duration
    supported: bool
    verdict: str
    next: str
    faithfulness: Faithfulness | None


def diagnose(
    model: str | Model | DiffusionPipeline,
    settings: DoctorSettings,
    axis: str | Axis,
    prompts: str | Dataset,
    reporter: Reporter,
) -> Diagnosis:
    """Arguments and errors as of `doctor`."""
    rules = get_composite(settings.composite)
    call_of(settings)  # refused before the model is opened
    chosen = axis if isinstance(axis, Axis) else load_axis(axis)
    neutral = neutral_prompts(prompts, settings.limit)
    samples = with_seeds(neutral, settings.seed, settings.seeds or LocateSettings().seeds)
    device = device_of(settings.accelerator)
    opened = open_named(model, settings, reporter, device)
    steps = opened.defaults.steps
    guidance = opened.defaults.guidance if settings.guidance is None else settings.guidance
    sites = find_sites(tree.inner(opened.network), patterns=settings.sites)
    rows = [samples[i % len(samples)] for i in range(settings.batch_size)]
    outcome, latents = checked(opened, rules, rows, steps, guidance)
    facts = describe(opened, latents, steps, guidance)
    supported = not outcome.uncovered and outcome.fault is None
    timed = "gradient" if settings.composite == _DEFAULT_COMPOSITE or not supported else settings.composite
    ranked = None
    if settings.faithfulness and outcome.fault is None:
        walk = Settings(steps=steps, guidance=unguided(opened, steps), sites=settings.sites)
        ranked = rank_composites(opened, chosen, samples, walk, reporter, _BATCH, [settings.composite])
    given = {
        "model": model if isinstance(model, str) else facts.name,
        "variant": settings.variant,
        "axis": None if axis == "gender" else axis if isinstance(axis, str) else axis.name,
        "prompts": prompts if isinstance(prompts, str) and prompts != "portraits" else None,
        "steps": settings.steps,
        "guidance": settings.guidance,
    }
    return Diagnosis(
        facts,
        count_neurons(sites),
        dict(outcome.uncovered),
        _conservation(outcome, rules, facts.timesteps[0], settings.seed),
        memory_needed(opened.network, outcome.kept_bytes, _BATCH),
        devices_here(device),
        estimate(opened, chosen, neutral, settings, timed),
        supported,
        _verdict(outcome, rules, settings.dtype),
        _next_command(outcome, rules, settings, given, ranked.best if ranked else ""),
        ranked,
    )


def checked(
    model: Model, rules: Composite, rows: list[dict[str, Any]], steps: int, guidance: float
) -> tuple[Conservation, list[int]]:
    """The conservation check of the pipeline's own first call for some samples, and the shape of one's latents."""
    kept: list[dict[str, Any]] = []

    def keep(call: Call) -> None:
        kept.append(call.arguments(None, slice(None)))
        raise Left

    walk = Walk(model, rows, steps, guidance, visit=keep)
    walk.run()
    (arguments,), network = kept, tree.inner(model.network)
    text = list(tensors([tree.get(arguments, path) for path in walk.learnt.conditions]))
    # The denoiser is called as outside a pass: nothing watches it any more.
    (outcome,) = AdaptiveBatch(parted=False).each(
        lambda _: check(network, lambda: walk.learnt.flat(network(**arguments)), rules, text=text), 1
    )
    latents = arguments[walk.learnt.latents]
    axis = walk.learnt.axes[(walk.learnt.latents,)]
    one: Tensor = latents[0] if axis is None else latents.select(axis, 0)
    return outcome, list(one.shape)


def describe(model: Model, latents: list[int], steps: int, guidance: float) -> ModelFacts:
    """What is known of an open model at this number of steps and scale; `latents` is the shape of one sample's."""
    network, scheduler = tree.inner(model.network), model.pipe.scheduler
    learnt, schedule = learnt_of(model, guidance, steps), schedule_of(model, steps, guidance)
    flow = "flow" if "Flow" in type(scheduler).__name__ else "epsilon"
    return ModelFacts(
        name=model.name,
        folder=None if model.folder is None else str(model.folder),
        family=type(model.pipe).__name__,
        unet=type(network).__name__,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        scheduler=type(scheduler).__name__,
        added=getattr(network, "config", {}).get("addition_embed_type"),
        prediction=scheduler.config.get("prediction_type", flow),
        draws=_draws(model, learnt, steps, guidance),
        steps=steps,
        guidance=guidance,
        call=model.call,
        latents=latents,
        conditions=sorted(".".join(map(str, path)) for path in learnt.conditions),
        calls=[list(call.blocks) for call in learnt.calls],
        timesteps=list(schedule.timesteps),
        told=list(schedule.told),
    )


def _draws(model: Model, learnt: Learnt, steps: int, guidance: float) -> bool:
    """Whether a step of the pipeline draws noise: whether it moves the generator that it is given.

    The scheduler's signature is no evidence: DDIM takes a generator but draws from it only if eta is above 0.
    """
    own, before, moved = torch.Generator().manual_seed(0), list[Tensor](), False

    def called(watcher: Watcher, arguments: dict[str, Any]) -> Any:
        before.append(own.get_state())
        return learnt.stub(len(before) - 1, arguments)

    def stepped(step: int, prediction: Any) -> None:
        nonlocal moved
        moved = not torch.equal(before[-1], own.get_state())
        raise Left

    with torch.no_grad():
        call_pipeline(model, Watcher(model, called, stepped), PROMPTS[:1], [own], steps, guidance)
    return moved


def count_neurons(sites: list[Site]) -> Neurons:
    """Sites and neurons, in all, by kind, and by kind and stream."""

    def counted(some: list[Site]) -> dict[str, int]:
        return {"sites": len(some), "neurons": sum(site.width for site in some)}

    kinds = list(dict.fromkeys(site.kind for site in sites))
    pairs = sorted(dict.fromkeys((site.kind, site.stream) for site in sites), key=lambda pair: kinds.index(pair[0]))
    return Neurons(
        kinds={kind: counted([site for site in sites if site.kind == kind]) for kind in kinds},
        streams=[
            {"kind": kind, "stream": stream}
            | counted([site for site in sites if (site.kind, site.stream) == (kind, stream)])
            for kind, stream in pairs
        ],
        **counted(sites),
    )


def _conservation(outcome: Conservation, rules: Composite, timestep: float, seed: int) -> ConservationFacts:
    cuts = [
        {
            "before": cut.before,
            **{name: _finite(share / cut.total) for name, share in (*cut.shares.items(), ("sum", cut.sum))},
            "error": _finite(cut.error),
        }
        for cut in outcome.cuts
    ]
    dtype = str(outcome.dtype).removeprefix("torch.")
    return ConservationFacts(
        outcome.composite, dtype, outcome.batch, _finite(outcome.total), cuts, _finite(outcome.error),
        outcome.conserves, rules.by_terms, _meaning(outcome, rules), outcome.fault, timestep, seed,
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _meaning(outcome: Conservation, rules: Composite) -> str:
    """What the largest error says."""
    if not outcome.cuts:
        return "nothing was propagated"
    name, error = outcome.composite, f"{outcome.error:.1e}"
    if outcome.conserves:
        return f"the largest error is {error}, rounding: relevance adds up at every cut"
    if outcome.uncovered:
        return f"the largest error is {error}: what is not covered was passed by its own gradient"
    if not rules.strict:
        return f"the largest error is {error}: plain gradients have no rules, and their shares need not add up"
    if not outcome.exact:
        return f"the largest error is {error}: {name} does not conserve through softmax, by definition"
    leaks = [cut.before for cut in outcome.cuts if cut.error > outcome.rounding]
    return (
        f"the largest error is {error}, more than rounding: relevance is lost or made up in `{leaks[-1]}`, where"
        f" {name} should conserve"
    )


def _verdict(outcome: Conservation, rules: Composite, dtype: str) -> str:
    name = outcome.composite
    if outcome.uncovered:
        count = len(outcome.uncovered)
        return f"this model is not supported with {name}: {count} operation{'s' * (count > 1)} without a rule"
    if outcome.fault:
        return f"this model is not supported in {dtype}: {outcome.fault}"
    if outcome.exact and not outcome.conserves:
        return f"this model is supported with {name}, with care: {_meaning(outcome, rules)}"
    return f"this model is supported with {name}"


def _next_command(
    outcome: Conservation, rules: Composite, settings: DoctorSettings, given: dict[str, Any], best: str
) -> str:
    """The next command, with this command's arguments; `best` is the composite that was found, if any."""
    faulty = outcome.fault is not None
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    words += [word for text in call_texts(call_of(settings)) for word in ("--call", text)]
    words += [word for site in settings.sites for word in ("--sites", site)]
    dtype = ["--dtype", settings.dtype] if settings.dtype != "float32" else []
    if best:
        return shlex.join(["stereo", "locate", *words, *dtype, "--composite", best])
    if outcome.uncovered and rules.strict:
        return shlex.join(["stereo", "doctor", *words, *dtype, "--composite", "gradient"])
    if faulty and settings.dtype == "float16":
        return shlex.join(["stereo", "doctor", *words, "--dtype", "float32"])
    if faulty or outcome.uncovered:
        return "stereo doctor on another copy of the model: values that are not finite come from its weights"
    composite = ["--composite", settings.composite] if settings.composite != _DEFAULT_COMPOSITE else []
    return shlex.join(["stereo", "locate", *words, *dtype, *composite])
