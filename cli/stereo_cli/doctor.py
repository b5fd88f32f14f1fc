"""`stereo doctor`: is this model supported, and what would it cost."""

from dataclasses import asdict

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Config, Json, command
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.doctor import DoctorSettings


@command
def doctor(
    *,
    model: options.Model = "portraits",
    axis: options.AxisName = "gender",
    prompts: options.Prompts = "portraits",
    settings: DoctorSettings,
    shown: Json,
    config: Config,
) -> None:
    """Say whether a model is supported: its denoiser and neurons, how it is called, rules, conservation, memory, time.

    One prediction, for noise at the noisiest timestep, is decomposed. The relevance that crosses a cut through the
    network, or enters behind it (time, text, biases), must add up to the size of the prediction.

    Exit codes: 0 it is supported; 2 it is not, or bad input.
    """
    from stereo_cli.doctor_tables import doctor_tables
    from stereoclinic.calls.doctor import doctor as diagnose

    found = diagnose(model, settings, axis=axis, prompts=prompts, reporter=TerminalReporter())
    if shown.as_json:
        terminal.print_json(asdict(found))
    else:
        for table in doctor_tables(asdict(found)):
            terminal.stdout().print(table)
        terminal.say(f"verdict: {found.verdict}")
        terminal.say(f"next: {found.next}")
    if not found.supported:
        raise typer.Exit(terminal.BAD_INPUT)
