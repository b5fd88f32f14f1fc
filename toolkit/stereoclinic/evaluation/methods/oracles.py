"""The two oracles: treatments that use the group prompts themselves.

The balanced oracle has no lean: its conditional prediction is the mean over the groups' prompts. It is a reference, no
bound: no lean is not parity, so a balancing mask can leave a smaller gap. The allocation oracle draws each image from
its allotted group's prompt: the upper bound of an allocating mask.
"""

from dataclasses import asdict

import torch
from torch import Tensor

from stereoclinic.evaluation.arms import ALLOCATION, BALANCED
from stereoclinic.evaluation.methods.base import Batch, Mitigation
from stereoclinic.io.digest import plain_digest
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.watch import Visit, Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, group_prompts
from stereoclinic.sns.allocate import allotted_group, uniform


class _Oracle(Mitigation):
    """An oracle of an axis; its images depend on the groups' prompts."""

    def __init__(self, name: str, axis: Axis) -> None:
        super().__init__(name)
        self.axis = axis

    def texts(self, row: Row) -> list[str]:
        return group_prompts(row, self.axis)


class BalancedOracle(_Oracle):
    """The conditional prediction is the mean over the groups' prompts.

    Args:
        axis: The bias axis.
        window: Steps at which it is, as shares of the run from its start.
    """

    def __init__(self, axis: Axis, window: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__(BALANCED, axis)
        self.window = window

    def key(self) -> str:
        return plain_digest([BALANCED, asdict(self.axis), self.window])

    def begin(self, rows: list[Row]) -> Batch:
        return Batch([row["prompt"] for row in rows], lambda walk: balanced(walk, self.axis, self.window))


class AllocationOracle(_Oracle):
    """Each image is drawn from the prompt of its allotted group.

    Args:
        axis: The bias axis.
        shares: (K,) of the groups; uniform by default.
    """

    needs = "group words in prompts"

    def __init__(self, axis: Axis, shares: Tensor | None = None) -> None:
        super().__init__(ALLOCATION, axis)
        self.shares = uniform(len(axis)) if shares is None else shares

    def key(self) -> str:
        return plain_digest([ALLOCATION, asdict(self.axis), self.shares.tolist()])

    def begin(self, rows: list[Row]) -> Batch:
        allotted = torch.tensor([allotted_group(row, self.shares) for row in rows])
        return Batch(allocation_prompts(self.axis, rows, self.shares), allotted=allotted)


def balanced(walk: Walk, axis: Axis, window: tuple[float, float] = (0.0, 1.0)) -> Visit:
    """A visit that replaces the conditional prediction by the mean over groups, within a window of the run."""
    (groups,) = encode_groups(walk, walk.rows, [axis])
    steps = len(schedule_of(walk.model, walk.steps, walk.guidance).timesteps)

    def visit(call: Call) -> None:
        if window[0] <= call.step / steps < window[1]:
            parts = [torch.cat(walk.portions.each(lambda own: call.predict(each, own), call.count)) for each in groups]  # noqa: B023
            call.reply = torch.stack(parts).mean(0)

    return visit


def allocation_prompts(axis: Axis, rows: list[Row], shares: Tensor | None = None) -> list[str]:
    """The prompt of each row's allotted group; uniform shares unless given."""
    shares = uniform(len(axis)) if shares is None else shares
    return [group_prompts(row, axis)[allotted_group(row, shares)] for row in rows]
