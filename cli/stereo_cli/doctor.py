"""`stereo doctor`: can this model be treated here."""

import math
import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common, options

if TYPE_CHECKING:
    from stereoclinic.ddtd.check import Conservation
    from stereoclinic.ddtd.composites import Composite
    from stereoclinic.denoisers.base import Denoiser

#: Samples that `stereo locate` walks together unless told otherwise.
BATCH = 16


@common.guarded
def doctor(
    model: options.Model = "portraits",
    dtype: options.Dtype = "float32",
    variant: options.Variant = None,
    composite: Annotated[
        str, typer.Option(help="Relevance rules to check, as `stereo locate` takes them.")
    ] = "epsilon-cp",
    seed: Annotated[int, typer.Option(min=0, help="Of the noise that is looked at.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in the pass.")] = 1,
    accelerator: options.Accelerator = "auto",
    as_json: options.AsJson = False,
    config: options.Config = None,
) -> None:
    """Say whether a model can be treated here: its family, neurons, uncovered operations, conservation and memory.

    One prediction, for noise at the noisiest timestep, is decomposed. Whatever crosses a cut through the network, and
    whatever enters behind it (time, text, biases), must add up to the prediction's own size.

    Exit codes: 0 it can be treated; 2 it cannot, or bad input.
    """
    from stereoclinic.ddtd.check import check
    from stereoclinic.ddtd.composites import get_composite
    from stereoclinic.ddtd.neurons import find_sites
    from stereoclinic.denoisers import open_denoiser

    rules = get_composite(composite)
    device = common.device_of(accelerator)
    denoiser = open_denoiser(model, device, dtype, variant)
    sites = find_sites(denoiser.unet)
    outcome = check(denoiser, rules, seed=seed, batch=batch_size)
    kinds: dict[str, dict[str, int]] = {}
    for site in sites:
        row = kinds.setdefault(site.kind, {"sites": 0, "neurons": 0})
        row["sites"] += 1
        row["neurons"] += site.width
    treatable = not outcome.uncovered and outcome.fault is None
    data = {
        "model": describe(denoiser),
        "neurons": {"kinds": kinds, "sites": len(sites), "neurons": sum(site.width for site in sites)},
        "uncovered": outcome.uncovered,
        "conservation": as_data(outcome, rules),
        "memory": memory(denoiser, outcome),
        "devices": devices(device),
        "treatable": treatable,
        "verdict": verdict(outcome, rules, dtype),
        "next": following(outcome, rules, composite, model, dtype, variant),
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
    if not treatable:
        raise typer.Exit(common.BAD_INPUT)


def describe(denoiser: "Denoiser") -> dict[str, Any]:
    """What the model is and where it lies."""
    unet, scheduler = denoiser.unet, denoiser.pipe.scheduler
    return {
        "name": denoiser.model,
        "folder": None if denoiser.folder is None else str(denoiser.folder),
        "family": type(denoiser).__name__,
        "unet": type(unet).__name__,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "dtype": str(unet.dtype).removeprefix("torch."),
        "latents": list(denoiser.latent_shape),
        "scheduler": type(scheduler).__name__,
        "added": unet.config.get("addition_embed_type"),
        "prediction": scheduler.config.get("prediction_type", "epsilon"),
        "draws": draws(denoiser),
        "steps": denoiser.defaults.steps,
        "guidance": denoiser.defaults.guidance,
    }


def draws(denoiser: "Denoiser") -> bool:
    """Whether the scheduler's step draws noise: two seeds, one step each, from the same place.

    Its signature does not tell: DDIM takes a generator, and draws from it only where eta is above 0.
    """
    import torch

    at = torch.ones(1, *denoiser.latent_shape, device=denoiser.device, dtype=denoiser.unet.dtype)
    ends = []
    for seed in (0, 1):
        timestep = denoiser.timesteps(denoiser.defaults.steps)[0]
        denoiser.pipe.scheduler.scale_model_input(at, timestep)  # some set their counters by it
        ends.append(denoiser.step(at, timestep, at, denoiser.generators([{"prompt": "", "seed": seed}])))
    return not torch.equal(*ends)


def as_data(outcome: "Conservation", rules: "Composite") -> dict[str, Any]:
    """The conservation table as plain data; whatever is not finite is None."""
    return {
        "composite": outcome.composite,
        "dtype": str(outcome.dtype).removeprefix("torch."),
        "timestep": outcome.timestep,
        "seed": outcome.seed,
        "samples": outcome.batch,
        "total": number(outcome.total),
        "cuts": [
            {
                "before": cut.before,
                **{
                    name: number(getattr(cut, name) / cut.total)
                    for name in ("hidden", "skips", "time", "text", "bias", "sum")
                },
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
        return f"this model cannot be treated with {name}: {count} operation{'s' * (count > 1)} without a rule"
    if outcome.fault:
        return f"this model cannot be treated in {dtype}: {outcome.fault}"
    if outcome.exact and not outcome.conserves:
        return f"this model can be treated with {name}, with care: {meaning(outcome, rules)}"
    return f"this model can be treated here with {name}"


def following(
    outcome: "Conservation", rules: "Composite", composite: str, model: str, dtype: str, variant: str | None
) -> str:
    """The command to try next."""
    given = ["--model", model] + (["--variant", variant] if variant else [])
    if outcome.uncovered and rules.strict:
        return shlex.join(["stereo", "doctor", *given, "--composite", "gradient"])
    if outcome.fault and dtype == "float16":
        return shlex.join(["stereo", "doctor", *given, "--dtype", "float32"])
    if outcome.fault or outcome.uncovered:
        return "stereo doctor on another copy of the model: values that are not finite come from its weights"
    given += ["--dtype", dtype] if dtype != "float32" else []
    given += ["--composite", composite] if composite != "epsilon-cp" else []
    return shlex.join(["stereo", "locate", *given])


def memory(denoiser: "Denoiser", outcome: "Conservation") -> dict[str, Any]:
    """Bytes of one relevance step, as far as they can be measured on any device: weights, and what a sample keeps."""
    weights = sum(parameter.nbytes for parameter in denoiser.unet.parameters())
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
