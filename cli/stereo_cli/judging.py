"""What `stereo bench` is told: names of arms, seeds and protocols that do not fit, limits, where figures come from."""

import platform
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stereo_cli import common

if TYPE_CHECKING:
    from datasets import Dataset

    from stereoclinic.evaluation.arms import Experiment, Protocol
    from stereoclinic.evaluation.instruments import Instruments
    from stereoclinic.evaluation.protocols import PublishedProtocol
    from stereoclinic.evaluation.readers import Reader
    from stereoclinic.pipelines import Model
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.prompts.sets import Row
    from stereoclinic.sns.mask import NeuronMask


def named(paths: list[Path], baselines: list[str]) -> dict[str, Path]:
    """Masks by the name of their arm: the file's stem, or the path where that is taken."""
    from stereoclinic.evaluation.arms import ALLOCATION, BALANCED, OTHER, RANDOM, UNTREATED

    common.check_distinct(paths, "--mask")
    named: dict[str, Path] = {}
    taken = {UNTREATED, RANDOM, BALANCED, ALLOCATION, OTHER, *baselines}
    for path in paths:
        name = path.stem
        if name in named or name.lower() in taken:
            name = str(path)
        named[name] = path
    return named


def own_axis(masks: "dict[str, NeuronMask]") -> "Axis | None":
    """The axis that the first mask was made for; None if it does not say.

    Raises:
        InputError: It is of several axes, or of one that does not ship.
    """
    return common.own_axis(next(iter(masks.values()))) if masks else None


def check_seeds(name: str, mask: "NeuronMask", first: int, images: int) -> None:
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


def judged_too(published: "PublishedProtocol", name: str, mask: "NeuronMask") -> str:
    """Says which occupations of a published protocol a mask was made on; nothing if it does not say, or on none."""
    made = {label for each in mask.origins for label in each.get("labels") or []}
    both = published.overlap(sorted(made))
    if not both:
        return ""
    return (
        f"mask {name} was made on {len(both)} of the {len(published.occupations)} occupations that"
        f" {published.name} judges ({', '.join(both[:3])}{', ...' * (len(both) > 3)}), so they are not held out;"
        f" `stereo locate --prompts protocol:{published.name}` makes one on others"
    )


#: Whose versions figures may depend on.
_LIBRARIES = ("torch", "diffusers", "transformers", "lightning", "torchmetrics", "datasets", "numpy", "safetensors")


def provenance(
    model: "Model",
    axis: str,
    rows: Any,
    paths: dict[str, Path],
    masks: "dict[str, NeuronMask]",
    strength: float,
    reader: Any,
    published: "PublishedProtocol | None" = None,
) -> dict[str, Any]:
    """Where figures come from, as plain data."""
    from stereoclinic.evaluation.draw import model_digest
    from stereoclinic.evaluation.readers import fingerprint, known_errors, limits
    from stereoclinic.io.digest import plain_digest, shapes_digest, weights_digest
    from stereoclinic.pipelines.arguments import inner
    from stereoclinic.prompts.sets import digest
    from stereoclinic.sns.compat import has_other_weights

    network = inner(model.network)
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("stereoclinic", *_LIBRARIES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            versions[name] = None
    return {
        "model": model.name,
        "call": model.call,
        "unet_shapes": shapes_digest(network),
        "unet_weights": weights_digest(network),
        "pipeline": model_digest(model),
        "scheduler": type(model.pipe.scheduler).__name__,
        "device": str(model.device),
        "axis": axis,
        "prompts": digest(rows),
        "reader": reader.name,
        "reader_weights": plain_digest(fingerprint(reader)),
        "reader_limits": list(limits(reader)),
        "reader_errors": [str(each) for each in known_errors(reader)],
        **({} if published is None else {"protocol": published.says()}),
        "strength": strength,
        "masks": {
            name: {**mask.metadata, "file": str(paths[name]), "other_weights": has_other_weights(mask, network)}
            for name, mask in masks.items()
        },
        "versions": versions,
        "command": shlex.join(["stereo", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def reader_for(
    spec: str,
    model: str,
    axes: "list[Axis]",
    classes: list[str],
    allow_race: bool,
    allow_code: bool,
    device: str,
) -> "Reader":
    """The reader that --reader names; the first axis is the one that is judged.

    Raises:
        InputError: There is none, it cannot be opened, or it cannot tell the axis's groups apart.
    """
    from stereoclinic.evaluation.readers import open_reader

    own = None
    if "portraits" in [each.strip() for each in spec.removeprefix("ensemble:").split(",")]:
        own = common.reader_folder(
            model,
            "give --reader clip, hf:MODEL, or the FOLDER of one that stereoclinic.portraits.train wrote for its"
            " pictures",
        )
    return open_reader(spec, axes, own, classes, allow_race, allow_code, device)


def instruments(clip_score: str | None, features: str, lpips: bool, device: str) -> "Instruments":
    """What is asked for to measure pictures with, besides their reader.

    Raises:
        InputError: One of them cannot be opened, or what it needs is not installed.
    """
    from stereoclinic.evaluation.instruments import Instruments, open_clip, open_features, open_lpips

    return Instruments(
        None if clip_score is None else open_clip(clip_score, device),
        open_features(features, device),
        open_lpips(device) if lpips else None,
        features,
    )


def baseline_samples(prompts: "Dataset", first: int, seeds: int, judged: int, images: int) -> "list[Row]":
    """What other methods are made on.

    Raises:
        InputError: A seed is judged too.
    """
    from stereoclinic.evaluation.methods import calibration_samples

    return calibration_samples(prompts, first, seeds, range(judged, judged + 2 * images))  # `other seeds` follow


def made_baselines(
    names: list[str],
    model: "Model",
    protocol: "Protocol",
    reader: "Reader",
    first: int,
    seeds: int,
    kept: Path,
    quiet: bool,
    published: "PublishedProtocol | None" = None,
) -> list[Any]:
    """Other methods, as a folder keeps them, or made on seeds that are not judged; a line on stderr for each made.

    Under a published protocol they are made on its calibration prompts, none of which it judges; but for those that are
    made for each prompt that they treat, and would do nothing else to others.
    """
    if not names:
        return []
    from stereoclinic.evaluation.methods import baseline_class
    from stereoclinic.evaluation.methods.calibration import Calibration
    from stereoclinic.evaluation.methods.checkpoint import kept_baselines

    most = max(protocol.images, protocol.group_images)
    batch = min(Calibration.batch_size, protocol.batch_size)
    how = Calibration(protocol.steps, protocol.guidance, reader, protocol.shares, batch)
    made = []
    for name in names:
        held_out = published is not None and not baseline_class(name).by_prompt
        prompts = published.calibration() if published is not None and held_out else protocol.prompts
        samples = baseline_samples(prompts, first, seeds, protocol.seed, most)

        def making(name: str, count: int = len(samples)) -> None:
            if not quiet:
                common.stderr().print(f"making baseline {name} on {count} samples, guidance {protocol.guidance:g}")

        made += kept_baselines([name], model, protocol.axis, samples, how, kept, common.is_rank_zero(), making)
    return made


def follow(published: "PublishedProtocol", given: dict[str, Any]) -> None:
    """Refuse what a published protocol fixes.

    Args:
        published: As --protocol names it.
        given: Option -> what was given for it; None or its default where nothing was.

    Raises:
        InputError: Something was given.
    """
    from stereoclinic.errors import InputError

    if clash := [option for option, value in given.items() if value]:
        raise InputError(f"{clash[0]}: protocol {published.name} fixes it; leave one of them")


def truths(
    reference: str | None, confusion: Path | None, axis: "Axis", labels: list[str]
) -> "dict[str, Callable[[Experiment], dict[str, Any]]]":
    """What --reference and --confusion add to results: name -> its figures of an experiment.

    Raises:
        InputError: One of them cannot be read, or does not go with the axis or the labels of the prompts.
    """
    if reference is None and confusion is None:
        return {}
    from functools import partial

    from stereoclinic.evaluation.references import amplified, corrected, load_confusion, reference_named
    from stereoclinic.statistics.amplification import reference_shares

    found: dict[str, Any] = {}
    if reference is not None:
        table = reference_named(reference, axis.name)
        reference_shares(table, labels, axis.groups)  # refused before anything is drawn
        found["amplification"] = partial(amplified, table=table)
    if confusion is not None:
        found["corrected_shares"] = partial(corrected, confusion=load_confusion(confusion, axis.groups))
    return found


def published_figures(published: "PublishedProtocol", experiment: "Experiment") -> dict[str, Any]:
    """The figure of a published protocol for each arm, and what a fair model shows of it by chance."""
    floor = published.floor(experiment.protocol.images)
    return {
        "name": published.name,
        "figure": published.says()["figure"],
        "arms": {arm.name: published.figure(arm.reads) for arm in experiment.neutral},
        "noise_floor": {"mean": floor.mean, "upper": floor.upper},
    }
