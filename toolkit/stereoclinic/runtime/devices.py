"""Devices and ranks: which device a run takes, where a rank opens its model, and how many threads it has."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stereoclinic.errors import InputError

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def check_precision(name: str) -> None:
    """Refuse a precision that Lightning does not know, with an InputError."""
    if name not in PRECISIONS:
        raise InputError(f"--precision {name!r}: expected one of {', '.join(PRECISIONS)}")


def device_of(accelerator: str, float64: bool = False) -> str:
    """The device that a command runs on, by torch's name.

    Args:
        accelerator: As given; "auto" takes the best that is there.
        float64: The command adds up in double precision, which Apple's GPUs do not have.

    Raises:
        InputError: No such accelerator, it is not there, or it will not do.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator not in ACCELERATORS:
        raise InputError(f"--accelerator {accelerator!r}: expected one of {', '.join(ACCELERATORS)}")
    if float64:
        if accelerator == "mps":
            raise InputError("--accelerator mps: relevance is summed in float64, which mps does not have; give cpu")
        del there["mps"]
    if accelerator == "auto":
        return next(name for name, found in there.items() if found)
    device = "cuda" if accelerator == "gpu" else accelerator
    if not there[device]:
        found = ", ".join(name for name in there if there[name])
        raise InputError(f"--accelerator {accelerator}: torch finds none; choose one of {found}")
    return device


def devices_here(used: str) -> list[dict[str, Any]]:
    """What torch finds on this machine: name, what it is, bytes of memory, and whether `used` runs on it."""
    cores = f"{torch.get_num_threads()} threads, {os.cpu_count()} cores"
    found: list[tuple[str, str, int | None]] = [("cpu", cores, None)]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append((f"cuda:{i}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU; relevance is summed in float64, which it lacks", None))
    return [
        {"name": name, "what": what, "memory": memory, "used": name.split(":")[0] == used}
        for name, what, memory in found
    ]


def place_of(device: str, strategy: str = "auto") -> str:
    """Where a rank opens its model: on its own device, or on the CPU where the weights are to be shared out."""
    if device != "cuda" or strategy.startswith("fsdp"):
        return "cpu" if strategy.startswith("fsdp") else device
    number = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return f"cuda:{number % torch.cuda.device_count()}"


def check_whole_model(strategy: str) -> None:
    """Refuse, before any work is done, a strategy that shares weights out where images are drawn.

    Raises:
        InputError: It does; only `locate` can.
    """
    if strategy.startswith("fsdp"):
        raise InputError(
            f"--strategy {strategy}: only locate shares weights out; draw with ddp, and --dtype bfloat16 if need be"
        )


def hush_lightning() -> None:
    """Call after Lightning was imported: its import sets the level of its loggers."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def strategy_for(strategy: str, ranks: int) -> str:
    """Lightning's strategy: where none is asked for, ddp between several ranks."""
    return "ddp" if strategy == "auto" and ranks > 1 else strategy


@contextmanager
def threads_for(device: str, ranks: int) -> Iterator[None]:
    """Use one thread per rank when several ranks share a CPU; otherwise they slow each other down."""

    threads = torch.get_num_threads()
    if device == "cpu" and ranks > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
