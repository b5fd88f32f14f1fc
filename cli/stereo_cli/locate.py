"""`stereo locate`: find the neurons that carry a stereotype."""

from pathlib import Path
from typing import Annotated

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Run, command
from stereo_cli.price import say_price
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.locate import LocateSettings


@command
def locate(
    *,
    model: options.Model = "portraits",
    axis: options.AxisName = "gender",
    prompts: options.Prompts = "portraits",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PATH", help="Mask, .pt or .safetensors.", show_default="AXIS.pt"),
    ] = None,
    settings: LocateSettings,
    run: Run,
) -> None:
    """Find the neurons that carry a stereotype; print the forecast, write the relevance and a mask.

    At each measured step of a neutral prompt the model also predicts for the prompt of each group. This gives the lean:
    0 is balanced, 1 is as if the group had been asked for. The lean by prompt and timestep forecasts the bias of the
    images. The lean is decomposed down to the neurons (Diffusion Deep Taylor Decomposition), and a mask is chosen
    from that.
    """
    from stereo_cli.tables import lean_table, mask_table
    from stereoclinic.calls.duration import locate_offer
    from stereoclinic.calls.inputs import relevance_file
    from stereoclinic.calls.locate import prepare_locate
    from stereoclinic.prompts.axes import load_axis
    from stereoclinic.report.summary import lean_summary, mask_summary

    chosen = load_axis(axis)
    file = out or Path(f"{chosen.name}.pt")
    reporter = TerminalReporter(run.quiet)
    job = prepare_locate(model, chosen, prompts, settings, file, None, reporter)
    if run.dry_run:
        terminal.say(f"would {job.description}")
        if not settings.stream and not settings.strategy.startswith("fsdp"):
            say_price(job, locate_offer)
        return
    if (located := job.run(reporter)) is None:
        return  # another rank prints
    stored = file.with_name(relevance_file(file.stem))
    leans, damping = lean_summary(located.relevance), mask_summary(located.mask)
    if run.as_json:
        files = {"relevance": str(stored), "mask": str(file)}
        dropped = located.relevance.metadata["dropped"]
        terminal.print_json({"lean": leans, "mask": damping, "dropped": dropped, "files": files})
        return
    console = terminal.stdout()
    console.print(lean_table(leans))
    console.print(mask_table(damping))
    terminal.say(f"wrote {file} and {stored}")
    own, listed = axis if Path(axis).suffix else None, None if settings.stream else prompts
    options.say_next(file, settings, model=model, axis=own, prompts=listed)
