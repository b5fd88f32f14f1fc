"""What every metric here is a shell of: sums in double precision whose size does not grow with the images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class Sums(Metric):
    """A metric whose states are added up over batches and ranks, so the result of several ranks is that of one."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, **sizes: tuple[int, ...]) -> None:
        """Adds a state of zeros for each name and size."""
        super().__init__()
        for name, size in sizes.items():
            self.add_state(name, default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Lets the states change device but not type.

        torchmetrics guards them against ``half()``, but not against ``to(torch.bfloat16)``, which is what a
        trainer in half precision calls on everything inside it; counts above 256 would then stop growing.
        """
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)
