"""`stereo locate`: find the neurons that carry a stereotype."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common, options, prompt_notes
from stereo_cli.beside import relevance_file
from stereo_cli.call import call_from
from stereo_cli.progress import progress_bar, refuse_left_over, says_what_is_kept

if TYPE_CHECKING:
    from torch import Tensor

    from stereoclinic.prompts.axes import Axis
    from stereoclinic.prompts.sets import Samples


_RELEVANCE = "Relevance"


@common.guarded
def locate(
    model: options.Model = "portraits",
    dtype: options.Dtype = "float32",
    variant: options.Variant = None,
    call: options.Call = None,
    height: options.Height = None,
    width: options.Width = None,
    sites: options.Sites = None,
    axis: options.AxisName = "gender",
    prompts: options.Prompts = "portraits",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The mask, .pt or .safetensors.", show_default="AXIS.pt"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="First of the calibration seeds.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds per prompt.")] = 16,
    limit: options.Limit = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read the prompts as they are needed, each device its own part, in place of all of them at the start:"
            " for a file or hub data set that is too large to hold. Give it a column `occupation`.",
            rich_help_panel=options.MODEL,
        ),
    ] = False,
    target: Annotated[
        str,
        typer.Option(
            help="What is decomposed. lean: see above. contrast: the same, not divided by how far the groups differ."
            " guidance: the lean that guidance adds, conditional minus unconditional. classifier: what the model's"
            " reader sees in the clean image that a prediction amounts to.",
            rich_help_panel=_RELEVANCE,
        ),
    ] = "lean",
    composite: Annotated[
        str,
        typer.Option(
            help="Relevance rules: gradient (the most faithful where it was measured), epsilon-cp, epsilon-attnlrp,"
            " gamma-cp, gamma-attnlrp, zplus-cp, deep-taylor, or your own TOML file.",
            rich_help_panel=_RELEVANCE,
        ),
    ] = "gradient",
    root: Annotated[
        str | None,
        typer.Option(
            help="plain: R = a g. rooted: R = (a - mean over the groups) g.",
            show_default="the composite's own",
            rich_help_panel=_RELEVANCE,
        ),
    ] = None,
    steps: options.Steps = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measure every Nth step.",
            show_default=f"2, or 1 where there are {common.FEW} steps or fewer",
            rich_help_panel=_RELEVANCE,
        ),
    ] = None,
    bins: Annotated[
        int,
        typer.Option(
            min=1,
            help="Timestep bins that relevance is kept by, at most one per measured step; stereo mask --per-bin plans"
            " each anew.",
            rich_help_panel=_RELEVANCE,
        ),
    ] = 5,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Guidance scale along the trajectory; 1 is none.",
            show_default="1, or the model's own where it is distilled into the weights",
            rich_help_panel=_RELEVANCE,
        ),
    ] = None,
    select: Annotated[
        str,
        typer.Option(
            help="plan: bounded least squares. top-k: the paper's own form.", rich_help_panel=options.CHOOSING
        ),
    ] = "plan",
    mu: options.Mu = None,
    overshoot: options.Overshoot = None,
    until: Annotated[
        float,
        typer.Option(
            min=0,
            help="Damp the noisy steps only, down to this timestep; groups are settled early.",
            rich_help_panel=options.CHOOSING,
        ),
    ] = 600.0,
    branch: Annotated[
        str,
        typer.Option(help="Halves of a guided batch to damp: both, or conditional.", rich_help_panel=options.CHOOSING),
    ] = "both",
    top: options.Top = None,
    mask_root: Annotated[
        str, typer.Option(help="Damp toward zero, balanced, or a group's mean.", rich_help_panel=options.CHOOSING)
    ] = "zero",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples walked together on one device.", rich_help_panel=options.DEVICES)
    ] = 16,
    devices: options.Devices = 1,
    num_nodes: options.NumNodes = 1,
    strategy: options.SharingStrategy = "auto",
    accelerator: options.Accelerator = "auto",
    precision: options.Precision = "32-true",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run that was cut off, on however many devices."),
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Find the neurons that carry a stereotype; print the forecast, write the relevance and a mask.

    Each neutral prompt is followed along its own denoising trajectory. At every measured step the model also predicts
    for the prompt of each group, which gives the LEAN: 0 is balanced, 1 is as if the group had been asked for. The
    lean is decomposed down to the neurons (Diffusion Deep Taylor Decomposition), and a mask is chosen from the result.

    The lean by occupation and timestep is a forecast of the bias that images will show, before any image is drawn.
    """
    from stereoclinic.errors import InputError
    from stereoclinic.pipelines import open_model
    from stereoclinic.prompts.axes import load_axis
    from stereoclinic.prompts.sets import with_seeds
    from stereoclinic.prompts.streams import Stream
    from stereoclinic.sns.linear import choose
    from stereoclinic.sns.select import Selection, check_root, neurons_of, number_of

    choosing: dict[str, Any] = {"mu": mu, "overshoot": overshoot, "top": top}
    choosing = {name: value for name, value in choosing.items() if value is not None}
    selection = Selection(select, until=until, root=mask_root, branch=branch, **choosing)
    common.check_method(select, [f"--{name}" for name in choosing])
    called = call_from(call, height, width)
    chosen = load_axis(axis)
    samples: Samples | Stream
    if stream:
        samples = Stream(prompts, range(seed, seed + seeds), limit)
        total, measures = None, f"{samples.about()['prompts']} x {seeds} seeds"
    else:
        rows = common.neutral_prompts(prompts, limit)
        samples = with_seeds(rows, seed, seeds)
        total, measures = len(samples), f"{len(samples)} samples ({len(rows)} prompts x {seeds} seeds)"
    file = out or Path(f"{chosen.name}.pt")
    common.check_target(file, "--out", (".pt", ".safetensors"))
    device = common.device_of(accelerator, float64=True)
    check_root(mask_root, chosen.groups)
    if precision not in common.PRECISIONS:
        raise InputError(f"--precision {precision!r}: expected one of {', '.join(common.PRECISIONS)}")
    if total is not None and total < devices * num_nodes:
        raise InputError(f"{measures} for {devices * num_nodes} devices: give more prompts or seeds, or fewer devices")
    classifier = _reader_of(model, chosen) if target == "classifier" else None
    opened = open_model(model, common.place_of(device, strategy), dtype, variant, called, common.note)

    from stereoclinic.ddtd.sharding import SHARDED, check_sharded
    from stereoclinic.ddtd.trajectory import Settings
    from stereoclinic.pipelines.arguments import inner
    from stereoclinic.pipelines.schedule import schedule_of
    from stereoclinic.pipelines.sites import find_sites
    from stereoclinic.sns.mask import in_unit

    steps = steps or opened.defaults.steps
    every = every or common.every_of(steps)
    guidance = common.unguided(opened, steps) if guidance is None else guidance
    settings = Settings(composite, root, steps, guidance, every, bins, target=target, sites=tuple(sites or ()))
    network = inner(opened.network)
    watched = find_sites(network, settings.kinds, settings.sites)
    timesteps = settings.timesteps(opened)
    edges = settings.edges(timesteps, opened.training_steps)
    if not isinstance(samples, Stream):
        prompt_notes.check_length(opened, samples.prompts, chosen, guidance, steps)
        prompt_notes.note_named(samples.prompts, chosen)
    measured, walked = len(timesteps), len(schedule_of(opened, steps, guidance).timesteps)
    if select == "top-k":
        number_of(selection.k, len(neurons_of(watched, None)))
    if in_unit(until, float(edges[0])) >= edges[0]:
        raise InputError(f"--until {until:g}: nothing is left to damp; timesteps run from {edges[0]:g} down to 0")
    ranks = devices * num_nodes
    if strategy == SHARDED:
        check_sharded(network, samples, composite, precision, ranks)
    stored = file.with_name(relevance_file(file.stem))
    shards = file.with_name(f"{file.stem}.shards")
    if not dry_run:
        common.claim(file, stored, shards)
    refuse_left_over(shards, resume)
    if dry_run:
        common.say(
            f"would measure {measures} at {measured} of"
            f" {walked} steps on {ranks} device(s), and write {stored} and {file}"
        )
        return

    from stereoclinic.ddtd.locate import locate as run
    from stereoclinic.ddtd.relevance import Relevance

    common.hush_lightning()
    bar = progress_bar(total and total * measured, f"locating {chosen.name}", quiet)
    with says_what_is_kept(shards), common.threads_for(device, ranks), bar as advance:
        relevance = run(
            opened,
            chosen,
            samples,
            settings,
            batch_size=batch_size,
            classifier=classifier,
            progress=lambda count: advance(count * ranks),
            warn=common.warn,
            shards=shards,
            accelerator=device,
            devices=devices,
            num_nodes=num_nodes,
            strategy=common.strategy_for(strategy, ranks),
            precision=precision,
        )
    if relevance is None:
        return  # another rank writes
    with says_what_is_kept(shards):
        relevance.save(stored)
        # The file keeps sums in float32: choosing from what it holds is what lets `stereo mask` choose the same again.
        relevance = Relevance.load(stored)
        mask = choose(relevance, selection)
        mask.save(file)
    shutil.rmtree(shards, ignore_errors=True)  # once all that it leads to is written

    from stereo_cli.tables import lean_table, mask_table
    from stereoclinic.report.summary import lean_summary, mask_summary

    leans, damping = lean_summary(relevance), mask_summary(mask)
    dropped = relevance.metadata["dropped"]
    if dropped:
        common.warn(f"{dropped} of {relevance.metadata['samples']} samples were dropped: their values were not finite")
    if as_json:
        files = {"relevance": str(stored), "mask": str(file)}
        common.print_json({"lean": leans, "mask": damping, "dropped": dropped, "files": files})
        return
    console = common.stdout()
    console.print(lean_table(leans))
    console.print(mask_table(damping))
    common.say(f"wrote {file} and {stored}")
    own, listed = axis if Path(axis).suffix else None, None if stream else prompts  # a stream is too long to be judged
    common.say_next(file, called, model=model, dtype=dtype, variant=variant, axis=own, prompts=listed)


def _reader_of(model: str, axis: "Axis") -> "Callable[[Tensor], Tensor]":
    """The reader that a model brings, as the classifier whose logits are decomposed."""
    from stereoclinic.evaluation.readers import PortraitsReader

    advice = "from Python, stereoclinic.locate(..., classifier=...) takes one of your own"
    return PortraitsReader(common.reader_folder(model, advice)).classifier(axis)
