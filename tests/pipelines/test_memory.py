"""Out of memory: every sample is computed once, whatever fits, and the user is told once."""

import pytest
import torch

from stereoclinic.errors import InputError
from stereoclinic.pipelines.memory import AdaptiveBatch, is_out_of_memory

SAYS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    MemoryError(),
]


class Device:
    """Takes so many samples at a time."""

    def __init__(self, fits: int, error: BaseException = SAYS[0]) -> None:
        self.fits, self.error, self.asked = fits, error, []

    def __call__(self, part: slice) -> list[int]:
        own = list(range(100))[part]
        self.asked.append(len(own))
        if len(own) > self.fits:
            raise self.error
        return own


@pytest.mark.parametrize("samples", [1, 5, 16])
@pytest.mark.parametrize("fits", [1, 3, 16])
@pytest.mark.parametrize("error", SAYS, ids=lambda error: type(error).__name__)
def test_every_sample_is_computed_once_and_in_order(samples: int, fits: int, error: BaseException) -> None:
    said: list[str] = []
    parts = AdaptiveBatch(warn=said.append).each(Device(fits, error), samples)
    assert [i for part in parts for i in part] == list(range(samples))
    assert len(said) == (samples > fits)


def test_what_was_learnt_holds_for_the_rest_of_the_run_and_is_said_once() -> None:
    said: list[str] = []
    portions, device = AdaptiveBatch(warn=said.append), Device(5)
    portions.each(device, 16)
    assert device.asked == [16, 8, 4, 4, 4, 4]
    device.asked.clear()
    portions.each(device, 16)
    assert device.asked == [4, 4, 4, 4]
    device.fits = 2  # something else took memory
    portions.each(device, 16)
    assert said == ["16 samples at a time do not fit in memory; going on with 4"]


def test_a_sample_that_does_not_fit_is_a_clear_error() -> None:
    with pytest.raises(InputError, match=r"a single sample does not fit in memory \(CUDA out of memory"):
        AdaptiveBatch().each(Device(0), 16)


@pytest.mark.parametrize("error", [RuntimeError("expected scalar type Half"), ValueError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    device = Device(0, error)
    with pytest.raises(type(error)):
        AdaptiveBatch().each(device, 16)
    assert device.asked == [16]
