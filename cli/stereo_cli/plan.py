"""`stereo plan`: plan a mask step by step."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Run, command
from stereo_cli.price import say_price
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.plan import PlanSettings

if TYPE_CHECKING:
    from stereoclinic.calls.plan import Planned


@command
def plan(
    *,
    relevance: Annotated[
        Path | None,
        typer.Argument(metavar="RELEVANCE", help="Relevance file; it names model and axis.", show_default=False),
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
            show_default="AXIS-allocated.pt or AXIS-balanced.pt",
        ),
    ] = None,
    settings: PlanSettings,
    run: Run,
) -> None:
    """Plan a mask step by step, along the damped trajectory.

    With --allocate the mask holds one damping for each group. An image is allotted a group from its prompt and seed
    alone, and the neurons that push away from that group are damped. With --balance it holds one damping, which aims
    every lean at 0. Without a relevance file any neuron may be damped.
    """
    from stereoclinic.calls.duration import plan_offer
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
        say_price(job, plan_offer)
        return
    if (planned := job.run(reporter)) is None:
        return  # another rank prints
    summary = mask_summary(planned.mask)
    if run.as_json:
        found = {"mask": summary, "held_out": planned.held_out, "dose": planned.dose, "file": str(file)}
        terminal.print_json(found)
        return
    _print(planned, summary, settings.dose)
    terminal.say(f"wrote {file}")
    own = axis if axis and Path(axis).suffix else None
    options.say_next(file, settings, model=name, axis=own, prompts=prompts, guidance=settings.guidance)


def _print(planned: "Planned", summary: dict[str, Any], bound: float | None) -> None:
    from stereo_cli.tables import mask_table

    terminal.stdout().print(mask_table(summary))
    if planned.dose is not None and bound is not None:
        options.say_dose(bound, planned.dose)
    if planned.held_out is not None:
        _say_held_out(planned.held_out)


def _say_held_out(held: dict[str, Any]) -> None:
    """Print how well the plan fits samples that it was not planned on."""
    spread = "" if held["standard_error"] is None else f" ±{held['standard_error']:.2f}"
    terminal.say(
        f"mean distance of the lean from its target: {held['left']:.2f}{spread} on {held['samples']} new samples,"
        f" {held['planned']:.2f} on the samples of the plan"
        + ("; give more --seeds for a better plan" if held["left"] > 2 * held["planned"] else "")
    )
