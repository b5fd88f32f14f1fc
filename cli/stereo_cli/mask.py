"""`stereo mask`: make a mask anew, from relevance or from other masks."""

from pathlib import Path
from typing import Annotated

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Run, command
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.mask import MaskSettings


@command
def mask(
    *,
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="A relevance file, or masks.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="Mask file, .pt or .safetensors.")],
    model: options.ModelOfFile = None,
    prompts: options.Prompts = "portraits",
    settings: MaskSettings,
    run: Run,
) -> None:
    """Make a new mask: choose again, change a mask, combine several, or find the dose. Only --dose runs the model.

    \b
    stereo mask RELEVANCE --mu 4 -o gentle.pt
        choose again, at another price
    stereo mask RELEVANCE --at-most 200 -o sparse.pt
        the best plan of 200 neurons
    stereo mask gender.pt --strength 0.5 --until 800 -o low.pt
        half the damping, at the noisiest steps
    stereo mask gender.pt age.pt -o both.pt
        one mask of two: factors multiply
    stereo mask gender.pt --dose 0.3 -o dosed.pt
        the weakest that leaves a mean lean of 0.3

    RELEVANCE is the file next to the mask of `stereo locate`.
    """
    from stereo_cli.tables import mask_table
    from stereoclinic.calls.inputs import check_target
    from stereoclinic.calls.mask import dosed_mask, made_mask, model_of
    from stereoclinic.calls.work import claimed
    from stereoclinic.io.tensors import ENDINGS
    from stereoclinic.report.summary import mask_summary

    check_target(out, "--out", ENDINGS)
    settings.check_confirm()
    reporter = TerminalReporter(run.quiet)
    made, how = made_mask(files, settings, out, reporter)
    name, settings = model_of(made.metadata, model), options.as_made(settings, made.metadata, model)
    if run.dry_run:
        total = mask_summary(made)["total"]
        terminal.say(f"would write {out}, {how}: {total['damped']} of {total['neurons']} neurons damped")
        return
    found = None
    with claimed(reporter, out):
        if settings.dose is not None:
            made, found = dosed_mask(made, name, settings, prompts, reporter)
        made.save(out)
    summary = mask_summary(made)
    if run.as_json:
        written = {"mask": str(out), "from": [str(path) for path in files]}
        terminal.print_json({"mask": summary, "dose": found, "files": written})
        return
    terminal.stdout().print(mask_table(summary))
    if settings.dose is not None and found is not None:
        options.say_dose(settings.dose, found)
    terminal.say(f"wrote {out}, {how}")
    own, *others = str(summary["axis"]).split("+")  # as compositions are named
    asked = settings.axis if settings.axis and Path(settings.axis).suffix else own if others else None
    options.say_next(out, settings, model=name, axis=asked, guidance=settings.guidance)
