"""`stereo mask`: make a mask anew, from stored relevance or from other masks; only a dose needs the model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common, dosing, options
from stereo_cli.call import call_from

if TYPE_CHECKING:
    from stereoclinic.sns.mask import NeuronMask


@common.guarded
def mask(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="One relevance file, or one or more masks.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The mask to write, .pt or .safetensors.", show_default=False),
    ],
    select: Annotated[
        str | None,
        typer.Option(
            help="relevance: plan, bounded least squares that prices what damping does besides; or top-k, the paper's"
            " own form.",
            show_default="plan",
            rich_help_panel=options.CHOOSING,
        ),
    ] = None,
    mu: options.Mu = None,
    overshoot: options.Overshoot = None,
    at_most: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="plan: damp no more neurons than these.",
            show_default="no limit",
            rich_help_panel=options.CHOOSING,
        ),
    ] = None,
    top: options.Top = None,
    z: Annotated[
        float | None,
        typer.Option(
            help="top-k: rank by the mean minus this many standard errors: sure neurons come before lucky ones.",
            show_default="2.0",
            rich_help_panel=options.CHOOSING,
        ),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            help="relevance: damp toward zero, balanced, or a group's mean (--mask-root of stereo locate).",
            show_default="zero",
            rich_help_panel=options.CHOOSING,
        ),
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,...",
            help="relevance: kinds of site to choose among: ff, attention, conv, other; of one stream (image, text,"
            " joint) by its name, as in ff:text.",
            show_default="all",
            rich_help_panel=options.CHOOSING,
        ),
    ] = None,
    per_bin: Annotated[
        bool | None,
        typer.Option(
            "--per-bin/--one-for-all",
            help="relevance: choose anew in each timestep bin, or once for all of them; once for all with --until 0 can"
            " be fused into the weights.",
            show_default="once for all",
            rich_help_panel=options.CHOOSING,
        ),
    ] = None,
    since: Annotated[
        float | None,
        typer.Option("--from", min=0, help="Damp from this timestep on.", show_default="the noisiest"),
    ] = None,
    until: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Damp down to this timestep; groups are settled early.",
            show_default="600 for relevance, as it is for a mask",
        ),
    ] = None,
    branch: Annotated[
        str | None,
        typer.Option(
            help="Halves of a guided batch to damp: both, or conditional.",
            show_default="both for relevance, as it is for a mask",
        ),
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="Scale the damping, from 0 (none) to 1 (as it is); of several masks one for all, or repeated, one for"
            " each in order.",
            show_default="1.0",
        ),
    ] = None,
    dose: dosing.Bound = None,
    confirm: dosing.Confirm = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="--dose: the model to dose on.", show_default="the one it was made for", rich_help_panel=options.MODEL
        ),
    ] = None,
    dtype: options.Dtype = "float32",
    variant: options.Variant = None,
    call: options.Call = None,
    height: options.Height = None,
    width: options.Width = None,
    axis: Annotated[
        str | None,
        typer.Option(
            "--axis", help="--dose: axis of the lean.", show_default="the file's", rich_help_panel=options.MODEL
        ),
    ] = None,
    prompts: options.Prompts = "portraits",
    limit: options.Limit = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="--dose: first seed.",
            show_default="after those that the mask was made on",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="--dose: number of seeds per prompt.")] = 2,
    steps: options.Steps = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="--dose: scale that the mask will be used at.",
            show_default="the model's own",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="--dose: samples through the model together.", rich_help_panel=options.DEVICES)
    ] = 36,
    accelerator: options.Accelerator = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Accept masks made for other weights if all sites fit.")
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Make a mask anew: choose again, change one, compose several, or find its dose (which alone runs the model).

    \b
    stereo mask RELEVANCE --mu 4 -o gentle.pt
        choose again, at another price
    stereo mask RELEVANCE --at-most 200 -o sparse.pt
        the best plan of 200 neurons
    stereo mask gender.pt --strength 0.5 --until 800 -o low.pt
        half the damping, at the noisiest steps
    stereo mask gender.pt -o gender.safetensors
        the same in the other format
    stereo mask gender.pt age.pt -o both.pt
        one mask of two: factors multiply
    stereo mask gender.pt --dose 0.3 -o dosed.pt
        as weak as leaves a mean lean of 0.3

    RELEVANCE is what `stereo locate` keeps beside the mask, such as gender.relevance.safetensors. Chosen again with the
    same options, the mask is the same.
    """
    from stereoclinic.errors import InputError
    from stereoclinic.io.files import ENDINGS, kind_of
    from stereoclinic.report.summary import mask_summary

    common.check_target(out, "--out", ENDINGS)
    common.check_distinct(files)
    dosing.check_confirm(dose, confirm)
    if not dry_run:
        common.claim(out)
    held = {path: kind_of(path) for path in files}
    if other := [path for path, kind in held.items() if kind not in ("mask", "relevance")]:
        raise InputError(f"{other[0]} is a {held[other[0]]} file; expected a mask or relevance")
    choosing = {
        "--select": select, "--mu": mu, "--overshoot": overshoot, "--at-most": at_most, "--top": top, "--z": z,
        "--root": root, "--kinds": kinds, "--per-bin/--one-for-all": per_bin,
    }  # fmt: skip
    given = [name for name, value in choosing.items() if value is not None]
    located = [path for path, kind in held.items() if kind == "relevance"]
    if not located:
        if given:
            raise InputError(
                f"{given[0]}: {files[0]} is a mask, whose neurons are chosen; give the relevance that it was made from"
            )
        made = _from_masks(files, strength or [1.0], since, until, branch, force)
        done = ("changed from" if len(files) == 1 else "composed of") + f" {', '.join(map(str, files))}"
    else:
        if len(files) > 1:
            raise InputError(
                f"{located[0]} is relevance, and one of {len(files)} files; give one relevance file alone, or masks to"
                " compose"
            )
        if out.resolve() == files[0].resolve():
            raise InputError(f"--out {out}: the relevance itself, which would be lost; give another name")
        if strength and len(strength) > 1:
            raise InputError(f"--strength is given {len(strength)} times for one mask; give it once")
        method = select or "plan"
        common.check_method(method, given)
        settings: dict[str, Any] = {
            "select": select, "mu": mu, "overshoot": overshoot, "at_most": at_most, "top": top, "z": z, "root": root,
            "kinds": kinds and tuple(kind.strip() for kind in kinds.split(",")), "per_bin": per_bin, "since": since,
            "until": until, "branch": branch,
        }  # fmt: skip
        settings = {name: value for name, value in settings.items() if value is not None}
        made = _from_relevance(files[0], settings, (strength or [1.0])[0], quiet)
        done = f"chosen by {method} from {files[0]}"

    called, found = call_from(call, height, width, made.metadata), None
    if model is None:
        dtype, variant = common.opened_as(made.metadata, dtype, variant)
    if dose is not None and not dry_run:
        from stereoclinic.pipelines import open_model
        from stereoclinic.prompts.axes import load_axis
        from stereoclinic.sns.compat import check_fits

        name = model or str(made.metadata.get("model", "portraits"))
        chosen, rows = load_axis(axis) if axis else common.own_axis(made), common.neutral_prompts(prompts, limit)
        if chosen is None:
            raise InputError("--dose: the mask does not say what axis it was made for; give --axis")
        images, reader = dosing.confirmed_by(confirm, name, chosen)
        device = common.device_of(accelerator)
        opened = open_model(name, device, dtype, variant, called, common.note)
        opened.defaults = replace(opened.defaults, steps=steps or opened.defaults.steps)
        check_fits(made, opened.network, force)
        first = max((last + 1 for _, last in made.made_on), default=0) if seed is None else seed
        scale = opened.defaults.guidance if guidance is None else guidance
        steps = steps or opened.defaults.steps
        how = dosing.Dosing(dose, first, seeds, images, reader, steps, scale, batch_size)
        made, found = dosing.give_dose(made, opened, chosen, rows, how, device, force, quiet)

    summary = mask_summary(made)
    if dry_run:
        total = summary["total"]
        common.say(f"would write {out}, {done}: {total['damped']} of {total['neurons']} neurons damped")
        return
    made.save(out)
    if as_json:
        written = {"mask": str(out), "from": [str(path) for path in files]}
        common.print_json({"mask": summary, "dose": found, "files": written})
        return

    from stereo_cli.tables import mask_table

    common.stdout().print(mask_table(summary))
    if dose is not None and found is not None:
        dosing.say_dose(dose, found)
    common.say(f"wrote {out}, {done}")
    own, *others = str(summary["axis"]).split("+")  # as compositions are named
    of = model or str(made.metadata.get("model", "portraits"))
    asked = axis if axis and Path(axis).suffix else own if others else None
    common.say_next(out, called, model=of, dtype=dtype, variant=variant, axis=asked, guidance=guidance)


def _from_relevance(file: Path, settings: dict[str, Any], strength: float, quiet: bool) -> "NeuronMask":
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.sns.linear import adjusted, choose
    from stereoclinic.sns.select import Selection

    selection = Selection(**settings)
    relevance = Relevance.load(file)
    if not quiet:
        count = sum(site.width for site in relevance.sites)
        common.stderr().print(f"choosing among {count} neurons by {selection.select}")
    return adjusted(choose(relevance, selection), strength)


def _from_masks(
    files: list[Path],
    strengths: list[float],
    since: float | None,
    until: float | None,
    branch: str | None,
    force: bool,
) -> "NeuronMask":
    from dataclasses import replace

    from stereoclinic.errors import InputError
    from stereoclinic.sns.linear import adjusted
    from stereoclinic.sns.mask import BRANCHES, NeuronMask

    if len(strengths) not in (1, len(files)):
        raise InputError(
            f"--strength is given {len(strengths)} times for {len(files)} masks; give it once, or for each"
        )
    if branch is not None and branch not in BRANCHES:
        raise InputError(f"--branch {branch!r}: expected {' or '.join(BRANCHES)}")
    masks = [NeuronMask.load(path) for path in files]
    if len(masks) == 1:
        made = adjusted(masks[0], strengths[0])
    else:
        from stereoclinic.sns.compose import compose

        made = compose(masks, strengths * len(masks) if len(strengths) == 1 else strengths, force)
    if since is not None or until is not None:
        first, last = made.bin_edges[0].item(), made.bin_edges[-1].item()
        made = adjusted(made, window=(first if since is None else since, last if until is None else until))
    return made if branch is None else replace(made, branch="both" if branch == "both" else "conditional")
