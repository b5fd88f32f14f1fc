"""`stereo bench`: draw the same seeds with and without masks, and compare."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Run, command
from stereo_cli.price import say_price
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.evaluate_settings import EvaluateSettings


@command
def bench(
    *,
    masks: Annotated[
        list[Path] | None,
        typer.Option("--mask", "-m", metavar="PATH", help="Mask to judge; may repeat."),
    ] = None,
    model: options.Model = "portraits",
    axis: Annotated[
        str | None, typer.Option(metavar="NAME", help="Axis to judge on.", show_default="the first mask's")
    ] = None,
    prompts: options.Prompts = "portraits",
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PATH", help="Folder of the results."),
    ] = Path("stereo-bench"),
    fail_above: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=X", help="Exit 1 if a figure of the first mask is above X, such as parity_gap=0.2."),
    ] = None,
    settings: EvaluateSettings,
    run: Run,
) -> None:
    """Draw the same seeds with and without a mask, and compare: bias, side effects, cost.

    For reference, it also draws a random mask and the allocation oracle (the bound for allocating masks). Gaps and
    rates come with 95 % intervals. Calling an interrupted bench again continues it.
    """
    from stereoclinic.calls.duration import bench_offer
    from stereoclinic.calls.evaluate import prepare_evaluation
    from stereoclinic.evaluation.figures.registry import requested
    from stereoclinic.evaluation.limits import exceeded, parse_limit

    limits = [parse_limit(text) for text in fail_above or []]
    computed = requested(settings.figures, *(name for name, _ in limits))
    settings = settings.model_copy(update={"figures": computed})
    reporter = TerminalReporter(run.quiet)
    line = shlex.join(["stereo", *sys.argv[1:]])
    job = prepare_evaluation(model, masks, axis, prompts, settings, out, reporter, command=line)
    if run.dry_run:
        terminal.say(f"would {job.description}")
        say_price(job, bench_offer)
        return
    if (results := job.run(reporter)) is None:
        return  # another rank prints
    data = results.data
    first = next(iter(data["experiments"][0]["masks"]), "untreated")
    above = exceeded(data["experiments"], first, limits)
    if run.as_json:
        terminal.print_json({"out": str(out), "experiments": data["experiments"], "exceeded": above})
    else:
        _print(data, settings.figures, out)
    if above:
        terminal.fail("; ".join(above), terminal.FAILED)


def _print(results: dict[str, Any], figures: str, out: Path) -> None:
    from stereo_cli.bench_tables import bench_tables, reader_says

    console = terminal.stdout()
    for experiment in results["experiments"]:
        for table in bench_tables(experiment, figures):
            console.print(table)
    if limits := reader_says(results["provenance"]):
        console.print(limits)
    names = ("report.html", "results.json", "images")
    terminal.say(f"wrote {', '.join(str(out / name) for name in names)} and {out / 'before_after.png'}")
