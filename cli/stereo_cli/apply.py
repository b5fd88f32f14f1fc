"""`stereo apply`: draw prompts with a mask beside without, or write a checkpoint that has it folded in."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common, options, prompt_notes
from stereo_cli.call import call_from
from stereo_cli.progress import progress_bar

if TYPE_CHECKING:
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.sns.mask import NeuronMask


@common.guarded
def apply(
    masks: Annotated[
        list[Path],
        typer.Option("--mask", "-m", help="The mask; several are applied together.", show_default=False),
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option("--images", "-n", min=1, help="Number of images per prompt, on each side.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    strength: Annotated[
        float, typer.Option(min=0, max=1, help="0 leaves the model as it is, 1 is the mask as made.")
    ] = 1.0,
    shares: options.Shares = None,
    allocate: Annotated[
        bool,
        typer.Option(
            "--allocate", help="Insist on a mask that allots each image a group; refuse one that only balances."
        ),
    ] = False,
    gate: Annotated[
        bool,
        typer.Option("--gate/--no-gate", help="Leave prompts alone that name a group of the mask's axis."),
    ] = True,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            "--axis",
            help="Axis whose words the gate looks for, a name or a .toml file; may repeat.",
            show_default="the mask's",
        ),
    ] = None,
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse",
            help="Write a diffusers checkpoint with the mask folded into its weights to --out, and draw nothing.",
        ),
    ] = False,
    model: options.Model = "portraits",
    dtype: options.Dtype = "float32",
    variant: options.Variant = None,
    call: options.Call = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale.", show_default="the model's own")
    ] = None,
    steps: options.Steps = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images drawn together on one device.", rich_help_panel=options.DEVICES)
    ] = 50,
    devices: options.Devices = 1,
    num_nodes: options.NumNodes = 1,
    strategy: options.Strategy = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the images and side_by_side.png, or with --fuse the checkpoint.",
            show_default="stereo-apply",
        ),
    ] = None,
    force: options.Force = False,
    accelerator: options.Accelerator = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Draw prompts without and with a mask, from the same seeds, and put them side by side.

    A mask that allocates allots each image a group, from its prompt and seed alone: the same picture whatever else is
    drawn with it. --shares sets how many of each. Prompts that name a group are left as they are, see --no-gate.

    --fuse -o DIR writes an ordinary diffusers checkpoint instead, which needs no StereoClinic to be used. A mask can be
    folded in when it damps toward zero, alike at all timesteps, in both halves of guidance, and allots nothing: stereo
    mask RELEVANCE --until 0 makes such a one.
    """
    from stereoclinic.errors import InputError
    from stereoclinic.evaluation.draw import Part, Store, draw, model_digest
    from stereoclinic.evaluation.methods.base import Mitigation, Suppressed
    from stereoclinic.io.files import whole_results, write_image
    from stereoclinic.pipelines import open_model
    from stereoclinic.pipelines.images import check_blank, named
    from stereoclinic.prompts.axes import load_axis
    from stereoclinic.report import report
    from stereoclinic.sns.compat import check_fits
    from stereoclinic.sns.compose import compose
    from stereoclinic.sns.mask import NeuronMask

    texts = list(dict.fromkeys(text.strip() for text in prompts or []))
    if odd := [text for text in texts if text != text.encode(errors="replace").decode()]:
        raise InputError(f"prompt {odd[0]!r}: not all of it is text; give it in UTF-8")
    if not all(texts) or not (texts or fuse):
        raise InputError("a prompt is missing or empty; give a text such as 'a photo of a doctor'")
    common.check_distinct(masks, "--mask")
    loaded = [NeuronMask.load(path) for path in masks]
    mask = loaded[0] if len(loaded) == 1 else compose(loaded, force=force)
    given, called = options.shares_from(shares), call_from(call, height, width)
    if (given or allocate) and not mask.allocates:
        raise InputError(
            "--shares and --allocate: this mask only balances, it allots no groups; make one that does with"
            " `stereo plan --allocate`"
        )
    if fuse:
        if texts or given or called or axis:
            raise InputError(
                "--fuse writes a checkpoint and draws nothing: give it no prompts, shares, axis or call options"
            )
        _fuse(mask, strength, out, model, dtype, variant, force, as_json, dry_run)
        return
    if axis and not gate:
        raise InputError("--axis says what the gate looks for, and --no-gate opens it; leave one of them")
    axes = [] if not gate else [load_axis(each) for each in axis] if axis else _axes_of(mask)
    out = out or Path("stereo-apply")
    report.check_folder(out)
    device = common.device_of(accelerator)
    opened = open_model(model, common.place_of(device), dtype, variant, called, common.note)
    opened.defaults = replace(opened.defaults, steps=steps or opened.defaults.steps)
    check_fits(mask, opened.network, force)
    steps, guidance = steps or opened.defaults.steps, opened.defaults.guidance if guidance is None else guidance

    from stereoclinic.pipelines.conditions import cut_prompts
    from stereoclinic.pipelines.schedule import schedule_of

    schedule_of(opened, steps, guidance)  # refused before anything is drawn
    prompt_notes.note_cut(opened, cut_prompts(opened, texts, guidance, steps), guidance, steps)
    for path, each in zip(masks, loaded, strict=True):
        common.note_differences(path.name, each, opened)
    rows: list[dict[str, Any]] = [{"prompt": text, "seed": seed + i} for text in texts for i in range(count)]
    treated = Suppressed("treated", opened, mask, axes, strength, given, force)
    allotted = treated.treatment.allotment(rows)
    ranks = devices * num_nodes
    if dry_run:
        common.say(
            f"would draw {2 * len(rows)} images in {steps} steps at guidance {guidance:g} on {ranks} device(s), and"
            f" write {out}"
        )
        return

    unfinished = out / "apply-parts"
    common.claim(out / "side_by_side.png", out / report.IMAGES, unfinished)
    common.hush_lightning()
    kept = Store(unfinished)
    digest = model_digest(opened)
    parts = {
        arm.name: [
            Part(arm, rows[start : start + batch_size], steps, guidance, digest)
            for start in range(0, len(rows), batch_size)
        ]
        for arm in (Mitigation("untreated"), treated)
    }
    with common.threads_for(device, ranks), progress_bar(2 * len(rows), "drawing", quiet) as advance:
        first = draw(
            opened, [part for each in parts.values() for part in each], kept,
            lambda arm, count: advance(count * ranks, arm), common.warn,
            accelerator=device, devices=devices, num_nodes=num_nodes, strategy=common.strategy_for(strategy, ranks),
        )  # fmt: skip
    if not first:
        return  # another rank writes
    found = {arm: kept.read(each) for arm, each in parts.items()}
    blank = [named(rows[at], arm) for arm, each in found.items() for at in each.blank]
    if said := check_blank(blank, 2 * len(rows)):
        common.warn(said)
    drawn = {arm: list(each.images) for arm, each in found.items()}

    left_alone = list(dict.fromkeys(row["prompt"] for row, own in zip(rows, allotted, strict=True) if own is None))
    if left_alone:
        common.warn(f"left as they are, for they name a group (--no-gate treats them): {'; '.join(left_alone)}")
    names = [path.name for path in masks]
    entries = []
    images = out / report.IMAGES
    sheet = report.side_by_side(
        [
            report.SheetRow(text, *(pictures[p * count : (p + 1) * count] for pictures in drawn.values()))
            for p, text in enumerate(texts)
        ],
        ("untreated", " + ".join(names) + ("" if strength == 1 else f" at {strength:g}")),
    )
    with whole_results(images) as temporary, report.ImageFolder(temporary) as folder:
        write_image(temporary / "side_by_side.png", sheet)
        for arm, pictures in drawn.items():
            for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
                entry: dict[str, Any] = {
                    "file_name": f"{arm}/{i // count:03d}-{report.slug(row['prompt'])}-{row['seed']}.png",
                    "arm": arm,
                    "prompt": row["prompt"],
                    "seed": row["seed"],
                    "masks": ", ".join(names) if arm == "treated" else "",
                    "strength": strength if arm == "treated" else 0.0,
                    "allotted": allotted[i] if arm == "treated" and isinstance(allotted[i], str) else None,
                    "guidance": float(guidance),
                    "steps": steps,
                    "call": called,
                }
                folder.add(entry, picture)
                entries.append({**entry, "file_name": str(images / entry["file_name"])})
    shutil.rmtree(unfinished, ignore_errors=True)
    if as_json:
        common.print_json({"out": str(out), "sheet": str(out / "side_by_side.png"), "images": entries})
        return
    common.say(f"wrote {out / 'side_by_side.png'} and {len(entries)} images in {out / 'images'}")


def _axes_of(mask: "NeuronMask") -> "list[Axis]":
    """The axes that a mask was made for: their words are what the gate looks for."""
    from stereoclinic.prompts.axes import made_for

    found = [axis for metadata in mask.origins if (axis := made_for(metadata)) is not None]
    return list({axis.name: axis for axis in found}.values())


def _fuse(
    mask: "NeuronMask",
    strength: float,
    out: Path | None,
    model: str,
    dtype: str,
    variant: str | None,
    force: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Write the model with the mask folded in."""
    from stereoclinic.errors import InputError
    from stereoclinic.pipelines import model_folder, open_pipeline
    from stereoclinic.sns.fuse import fuse, is_fusable, save_fused

    if out is None:
        raise InputError("--fuse needs --out DIR, a new folder for the checkpoint")
    if (reason := is_fusable(mask)) is not None:
        raise InputError(f"--fuse: {reason} (`stereo mask RELEVANCE --until 0 -o one.pt` makes one that can be fused)")
    if dry_run:
        common.say(f"would fold the mask into {model} at strength {strength:g}, and write {out}")
        return
    common.claim(out)
    pipe = open_pipeline(model, "cpu", dtype, variant, common.note)
    fuse(pipe, mask, strength, force)
    folder = model_folder(model)
    # What this package knows of the model goes along: its defaults, and its reader.
    known = [] if folder is None else [folder / name for name in ("stereoclinic.json", "reader")]
    save_fused(pipe, out, beside=[path for path in known if path.exists()])
    if as_json:
        common.print_json({"out": str(out), "strength": strength})
        return
    common.say(f"wrote {out}; diffusers opens it: DiffusionPipeline.from_pretrained({str(out)!r})")
