"""Mitigations: what an arm of an experiment does to the model while it draws.

with mitigation:
    batch = mitigation.begin(rows)
    draw(model, rows, steps, guidance, batch.prompts, batch.prepare)
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from stereoclinic.io.digest import plain_digest
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Visit, Walk
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row
from stereoclinic.sns.allocate import on_axis
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.policy import Treatment


@dataclass(frozen=True)
class Batch:
    """How the next images are drawn.

    Args:
        prompts: What each is conditioned on.
        prepare: Given the walk, what changes its predictions, see `pipelines.images.draw`.
        allotted: (B,) the group that each image was allotted to, -1 for none; None without allocation.
    """

    prompts: list[str]
    prepare: Callable[[Walk], Visit] | None = None
    allotted: Tensor | None = None


class Mitigation:
    """The base of all mitigations; by itself it leaves the model as it is.

    Args:
        name: Of the arm.
    """

    #: What it was made from: labels, training, images. Printed next to its figures.
    needs = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def key(self) -> str:
        """Identifies what it does to a model; images of the same key are drawn once and kept."""
        return type(self).__name__

    def texts(self, row: Row) -> list[str]:
        """Texts that an image depends on besides its own prompt."""
        return []

    def begin(self, rows: list[Row]) -> Batch:
        """Announce the next images, samples with `prompt` and `seed`."""
        return Batch([row["prompt"] for row in rows])

    def judged(self, allotted: Tensor | None, axis: Axis) -> Tensor | None:
        """The allotted groups as groups of the judged axis; None if none is of that axis."""
        return allotted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class Suppressed(Mitigation):
    """Stereotype Neuron Suppression by a mask; an allocating mask allots every image a group by its seed.

    Args:
        name: Of the arm.
        model: The pipeline.
        mask: What to damp.
        axes: Axes whose groups the gate looks for; with none, every prompt is treated.
        strength: Scales the damping, 0 to 1.
        shares: Of the groups, see `shares_of`.
        force: Accept a mask that was made for other weights, see `check_fits`.
    """

    needs = "prompts"

    def __init__(
        self,
        name: str,
        model: Model,
        mask: NeuronMask,
        axes: Sequence[Axis] = (),
        strength: float = 1.0,
        shares: Sequence[dict[str, float]] = (),
        force: bool = False,
    ) -> None:
        super().__init__(name)
        self.treatment = Treatment(model, mask, axes, strength, shares, force=force)
        self.strength = strength

    def key(self) -> str:
        mask, shares = self.treatment.mask, self.treatment.shares
        about: dict[str, Any] = {
            "sites": [(site.name, site.width) for site in mask.sites],
            "branch": mask.branch,
            "groups": mask.groups,
            "strength": self.strength,
            "shares": None if shares is None else shares.tolist(),
            "gate": [asdict(axis) for axis in self.treatment.axes],
        }
        tensors = [mask.factors, mask.bin_edges] + ([] if mask.roots is None else [mask.roots])
        return plain_digest(about, *tensors)

    def begin(self, rows: list[Row]) -> Batch:
        named, groups = self.treatment.begin(rows), self.treatment.mask.groups
        allotted = None
        if groups:
            allotted = torch.tensor([groups.index(each) if isinstance(each, str) else -1 for each in named])
        return Batch([row["prompt"] for row in rows], allotted=allotted)

    def judged(self, allotted: Tensor | None, axis: Axis) -> Tensor | None:
        numbers = on_axis(self.treatment.mask.groups, axis)
        if allotted is None or max(numbers) < 0:
            return None
        return torch.tensor([*numbers, -1])[allotted]  # -1, the last, stays -1

    def __enter__(self) -> Self:
        self.treatment.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.treatment.__exit__(*error)
