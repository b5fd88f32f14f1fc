"""The two ceilings that any mask is measured beside.

The balanced oracle has no lean at all: within a window of steps its conditional prediction is the mean of the groups'.
No removal of lean can do better, and what it leaves is the model's own. The allocation oracle draws each image from its
allotted group's prompt: what a treatment that sets a distribution could reach.

Prompt allocation: the allotted group's word is written into the prompt, the way that practice goes.

    "a photo of a doctor"  ->  "a photo of a female doctor"      for an image allotted to "female"

This is the allocation oracle with the one thing that a user would insist on: a prompt that names a group already is
left as it is. On neutral prompts the two draw the same pictures. What the oracle bounds is what can be reached without
touching the prompt; as a comparator it is allowed to touch it, and is as good as the model's obedience to group words.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stereoclinic.evaluation.arms import ALLOCATION, BALANCED
from stereoclinic.evaluation.methods.base import Batch, Mitigation
from stereoclinic.evaluation.methods.calibration import Calibration, Cost, Progress
from stereoclinic.io.digest import plain_digest
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.watch import Visit, Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, group_prompts
from stereoclinic.sns.allocate import allotted_group, shares_of, uniform
from stereoclinic.sns.policy import is_neutral


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


class PromptAllocation(AllocationOracle):
    """The allocation oracle behind a gate; nothing is calibrated.

    Args:
        axis: The bias axis.
        shares: (K,) of the groups; uniform by default.
    """

    title: ClassVar[str] = "prompt allocation"
    source: ClassVar[str] = "practice"
    by_prompt: ClassVar[bool] = False
    needs = "group words in prompts"

    def __init__(self, axis: Axis, shares: Tensor | None = None) -> None:
        super().__init__(axis, shares)
        self.name, self.cost, self.strength = self.title, Cost(), 1.0

    @classmethod
    def fit(
        cls,
        model: Model,
        axis: Axis,
        samples: Sequence[Row],
        calibration: Calibration,
        progress: Progress | None = None,
        settings: Any = None,
    ) -> Self:
        """As every comparator's; of it all, only the shares matter here."""
        return cls(axis, shares_of(axis.groups, [calibration.shares] if calibration.shares else []))

    def key(self) -> str:
        return plain_digest([super().key(), "gated"])

    def begin(self, rows: list[Row]) -> Batch:
        written = super().begin(rows)
        assert written.allotted is not None
        own = torch.tensor([is_neutral(row["prompt"], self.axis) for row in rows])
        prompts = [
            prompt if neutral else row["prompt"]
            for row, prompt, neutral in zip(rows, written.prompts, own.tolist(), strict=True)
        ]
        return Batch(prompts, allotted=torch.where(own, written.allotted, -1))
