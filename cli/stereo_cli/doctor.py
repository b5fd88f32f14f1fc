"""`stereo doctor`: is this model supported, and what would it cost."""

import math
import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common, options
from stereo_cli.call import call_from

if TYPE_CHECKING:
    from stereoclinic.ddtd.conservation import Conservation
    from stereoclinic.ddtd.rules.composites import Composite
    from stereoclinic.pipelines.learn import Learnt
    from stereoclinic.pipelines.model import Model
    from stereoclinic.pipelines.sites import Site

#: Samples that `stereo locate` walks together unless told otherwise.
BATCH = 16
#: The composite that is checked unless told otherwise: its relevance adds up.
CHECKED = "epsilon-cp"
_TIME = "Estimated time"


@common.guarded
def doctor(
    model: options.Model = "portraits",
    dtype: options.Dtype = "float32",
    variant: options.Variant = None,
    call: options.Call = None,
    height: options.Height = None,
    width: options.Width = None,
    composite: Annotated[str, typer.Option(help="Relevance rules to check, as `stereo locate` takes them.")] = CHECKED,
    sites: options.Sites = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise that is looked at.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of samples in the pass.")] = 1,
    axis: Annotated[str, typer.Option("--axis", help="Axis of bias.", rich_help_panel=_TIME)] = "gender",
    prompts: options.Prompts = "portraits",
    limit: options.Limit = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds per prompt that relevance is located on.", rich_help_panel=_TIME)
    ] = 16,
    images: Annotated[
        int, typer.Option(min=1, help="Number of images per neutral prompt of a bench.", rich_help_panel=_TIME)
    ] = 25,
    steps: options.Steps = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, help="Guidance scale.", show_default="the model's own", rich_help_panel=options.MODEL),
    ] = None,
    accelerator: options.Accelerator = "auto",
    as_json: options.AsJson = False,
    config: options.Config = None,
) -> None:
    """Say whether a model is supported: its denoiser and neurons, how it is called, rules, conservation, memory, time.

    One prediction, for noise at the noisiest timestep, is decomposed. Whatever crosses a cut through the network, and
    whatever enters behind it (time, text, biases), must add up to the prediction's own size.

    Exit codes: 0 it is supported; 2 it is not, or bad input.
    """
    from stereoclinic.ddtd.rules.composites import get_composite
    from stereoclinic.pipelines import open_model
    from stereoclinic.prompts.axes import load_axis
    from stereoclinic.prompts.sets import with_seeds

    rules, called, chosen = get_composite(composite), call_from(call, height, width), load_axis(axis)
    samples = with_seeds(common.neutral_prompts(prompts, limit), seed, seeds)
    device = common.device_of(accelerator)
    opened = open_model(model, device, dtype, variant, called, common.note)

    from stereo_cli.doctor_time import Workload, estimate
    from stereoclinic.pipelines.arguments import inner
    from stereoclinic.pipelines.learn import learnt_of
    from stereoclinic.pipelines.schedule import schedule_of
    from stereoclinic.pipelines.sites import find_sites

    asked_steps, steps = steps, steps or opened.defaults.steps
    scale = opened.defaults.guidance if guidance is None else guidance
    found = find_sites(inner(opened.network), patterns=sites or ())
    learnt, schedule = learnt_of(opened, scale, steps), schedule_of(opened, steps, scale)
    rows = [samples[i % len(samples)] for i in range(batch_size)]
    outcome, latents = checked(opened, rules, rows, steps, scale)
    supported = not outcome.uncovered and outcome.fault is None
    asked = {"variant": variant, "axis": None if axis == "gender" else axis, "prompts": prompts}
    given = ["--model", model, *common.words_of(called, **asked, steps=asked_steps, guidance=guidance)]
    given += [word for each in sites or () for word in ("--sites", each)]
    timed = "gradient" if composite == CHECKED or not supported else composite
    work = Workload(chosen, samples, images, steps, scale, timed, tuple(sites or ()))
    data = {
        "model": {
            **describe(opened, learnt, steps, scale),
            "latents": latents,
            "timesteps": list(schedule.timesteps),
            "told": list(schedule.told),
        },
        "neurons": neurons(found),
        "uncovered": outcome.uncovered,
        "conservation": {**as_data(outcome, rules), "timestep": schedule.timesteps[0], "seed": seed},
        "memory": memory(opened, outcome),
        "devices": devices(device),
        "time": estimate(opened, found, rows, work),
        "treatable": supported,
        "verdict": verdict(outcome, rules, dtype),
        "next": following(outcome, rules, composite, dtype, given),
    }
    if as_json:
        common.print_json(data)
    else:
        from stereo_cli.doctor_tables import doctor_tables

        console = common.stdout()
        for table in doctor_tables(data):
            console.print(table)
        common.say(f"verdict: {data['verdict']}")
        common.say(f"next: {data['next']}")
    if not supported:
        raise typer.Exit(common.BAD_INPUT)


def checked(
    model: "Model", rules: "Composite", rows: list[dict[str, Any]], steps: int, guidance: float
) -> "tuple[Conservation, list[int]]":
    """The conservation check of the pipeline's own first call for some samples, and the shape of one's latents."""
    from torch import Tensor

    from stereoclinic.ddtd.conservation import check
    from stereoclinic.ddtd.rules.operations import tensors
    from stereoclinic.pipelines import arguments as tree
    from stereoclinic.pipelines.call import Call
    from stereoclinic.pipelines.intercept import Left
    from stereoclinic.pipelines.memory import AdaptiveBatch
    from stereoclinic.pipelines.watch import Walk

    kept: list[dict[str, Any]] = []

    def keep(call: Call) -> None:
        kept.append(call.arguments(None, slice(None)))
        raise Left

    walk = Walk(model, rows, steps, guidance, visit=keep)
    walk.run()
    (arguments,), network = kept, tree.inner(model.network)
    text = list(tensors([tree.get(arguments, path) for path in walk.learnt.conditions]))
    # Called as it is outside a pass: nothing watches any more.
    (outcome,) = AdaptiveBatch(parted=False).each(
        lambda _: check(network, lambda: walk.learnt.flat(network(**arguments)), rules, text=text), 1
    )
    latents = arguments[walk.learnt.latents]
    axis = walk.learnt.axes[(walk.learnt.latents,)]
    one: Tensor = latents[0] if axis is None else latents.select(axis, 0)
    return outcome, list(one.shape)


def describe(model: "Model", learnt: "Learnt", steps: int, guidance: float) -> dict[str, Any]:
    """What the model is, where it lies, and how its pipeline calls the denoiser."""
    from stereoclinic.pipelines.arguments import inner

    network, scheduler = inner(model.network), model.pipe.scheduler
    config = getattr(network, "config", {})
    flow = "flow" if "Flow" in type(scheduler).__name__ else "epsilon"
    return {
        "name": model.name,
        "folder": None if model.folder is None else str(model.folder),
        "family": type(model.pipe).__name__,
        "unet": type(network).__name__,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "scheduler": type(scheduler).__name__,
        "added": config.get("addition_embed_type"),
        "prediction": scheduler.config.get("prediction_type", flow),
        "draws": draws(model, learnt, steps, guidance),
        "steps": steps,
        "guidance": guidance,
        "call": model.call,
        "conditions": sorted(".".join(map(str, path)) for path in learnt.conditions),
        "calls": [list(each.blocks) for each in learnt.calls],
    }


def draws(model: "Model", learnt: "Learnt", steps: int, guidance: float) -> bool:
    """Whether a step of the pipeline draws noise: whether it moves the generator that it is given.

    The scheduler's signature does not tell: DDIM takes a generator, and draws from it only where eta is above 0.
    """
    import torch

    from stereoclinic.pipelines.intercept import Left, Watcher, call_pipeline
    from stereoclinic.pipelines.learn import PROMPTS

    own, before, moved = torch.Generator().manual_seed(0), list[torch.Tensor](), False

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


def neurons(found: "list[Site]") -> dict[str, Any]:
    """How many sites and neurons there are, by kind, and by kind and stream."""

    def counted(some: "list[Site]") -> dict[str, int]:
        return {"sites": len(some), "neurons": sum(site.width for site in some)}

    kinds = list(dict.fromkeys(site.kind for site in found))
    pairs = dict.fromkeys((site.kind, site.stream) for site in found)
    return {
        "kinds": {kind: counted([site for site in found if site.kind == kind]) for kind in kinds},
        "streams": [
            {"kind": kind, "stream": stream}
            | counted([site for site in found if (site.kind, site.stream) == (kind, stream)])
            for kind, stream in sorted(pairs, key=lambda pair: kinds.index(pair[0]))
        ],
        **counted(found),
    }


def as_data(outcome: "Conservation", rules: "Composite") -> dict[str, Any]:
    """The conservation table as plain data; whatever is not finite is None."""
    return {
        "composite": outcome.composite,
        "dtype": str(outcome.dtype).removeprefix("torch."),
        "samples": outcome.batch,
        "total": number(outcome.total),
        "cuts": [
            {
                "before": cut.before,
                **{name: number(share / cut.total) for name, share in (*cut.shares.items(), ("sum", cut.sum))},
                "error": number(cut.error),
            }
            for cut in outcome.cuts
        ],
        "error": number(outcome.error),
        "conserves": outcome.conserves,
        "absorbs": rules.by_terms,
        "meaning": meaning(outcome, rules),
        "fault": outcome.fault,
    }


def number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def meaning(outcome: "Conservation", rules: "Composite") -> str:
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


def verdict(outcome: "Conservation", rules: "Composite", dtype: str) -> str:
    """The last word."""
    name = outcome.composite
    if outcome.uncovered:
        count = len(outcome.uncovered)
        return f"this model is not supported with {name}: {count} operation{'s' * (count > 1)} without a rule"
    if outcome.fault:
        return f"this model is not supported in {dtype}: {outcome.fault}"
    if outcome.exact and not outcome.conserves:
        return f"this model is supported with {name}, with care: {meaning(outcome, rules)}"
    return f"this model is supported with {name}"


def following(
    outcome: "Conservation",
    rules: "Composite",
    composite: str,
    dtype: str,
    given: list[str],
) -> str:
    """The command to try next, on what was given to this one."""
    if outcome.uncovered and rules.strict:
        kept = given + (["--dtype", dtype] if dtype != "float32" else [])
        return shlex.join(["stereo", "doctor", *kept, "--composite", "gradient"])
    if outcome.fault and dtype == "float16":
        return shlex.join(["stereo", "doctor", *given, "--dtype", "float32"])
    if outcome.fault or outcome.uncovered:
        return "stereo doctor on another copy of the model: values that are not finite come from its weights"
    given += ["--dtype", dtype] if dtype != "float32" else []
    given += ["--composite", composite] if composite != CHECKED else []
    return shlex.join(["stereo", "locate", *given])


def memory(model: "Model", outcome: "Conservation") -> dict[str, Any]:
    """Bytes of one relevance step, as far as they can be measured on any device: weights, and what a sample keeps."""
    weights = sum(parameter.nbytes for parameter in model.network.parameters())
    return {
        "unet_weights": weights,
        "kept_by_a_sample": outcome.kept_bytes,
        "batch": BATCH,
        "batch_total": weights + BATCH * outcome.kept_bytes,
    }


def devices(used: str) -> list[dict[str, Any]]:
    """What torch finds here."""
    import torch

    found: list[dict[str, Any]] = [
        {"name": "cpu", "what": f"{torch.get_num_threads()} threads, {os.cpu_count()} cores", "memory": None}
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append({"name": f"cuda:{i}", "what": properties.name, "memory": properties.total_memory})
    if torch.backends.mps.is_available():
        found.append(
            {"name": "mps", "what": "Apple GPU; relevance is summed in float64, which it lacks", "memory": None}
        )
    return [{**each, "used": each["name"].split(":")[0] == used} for each in found]
