"""How a call speaks while it runs: notes, warnings and progress.

A call in two halves: everything is checked first, then it is run, claims its files and keeps its progress.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

from stereoclinic.errors import InputError
from stereoclinic.runtime.ranks import is_rank_zero

_log = logging.getLogger("stereoclinic")


class Advance(Protocol):
    """Called with how much was done since the last time."""

    def __call__(self, count: int, description: str = "") -> None: ...


class Reporter:
    """Notes go to the logger `stereoclinic`, warnings to Python's own; no progress. The command line has its own."""

    def note(self, text: str) -> None:
        """Something that results may depend on."""
        _log.info(text)

    def status(self, text: str) -> None:
        """What is being done now; results do not depend on it."""
        _log.info(text)

    def warn(self, text: str) -> None:
        """Something that went wrong and stops nothing."""
        warnings.warn(text, stacklevel=3)

    def progress(self, total: int | None, title: str) -> AbstractContextManager[Advance]:
        """A stretch of work.

        Args:
            total: How much there is to do; None where that is not known.
            title: What is done.

        Returns:
            A context; what it yields is called as the work goes on.
        """
        return nullcontext(_nothing)


def _nothing(count: int, description: str = "") -> None:
    pass


@contextmanager
def claimed(reporter: Reporter, *places: Path) -> Iterator[None]:
    """Be the only run that writes these files and folders; the ranks of one job count as one.

    Raises:
        InputError: Another run writes there, or a folder cannot be made.
    """
    with ExitStack() as claims:
        if is_rank_zero():
            from stereoclinic.io.files import sole_writer

            for place in places:
                for line in claims.enter_context(sole_writer(place)):
                    reporter.note(line)
        yield


def refuse_left_over(file: Path, place: Path, resume: bool) -> None:
    """Refuse the progress of an interrupted run, unless `resume` is set.

    Args:
        file: What the run writes.
        place: Where its progress is.
        resume: Whether the progress is wanted.

    Raises:
        InputError: There is progress, of an interrupted run or of one that is still running.
    """
    if not place.exists() or resume:
        return
    with claimed(Reporter(), file, place):  # refused while another run is writing: its progress is no left-over
        raise InputError(
            f"{place} holds the progress of an interrupted run; continue it with --resume, or remove it to start anew"
        )


@contextmanager
def keeps_progress(place: Path | None, reporter: Reporter) -> Iterator[None]:
    """Where the work is interrupted, say where its progress is and how to continue."""
    try:
        yield
    except BaseException:
        if place is not None and (any(place.glob("*.safetensors")) or place.is_file()):
            reporter.warn(f"{place} keeps the progress; the same command with --resume continues it")
        elif place is not None:
            with suppress(OSError):  # an empty folder, or none
                place.rmdir()
        raise
