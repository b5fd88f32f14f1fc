"""What a figure is computed from: one arm of an experiment, and what several figures of it share."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stereoclinic.evaluation.arms import ALLOCATION, OTHER, Drawn, Experiment
from stereoclinic.statistics.agreement import agreement_figures
from stereoclinic.statistics.distances import frechet_within_groups, within_groups_ratio
from stereoclinic.statistics.intervals import Interval, PairedDifference
from stereoclinic.statistics.resampling import Noise, noise_of

DRAWS = 600  # of the interval of a gap


@dataclass(frozen=True)
class Case:
    """One arm.

    Args:
        arm: What is measured.
        before: The untreated arm of the same prompts.
        distant: The untreated arm on other seeds; None where it was not drawn.
        experiment: All of them.
        change: Change of the parity gap from `before`; None for `before`, `distant`, and prompts without a gap.
        ceiling: The same of the balanced oracle.
        hard: Count each image's top group rather than average probabilities.
        pooled: Pool the prompts.
    """

    arm: Drawn
    before: Drawn
    distant: Drawn | None
    experiment: Experiment
    change: PairedDifference | None = None
    ceiling: PairedDifference | None = None
    hard: bool = True
    pooled: bool = False

    @property
    def target(self) -> Tensor:
        """(K,) shares that every gap is measured to."""
        return self.experiment.protocol.target

    @property
    def paired(self) -> Drawn | None:
        """The untreated arm where it has the same seeds; None for itself and for other seeds."""
        return None if self.arm is self.before or self.arm is self.distant else self.before

    def noise(self, target: Tensor | None, draws: int = DRAWS) -> Noise:
        """What chance does to the shares of this arm."""
        return noise_of(self.arm.reads, target, self.hard, self.pooled, draws, torch.Generator().manual_seed(0))

    @cached_property
    def usual_noise(self) -> Noise:
        return self.noise(self.target)

    @cached_property
    def agreement(self) -> dict[str, Any]:
        """How several readers agree; empty where there is one."""
        arm = self.arm
        return agreement_figures(arm.by_reader, self.experiment.protocol.axis.groups) if arm.by_reader else {}

    @cached_property
    def within_groups(self) -> tuple[float, float, Interval | None] | None:
        """Distance to untreated images of the same groups, its sampling noise, and their ratio.

        None where there is nothing to compare with. The arm on other seeds shares them with the reference, which
        brings it closer than two samples are.
        """
        oracle, reference = self.experiment.arm(ALLOCATION), self.experiment.reference
        if reference is None or oracle.allotted is None or reference.allotted is None or self.arm.name == OTHER:
            return None
        groups = len(self.experiment.protocol.axis)
        named = (self.arm, self.arm.reads.argmax(2)), (reference, reference.allotted), (oracle, oracle.allotted)
        arm, others, fair = ((drawn.features, cells(group, groups)) for drawn, group in named)
        flat = [(features.flatten(0, 1), numbers.flatten()) for features, numbers in (arm, others, fair)]
        number = len(self.arm.reads) * groups
        distance, noise = frechet_within_groups(flat[0], flat[1], flat[2], number)
        if distance != distance:
            return None
        return distance, noise, within_groups_ratio(arm, others, fair, number)


def cells(group: Tensor, groups: int) -> Tensor:
    """(P, n) group of each image -> (P, n) number of its prompt x group."""
    return torch.arange(len(group))[:, None] * groups + group
