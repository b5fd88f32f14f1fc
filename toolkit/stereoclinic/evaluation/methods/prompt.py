"""Prompt allocation: the allotted group's word is written into the prompt, as practice has it.

    "a photo of a doctor"  ->  "a photo of a female doctor"      for an image allotted to "female"

This is the allocation oracle, except that a prompt that names a group already is left as it is. It is as good as the
model's obedience to group words.
"""

from dataclasses import asdict
from typing import Self

import torch

from stereoclinic.evaluation.methods.base import Batch
from stereoclinic.evaluation.methods.baseline import Baseline
from stereoclinic.evaluation.methods.calibration import Run
from stereoclinic.evaluation.methods.oracles import allocation_prompts
from stereoclinic.io.digest import plain_digest
from stereoclinic.prompts.sets import Row, group_prompts
from stereoclinic.sns.allocate import allotted_group
from stereoclinic.sns.policy import is_neutral


class PromptAllocation(Baseline):
    """Arguments as of `Baseline`; nothing is calibrated."""

    title, source = "prompt allocation", "practice"
    needs = "group words in prompts"

    @classmethod
    def _fit(cls, run: Run, settings: None) -> Self:
        return cls(run.model, run.axis, run.target, 1.0)

    def key(self) -> str:
        return plain_digest([super().key(), asdict(self.axis)])

    def texts(self, row: Row) -> list[str]:
        return group_prompts(row, self.axis)

    def begin(self, rows: list[Row]) -> Batch:
        allotted = torch.tensor([allotted_group(row, self.target) for row in rows])
        neutral = torch.tensor([is_neutral(row["prompt"], self.axis) for row in rows])
        written = zip(rows, allocation_prompts(self.axis, rows, self.target), neutral.tolist(), strict=True)
        prompts = [prompt if own else row["prompt"] for row, prompt, own in written]
        return Batch(prompts, allotted=torch.where(neutral, allotted, -1))
