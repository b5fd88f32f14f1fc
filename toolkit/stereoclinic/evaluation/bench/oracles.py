"""The two ceilings that any mask is measured beside.

The balanced oracle has no lean at all: within a window of steps its conditional prediction is the mean of the groups'.
No removal of lean can do better, and what it leaves is the model's own. The allocation oracle draws each image from its
allotted group's prompt: what a treatment that sets a distribution could reach.
"""

from dataclasses import asdict

import torch
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.digest import plain_digest
from stereoclinic.evaluation.bench.arms import ALLOCATION, BALANCED
from stereoclinic.evaluation.bench.mitigation import Batch, Mitigation
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.watch import Visit, Walk, encode_groups
from stereoclinic.prompts import Row, group_prompts
from stereoclinic.sns.allocate import allotted_group, uniform


class BalancedOracle(Mitigation):
    """The conditional prediction is fbar within a window of the steps, and f outside.

    Args:
        axis: The bias axis.
        window: As shares of the run, from its start.
    """

    def __init__(self, axis: Axis, window: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__(BALANCED)
        self.axis, self.window = axis, window

    def key(self) -> str:
        return plain_digest([BALANCED, asdict(self.axis), self.window])

    def beside(self, row: Row) -> list[str]:
        return group_prompts(row, self.axis)

    def begin(self, rows: list[Row]) -> Batch:
        return Batch([row["prompt"] for row in rows], lambda walk: balanced(walk, self.axis, self.window))


class AllocationOracle(Mitigation):
    """Each image is drawn from the prompt of its allotted group.

    Args:
        axis: The bias axis.
        shares: (K,) of the groups; uniform by default.
    """

    needs = "group words in prompts"

    def __init__(self, axis: Axis, shares: Tensor | None = None) -> None:
        super().__init__(ALLOCATION)
        self.axis, self.shares = axis, uniform(len(axis)) if shares is None else shares

    def key(self) -> str:
        return plain_digest([ALLOCATION, asdict(self.axis), self.shares.tolist()])

    def beside(self, row: Row) -> list[str]:
        return group_prompts(row, self.axis)

    def begin(self, rows: list[Row]) -> Batch:
        allotted = torch.tensor([allotted_group(row, self.shares) for row in rows])
        return Batch(allocation_prompts(self.axis, rows, self.shares), allotted=allotted)


def balanced(walk: Walk, axis: Axis, window: tuple[float, float] = (0.0, 1.0)) -> Visit:
    """What makes the prediction for the prompts fbar inside the window (shares of the run), and leaves it outside."""
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
