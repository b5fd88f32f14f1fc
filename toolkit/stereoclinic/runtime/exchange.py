"""What ranks that share a computation exchange: every rank has its own samples, and all decide alike."""

from collections.abc import Sequence
from typing import TypeVar

import lightning as L
import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

T = TypeVar("T")


class Ranks:
    """The ranks of a module's trainer; without a module, one process alone.

    Args:
        module: Whose `predict_step` runs.
        numbers: The numbers of this rank's samples.

    Attributes:
        first: Whether this is the first rank.
    """

    def __init__(self, module: L.LightningModule | None = None, numbers: Sequence[int] = ()) -> None:
        self._module = None if module is None or module.trainer.world_size == 1 else module
        self.first = module is None or module.global_rank == 0
        self._order: Tensor | None = None
        if self._module is not None:
            self._order = self.gather(torch.tensor(numbers)).argsort()

    def gather(self, own: Tensor) -> Tensor:
        """(own samples, ...) to (all samples, ...), on the CPU, in the order of the samples.

        Sums over samples are then the same, bit for bit, on any number of ranks.
        """
        if self._module is None:
            return own.cpu()
        gathered = torch.cat(gather_all_tensors(own.to(self._module.device).contiguous())).cpu()
        return gathered if self._order is None else gathered[self._order]

    def agree(self, value: T) -> T:
        """The first rank's value, plain or on the CPU: rounding could make ranks decide differently."""
        if self._module is None:
            return value
        agreed: T = self._module.trainer.strategy.broadcast(value)
        return agreed
