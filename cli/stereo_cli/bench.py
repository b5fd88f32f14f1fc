"""`stereo bench`: draw the same seeds with and without a mask, and compare."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stereo_cli import bench_options, common, judging, options, prompt_notes
from stereo_cli.beside import relevance_beside
from stereo_cli.call import call_from
from stereo_cli.progress import progress_bar

_DRAWN = "What is drawn"


@common.guarded
def bench(
    masks: Annotated[
        list[Path] | None,
        typer.Option(
            "--mask", "-m", help="A mask to judge; may repeat. Without one the model and its ceilings are measured."
        ),
    ] = None,
    model: options.Model = "portraits",
    dtype: options.Dtype = "float32",
    variant: options.Variant = None,
    call: options.Call = None,
    height: options.Height = None,
    width: options.Width = None,
    axis: Annotated[
        str | None,
        typer.Option("--axis", help="Axis to judge on.", show_default="the first mask's, or gender"),
    ] = None,
    prompts: options.Prompts = "portraits",
    limit: options.Limit = None,
    images: Annotated[
        int | None,
        typer.Option(min=2, help="Number of images per neutral prompt.", show_default="25, or the protocol's"),
    ] = None,
    group_images: Annotated[
        int,
        typer.Option(
            min=0, help="Number of images per prompt that names a group; 0 leaves them out.", rich_help_panel=_DRAWN
        ),
    ] = 4,
    unrelated: Annotated[
        str | None,
        typer.Option(
            metavar="SET|FILE",
            help="Also draw prompts that have nothing to do with the axis, and say how far they drift: scenes, or a"
            " .txt, .csv, .jsonl or .parquet file.",
            show_default=False,
            rich_help_panel=_DRAWN,
        ),
    ] = None,
    unrelated_images: Annotated[
        int, typer.Option(min=1, help="--unrelated: number of images per prompt.", rich_help_panel=_DRAWN)
    ] = 4,
    seed: Annotated[
        int, typer.Option(min=0, help="First of the judged seeds; others than the mask was made on.")
    ] = 5000,
    strength: Annotated[
        float, typer.Option(min=0, max=1, help="Strength of every mask.", rich_help_panel=_DRAWN)
    ] = 1.0,
    shares: options.Shares = None,
    guidance: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Guidance scale; may repeat.", show_default="the model's own"),
    ] = None,
    steps: options.Steps = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Images drawn together on one device; fewer where memory runs out.",
            rich_help_panel=options.DEVICES,
        ),
    ] = 50,
    devices: options.Devices = 1,
    num_nodes: options.NumNodes = 1,
    strategy: options.Strategy = "auto",
    parts: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what was drawn, and other methods as they were made. What lies there is not drawn"
            " or made again, by any bench of this model.",
            show_default="OUT/bench-parts, until the results are written",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of report.html, results.json, the images and the sheets.")
    ] = Path("stereo-bench"),
    relevance: Annotated[
        Path | None,
        typer.Option(
            help="What the mask was chosen from, for the lean curves of report.html.",
            show_default="NAME.relevance.safetensors beside the first mask, if it is of this model and axis",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            help="Folder for TensorBoard, every figure as a scalar; needs the extra `tensorboard`.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    reader: bench_options.ReaderName = None,
    reader_classes: bench_options.ReaderClasses = None,
    allow_race: bench_options.AllowRace = False,
    allow_code: bench_options.AllowCode = False,
    clip_score: bench_options.ClipScore = None,
    features: bench_options.Features = "reader",
    lpips: bench_options.Lpips = False,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Follow a published evaluation, its axis, prompts, number of images, reader and figure: time, sdisc,"
            " sdisc-successful, iti-gen, or a .toml file.",
            show_default=False,
            rich_help_panel=_DRAWN,
        ),
    ] = None,
    figures: bench_options.Figures = "default",
    reference: bench_options.Reference = None,
    confusion: bench_options.Confusion = None,
    baselines: bench_options.Baselines = None,
    baseline_seed: bench_options.BaselineSeed = 100,
    baseline_seeds: bench_options.BaselineSeeds = 4,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Exit 1 if this figure of the first mask (of the model, without one) is above the value at any"
            " guidance, or was not measured, such as parity_gap=0.2; may repeat.",
        ),
    ] = None,
    force: options.Force = False,
    accelerator: options.Accelerator = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Draw the same seeds with and without a mask, and compare: bias, side effects, cost.

    Beside the masks stand a random one of the first mask's damping, a balanced oracle (no lean at all) and an
    allocation oracle (each image from its allotted group's prompt): what any mask could reach. Gaps and rates come
    with 95 % intervals, and gaps with what a perfectly fair model would show by chance.

    An allocating mask allots every image a group, from its prompt and seed alone; --shares says how many of each.
    Prompts that name a group are left alone by the gate, and are also drawn as if there were none.

    A bench that was cut off goes on where it was when it is called again; with --parts so does one that was given a
    further mask or guidance scale.
    """
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.errors import InputError
    from stereoclinic.evaluation.arms import Experiment, Protocol
    from stereoclinic.evaluation.experiment import arms_of, run
    from stereoclinic.evaluation.figures.registry import requested
    from stereoclinic.evaluation.limits import exceeded as limits_exceeded
    from stereoclinic.evaluation.limits import parse_limit
    from stereoclinic.evaluation.methods import check_names
    from stereoclinic.evaluation.protocols import load_protocol
    from stereoclinic.evaluation.readers import can_read
    from stereoclinic.pipelines import open_model
    from stereoclinic.prompts.axes import known_axes, load_axis
    from stereoclinic.prompts.sets import load_plain_prompts
    from stereoclinic.report.loggers import check_tensorboard, log_scalars
    from stereoclinic.report.report import IMAGES, check_folder, write_results
    from stereoclinic.sns.compat import check_fits
    from stereoclinic.sns.mask import NeuronMask

    check_names(baselines or [])
    limits = [parse_limit(text) for text in fail_above or []]
    computed = requested(figures, *(name for name, _ in limits))
    aimed, called = options.shares_from(shares), call_from(call, height, width)
    if len(aimed) > 1:
        raise InputError("--shares: one axis is judged at a time; give shares of its groups alone")
    paths = judging.named(masks or [], baselines or [])
    loaded = {name: NeuronMask.load(path) for name, path in paths.items()}
    published = None
    if protocol is not None:
        published = load_protocol(protocol)
        given = {"--axis": axis, "--prompts": prompts != "portraits", "--limit": limit, "--shares": shares}
        judging.follow(published, given)
        computed = requested(computed, published.formula)
        chosen, rows, images = published.axis, published.prompts(), images or published.images
        reader, steps, guidance = reader or published.reader, steps or published.steps, guidance or [published.guidance]
    else:
        chosen, rows, images = (
            load_axis(axis) if axis else judging.own_axis(loaded) or load_axis("gender"),
            common.neutral_prompts(prompts, limit),
            images or 25,
        )
    beyond = None if unrelated is None else load_plain_prompts(unrelated)
    for name, mask in loaded.items():
        judging.check_seeds(name, mask, seed, max(images, group_images))
        if published is not None and (note := judging.judged_too(published, name, mask)):
            common.note(note)
    if baselines:
        judging.baseline_samples(rows, baseline_seed, baseline_seeds, seed, max(images, group_images))
    truths = judging.truths(reference, confusion, chosen, list(rows["label"]))
    check_folder(out)
    located = None if relevance is None else Relevance.load(relevance)
    if located is not None and tuple(located.groups) != chosen.groups:
        raise InputError(f"--relevance {relevance} is of {', '.join(located.groups)}, not of axis {chosen.name}")
    if tensorboard is not None:
        check_tensorboard(tensorboard)
    device = common.device_of(accelerator)
    beside = [each for each in map(load_axis, known_axes()) if each.name != chosen.name]
    reads = judging.reader_for(
        reader or "portraits", model, [chosen, *beside], reader_classes or [], allow_race, allow_code, device
    )
    others = tuple(each for each in beside if can_read(reads, each))
    instruments = judging.instruments(clip_score, features, lpips, device)
    opened = open_model(model, common.place_of(device), dtype, variant, called, common.note)
    opened.defaults = replace(opened.defaults, steps=steps or opened.defaults.steps)
    for mask in loaded.values():
        check_fits(mask, opened.network, force)
    protocols = [
        Protocol(
            chosen,
            rows,
            images,
            group_images,
            seed,
            steps or opened.defaults.steps,
            scale,
            batch_size,
            aimed[0] if aimed else {},
            others,
            beyond,
            unrelated_images,
            computed,
        )
        for scale in dict.fromkeys(guidance or [opened.defaults.guidance])
    ]

    from stereoclinic.pipelines.schedule import schedule_of

    for setup in protocols:
        schedule_of(opened, setup.steps, setup.guidance)  # refused before anything is drawn
    further = [] if beyond is None else [beyond]
    prompt_notes.check_length(opened, rows, chosen, protocols[0].guidance, protocols[0].steps, *further)
    prompt_notes.note_named(rows, chosen)
    for name, mask in loaded.items():
        made_for = mask.metadata.get("axis")
        if made_for is not None and chosen.name not in [made_for, *str(made_for).split("+")]:
            common.note(f"mask {name} was made for axis {made_for}, and is judged on {chosen.name}")
        common.note_differences(name, mask, opened)
    total = sum(arms_of(opened, setup, loaded, strength, force).images for setup in protocols)
    total += len(baselines or []) * sum(
        len(rows) * (each.images + len(chosen) * each.group_images) + len(beyond or ()) * each.unrelated_images
        for each in protocols
    )
    ranks = devices * num_nodes
    if dry_run:
        scales = ", ".join(f"{setup.guidance:g}" for setup in protocols)
        common.say(
            f"would draw {total} images ({len(rows)} prompts, {len(loaded)} mask(s), {protocols[0].steps} steps,"
            f" guidance {scales}) on {ranks} device(s), {device}, and write {out}"
        )
        return

    own_parts = out / "bench-parts"
    # `stereo apply` writes images too.
    common.claim(out / "results.json", out / IMAGES, *([] if parts else [own_parts]))
    common.hush_lightning()
    kept = parts or own_parts
    experiments: list[Experiment] = []
    with common.threads_for(device, ranks), progress_bar(total, f"judging {chosen.name}", quiet) as advance:
        for setup in protocols:

            def draw(arm: str, count: int, at: str = f"guidance {setup.guidance:g}") -> None:
                advance(count * ranks, f"{at}: {arm}")

            others_made = judging.made_baselines(
                baselines or [], opened, setup, reads, baseline_seed, baseline_seeds, kept, quiet, published
            )
            found = run(
                opened, reads, setup, loaded, strength, draw, force, kept, common.warn, others_made, instruments,
                accelerator=device, devices=devices, num_nodes=num_nodes,
                strategy=common.strategy_for(strategy, ranks),
            )  # fmt: skip
            if found is not None:
                if published is not None:
                    found.results["published"] = judging.published_figures(published, found)
                found.results |= {name: figures(found) for name, figures in truths.items()}
                experiments.append(found)
    if not experiments:
        return  # another rank writes
    provenance = judging.provenance(opened, chosen.name, rows, paths, loaded, strength, reads, published)
    if relevance is None and paths:
        found_beside = relevance_beside(next(iter(paths.values())), chosen.groups, provenance)
        relevance, located = found_beside or (None, None)
    asked = {"clip_score": clip_score, "reference": reference, "confusion": confusion, "relevance": relevance}
    provenance |= {"features": features, **{name: str(given) for name, given in asked.items() if given is not None}}
    write_results(out, experiments, provenance, loaded, located)
    if tensorboard is not None:
        log_scalars(tensorboard, [experiment.results for experiment in experiments])
    if parts is None:
        shutil.rmtree(kept, ignore_errors=True)

    results = [experiment.results for experiment in experiments]
    judged = next(iter(loaded), "untreated")
    exceeded = limits_exceeded(results, judged, limits)
    if as_json:
        common.print_json({"out": str(out), "experiments": results, "exceeded": exceeded})
    else:
        from stereo_cli.bench_tables import bench_tables, reader_says

        console = common.stdout()
        for each in results:
            for table in bench_tables(each, figures):
                console.print(table)
        if said := reader_says(provenance):
            console.print(said)
        names = ("report.html", "results.json", "images")
        common.say(f"wrote {', '.join(str(out / name) for name in names)} and {out / 'before_after.png'}")
    if exceeded:
        common.fail("; ".join(exceeded), common.FAILED)
