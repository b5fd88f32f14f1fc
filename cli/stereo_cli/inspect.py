"""`stereo inspect`: what a mask or relevance file holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common, options
from stereo_cli.call import call_from
from stereo_cli.progress import progress_bar

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance


@common.guarded
def inspect(
    file: Annotated[Path, typer.Argument(help="A mask or relevance file, .pt or .safetensors.", show_default=False)],
    picture: Annotated[
        Path | None, typer.Option(help="Also draw it as a map of the denoiser, to this PNG.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many sites, and single neurons of relevance, to name.")] = 12,
    images: Annotated[
        Path | None,
        typer.Option(
            help="relevance: draw what the top neurons respond to, over pictures of the prompts they matter most in, to"
            " this folder.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="--images: the model.", show_default="the one the file names", rich_help_panel=options.MODEL),
    ] = None,
    dtype: options.Dtype = "float32",
    variant: options.Variant = None,
    call: options.Call = None,
    height: options.Height = None,
    width: options.Width = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="--images: neutral prompts with the file's labels.",
            show_default="a photo of a LABEL",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="--images: of the pictures.", rich_help_panel=options.MODEL)] = 0,
    composite: Annotated[
        str | None,
        typer.Option(help="--images: relevance rules.", show_default="the file's own", rich_help_panel=options.MODEL),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="--images: pictures drawn together.", rich_help_panel=options.DEVICES)
    ] = 8,
    force: Annotated[
        bool,
        typer.Option("--force", help="--images: accept other weights if all sites fit.", rich_help_panel=options.MODEL),
    ] = False,
    accelerator: options.Accelerator = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what a file holds: how much a mask damps, or where relevance sits and which neurons carry it.

    By kind of layer, by depth in the denoiser and by timestep. Shares of relevance come with what chance alone would
    show.
    """
    from stereoclinic.errors import InputError
    from stereoclinic.io.files import write_whole
    from stereoclinic.io.tensors import kind_of

    if picture is not None:
        common.check_target(picture, "--picture", (".png",))
        common.claim(picture)
    kind = kind_of(file)
    written: list[Path] = []
    if kind == "mask":
        from stereoclinic.report.summary import mask_summary
        from stereoclinic.sns.mask import NeuronMask

        if images is not None:
            raise InputError(f"--images: {file} is a mask; give the relevance that it was made from")
        found = summary = mask_summary(NeuronMask.load(file))
    elif kind == "relevance":
        from stereoclinic.ddtd.relevance import Relevance
        from stereoclinic.report.located import relevance_summary
        from stereoclinic.report.summary import lean_summary

        relevance = Relevance.load(file)
        summary = relevance_summary(relevance, top)
        found = {**summary, "lean": lean_summary(relevance)}
        if images is not None:
            settings: dict[str, Any] = {"model": model, "dtype": dtype, "variant": variant, "composite": composite}
            settings["call"] = call_from(call, height, width, relevance.metadata)
            settings |= {"prompts": prompts, "seed": seed, "batch_size": batch_size, "force": force}
            settings |= {"accelerator": accelerator, "quiet": quiet}
            found["images"] = str(_draw_images(file, relevance, summary["neurons"], images, **settings))
            written.append(images)
    else:
        raise InputError(f"{file} is a {kind} file; expected a mask or relevance")
    if picture is not None:
        from stereoclinic.report.atlas import mask_map, relevance_map

        figure = (mask_map if kind == "mask" else relevance_map)(summary, file.name)
        write_whole(picture, lambda path: figure.savefig(path, format="png", dpi=150))
        written.append(picture)
    if as_json:
        common.print_json({"file": str(file), "kind": kind, **found})
        return

    from stereo_cli import inspect_tables, tables

    if kind == "mask":
        shown = [tables.mask_table(summary), *inspect_tables.mask_tables(summary, top)]
    else:
        shown = [tables.lean_table(found["lean"]), *inspect_tables.relevance_tables(summary, top)]
    for table in (*shown, inspect_tables.metadata_table(summary["metadata"])):
        common.stdout().print(table)
    for path in written:
        common.say(f"wrote {path}")


def _draw_images(
    file: Path,
    relevance: "Relevance",
    neurons: list[dict[str, Any]],
    folder: Path,
    *,
    model: str | None,
    dtype: str,
    variant: str | None,
    call: dict[str, Any],
    prompts: str | None,
    seed: int,
    composite: str | None,
    batch_size: int,
    force: bool,
    accelerator: str,
    quiet: bool,
) -> Path:
    """Draw what the neurons respond to; returns the sheet."""
    from stereoclinic.errors import InputError
    from stereoclinic.pipelines import open_model
    from stereoclinic.prompts.sets import occupation_prompts
    from stereoclinic.report import responses
    from stereoclinic.sns.compat import check_fits

    responses.check_folder(folder)
    common.claim(folder.resolve())
    name = model or relevance.metadata.get("model")
    if model is None:
        dtype, variant = common.opened_as(relevance.metadata, dtype, variant)
    if not name:
        raise InputError(f"--images: {file} does not name its model; give --model")
    if not neurons:
        raise InputError(f"--images: nothing was measured in {file}")
    settings = responses.settings_of(relevance, composite)
    groups = relevance.groups
    asked = common.neutral_prompts(prompts, None) if prompts else occupation_prompts(relevance.labels)
    rows = responses.samples(asked, neurons, groups[0], seed)
    opened = open_model(name, common.device_of(accelerator), dtype, variant, call, common.note)
    check_fits(relevance, opened.network, force)
    measured = len(settings.timesteps(opened))
    with progress_bar(len(rows) * measured, "drawing", quiet) as advance:
        found = responses.respond(
            opened, relevance, neurons, rows, settings, batch_size, warn=common.warn, progress=advance
        )
    about = {
        "relevance": str(file),
        "model": opened.name,
        "call": opened.call,
        "axis": relevance.metadata.get("axis"),
        "composite": settings.composite,
        "root": settings.root,
        "target": settings.target,
        "steps": settings.steps,
        "every": settings.every,
        "guidance": settings.guidance,
    }
    responses.write_responses(folder, found, groups, about)
    return folder / responses.SHEET
