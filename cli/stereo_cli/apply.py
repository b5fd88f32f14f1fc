"""`stereo apply`: draw prompts without and with masks, or write a checkpoint that has them folded in."""

from pathlib import Path
from typing import Annotated

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Run, command
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.apply import ApplySettings


@command
def apply(
    *,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)
    ] = None,
    masks: Annotated[list[Path], typer.Option("--mask", "-m", metavar="PATH", help="Mask; several are combined.")],
    model: options.Model = "portraits",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="PATH", help="Folder of images, or checkpoint.", show_default="stereo-apply"
        ),
    ] = None,
    fuse: Annotated[
        bool,
        typer.Option("--fuse", metavar="", help="Write a checkpoint with the mask folded into its weights."),
    ] = False,
    settings: ApplySettings,
    run: Run,
) -> None:
    """Draw prompts without and with a mask, from the same seeds, and put them side by side.

    An allocating mask gives each image a group, from its prompt and seed alone. A fused checkpoint needs no
    StereoClinic; `stereo mask RELEVANCE --until 0` makes a mask that can be fused.
    """
    from stereoclinic.calls.apply import prepare_apply
    from stereoclinic.errors import InputError

    reporter = TerminalReporter(run.quiet)
    if fuse:
        if prompts:
            raise InputError("--fuse writes a checkpoint and draws nothing: give it no prompts")
        _fuse(masks, settings, run, model, out, reporter)
        return
    out = out or Path("stereo-apply")
    job = prepare_apply(prompts or [], masks, model, settings, out, reporter)
    if run.dry_run:
        terminal.say(f"would {job.description}")
        return
    if (images := job.run(reporter)) is None:
        return  # another rank prints
    sheet = out / "side_by_side.png"
    if run.as_json:
        terminal.print_json({"out": str(out), "sheet": str(sheet), "images": images})
        return
    terminal.say(f"wrote {sheet} and {len(images)} images in {out / 'images'}")


def _fuse(
    masks: list[Path], settings: ApplySettings, run: Run, model: str, out: Path | None, reporter: TerminalReporter
) -> None:
    from stereoclinic.calls.fuse import prepare_fuse

    job = prepare_fuse(masks, model, settings, out)
    if run.dry_run:
        terminal.say(f"would {job.description}")
        return
    job.run(reporter)
    folder = str(job.out)
    if run.as_json:
        terminal.print_json({"out": folder, "strength": settings.strength})
        return
    terminal.say(f"wrote {folder}; diffusers opens it: DiffusionPipeline.from_pretrained({folder!r})")
