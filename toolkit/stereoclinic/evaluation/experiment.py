"""The experiment of `stereo bench`: the same seeds drawn by every arm, and read; `comparison` makes figures of it.

    untreated            the model as it is
    mask NAME            each mask given; an allocating one allots every image a group by its seed
    random               a random mask of the first mask's sum of damping
    baseline NAME        another method, see `baselines`
    balanced oracle      no lean at all            } ceilings
    allocation oracle    every group its share     }
    other seeds          the model as it is, on seeds of its own: the floor of every distance
    reference            every group its share, on other seeds: what people of each group look like, untreated

Group prompts ("a photo of a female doctor") are drawn untreated and by each mask, without the gate that would leave
them alone: what the gate misses is treated so. Unrelated prompts ("a photo of a mountain"), where there are any, are
drawn untreated, by each mask with its gate and each baseline, and untreated on other seeds.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from stereoclinic.evaluation.readers.ensemble import by_reader_key
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
    made = [Mitigation(UNTREATED), *(suppressed(name, mask) for name, mask in masks.items())]
    if masks:
        made.append(suppressed(RANDOM, random_like(next(iter(masks.values())), seed=protocol.seed)))
    made += [*baselines, BalancedOracle(axis), AllocationOracle(axis, protocol.target)]
    names = [each.name for each in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two arms are called {twice[0]!r}: give that mask another name")
    neutral = [Arm(each.name, each, judged, n) for each in made]
    neutral.append(Arm(OTHER, Mitigation(OTHER), other, n))
    grouped = []
    if m:
        rows = [
            {**row, "prompt": prompt, "wanted": group}
            for row in with_seeds(protocol.prompts, protocol.seed, m)
            for group, prompt in zip(axis.groups, group_prompts(row, axis), strict=True)
        ]
        ungated = [Mitigation(UNTREATED), *(suppressed(name, mask, gate=False) for name, mask in masks.items())]
        ungated += baselines
        grouped = [Arm(each.name, each, rows, m) for each in ungated]
    unrelated = []
    if protocol.unrelated is not None:
        m = protocol.unrelated_images
        same, distant = (list(with_seeds(protocol.unrelated, first, m)) for first in (protocol.seed, protocol.seed + m))
        used = [Mitigation(UNTREATED), *(suppressed(name, mask) for name, mask in masks.items()), *baselines]
        unrelated = [*(Arm(each.name, each, same, m) for each in used), Arm(OTHER, Mitigation(OTHER), distant, m)]
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
        masks: Name -> mask; none is fine, then only the model and its ceilings are measured.
        strength: Of every mask.
        progress: Called with the arm's name and the number of images drawn.
        force: Apply masks that were made for other weights, see `check_fits`.
        parts: Folder that keeps what was drawn: a run that was cut off goes on there, and whatever another run of the
            same model has drawn there is not drawn again. By default a temporary one.
        warn: Told what does not stop the run.
        baselines: Other methods, made on other seeds and the same on every rank, see `baselines.kept`; or of one's own.
        instruments: What else pictures are measured with.
        **trainer: Given to `lightning.Trainer`: accelerator, devices, num_nodes, strategy.

    Returns:
        The experiment on rank zero, None on any other rank.

    Raises:
        InputError: The reader does not know the axis, or there are fewer batches than devices.
        Incomplete: Pictures are missing at the end.
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
        if isinstance(each, Baseline)  # what a user's own took is not known
    }
    if costs:
        experiment.results["baselines"] = costs
    return experiment


def _note_left_out(experiment: Experiment) -> dict[str, Any]:
    """What results say of seeds that are left out, if any are; its protocol then counts the others alone."""
    protocol = experiment.protocol
    parts = {"neutral": experiment.neutral, "group": experiment.grouped, "unrelated": experiment.unrelated}
    asked = {"neutral": protocol.images, "group": protocol.group_images, "unrelated": protocol.unrelated_images}
    every = [*experiment.neutral, *experiment.grouped, *experiment.unrelated]
    every += [] if experiment.reference is None else [experiment.reference]
    if not (blank := sum(arm.blank for arm in every)):
        return {}
    first, seeds, kept = protocol.seed, dict[str, list[int]](), dict(asked)
    for part, arms in parts.items():
        if arms:
            seeds[part] = sorted({*range(first, first + asked[part])} - {*arms[0].seeds})
            kept[part] = len(arms[0].seeds)
    experiment.protocol = replace(
        protocol, images=kept["neutral"], group_images=kept["group"], unrelated_images=kept["unrelated"]
    )
    return {"left_out": {"pictures": blank, "seeds": {part: each for part, each in seeds.items() if each}}}


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
    """Draw arms and read their pictures; arguments and errors as of `run`, None on any rank but the first."""
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
            warn(f"pictures were drawn on several kinds of device ({kinds}): what drawing took is not compared")
            found = [replace(each, seconds=None, memory=None) for each in found]
        blank = [named(arm.samples[at], arm.name) for arm, each in zip(arms, found, strict=True) for at in each.blank]
        if said := check_blank(blank, sum(len(arm.samples) for arm in arms)):
            warn(f"{said}; their seeds are left out of every figure, for all prompts and arms alike")
        left_out = _left_out(arms, found)
        read = [_read(reader, protocol, arm, each) for arm, each in zip(arms, found, strict=True)]
        return [_without(each, left_out[arm.prompts]) for arm, each in zip(arms, read, strict=True)]


def _left_out(arms: Sequence[Arm], found: Sequence[Pictures]) -> dict[tuple[str, ...], set[int]]:
    """Prompts -> the places of seeds at which a picture of some arm of theirs shows nothing.

    Figures pair arms seed by seed, and need as many images of each prompt.
    """
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
            f"{len(kept)} of {len(drawn.seeds)} seeds are left, as a picture of each of the others shows nothing; give"
            " --dtype float32, or more --images"
        )
    return drawn.only(kept)


def _read(reader: Reader, protocol: Protocol, arm: Arm, drawn: Pictures) -> Drawn:
    """What the reader sees in an arm's pictures, as they are saved: at eight bits a colour."""
    axes = (protocol.axis, *protocol.others)
    reads: dict[str, list[Tensor]] = {axis.name: [] for axis in axes}
    right, features, apart, none = [], [], [], []
    for start in range(0, len(arm.samples), protocol.batch_size):
        rows = arm.samples[start : start + protocol.batch_size]
        pictures = drawn.images[start : start + protocol.batch_size].float() / 255
        seen = read_rows(reader, pictures, rows)
        for axis in axes:
            found, unseen = groups_seen(reader, axis, seen)
            reads[axis.name].append(found)
            if axis is protocol.axis and unseen is not None:
                none.append(unseen)
        features.append(_features(reader, pictures))
        if (each := by_reader_key(protocol.axis.name)) in seen:
            apart.append(seen[each])
        if "occupation" in seen:
            known = reader.classes["occupation"]
            asked = torch.tensor([known.index(row["label"]) if row["label"] in known else -1 for row in rows])
            right.append(torch.where(asked >= 0, (seen["occupation"].argmax(1) == asked).float(), torch.nan))

    def by_prompt(values: Tensor) -> Tensor:
        """Samples come seed by seed, and within a seed prompt by prompt."""
        by_seed: Tensor = values.unflatten(0, (arm.count, -1))  # (n, P, ...)
        return by_seed.transpose(0, 1).contiguous()

    allotted = arm.mitigation.judged(drawn.allotted, protocol.axis)
    occupation = by_prompt(torch.cat(right)) if right else None
    if occupation is not None and occupation.isnan().all():
        occupation = None
    return Drawn(
        arm.name,
        by_prompt(torch.cat(reads[protocol.axis.name])),
        occupation,
        by_prompt(torch.cat(features)),
        by_prompt(drawn.images),
        drawn.seconds,
        {each.name: by_prompt(torch.cat(reads[each.name])) for each in protocol.others},
        None if allotted is None else by_prompt(allotted),
        _by_reader(reader, by_prompt(torch.cat(apart))) if apart else {},
        memory=drawn.memory,
        no_group=by_prompt(torch.cat(none)) if none else None,
        seeds=tuple(row["seed"] for row in arm.samples[:: len(arm.prompts)]),
        blank=len(drawn.blank),
    )


def _by_reader(ensemble: Any, reads: Tensor) -> dict[str, Tensor]:
    """(P, n, readers, K) -> name -> (P, n, K)."""
    return {each.name: reads[:, :, i] for i, each in enumerate(ensemble.readers)}


def _features(reader: Reader, pictures: Tensor) -> Tensor:
    """What distances are taken of: the reader's own features, or of one that has none, 8 x 8 pixels."""
    found = reader.features(pictures)
    return adaptive_avg_pool2d(pictures, 8).flatten(1) if found is None else found
