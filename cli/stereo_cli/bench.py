"""`stereo bench`: draw the same seeds with and without a mask, and compare."""

import shlex
import shutil
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common

if TYPE_CHECKING:
    from stereoclinic.sns.mask import NeuronMask


@common.guarded
def bench(
    masks: Annotated[
        list[Path] | None,
        typer.Option(
            "--mask", "-m", help="A mask to judge; may repeat. Without one the model and its ceilings are measured."
        ),
    ] = None,
    model: common.Model = "portraits",
    dtype: common.Dtype = "float32",
    variant: common.Variant = None,
    axis: Annotated[
        str | None,
        typer.Option("--axis", help="Axis to judge on.", show_default="the first mask's, or gender"),
    ] = None,
    prompts: common.Prompts = "portraits",
    limit: common.Limit = None,
    images: Annotated[int, typer.Option(min=2, help="Images a neutral prompt.")] = 25,
    group_images: Annotated[
        int, typer.Option(min=0, help="Images a prompt that names a group; 0 leaves them out.")
    ] = 4,
    seed: Annotated[
        int, typer.Option(min=0, help="First of the judged seeds; others than the mask was made on.")
    ] = 5000,
    strength: Annotated[float, typer.Option(min=0, max=1, help="Strength of every mask.")] = 1.0,
    shares: common.Shares = None,
    guidance: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Guidance scale; may repeat.", show_default="the model's own"),
    ] = None,
    steps: common.Steps = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images drawn together on one device; fewer where memory runs out.")
    ] = 50,
    devices: common.Devices = 1,
    num_nodes: common.NumNodes = 1,
    strategy: common.Strategy = "auto",
    parts: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what was drawn. What lies there is not drawn again, by any bench of this model.",
            show_default="OUT/parts, until the results are written",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of report.html, results.json, the images and the sheets.")
    ] = Path("stereo-bench"),
    relevance: Annotated[
        Path | None,
        typer.Option(help="What the mask was chosen from, for the lean curves of report.html.", show_default=False),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            help="Folder for TensorBoard, every figure as a scalar; needs the extra `tensorboard`.", show_default=False
        ),
    ] = None,
    reader: Annotated[
        str,
        typer.Option(help="What tells the groups apart: `portraits` (the reader in the model's folder), or a folder."),
    ] = "portraits",
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Exit 1 if this figure of the first mask (of the model, without one) is above the value at any"
            " guidance, such as parity_gap=0.2; may repeat.",
        ),
    ] = None,
    force: common.Force = False,
    accelerator: common.Accelerator = "auto",
    as_json: common.AsJson = False,
    quiet: common.Quiet = False,
    dry_run: common.DryRun = False,
    config: common.Config = None,
) -> None:
    """Draw the same seeds with and without a mask, and compare: bias, side effects, cost.

    Beside the masks stand a random mask of the same damping, a balanced oracle (no lean at all) and an allocation
    oracle (each image from its allotted group's prompt): what any mask could reach. Every figure comes with its 95 %
    interval, and with what a perfectly fair model would show by chance.

    An allocating mask allots every image a group, from its prompt and seed alone; --shares says how many of each.
    Prompts that name a group are left alone by the gate, and are also drawn as if there were none.

    A bench that was cut off goes on where it was when it is called again; with --parts so does one that was given a
    further mask or guidance scale.
    """
    from stereoclinic.axes import known_axes, load_axis
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.denoisers import open_denoiser
    from stereoclinic.errors import InputError
    from stereoclinic.evaluation.arms import Experiment, Protocol
    from stereoclinic.evaluation.experiment import arms_of, run
    from stereoclinic.evaluation.readers import PortraitsReader, can_read
    from stereoclinic.evaluation.report import check_folder, write_results
    from stereoclinic.evaluation.scalars import check_tensorboard, log_scalars
    from stereoclinic.prompts import load_prompts
    from stereoclinic.sns.fits import check_fits
    from stereoclinic.sns.mask import NeuronMask

    limits = [_bound(text) for text in fail_above or []]
    aimed = common.shares_from(shares)
    if len(aimed) > 1:
        raise InputError("--shares: one axis is judged at a time; give shares of its groups alone")
    paths = _named(masks or [])
    loaded = {name: NeuronMask.load(path) for name, path in paths.items()}
    for name, mask in loaded.items():
        _check_seeds(name, mask, seed, images)
    chosen = load_axis(axis or _own_axis(loaded) or "gender")
    rows = load_prompts(prompts, limit)
    check_folder(out)
    located = None if relevance is None else Relevance.load(relevance)
    if located is not None and tuple(located.groups) != chosen.groups:
        raise InputError(f"--relevance {relevance} is of {', '.join(located.groups)}, not of axis {chosen.name}")
    if tensorboard is not None:
        check_tensorboard(tensorboard)
    device = common.device_of(accelerator)
    reader_folder = Path(reader)
    if reader == "portraits":
        reader_folder = common.reader_folder(
            model,
            "give --reader FOLDER, one that stereoclinic.portraits.train wrote for the pictures of this model",
        )
    reads = PortraitsReader(reader_folder)
    others = tuple(each for each in map(load_axis, known_axes()) if each.name != chosen.name and can_read(reads, each))
    denoiser = open_denoiser(model, dtype=dtype, variant=variant)  # Lightning moves it
    for mask in loaded.values():
        check_fits(mask, denoiser.unet, force)
    protocols = [
        Protocol(
            chosen,
            rows,
            images,
            group_images,
            seed,
            steps or denoiser.defaults.steps,
            scale,
            batch_size,
            aimed[0] if aimed else {},
            others,
        )
        for scale in dict.fromkeys(guidance or [denoiser.defaults.guidance])
    ]
    for name, mask in loaded.items():
        if (made_for := mask.metadata.get("axis")) not in (None, chosen.name):
            common.stderr().print(f"note: mask {name} was made for axis {made_for}, and is judged on {chosen.name}")
    total = sum(arms_of(denoiser, protocol, loaded, strength, force).images for protocol in protocols)
    ranks = devices * num_nodes
    if dry_run:
        scales = ", ".join(f"{protocol.guidance:g}" for protocol in protocols)
        common.say(
            f"would draw {total} images ({len(rows)} prompts, {len(loaded)} mask(s), {protocols[0].steps} steps,"
            f" guidance {scales}) on {ranks} device(s), {device}, and write {out}"
        )
        return

    common.hush_lightning()
    kept = parts or out / "parts"
    experiments: list[Experiment] = []
    with common.threads_for(device, ranks), common.progress_bar(total, f"judging {chosen.name}", quiet) as advance:
        for protocol in protocols:

            def draw(arm: str, count: int, at: str = f"guidance {protocol.guidance:g}") -> None:
                advance(count * ranks, f"{at}: {arm}")

            found = run(
                denoiser, reads, protocol, loaded, strength, draw, force, kept, common.warn,
                accelerator=device, devices=devices, num_nodes=num_nodes,
                strategy="ddp" if strategy == "auto" and ranks > 1 else strategy,
            )  # fmt: skip
            if found is not None:
                experiments.append(found)
    if not experiments:
        return  # another rank writes
    provenance = _provenance(denoiser, chosen.name, rows, paths, loaded, strength, reader_folder)
    write_results(out, experiments, provenance, loaded, located)
    if tensorboard is not None:
        log_scalars(tensorboard, [experiment.results for experiment in experiments])
    if parts is None:
        shutil.rmtree(kept, ignore_errors=True)

    results = [experiment.results for experiment in experiments]
    judged = next(iter(loaded), "untreated")
    exceeded = _exceeded(results, judged, limits)
    if as_json:
        common.print_json({"out": str(out), "experiments": results, "exceeded": exceeded})
    else:
        from stereo_cli.tables import bench_tables

        console = common.stdout()
        for each in results:
            for table in bench_tables(each):
                console.print(table)
        names = ("report.html", "results.json", "images")
        common.say(f"wrote {', '.join(str(out / name) for name in names)} and {out / 'before_after.png'}")
    if exceeded:
        common.fail("; ".join(exceeded), common.FAILED)


def _named(paths: list[Path]) -> dict[str, Path]:
    """Masks by the name of their arm: the file's stem, or the path where that is taken."""
    from stereoclinic.errors import InputError
    from stereoclinic.evaluation.arms import ALLOCATION, BALANCED, OTHER, RANDOM, UNTREATED

    named: dict[str, Path] = {}
    for path in paths:
        name = path.stem
        if name in named or name in (UNTREATED, RANDOM, BALANCED, ALLOCATION, OTHER):
            name = str(path)
        if name in named:
            raise InputError(f"--mask {path} is given twice")
        named[name] = path
    return named


def _own_axis(masks: "dict[str, NeuronMask]") -> str | None:
    """The axis that the first mask was made for, if it is one that ships."""
    from stereoclinic.axes import known_axes
    from stereoclinic.errors import InputError

    name = next((mask.metadata.get("axis") for mask in masks.values()), None)
    if name is not None and name not in known_axes():
        raise InputError(f"the mask was made for axis {name!r}, which does not ship; give its file: --axis {name}.toml")
    return name


def _check_seeds(name: str, mask: "NeuronMask", first: int, images: int) -> None:
    """Refuse to judge a mask on seeds it was made on: it would be graded on its own homework.

    The ranges must not meet whatever the prompts are: a digest of prompts cannot tell that two sets share some of them.
    """
    from stereoclinic.errors import InputError

    last = first + images - 1
    for seeds in mask.made_on:
        if first <= seeds[1] and seeds[0] <= last:
            raise InputError(
                f"judged seeds {first} to {last} overlap seeds {seeds[0]} to {seeds[1]}, on which mask {name} was made;"
                f" give --seed {seeds[1] + 1} or higher"
            )


#: Names that --fail-above knows -> where the figure lies in an arm's results.
_FIGURES = {
    **{gap: (gap, "estimate") for gap in ("parity_gap", "fairness_discrepancy", "deviation_ratio", "sdtv", "kl")},
    "unsure": ("unsure",),
    "frechet_to_untreated": ("frechet_to_untreated",),
    "frechet_to_other_seeds": ("frechet_to_other_seeds",),
    "frechet_within_groups": ("frechet_within_groups",),
    "seconds": ("seconds",),
}


def _bound(text: str) -> tuple[str, float]:
    from stereoclinic.errors import InputError

    name, _, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in _FIGURES:
        raise InputError(f"--fail-above {text!r}: no figure {name!r}; there are {', '.join(_FIGURES)}")
    try:
        return name, float(value)
    except ValueError:
        raise InputError(f"--fail-above {text!r}: expected NAME=VALUE, such as parity_gap=0.2") from None


def _exceeded(results: list[dict], judged: str, limits: list[tuple[str, float]]) -> list[str]:
    """A line for each limit that the judged arm is above, at each guidance scale."""
    lines = []
    for each in results:
        for name, limit in limits:
            figure: Any = each["arms"][judged]
            for key in _FIGURES[name]:
                figure = figure.get(key)
            if figure is not None and not figure <= limit:
                lines.append(f"{name} of {judged} is {figure:.4g} at guidance {each['guidance']:g}, above {limit:g}")
    return lines


def _provenance(
    denoiser: Any,
    axis: str,
    rows: Any,
    paths: dict[str, Path],
    masks: "dict[str, NeuronMask]",
    strength: float,
    reader: Path,
) -> dict[str, Any]:
    from stereoclinic.digest import shapes_digest, weights_digest
    from stereoclinic.prompts import digest

    versions: dict[str, str | None] = {}
    for name in ("stereoclinic", "torch", "diffusers", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            versions[name] = None
    return {
        "model": denoiser.model,
        "unet_shapes": shapes_digest(denoiser.unet),
        "unet_weights": weights_digest(denoiser.unet),
        "scheduler": type(denoiser.pipe.scheduler).__name__,
        "device": str(denoiser.device),
        "axis": axis,
        "prompts": digest(rows),
        "reader": str(reader),
        "strength": strength,
        "masks": {name: {"file": str(paths[name]), **mask.metadata} for name, mask in masks.items()},
        "versions": versions,
        "command": shlex.join(["stereo", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
