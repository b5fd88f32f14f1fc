"""`stereo plan`: plan a mask step by step."""

from pathlib import Path
from typing import Annotated

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Run, command
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.plan import PlanSettings


@command
def plan(
    *,
    relevance: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RELEVANCE]",
            help="Relevance file; it names model and axis.",
            show_default=False,
        ),
    ] = None,
    model: options.ModelOfFile = None,
    axis: options.AxisOfFile = None,
    prompts: options.Prompts = "portraits",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="Mask file, .pt or .safetensors.",
            show_default="AXIS-allocated.pt",
        ),
    ] = None,
    settings: PlanSettings,
    run: Run,
) -> None:
    """Plan a mask step by step, each step where the damped steps before it have led.

    With --allocate the mask holds one damping for each group. An image is allotted a group from its prompt and seed
    alone, and the neurons that push away from that group are damped. With --balance the mask holds one damping, which
    aims every lean at 0. No relevance file is needed.
    """
    from stereo_cli.tables import mask_table
    from stereoclinic.calls.inputs import PLANNED
    from stereoclinic.calls.mask import model_of
    from stereoclinic.calls.plan import prepare_plan
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.prompts.axes import load_axis
    from stereoclinic.report.summary import mask_summary

    located = None if relevance is None else Relevance.load(relevance)
    made = {} if located is None else located.metadata
    chosen = load_axis(axis or str(made.get("axis", "gender")))
    name, settings = model_of(made, model), options.as_made(settings, made, model)
    file = out or Path(f"{chosen.name}{PLANNED[0] if settings.allocate else PLANNED[1]}.pt")
    reporter = TerminalReporter(run.quiet)
    job = prepare_plan(name, chosen, prompts, located, settings, file, reporter)
    if run.dry_run:
        terminal.say(f"would {job.description}")
        return
    if (planned := job.run(reporter)) is None:
        return  # another rank prints
    summary = mask_summary(planned.mask)
    if run.as_json:
        found = {"mask": summary, "held_out": planned.held_out, "dose": planned.dose, "file": str(file)}
        terminal.print_json(found)
        return
    terminal.stdout().print(mask_table(summary))
    if planned.dose is not None and settings.dose is not None:
        options.say_dose(settings.dose, planned.dose)
    if (held := planned.held_out) is not None:
        spread = "" if held["standard_error"] is None else f" ±{held['standard_error']:.2f}"
        terminal.say(
            f"on {held['samples']} further samples the lean misses its target by {held['left']:.2f}{spread} in the"
            f" mean, on those planned on by {held['planned']:.2f}"
            + ("; plan on more --seeds to come nearer" if held["left"] > 2 * held["planned"] else "")
        )
    terminal.say(f"wrote {file}")
    own = axis if axis and Path(axis).suffix else None
    options.say_next(file, settings, model=name, axis=own, prompts=prompts, guidance=settings.guidance)
