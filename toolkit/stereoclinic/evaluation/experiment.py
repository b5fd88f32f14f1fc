"""The experiment of `stereo bench`: the same seeds drawn by every arm, and read; `comparison` makes figures of it.

    untreated            the model as it is
    mask NAME            each mask given; an allocating one allots every image a group by its seed
    random               a random mask of the first mask's sum of damping
    balanced oracle      no lean at all            } ceilings
    allocation oracle    every group its share     }
    other seeds          the model as it is, on seeds of its own: the floor of every distance
    reference            every group its share, on other seeds: what people of each group look like, untreated

Group prompts ("a photo of a female doctor") are drawn untreated and by each mask, without the gate that would leave
them alone: what the gate misses is treated so.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from datasets import Dataset
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.denoisers.sampling import sample
from stereoclinic.evaluation.arms import (
    ALLOCATION,
    BALANCED,
    OTHER,
    RANDOM,
    REFERENCE,
    UNTREATED,
    Drawn,
    Experiment,
    Protocol,
)
from stereoclinic.evaluation.comparison import summarise
from stereoclinic.evaluation.oracles import allocation_prompts, balanced_oracle
from stereoclinic.evaluation.readers import PortraitsReader, group_columns
from stereoclinic.prompts import group_prompts, with_seeds
from stereoclinic.sns.allocate import allotted_group
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.select import random_like
from stereoclinic.sns.treat import Treatment


def run(
    denoiser: Denoiser,
    reader: PortraitsReader,
    protocol: Protocol,
    masks: dict[str, NeuronMask],
    strength: float = 1.0,
    progress: Callable[[str, int], None] | None = None,
    force: bool = False,
) -> Experiment:
    """Draw every arm and compare.

    Args:
        denoiser: The model.
        reader: Reads group and occupation off images.
        protocol: What is drawn.
        masks: Name -> mask; none is fine, then only the model and its ceilings are measured.
        strength: Of every mask.
        progress: Called with the arm's name and the number of images drawn.
        force: Apply masks that were made for other weights of the same shapes.

    Raises:
        InputError: The reader does not know the axis.
    """
    group_columns(reader, protocol.axis)  # refused before anything is drawn

    def draw(
        name: str,
        samples: Dataset,
        count: int,
        mask: NeuronMask | None = None,
        oracle: str = "",
        gate: bool = True,
    ) -> Drawn:
        treatment = None
        if mask is not None:
            treatment = Treatment(
                denoiser.pipe,
                mask,
                [protocol.axis] if gate else [],
                strength,
                [protocol.shares] if protocol.shares else [],
                protocol.guidance > 1,
                force,
            )
        return _draw(denoiser, reader, protocol, name, samples, count, treatment, oracle, progress)

    axis, n, m = protocol.axis, protocol.images, protocol.group_images
    judged = with_seeds(protocol.prompts, protocol.seed, n)
    _warm_up(denoiser, axis, list(judged.select(range(len(protocol.prompts)))), protocol)
    neutral = [draw(UNTREATED, judged, n)]
    neutral += [draw(name, judged, n, mask) for name, mask in masks.items()]
    if masks:
        neutral.append(draw(RANDOM, judged, n, random_like(next(iter(masks.values())), seed=protocol.seed)))
    neutral.append(draw(BALANCED, judged, n, oracle=BALANCED))
    neutral.append(draw(ALLOCATION, judged, n, oracle=ALLOCATION))
    other = with_seeds(protocol.prompts, protocol.seed + n, n)
    neutral.append(draw(OTHER, other, n))
    reference = draw(REFERENCE, other, n, oracle=ALLOCATION)

    grouped = []
    if m:
        rows = [
            {**row, "prompt": prompt, "wanted": group}
            for row in with_seeds(protocol.prompts, protocol.seed, m)
            for group, prompt in zip(axis.groups, group_prompts(row, axis), strict=True)
        ]
        by_group = Dataset.from_list(rows)
        grouped = [draw(UNTREATED, by_group, m)]
        grouped += [draw(name, by_group, m, mask, gate=False) for name, mask in masks.items()]
    experiment = Experiment(protocol, neutral, grouped, reference)
    experiment.results = summarise(experiment, list(masks))
    return experiment


def images_to_draw(protocol: Protocol, masks: int) -> int:
    """How many images `run` draws in all: the total of its progress."""
    neutral = len(protocol.prompts) * protocol.images * (5 + masks + (masks > 0))
    return neutral + len(protocol.prompts) * len(protocol.axis) * protocol.group_images * (1 + masks)


def _warm_up(denoiser: Denoiser, axis: Axis, rows: list[dict], protocol: Protocol) -> None:
    """Encode every prompt and draw one picture for nothing, so that the first arm does not pay for all of them."""
    for row in rows:
        denoiser.encode([row["prompt"], *group_prompts(row, axis)])
    sample(denoiser, rows[:1], [rows[0]["prompt"]], min(protocol.steps, 2), protocol.guidance)


def _draw(
    denoiser: Denoiser,
    reader: PortraitsReader,
    protocol: Protocol,
    name: str,
    samples: Dataset,
    count: int,
    treatment: Treatment | None,
    oracle: str,
    progress: Callable[[str, int], None] | None,
) -> Drawn:
    axis = protocol.axis
    columns = {each.name: group_columns(reader, each) for each in (axis, *protocol.others)}
    reads: dict[str, list[Tensor]] = {each: [] for each in columns}
    right, features, images, allotted = [], [], [], []
    seconds = 0.0
    with treatment or nullcontext():
        for start in range(0, len(samples), protocol.batch_size):
            rows = [samples[i] for i in range(start, min(start + protocol.batch_size, len(samples)))]
            prompts = [row["prompt"] for row in rows]
            conditional = None
            if oracle == ALLOCATION:
                prompts = allocation_prompts(axis, rows, protocol.target)
                allotted.append(torch.tensor([allotted_group(row, protocol.target) for row in rows]))
            elif oracle == BALANCED:
                conditional = balanced_oracle(denoiser, axis, rows)
            if treatment is not None:
                treatment.begin(rows)
                if treatment.mask.allocates:
                    groups = treatment.mask.groups
                    own = [groups.index(each) if isinstance(each, str) else -1 for each in treatment.allotment(rows)]
                    allotted.append(torch.tensor(own))
            began = time.perf_counter()
            pictures = sample(denoiser, rows, prompts, protocol.steps, protocol.guidance, conditional).cpu()
            seconds += time.perf_counter() - began
            seen = reader.read(pictures)
            for each, (head, order) in columns.items():
                reads[each].append(seen[head][:, order] / seen[head][:, order].sum(1, keepdim=True))
            features.append(reader.features(pictures))
            if "occupation" in seen:
                known = reader.classes["occupation"]
                wanted = torch.tensor([known.index(r["label"]) if r["label"] in known else -1 for r in rows])
                right.append(torch.where(wanted >= 0, (seen["occupation"].argmax(1) == wanted).float(), torch.nan))
            images.append((pictures * 255).round().to(torch.uint8))
            if progress is not None:
                progress(name, len(rows))

    def by_prompt(parts: list[Tensor]) -> Tensor:
        """Samples come seed by seed, and within a seed prompt by prompt."""
        return torch.cat(parts).unflatten(0, (count, -1)).transpose(0, 1).contiguous()

    occupation = by_prompt(right) if right else None
    if occupation is not None and occupation.isnan().all():
        occupation = None
    return Drawn(
        name,
        by_prompt(reads[axis.name]),
        occupation,
        by_prompt(features),
        by_prompt(images),
        seconds,
        {each.name: by_prompt(reads[each.name]) for each in protocol.others},
        by_prompt(allotted) if allotted else None,
    )
