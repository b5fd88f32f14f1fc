"""`stereo export`: a mask as a LoRA, full differences, (IA)^3 or a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Run, command
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.export import ExportSettings


@command
def export(
    *,
    masks: Annotated[list[Path], typer.Argument(metavar="MASK", help="Mask; several are exported as one.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PATH", help="A .safetensors file, or a folder."),
    ],
    model: options.ModelOfFile = None,
    settings: ExportSettings,
    run: Run,
) -> None:
    """Write a mask for diffusers, ComfyUI, A1111 or peft, which then need no StereoClinic.

    \b
    stereo export one.pt -o gender.safetensors
        a LoRA, which loads and scales as any other
    stereo export gender.pt --static -o gender.safetensors
        of a mask that differs between timesteps: the nearest
    stereo export one.pt --format checkpoint -o fused

    `stereo mask RELEVANCE --until 0 -o one.pt` plans a mask that serves all timesteps alike.
    """
    from stereoclinic.calls.export import mask_of, prepare_export
    from stereoclinic.calls.mask import model_of

    reporter = TerminalReporter(run.quiet)
    mask = mask_of(masks, settings)
    settings = options.as_made(settings, mask.metadata, model)
    job = prepare_export(mask, masks[0], model_of(mask.metadata, model), settings, out)
    if run.dry_run:
        terminal.say(f"would {job.description}")
        return
    written = job.run(reporter)
    for note in job.notes:
        reporter.note(note)
    if run.as_json:
        terminal.print_json({**written, "format": settings.format, "strength": settings.strength, "notes": job.notes})
        return
    path = written["path"]
    if ranks := written.get("ranks"):
        sizes = sorted(ranks.values())
        terminal.say(f"{len(sizes)} layers, ranks {sizes[0]} to {sizes[-1]}")
    if written.get("lost_of_all"):
        worst = max(written["lost"], key=written["lost"].get)
        terminal.say(
            f"--rank {settings.rank} loses {written['lost_of_all']:.1%} of the difference (Frobenius norm);"
            f" most in {worst}: {written['lost'][worst]:.1%}"
        )
    opens = {
        "lora": f"; diffusers opens it: pipe.load_lora_weights({path!r})",
        "ia3": f"; peft opens it: PeftModel.from_pretrained(pipe.{{unet or transformer}}, {path!r})",
        "checkpoint": f"; diffusers opens it: DiffusionPipeline.from_pretrained({path!r})",
    }
    terminal.say(f"wrote {path} for {written['readers']}{opens.get(settings.format, '')}")
