"""`stereo plan`: plan a treatment step by step, on the trajectory as it is being treated."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common, dosing, options, prompt_notes
from stereo_cli.beside import PLANNED
from stereo_cli.call import call_from
from stereo_cli.progress import Advance, progress_bar, refuse_left_over, says_what_is_kept

if TYPE_CHECKING:
    from stereoclinic.pipelines import Model
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.prompts.sets import Samples
    from stereoclinic.sns.mask import NeuronMask
    from stereoclinic.sns.stepwise import Stepwise


_PLAN = "The plan"


@common.guarded
def plan(
    relevance: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RELEVANCE]",
            help="What stereo locate wrote; needed for --among, and names the model and the axis.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The mask, .pt or .safetensors.",
            show_default="AXIS-allocated.pt, or AXIS-balanced.pt",
        ),
    ] = None,
    allocate: Annotated[
        bool,
        typer.Option(
            "--allocate/--balance",
            help="Plan a damping for each group, for images that are allotted to it; or one that balances.",
        ),
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(
            help="`portraits`, a diffusers folder, a checkpoint, or a hub id.",
            show_default="the file's, or portraits",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    dtype: options.Dtype = "float32",
    variant: options.Variant = None,
    call: options.Call = None,
    height: options.Height = None,
    width: options.Width = None,
    sites: options.Sites = None,
    axis: Annotated[
        str | None,
        typer.Option("--axis", help="Axis of bias.", show_default="the file's, or gender"),
    ] = None,
    prompts: options.Prompts = "portraits",
    limit: options.Limit = None,
    stay: Annotated[
        list[str] | None,
        typer.Option(
            help="Axes along which nothing is to move; may repeat, none for none.",
            show_default="the others that ship",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    among: Annotated[
        float,
        typer.Option(
            min=0,
            help="Damp only this share of the neurons, those most surely relevant at the treated steps.",
            rich_help_panel=_PLAN,
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="First of the calibration seeds.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds per prompt. A plan made on few seeds misses on others.")
    ] = 16,
    mu: Annotated[
        float, typer.Option(min=0, help="Price of moving the prediction off the axis.", rich_help_panel=_PLAN)
    ] = 0.1,
    keep: Annotated[
        float,
        typer.Option(
            min=0, help="Price of moving it along what is to stay: other axes, the text itself.", rich_help_panel=_PLAN
        ),
    ] = 1.0,
    overshoot: Annotated[
        float,
        typer.Option(
            min=0,
            help="Overshoot: remove this fraction more than the measured lean. Without guidance, 0.25 with --seeds 32"
            " removed more of the gap.",
            rich_help_panel=_PLAN,
        ),
    ] = 0.0,
    root: Annotated[
        str,
        typer.Option(
            help="Damp toward zero, or toward the mean when the allotted group is asked for: group.",
            rich_help_panel=_PLAN,
        ),
    ] = "zero",
    until: Annotated[
        float,
        typer.Option(
            min=0,
            help="Damp the noisy steps only, down to this timestep; groups are settled early.",
            rich_help_panel=_PLAN,
        ),
    ] = 400.0,
    replans: Annotated[
        int, typer.Option(min=1, help="How often each step is planned, each time where it led.", rich_help_panel=_PLAN)
    ] = 3,
    steps: options.Steps = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, help="Guidance scale it is planned at.", show_default="the model's own"),
    ] = None,
    check: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of further seeds per prompt on which the plan is then checked; 0 for none. A plan fits its own"
            " samples better than others.",
            rich_help_panel=_PLAN,
        ),
    ] = 2,
    dose: dosing.Bound = None,
    confirm: dosing.Confirm = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Samples through the model together on one device; fewer where memory runs out.",
            rich_help_panel=options.DEVICES,
        ),
    ] = 36,
    devices: options.Devices = 1,
    num_nodes: options.NumNodes = 1,
    strategy: options.Strategy = "auto",
    accelerator: options.Accelerator = "auto",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a plan that was cut off, on however many devices."),
    ] = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Plan a treatment step by step, each step where the treated steps before it have led.

    With --allocate (the default) the mask holds one damping for each group. An image is allotted a group from its
    prompt and seed alone, and the neurons that push away from that group are damped: damping cannot set a distribution,
    but allotting can. With --balance it holds one, which aims every lean at 0; where it was measured, that was better
    than the mask of stereo locate without guidance, and worse with it.

    Each step solves a bounded least-squares problem: the lean at its target, at a price for what moves besides. Rows
    are exact derivatives at the treated point, so no relevance file is needed; --among keeps to the neurons that
    stereo locate found.
    """
    from stereoclinic.errors import InputError
    from stereoclinic.pipelines import open_model
    from stereoclinic.prompts.axes import known_axes, load_axis
    from stereoclinic.prompts.sets import with_seeds

    dosing.check_confirm(dose, confirm)
    located = None
    if relevance is not None:
        from stereoclinic.ddtd.relevance import Relevance

        located = Relevance.load(relevance)
    if among <= 0 or among > 1:
        raise InputError(f"--among {among:g}: expected a share above 0 and up to 1")
    if among < 1 and located is None:
        raise InputError(
            "--among: give the relevance file that stereo locate wrote, such as gender.relevance.safetensors"
        )
    said = located.metadata if located is not None else {}
    called = call_from(call, height, width, said)
    chosen = load_axis(axis or str(said.get("axis", "gender")))
    if stay == ["none"]:
        stay = []
    others = [load_axis(name) for name in (known_axes() if stay is None else stay)]
    others = [each for each in others if each.name != chosen.name]
    rows = common.neutral_prompts(prompts, limit)
    samples = with_seeds(rows, seed, seeds)
    file = out or Path(f"{chosen.name}{PLANNED[0] if allocate else PLANNED[1]}.pt")
    common.check_target(file, "--out", (".pt", ".safetensors"))
    device = common.device_of(accelerator)
    name = model or str(said.get("model", "portraits"))
    if model is None:
        dtype, variant = common.opened_as(said, dtype, variant)
    ranks = devices * num_nodes
    if len(samples) < ranks:
        raise InputError(f"{len(samples)} samples for {ranks} devices: give more prompts or seeds, or fewer devices")
    images, reader = (0, None) if dose is None else dosing.confirmed_by(confirm, name, chosen)
    opened = open_model(name, common.place_of(device), dtype, variant, called, common.note)
    opened.defaults = replace(opened.defaults, steps=steps or opened.defaults.steps)

    from stereoclinic.pipelines.schedule import schedule_of
    from stereoclinic.sns.compat import check_fits
    from stereoclinic.sns.plan import plan_stepwise
    from stereoclinic.sns.select import most_relevant
    from stereoclinic.sns.stepwise import Stepwise

    if located is not None:
        check_fits(located, opened.network, force)
    scale = opened.defaults.guidance if guidance is None else guidance
    settings = Stepwise(
        mu, keep, overshoot, root, until, replans, steps=steps or opened.defaults.steps, guidance=scale,
        batch_size=batch_size, sites=tuple(sites or common.patterns_of(said)),
    )  # fmt: skip
    timesteps = schedule_of(opened, settings.steps, scale).timesteps
    if not (treated := len(settings.treated(timesteps))):
        raise InputError(f"--until {until:g}: no step lies above it; timesteps run from {timesteps[0]:g}")
    prompt_notes.check_length(opened, rows, chosen, scale, settings.steps)
    prompt_notes.note_named(rows, chosen)
    candidates = None
    if located is not None and among < 1:
        from stereoclinic.sns.mask import in_unit

        candidates = most_relevant(located, among, (first := float(located.bin_edges[0]), in_unit(until, first)))
    unfinished = file.with_name(f"{file.stem}.unfinished.safetensors")
    if not dry_run:
        common.claim(file, unfinished)
    refuse_left_over(unfinished, resume)
    if dry_run:
        common.say(
            f"would plan {treated} of {len(timesteps)} steps on {len(samples)} samples ({len(rows)} prompts x {seeds}"
            f" seeds) at guidance {scale:g} on {ranks} device(s), and write {file}"
        )
        return
    common.hush_lightning()
    passes = treated * len(samples) * (len(chosen) if allocate else 1)
    bar = progress_bar(passes, f"planning {chosen.name}", quiet)
    with says_what_is_kept(unfinished), common.threads_for(device, ranks), bar as advance:
        mask = plan_stepwise(
            opened, chosen, samples, settings, allocate, others, candidates,
            progress=advance, warn=common.warn, unfinished=unfinished,
            accelerator=device, devices=devices, num_nodes=num_nodes, strategy=common.strategy_for(strategy, ranks),
        )  # fmt: skip
    if mask is None:
        return  # another rank writes
    found = None
    if bool((mask.factors == 1).all()):
        unfinished.unlink(missing_ok=True)  # there is nothing to go on with
        raise InputError(f"no damping is worth its price, and {file} is not written; give a lower --mu or --keep")
    with says_what_is_kept(unfinished):
        mask.save(file)  # it took minutes, whatever becomes of its dose
    unfinished.unlink(missing_ok=True)
    if dose is not None:
        half = max(1, seeds // 2)
        how = dosing.Dosing(dose, seed + seeds, half, images, reader, settings.steps, scale, batch_size)
        try:
            mask, found = dosing.give_dose(mask, opened, chosen, rows, how, device, force, quiet)
        except InputError as error:
            raise InputError(f"{error}; {file} holds the mask as it was planned") from error
        mask.save(file)
    held = None
    if check and dose is None:
        further = with_seeds(rows, seed + seeds, check)
        with progress_bar(treated * len(further), "checking on further seeds", quiet) as advance:
            held = _held_out(mask, opened, chosen, further, settings, force, advance)

    from stereo_cli.tables import mask_table
    from stereoclinic.report.summary import mask_summary

    summary = mask_summary(mask)
    if as_json:
        common.print_json({"mask": summary, "held_out": held, "dose": found, "file": str(file)})
        return
    common.stdout().print(mask_table(summary))
    if dose is not None and found is not None:
        dosing.say_dose(dose, found)
    if held is not None:
        spread = "" if held["standard_error"] is None else f" ±{held['standard_error']:.2f}"
        common.say(
            f"on {held['samples']} further samples the lean misses its target by {held['left']:.2f}{spread} in the"
            f" mean, on those planned on by {held['planned']:.2f}"
            + ("; plan on more --seeds to come nearer" if held["left"] > 2 * held["planned"] else "")
        )
    common.say(f"wrote {file}")
    own = axis if axis and Path(axis).suffix else None
    common.say_next(
        file, called, model=name, dtype=dtype, variant=variant, axis=own, prompts=prompts, guidance=guidance
    )


def _held_out(
    mask: "NeuronMask",
    model: "Model",
    axis: "Axis",
    samples: "Samples",
    settings: "Stepwise",
    force: bool,
    progress: Advance,
) -> dict[str, Any]:
    """What a plan leaves of the lean on samples that it was not made on, beside what it says of its own."""
    from stereoclinic.sns.dose import lean_left

    left = lean_left(
        model, axis, samples, mask, 1.0, settings.steps, settings.guidance, batch_size=settings.batch_size,
        force=force, progress=progress,
    )  # fmt: skip
    bins = mask.metadata["selection"]["bins"]
    error = left.std().item() / len(left) ** 0.5 if len(left) > 1 else None
    return {
        "samples": len(left),
        "seeds": samples.about()["seeds"],
        "left": left.mean().item(),
        "standard_error": error,
        "planned": sum(each["lean_after"] for each in bins) / len(bins),
    }
