"""`stereo inspect`: what a mask or relevance file holds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Shown, command
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.responses import ResponseSettings


@command
def inspect(
    file: Annotated[Path, typer.Argument(help="A mask or relevance file, .pt or .safetensors.")],
    settings: ResponseSettings,
    shown: Shown,
    picture: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Also draw a map of the denoiser, to this PNG.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Number of sites and neurons to list.")] = 12,
    images: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Also draw what the top neurons of relevance respond to, to this folder."),
    ] = None,
) -> None:
    """Say what a file holds: how much a mask damps, or where relevance is and which neurons carry it.

    By kind of layer, by depth in the denoiser and by timestep. Shares of relevance come with what chance alone shows.
    """
    from stereoclinic.calls.inputs import check_target
    from stereoclinic.calls.work import claimed
    from stereoclinic.errors import InputError
    from stereoclinic.io.files import write_whole
    from stereoclinic.io.tensors import kind_of

    reporter = TerminalReporter(shown.quiet)
    if picture is not None:
        check_target(picture, "--picture", (".png",))
    kind = kind_of(file)
    if kind not in ("mask", "relevance"):
        raise InputError(f"{file} is a {kind} file; expected a mask or relevance")
    if kind == "mask" and images is not None:
        raise InputError(f"--images: {file} is a mask; give the relevance that it was made from")
    with claimed(reporter, *([] if picture is None else [picture])):
        summary = _mask(file) if kind == "mask" else _relevance(file, top, images, settings, reporter)
        if picture is not None:
            from stereoclinic.report.atlas import mask_map, relevance_map

            figure = (mask_map if kind == "mask" else relevance_map)(summary, file.name)
            write_whole(picture, lambda path: figure.savefig(path, format="png", dpi=150))
    if shown.as_json:
        terminal.print_json({"file": str(file), "kind": kind, **summary})
        return
    _print(kind, summary, top)
    for path in (images, picture):
        if path is not None:
            terminal.say(f"wrote {path}")


def _mask(file: Path) -> dict[str, Any]:
    from stereoclinic.report.summary import mask_summary
    from stereoclinic.sns.mask import NeuronMask

    return mask_summary(NeuronMask.load(file))


def _relevance(
    file: Path, top: int, images: Path | None, settings: ResponseSettings, reporter: TerminalReporter
) -> dict[str, Any]:
    from stereoclinic.calls.responses import draw_responses
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.report.located import relevance_summary
    from stereoclinic.report.summary import lean_summary

    relevance = Relevance.load(file)
    summary = {**relevance_summary(relevance, top), "lean": lean_summary(relevance)}
    if images is not None:
        settings = options.as_made(settings, relevance.metadata, settings.model)
        sheet = draw_responses(relevance, file, summary["neurons"], images, settings, reporter)
        summary["images"] = str(sheet)
    return summary


def _print(kind: str, summary: dict[str, Any], top: int) -> None:
    from stereo_cli import inspect_tables, tables

    if kind == "mask":
        found = [tables.mask_table(summary), *inspect_tables.mask_tables(summary, top)]
    else:
        found = [tables.lean_table(summary["lean"]), *inspect_tables.relevance_tables(summary, top)]
    for table in (*found, inspect_tables.metadata_table(summary["metadata"])):
        terminal.stdout().print(table)
