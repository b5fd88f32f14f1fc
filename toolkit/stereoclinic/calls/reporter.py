"""How a call speaks while it runs: notes, warnings and progress."""

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

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
