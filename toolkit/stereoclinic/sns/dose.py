"""The dose: the smallest strength of a mask that brings the lean under a bound, found without drawing an image.

    left(strength) = mean over samples and treated steps of |S(x_t treated) - tau|

on the trajectory that is treated at that strength and guidance, by bisection. tau is 0, or for an image that is
allotted to group g the lean of f_g. The samples are calibration: confirm the result on others, with images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stereoclinic.ddtd.lean import check_told_apart, group_directions, lean
from stereoclinic.errors import InputError
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.conditions import Conditions
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, Samples
from stereoclinic.sns.allocate import on_axis
from stereoclinic.sns.linear import adjusted
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.policy import Treatment


@dataclass(frozen=True)
class Dose:
    """The result of a search."""

    strength: float  # the smallest tried that meets the bound
    left: float  # mean |lean - target| at that strength
    tried: list[tuple[float, float]]  # every strength with its mean |lean - target|, weakest first


def find_dose(
    model: Model,
    axis: Axis,
    samples: Samples,
    mask: NeuronMask,
    bound: float,
    steps: int,
    guidance: float,
    shares: Sequence[Mapping[str, float]] = (),
    batch_size: int = 36,
    resolution: float = 0.05,
    force: bool = False,
    progress: Callable[[float, float], None] | None = None,
) -> Dose:
    """Bisect the strength, assuming that more damping leaves less lean.

    Args:
        model: The pipeline.
        axis: The bias axis.
        samples: Calibration; evaluate on others.
        mask: The mask.
        bound: Largest mean |lean - target|; 0 to 1, say.
        steps: Of the scheduler, as it will be used.
        guidance: As it will be used.
        shares: Of an allocating mask, see `shares_of`.
        batch_size: Samples through the model together.
        resolution: Largest error of the strength.
        force: As in `suppress`.
        progress: Called with each strength and its mean |lean - target|.

    Raises:
        InputError: The mask does not meet the bound at full strength (says what it leaves), or as `lean_left`.
    """
    if not 0 < resolution <= 1 or not bound >= 0:
        raise InputError(f"bound {bound:g}, resolution {resolution:g}: expected a bound of 0 or more, and 0 to 1")
    tried: dict[float, float] = {}
    portions = AdaptiveBatch(batch_size)

    def left(strength: float) -> float:
        leans = lean_left(model, axis, samples, mask, strength, steps, guidance, shares, force=force, portions=portions)
        tried[strength] = leans.mean().item()
        if progress is not None:
            progress(strength, tried[strength])
        return tried[strength]

    weak, strong = 0.0, 1.0
    if left(weak) <= bound:
        strong = 0.0
    elif left(strong) > bound:
        raise InputError(
            f"at full strength the mask leaves a mean |lean - target| of {tried[1.0]:.3f} ({tried[0.0]:.3f} untreated),"
            f" above {bound:g}; plan a stronger one (a lower --mu), or ask for less"
        )
    while strong - weak > resolution:
        middle = (weak + strong) / 2
        weak, strong = (weak, middle) if left(middle) <= bound else (middle, strong)
    return Dose(strong, tried[strong], sorted(tried.items()))


def dosed(mask: NeuronMask, found: Dose, bound: float, samples: Samples) -> NeuronMask:
    """The mask at the strength that was found; `metadata["dose"]` records how, on which seeds, and an earlier dose."""
    about = {"bound": bound, "strength": found.strength, "left": found.left, "seeds": samples.about()["seeds"]}
    if earlier := mask.metadata.get("dose"):
        about["earlier"] = earlier
    made = adjusted(mask, found.strength)
    return replace(made, metadata={**made.metadata, "dose": about})


@torch.no_grad()
def lean_left(
    model: Model,
    axis: Axis,
    samples: Samples,
    mask: NeuronMask,
    strength: float,
    steps: int,
    guidance: float,
    shares: Sequence[Mapping[str, float]] = (),
    batch_size: int = 36,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
    portions: AdaptiveBatch | None = None,
) -> Tensor:
    """(samples,) mean |lean - target| over groups and the steps that the mask treats, on the treated trajectory.

    `progress` is called with the number of samples of each treated step; `portions` halves a batch that does not fit in
    memory, and is reused.

    Raises:
        InputError: The mask treats no step of the sampler, or allots groups of another axis, or predictions have no
            lean, see `check_told_apart`.
    """
    rows: list[dict[str, Any]] = list(samples)
    timesteps = schedule_of(model, steps, guidance).timesteps
    treated = [i for i, t in enumerate(timesteps) if _treats(mask, t)]
    numbers = dict(zip(mask.groups, on_axis(mask.groups, axis), strict=True))
    if -1 in numbers.values():
        raise InputError(
            f"the mask allots {', '.join(mask.groups)}, not the groups of axis {axis.name} ({', '.join(axis.groups)});"
            " give the axis that it was made for"
        )
    if not treated:
        raise InputError(f"the mask treats none of the sampler's {steps} steps; give more --steps, or another mask")

    def left(batch: slice) -> Tensor:
        part, total = rows[batch], torch.zeros(len(rows[batch]))
        treatment = Treatment(model, mask, (), strength, shares, force=force)
        goals = [numbers[name] if isinstance(name, str) else None for name in treatment.begin(part)]

        def visit(call: Call) -> None:
            if call.step in treated:
                total.add_(_distances(call, groups, part, goals))
                if progress is not None:
                    progress(len(part))

        with treatment:
            walk = Walk(model, part, steps, guidance, visit=visit, last=treated[-1] + 1)
            (groups,) = encode_groups(walk, part, [axis])
            walk.run()
        return total / len(treated)

    portions = portions or AdaptiveBatch(batch_size)
    return torch.cat(portions.each(left, len(rows)))


def _distances(call: Call, groups: list[Conditions], rows: list[Row], allotted: list[int | None]) -> Tensor:
    """(B,) mean over groups of |lean - target| at one step; `allotted` has each sample's group on the axis."""
    balanced, directions = group_directions(call.compare(groups))
    prediction = call.own()
    check_told_apart(prediction, directions, rows, call.timestep)
    goals = torch.stack([lean(balanced + direction, balanced, directions) for direction in directions])  # (K, K, B)
    targets = [torch.zeros_like(goals[0, :, b]) if k is None else goals[k, :, b] for b, k in enumerate(allotted)]
    return (lean(prediction, balanced, directions) - torch.stack(targets, 1)).abs().mean(0).cpu()


def _treats(mask: NeuronMask, timestep: float) -> bool:
    bin_ = mask.bin_of(timestep)
    return bin_ is not None and bool((mask.factors[..., bin_, :] < 1).any())
