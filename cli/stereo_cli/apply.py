"""`stereo apply`: draw prompts without and with masks."""

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
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="Folder of images.")] = Path("stereo-apply"),
    settings: ApplySettings,
    run: Run,
) -> None:
    """Draw prompts without and with a mask, from the same seeds, and put them side by side.

    An allocating mask gives each image a group, from its prompt and seed alone.
    """
    from stereoclinic.calls.apply import prepare_apply

    reporter = TerminalReporter(run.quiet)
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
