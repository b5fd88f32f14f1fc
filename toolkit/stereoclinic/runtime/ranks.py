"""All ranks end together, with one line that gives the reason, and a dead rank fails the run.

Lightning starts the other ranks as processes of the first. When one of them dies it kills the first by -9, which can
then say nothing; when the first is killed, the others are not told. Both are watched for here.

torchrun would not do: after `kill -9` of its agent three workers were still running 20 s later, and after `kill -9` of
a rank it ended with exit code 1 (here a limit that was exceeded) and 49 lines. Tried with torch 2.13.0 over gloo.
"""

import os
import signal
import sys
import threading
import time
from subprocess import Popen
from typing import Any

_EVERY = 0.2  # seconds
_started: list[Popen[bytes]] = []


def is_rank_zero() -> bool:
    """False in the processes that Lightning, torchrun or SLURM started beside the first."""
    ranks = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def watch(rank_zero: bool, incomplete: int) -> None:
    """Watch, from a thread that ends with the process, for the end of the ranks that this one depends on.

    Args:
        rank_zero: Whether this is the first rank, which starts the others.
        incomplete: The exit code of a job that lost a rank.
    """
    if any(thread.name == "stereo-ranks" for thread in threading.enumerate()):
        return
    follow = _watch_ranks if rank_zero else _watch_launcher
    threading.Thread(target=follow, args=(incomplete, os.getppid()), daemon=True, name="stereo-ranks").start()


def lost() -> str | None:
    """A line on the first of the other ranks that was killed; None while there is none."""
    for number, process in enumerate(_started, start=1):
        code = process.poll()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"rank {number} was killed ({name}; without a reason of yours, memory ran out); run again"
    return None


def _watch_launcher(incomplete: int, launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_EVERY)
    os._exit(incomplete)  # a rank that waits for the others hears of nothing else


def _watch_ranks(incomplete: int, _: int) -> None:
    failed: float | None = None
    while True:
        time.sleep(_EVERY)
        _take_over()
        if (line := lost()) is not None:
            _end(incomplete, line)
        codes = [code for process in _started if (code := process.poll())]
        failed = (failed or time.monotonic()) if codes else None
        # It has said why itself. Most often this rank comes to the same end, and is given time for it.
        if failed is not None and time.monotonic() - failed > 10:
            _end(codes[0] if codes[0] > 1 else incomplete, None)


def _take_over() -> None:
    """The processes that Lightning started, from the thread by which it watches them; it is left with none."""
    for thread in threading.enumerate():
        processes: Any = getattr(thread, "_child_processes", None)
        if thread.name == "child-process-observer" and processes:
            _started[:] = processes
            thread._child_processes = []  # type: ignore[attr-defined]


def _end(code: int, line: str | None) -> None:
    for process in _started:
        process.kill()
    if line is not None:
        print(f"stereo: {line}", file=sys.stderr, flush=True)
    os._exit(code)
