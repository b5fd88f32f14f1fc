"""Memory: how much there is, how much a run took, and smaller batches when it runs out."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import nn

from stereoclinic.errors import InputError, first_line

T = TypeVar("T")

# What torch says where it has no class for it: the CPU's allocator, MPS, and cuBLAS' and cuDNN's own workspaces.
_SAYS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def memory_of(device: torch.device) -> int:
    """Bytes that a device has; the machine's, where it has none of its own."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Peak:
    """The most bytes that tensors took on a GPU within a `with` block; None on a device that does not count them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *failure: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAYS)


@dataclass
class AdaptiveBatch:
    """How many samples go through the model together; a smaller number holds for the rest of a run.

    Args:
        most: Samples at a time; None for whole batches.
        warn: Called once with a line when a batch did not fit.
        parted: Whether a batch that does not fit may be split.
    """

    most: int | None = None
    warn: Callable[[str], None] = lambda text: None
    parted: bool = True
    _said: bool = False

    def each(self, compute: Callable[[slice], T], samples: int) -> list[T]:
        """`compute` of one portion after the other; a portion that runs out of memory is halved and computed again.

        What `compute` returns must not depend on the portions, and it must leave nothing behind when it fails.

        Raises:
            InputError: A single sample does not fit, or a batch that may not be split.
        """
        found: list[T] = []
        start, asked = 0, min(samples, self.most or samples)
        size = asked
        while start < samples:
            stop = min(start + size, samples)
            try:
                found.append(compute(slice(start, stop)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = first_line(error)
            else:
                start = stop
                continue
            # Out of the except block: the error's traceback holds on to every tensor of the failed pass.
            if not self.parted and stop - start > 1:
                raise InputError(
                    f"{stop - start} samples at a time do not fit in memory ({failed}); devices that share a model's"
                    " weights cannot use smaller batches individually; give a smaller --batch-size"
                )
            if stop - start == 1:
                raise InputError(
                    f"a single sample does not fit in memory ({failed}); try --precision bf16-mixed, a device with"
                    " more memory, or on a GPU attention slicing or gradient checkpointing of the denoiser"
                )
            self.most = size = (stop - start + 1) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if size < asked and not self._said:
            self._said = True
            self.warn(f"{asked} samples at a time do not fit in memory; going on with {size}")
        return found


def memory_needed(network: nn.Module, kept: int, batch: int) -> dict[str, int]:
    """Bytes of a relevance step: the weights, what a sample keeps for its backward pass, and both for a batch."""
    weights = sum(parameter.nbytes for parameter in network.parameters())
    return {
        "unet_weights": weights, "kept_by_a_sample": kept, "batch": batch, "batch_total": weights + batch * kept,
    }  # fmt: skip
