"""`evaluate`: draw the same seeds with and without masks, and compare. `stereo bench` is this call."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets import Dataset
from diffusers import DiffusionPipeline

from stereoclinic.calls import inputs
from stereoclinic.calls.evaluate_settings import EvaluateSettings
from stereoclinic.calls.evaluation import Evaluation, References, baseline_samples
from stereoclinic.calls.reader import named_reader
from stereoclinic.calls.work import Reporter
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.errors import InputError
from stereoclinic.evaluation import instruments
from stereoclinic.evaluation.arms import ALLOCATION, BALANCED, OTHER, RANDOM, UNTREATED, Protocol
from stereoclinic.evaluation.figures.registry import requested
from stereoclinic.evaluation.methods import check_names
from stereoclinic.evaluation.protocols import PublishedProtocol, load_protocol
from stereoclinic.evaluation.readers import Reader, can_read, group_columns
from stereoclinic.evaluation.references import amplified, corrected, load_confusion, reference_named
from stereoclinic.evaluation.results import Results
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.prompts.axes import WATCHED, Axis, load_axis
from stereoclinic.prompts.sets import load_plain_prompts
from stereoclinic.report.loggers import logs_of
from stereoclinic.report.report import check_folder
from stereoclinic.runtime.devices import check_whole_model, device_of, place_of
from stereoclinic.sns.compat import check_fits
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.statistics.amplification import reference_shares

Masks = Mapping[str, NeuronMask | str | Path] | Iterable[str | Path]


def evaluate(
    model: str | Model | DiffusionPipeline = "portraits",
    masks: Masks | None = None,
    *,
    axis: str | Axis | None = None,
    prompts: str | Dataset = "portraits",
    settings: EvaluateSettings | None = None,
    reader: Reader | None = None,
    out: str | Path = "stereo-bench",
    reporter: Reporter | None = None,
) -> Results | None:
    """Draw the same seeds with and without masks, and compare: bias, side effects, cost.

    This is `stereo bench`: it writes results.json, report.html and the images.

    Args:
        model: `portraits`, a diffusers folder, a checkpoint, a hub id; or an open pipeline, which stays where it is.
        masks: Masks by name, or files of masks. Without masks, the model and the oracles are measured.
        axis: Axis to judge on: a name, a TOML file, or an axis. By default the first mask's, or gender.
        prompts: Neutral prompts: the name of a set, a file, a hub data set, or rows as `load_prompts` returns them.
        settings: Everything else; the defaults are those of the command.
        reader: Your own reader, in place of the one that the settings name.
        out: Folder of the results. An interrupted run continues here when it is called again.
        reporter: Gets notes, warnings and progress.

    Returns:
        What results.json holds, with its `verdict` in words; None on every rank but the first.

    Raises:
        InputError: An argument is wrong or does not fit the model; the message says what to do.
        Incomplete: Images are missing at the end.
    """
    reporter = reporter or Reporter()
    return prepare_evaluation(model, masks, axis, prompts, settings, out, reporter, reader).run(reporter)


def prepare_evaluation(
    model: str | Model | DiffusionPipeline,
    masks: Masks | None,
    axis: str | Axis | None,
    prompts: str | Dataset,
    settings: EvaluateSettings | None,
    out: str | Path,
    reporter: Reporter,
    reader: Reader | None = None,
    command: str | None = None,
) -> Evaluation:
    """Check everything that `evaluate` needs; arguments and errors as there.

    `command` is the command line, which results keep.
    """
    settings, out = settings or EvaluateSettings(), Path(out)
    check_names(settings.baselines)
    check_whole_model(settings.strategy)
    named, files = _load_masks(masks, settings.baselines)
    published = None if settings.protocol is None else load_protocol(settings.protocol)
    if published is not None:
        settings = _following(published, settings, axis, prompts)
    judged = _protocol(axis, prompts, named, published, settings)
    _check_held_out(named, judged, published, settings, reporter)
    references = _references(settings, judged)
    check_folder(out)
    relevance = _relevance(settings.relevance, judged.axis)
    logs = logs_of(settings.logger, out / "logs")
    device = device_of(settings.accelerator)
    others = [each for each in map(load_axis, WATCHED) if each.name != judged.axis.name]
    reader = reader or named_reader(
        settings.reader or "portraits", settings, inputs.name_of(model), [judged.axis, *others], device
    )
    group_columns(reader, judged.axis)
    measured = _instruments(settings, device)
    opened = inputs.open_named(model, settings, reporter, place_of(device))
    for mask in named.values():
        check_fits(mask, opened.network, settings.force)
    judged = replace(
        judged, steps=opened.defaults.steps, others=tuple(each for each in others if can_read(reader, each))
    )
    scales = settings.guidance or (opened.defaults.guidance,)
    protocols = [replace(judged, guidance=scale) for scale in dict.fromkeys(scales)]
    _check_model(opened, named, protocols, reporter)
    return Evaluation(
        opened, named, files, protocols, published, reader, measured, references, relevance, settings, out, device,
        logs, command,
    )  # fmt: skip


def mask_names(files: Iterable[str | Path], baselines: Iterable[str] = ()) -> dict[str, Path]:
    """Mask files by the name of their arm: the file's stem, or its path where that name is taken.

    Raises:
        InputError: A file is given twice.
    """
    paths = [Path(file) for file in files]
    inputs.check_distinct(paths, "--mask")
    names: dict[str, Path] = {}
    taken = {UNTREATED, RANDOM, BALANCED, ALLOCATION, OTHER, *baselines}
    for path in paths:
        free = path.stem not in names and path.stem.lower() not in taken
        names[path.stem if free else str(path)] = path
    return names


def _load_masks(masks: Masks | None, baselines: Iterable[str]) -> tuple[dict[str, NeuronMask], dict[str, Path]]:
    """Masks by name, and the files of those that were read from one."""
    given = masks if isinstance(masks, Mapping) else mask_names(masks or (), baselines)
    files = {name: Path(mask) for name, mask in given.items() if not isinstance(mask, NeuronMask)}
    named = {name: mask if isinstance(mask, NeuronMask) else NeuronMask.load(mask) for name, mask in given.items()}
    return named, files


def _following(
    published: PublishedProtocol, settings: EvaluateSettings, axis: object, prompts: object
) -> EvaluateSettings:
    """The settings with what a published protocol sets; raises InputError if the user set it too."""
    given = {
        "--axis": axis is not None, "--prompts": prompts != "portraits", "--limit": settings.limit is not None,
        "--shares": bool(settings.shares),
    }  # fmt: skip
    if clash := [option for option, is_given in given.items() if is_given]:
        raise InputError(f"{clash[0]}: protocol {published.name} sets {clash[0]} itself; leave out one of the two")
    own = {
        "images": published.images, "reader": published.reader, "steps": published.steps,
        "guidance": (published.guidance,),
    }  # fmt: skip
    return settings.model_copy(update={name: getattr(settings, name) or value for name, value in own.items()})


def _protocol(
    axis: str | Axis | None,
    prompts: str | Dataset,
    masks: dict[str, NeuronMask],
    published: PublishedProtocol | None,
    settings: EvaluateSettings,
) -> Protocol:
    """What is drawn, as far as it is known before the model is open."""
    if len(settings.shares) > 1:
        raise InputError("--shares: only one axis is judged; give shares for its groups only")
    if published is not None:
        axis, rows = published.axis, published.prompts()
    else:
        if axis is None:
            axis = next((inputs.own_axis(mask) for mask in list(masks.values())[:1]), None) or "gender"
        axis = axis if isinstance(axis, Axis) else load_axis(axis)
        rows = inputs.neutral_prompts(prompts, settings.limit)
    return Protocol(
        axis,
        rows,
        settings.images or 25,
        settings.group_images,
        settings.seed,
        guidance=min(settings.guidance, default=1.0),  # a scale below 0 is refused here
        batch_size=settings.batch_size,
        shares=settings.shares[0] if settings.shares else {},
        unrelated=None if settings.unrelated is None else load_plain_prompts(settings.unrelated),
        unrelated_images=settings.unrelated_images,
        figures=requested(settings.figures, *([] if published is None else [published.formula])),
        all_arms=settings.all_arms,
    )


def _check_held_out(
    masks: dict[str, NeuronMask],
    protocol: Protocol,
    published: PublishedProtocol | None,
    settings: EvaluateSettings,
    reporter: Reporter,
) -> None:
    """Refuse to judge a mask or a baseline on seeds it was made on; note judged occupations it was made on.

    Seed ranges must not overlap whatever the prompts are: a digest cannot tell that two sets share some prompts.
    """
    first, last = protocol.seed, protocol.seed + max(protocol.images, protocol.group_images) - 1
    for name, mask in masks.items():
        for seeds in mask.made_on:
            if first <= seeds[1] and seeds[0] <= last:
                raise InputError(
                    f"judged seeds {first} to {last} overlap seeds {seeds[0]} to {seeds[1]}, on which mask {name} was"
                    f" made; give --seed {seeds[1] + 1} or higher"
                )
        if published is not None and (note := judged_too(published, name, mask)):
            reporter.note(note)
    if settings.baselines:
        baseline_samples(protocol.prompts, protocol, settings)


def judged_too(published: PublishedProtocol, name: str, mask: NeuronMask) -> str:
    """Which occupations of a published protocol a mask was made on, in a sentence; empty if none is known."""
    made = {label for each in mask.origins for label in each.get("labels") or []}
    both = published.overlap(sorted(made))
    if not both:
        return ""
    return (
        f"mask {name} was made on {len(both)} of the {len(published.occupations)} occupations that"
        f" {published.name} judges ({', '.join(both[:3])}{', ...' * (len(both) > 3)}), so they are not held out;"
        f" `stereo locate --prompts protocol:{published.name}` makes one on others"
    )


def _references(settings: EvaluateSettings, protocol: Protocol) -> References:
    """The data of --reference and --confusion, checked against axis and labels."""
    found: References = {}
    if settings.reference is not None:
        table = reference_named(settings.reference, protocol.axis.name)
        reference_shares(table, list(protocol.prompts["label"]), protocol.axis.groups)
        found["amplification"] = partial(amplified, table=table)
    if settings.confusion is not None:
        counts = load_confusion(settings.confusion, protocol.axis.groups)
        found["corrected_shares"] = partial(corrected, confusion=counts)
    return found


def _relevance(file: Path | None, axis: Axis) -> Relevance | None:
    if file is None:
        return None
    relevance = Relevance.load(file)
    if tuple(relevance.groups) != axis.groups:
        raise InputError(f"--relevance {file} was located for {', '.join(relevance.groups)}, not for axis {axis.name}")
    return relevance


def _instruments(settings: EvaluateSettings, device: str) -> instruments.Instruments:
    """What images are measured with besides their reader."""
    return instruments.Instruments(
        None if settings.clip_score is None else instruments.open_clip(settings.clip_score, device),
        instruments.open_features(settings.features, device),
        instruments.open_lpips(device) if settings.lpips else None,
        settings.features,
    )


def _check_model(model: Model, masks: dict[str, NeuronMask], protocols: list[Protocol], reporter: Reporter) -> None:
    """Refuse schedules that the model cannot make, and note what of prompts and masks does not fit it."""
    for protocol in protocols:
        schedule_of(model, protocol.steps, protocol.guidance)
    first = protocols[0]
    unrelated = [] if first.unrelated is None else [first.unrelated]
    inputs.check_length(reporter, model, first.prompts, first.axis, first.guidance, first.steps, *unrelated)
    inputs.note_named(reporter, first.prompts, first.axis)
    for name, mask in masks.items():
        made_for = mask.metadata.get("axis")
        if made_for is not None and first.axis.name not in [made_for, *str(made_for).split("+")]:
            reporter.note(f"mask {name} was made for axis {made_for}, and is judged on {first.axis.name}")
        inputs.note_differences(reporter, name, mask, model)
