"""Prompt allocation: the allotted group's word is written into the prompt, the way that practice goes.

    "a photo of a doctor"  ->  "a photo of a female doctor"      for an image allotted to "female"

This is the allocation oracle with the one thing that a user would insist on: a prompt that names a group already is
left as it is. On neutral prompts the two draw the same pictures. What the oracle bounds is what can be reached without
touching the prompt; as a comparator it is allowed to touch it, and is as good as the model's obedience to group words.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.digest import plain_digest
from stereoclinic.evaluation.baselines.calibration import Calibration, Cost, Progress
from stereoclinic.evaluation.bench.mitigation import Batch
from stereoclinic.evaluation.bench.oracles import AllocationOracle
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts import Row
from stereoclinic.sns.allocate import shares_of
from stereoclinic.sns.gate import is_neutral


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
