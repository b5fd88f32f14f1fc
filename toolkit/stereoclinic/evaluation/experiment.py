"""The experiment of `stereo bench`: every arm draws the same seeds, and a reader reads the images.

    untreated            the model as it is
    mask NAME            each given mask
    random               a random mask with the first mask's sum of damping: the control
    baseline NAME        another method, see `methods`
    allocation oracle    each group at its target share: the upper bound of an allocating mask
    reference            the allocation oracle on other seeds: untreated images of each group

With `all_arms` also:

    balanced oracle      no lean at all: a reference, no bound; a balancing mask can leave a smaller gap. Without a mask
                         it is always drawn
    other seeds          untreated, on other seeds: the sampling noise of Fréchet and other distances

Group prompts ("a photo of a female doctor") are drawn untreated, by each mask without its gate, and by each baseline.
Unrelated prompts ("a photo of a mountain"), if any, are drawn untreated, by each mask with its gate, by each baseline,
and untreated on other seeds.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.evaluation.arms import OTHER, RANDOM, REFERENCE, UNTREATED, Drawn, Experiment, Protocol
from stereoclinic.evaluation.draw import Part, Pictures, Store, draw, model_digest
from stereoclinic.evaluation.figures.summarise import summarise
from stereoclinic.evaluation.instruments import Instruments, measure
from stereoclinic.evaluation.methods.base import Mitigation, Suppressed
from stereoclinic.evaluation.methods.baseline import Baseline
from stereoclinic.evaluation.methods.oracles import AllocationOracle, BalancedOracle
from stereoclinic.evaluation.readers import Reader, as_reader, group_columns, groups_seen, read_rows
from stereoclinic.evaluation.readers.ensemble import EnsembleReader, by_reader_key
from stereoclinic.pipelines.images import check_blank, named
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.sets import Row, group_prompts, with_seeds
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.select import random_like


@dataclass(frozen=True)
class Arm:
    """One mitigation on one set of samples, `count` of each prompt."""

    name: str
    mitigation: Mitigation
    samples: list[Row]
    count: int

    def parts(self, protocol: Protocol, digest: str) -> list[Part]:
        size = protocol.batch_size
        return [
            Part(self.mitigation, self.samples[start : start + size], protocol.steps, protocol.guidance, digest)
            for start in range(0, len(self.samples), size)
        ]

    @property
    def prompts(self) -> tuple[str, ...]:
        """Of each seed, in order: samples come seed by seed."""
        return tuple(row["prompt"] for row in self.samples[: len(self.samples) // self.count])


@dataclass(frozen=True)
class Arms:
    """Everything that an experiment draws."""

    neutral: list[Arm]
    grouped: list[Arm]
    reference: Arm
    unrelated: list[Arm]

    def __iter__(self) -> Iterator[Arm]:
        return iter([*self.neutral, *self.grouped, self.reference, *self.unrelated])

    @property
    def images(self) -> int:
        return sum(len(arm.samples) for arm in self)


def arms_of(
    model: Model,
    protocol: Protocol,
    masks: dict[str, NeuronMask],
    strength: float = 1.0,
    force: bool = False,
    baselines: Sequence[Mitigation] = (),
) -> Arms:
    """What an experiment draws; arguments as of `run`."""
    axis, n, m = protocol.axis, protocol.images, protocol.group_images
    shares = [dict(protocol.shares)] if protocol.shares else []

    def suppressed(name: str, mask: NeuronMask, gate: bool = True) -> Suppressed:
        gates = [axis] if gate else []
        return Suppressed(name, model, mask, gates, strength, shares, force)

    judged = list(with_seeds(protocol.prompts, protocol.seed, n))
    other = list(with_seeds(protocol.prompts, protocol.seed + n, n))
    gated = [Mitigation(UNTREATED), *(suppressed(name, mask) for name, mask in masks.items())]
    control = [suppressed(RANDOM, random_like(mask, seed=protocol.seed)) for mask in list(masks.values())[:1]]
    balanced = [BalancedOracle(axis)] if protocol.all_arms or not masks else []
    made = [*gated, *control, *baselines, *balanced, AllocationOracle(axis, protocol.target)]
    names = [each.name for each in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two arms are called {twice[0]!r}: give that mask another name")
    neutral = [Arm(each.name, each, judged, n) for each in made]
    neutral += [Arm(OTHER, Mitigation(OTHER), other, n)] if protocol.all_arms else []
    grouped = []
    if m:
        rows = [
            {**row, "prompt": prompt, "wanted": group}
            for row in with_seeds(protocol.prompts, protocol.seed, m)
            for group, prompt in zip(axis.groups, group_prompts(row, axis), strict=True)
        ]
        ungated = [Mitigation(UNTREATED), *(suppressed(name, mask, gate=False) for name, mask in masks.items())]
        grouped = [Arm(each.name, each, rows, m) for each in [*ungated, *baselines]]
    unrelated = []
    if protocol.unrelated is not None:
        m = protocol.unrelated_images
        same, distant = (list(with_seeds(protocol.unrelated, first, m)) for first in (protocol.seed, protocol.seed + m))
        unrelated = [Arm(each.name, each, same, m) for each in [*gated, *baselines]]
        unrelated.append(Arm(OTHER, Mitigation(OTHER), distant, m))
    return Arms(neutral, grouped, Arm(REFERENCE, AllocationOracle(axis, protocol.target), other, n), unrelated)


def run(
    model: Model,
    reader: Reader,
    protocol: Protocol,
    masks: dict[str, NeuronMask],
    strength: float = 1.0,
    progress: Callable[[str, int], None] | None = None,
    force: bool = False,
    parts: Path | None = None,
    warn: Callable[[str], None] = warnings.warn,
    baselines: Sequence[Mitigation] = (),
    instruments: Instruments | None = None,
    **trainer: Any,
) -> Experiment | None:
    """Draw every arm and compare.

    Args:
        model: The pipeline.
        reader: Reads group and occupation off images.
        protocol: What is drawn.
        masks: Name -> mask; without any, only the model and the oracles are measured.
        strength: Of every mask.
        progress: Called with the arm's name and the number of images drawn.
        force: Apply masks that were made for other weights, see `check_fits`.
        parts: Folder that keeps drawn images, which later runs of the same model use. By default a temporary one.
        warn: Called with what does not stop the run.
        baselines: Other methods, fitted on other seeds and the same on every rank, see `kept_baselines`; or your own.
        instruments: Further measurements.
        **trainer: Given to `lightning.Trainer`: accelerator, devices, num_nodes, strategy.

    Returns:
        The experiment on rank zero, None on any other rank.

    Raises:
        InputError: The reader does not know the axis, or there are fewer batches than devices.
        Incomplete: Images are missing at the end.
    """
    arms = arms_of(model, protocol, masks, strength, force, baselines)
    found = drawn(model, reader, protocol, list(arms), progress, parts, warn, **trainer)
    if found is None:
        return None
    rest = iter(found)
    neutral, grouped = ([next(rest) for _ in part] for part in (arms.neutral, arms.grouped))
    experiment = Experiment(protocol, neutral, grouped, next(rest), list(rest))
    left_out = _note_left_out(experiment)
    instruments = instruments or Instruments()
    measure(experiment, instruments, warn)
    experiment.results = summarise(experiment, list(masks))
    experiment.results["features"] = instruments.features_name
    experiment.results |= left_out
    costs = {
        each.name: {"needs": each.needs, "source": each.source, "strength": each.strength, **vars(each.cost)}
        for each in baselines
        if isinstance(each, Baseline)  # the cost of a user's own method is not known
    }
    if costs:
        experiment.results["baselines"] = costs
    return experiment


def _note_left_out(experiment: Experiment) -> dict[str, Any]:
    """A note about seeds that are left out; the protocol then counts only the others."""
    protocol = experiment.protocol
    parts = {
        "neutral": ("images", experiment.neutral),
        "group": ("group_images", experiment.grouped),
        "unrelated": ("unrelated_images", experiment.unrelated),
    }
    every = [*experiment.neutral, *experiment.grouped, *experiment.unrelated]
    every += [] if experiment.reference is None else [experiment.reference]
    if not (blank := sum(arm.blank for arm in every)):
        return {}
    seeds, kept = dict[str, list[int]](), dict[str, Any]()
    for part, (field, arms) in parts.items():
        if arms:
            kept[field] = len(arms[0].seeds)
            asked = range(protocol.seed, protocol.seed + getattr(protocol, field))
            if missing := sorted({*asked} - {*arms[0].seeds}):
                seeds[part] = missing
    experiment.protocol = replace(protocol, **kept)
    return {"left_out": {"pictures": blank, "seeds": seeds}}


def drawn(
    model: Model,
    reader: Reader,
    protocol: Protocol,
    arms: Sequence[Arm],
    progress: Callable[[str, int], None] | None = None,
    parts: Path | None = None,
    warn: Callable[[str], None] = warnings.warn,
    **trainer: Any,
) -> list[Drawn] | None:
    """Draw arms and read their images; arguments and errors as of `run`, None on any rank but the first."""
    reader = as_reader(reader)
    group_columns(reader, protocol.axis)  # refused before anything is drawn
    digest = model_digest(model)
    with tempfile.TemporaryDirectory() as temporary:
        store = Store(Path(temporary) if parts is None else parts)
        wanted = [arm.parts(protocol, digest) for arm in arms]
        if not draw(model, [part for each in wanted for part in each], store, progress, warn, **trainer):
            return None
        found = [store.read(each) for each in wanted]
        if len(devices := {each.device for each in found}) > 1:
            kinds = ", ".join(sorted(each or "unknown" for each in devices))
            warn(f"images were drawn on several kinds of device ({kinds}): what drawing took is not compared")
            found = [replace(each, seconds=None, memory=None) for each in found]
        blank = [named(arm.samples[at], arm.name) for arm, each in zip(arms, found, strict=True) for at in each.blank]
        if said := check_blank(blank, sum(len(arm.samples) for arm in arms)):
            warn(f"{said}; their seeds are left out of every figure, for all prompts and arms alike")
        left_out = _left_out(arms, found)
        read = [_read(reader, protocol, arm, each) for arm, each in zip(arms, found, strict=True)]
        return [_without(each, left_out[arm.prompts]) for arm, each in zip(arms, read, strict=True)]


def _left_out(arms: Sequence[Arm], found: Sequence[Pictures]) -> dict[tuple[str, ...], set[int]]:
    """Prompts -> places of seeds that all arms leave out, because an image of one arm shows nothing."""
    places: dict[tuple[str, ...], set[int]] = {}
    for arm, each in zip(arms, found, strict=True):
        places.setdefault(arm.prompts, set()).update(place // len(arm.prompts) for place in each.blank)
    return places


def _without(drawn: Drawn, left_out: set[int]) -> Drawn:
    if not left_out:
        return drawn
    kept = [place for place in range(len(drawn.seeds)) if place not in left_out]
    if len(kept) < min(2, len(drawn.seeds)):
        raise Incomplete(
            f"only {len(kept)} of {len(drawn.seeds)} seeds can be judged; the others have an image that shows nothing;"
            " give --dtype float32, or more --images"
        )
    return drawn.only(kept)


def _read(reader: Reader, protocol: Protocol, arm: Arm, drawn: Pictures) -> Drawn:
    """What the reader sees in an arm's images, as they are saved: at eight bits a colour."""
    batches: dict[str, list[Tensor]] = {}
    remarks: list[str] = []
    for start in range(0, len(arm.samples), protocol.batch_size):
        rows = arm.samples[start : start + protocol.batch_size]
        pictures = drawn.images[start : start + protocol.batch_size].float() / 255
        for name, values in _seen(reader, protocol, rows, pictures).items():
            batches.setdefault(name, []).append(values)
        remarks += reader.remarks or []

    def by_prompt(values: Tensor) -> Tensor:
        """Samples come seed by seed, and within a seed prompt by prompt: (n P, ...) -> (P, n, ...)."""
        by_seed: Tensor = values.unflatten(0, (arm.count, -1))
        return by_seed.transpose(0, 1).contiguous()

    columns = {name: by_prompt(torch.cat(parts)) for name, parts in batches.items()}
    right = columns.get("right")
    allotted = arm.mitigation.judged(drawn.allotted, protocol.axis)
    readers = reader.readers if isinstance(reader, EnsembleReader) else ()
    return Drawn(
        arm.name,
        columns[f"axis {protocol.axis.name}"],
        None if right is None or right.isnan().all() else right,
        columns["features"],
        by_prompt(drawn.images),
        drawn.seconds,
        {axis.name: columns[f"axis {axis.name}"] for axis in protocol.others},
        None if allotted is None else by_prompt(allotted),
        {each.name: columns["by reader"][:, :, i] for i, each in enumerate(readers)},
        memory=drawn.memory,
        no_group=columns.get("no group"),
        remarks=np.array(remarks, object).reshape(arm.count, -1).T if remarks else None,
        seeds=tuple(row["seed"] for row in arm.samples[:: len(arm.prompts)]),
        blank=len(drawn.blank),
    )


def _seen(reader: Reader, protocol: Protocol, rows: list[Row], pictures: Tensor) -> dict[str, Tensor]:
    """Everything that is read of a batch of images (B, 3, H, W) in [0, 1]: name -> (B, ...)."""
    seen = read_rows(reader, pictures, rows)
    features = reader.features(pictures)
    found = {"features": adaptive_avg_pool2d(pictures, 8).flatten(1) if features is None else features}
    for axis in (protocol.axis, *protocol.others):
        found[f"axis {axis.name}"], no_group = groups_seen(reader, axis, seen)
        if axis is protocol.axis and no_group is not None:
            found["no group"] = no_group
    if isinstance(reader, EnsembleReader):
        found["by reader"] = seen[by_reader_key(protocol.axis.name)]  # (B, readers, K)
    if "occupation" in seen:
        known = reader.classes["occupation"]
        asked = torch.tensor([known.index(row["label"]) if row["label"] in known else -1 for row in rows])
        found["right"] = torch.where(asked >= 0, (seen["occupation"].argmax(1) == asked).float(), torch.nan)
    return found
