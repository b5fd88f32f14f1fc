"""How far a command is: a bar on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from stereo_cli.terminal import note, stderr, warn
from stereoclinic.calls.work import Advance, Reporter
from stereoclinic.io.text import printable
from stereoclinic.runtime.ranks import is_rank_zero

if TYPE_CHECKING:
    from rich.progress import Progress


class _Count:
    """How much is done; it stops at the total."""

    def __init__(self, total: int | None) -> None:
        self.total, self.done, self.began = total, 0, time.monotonic()

    def add(self, count: int) -> int:
        """Count more as done; returns how much of it was below the total."""
        added = count if self.total is None else min(count, self.total - self.done)
        self.done += added
        return added


@contextmanager
def progress_bar(total: int | None, what: str, quiet: bool) -> Iterator[Advance]:
    """A bar on stderr; yields `advance(count, description)`. Not a terminal: a line each tenth of the way.

    It stops at the total: the first rank speaks for all, and may have a sample more than the others. Of a stream no
    total is known: the bar then counts and gives the rate, and a line comes each time that twice as much is done.
    """
    if quiet or not is_rank_zero():
        yield lambda count, description="": None
    elif not stderr().is_terminal:
        yield _lines(_Count(total), what)
    else:
        with _bar() as bar:
            task, counted = bar.add_task(printable(what), total=total), _Count(total)

            def move(count: int, description: str = "") -> None:
                bar.update(task, advance=counted.add(count), description=printable(description or what))

            yield move


def _lines(counted: _Count, what: str) -> Advance:
    """Ten lines in all, or one for each doubling where the total is not known."""
    total = counted.total

    def due() -> int:
        return counted.done.bit_length() if total is None else counted.done * 10 // max(total, 1)

    def line(count: int, description: str = "") -> None:
        before = due()
        counted.add(count)
        if due() > before:
            done = counted.done
            rate = done / max(time.monotonic() - counted.began, 1e-3)
            of = "" if total is None else f" of {total}"
            left = "" if total is None else f", {(total - done) / rate:.0f} s left"
            stderr().print(f"{what}: {done}{of} {description}".rstrip() + f" ({rate:.3g}/s{left})")

    return line


def _bar() -> "Progress":
    """A bar with its rate and times."""
    from rich import progress
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            return Text(f"{task.speed:.3g}/s" if task.speed else "")

    columns = (
        progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), progress.MofNCompleteColumn(),
        Rate(), progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    return progress.Progress(*columns, console=stderr(), transient=True)


class TerminalReporter(Reporter):
    """Notes and warnings as lines on stderr, progress as a bar.

    Args:
        quiet: No progress.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def note(self, text: str) -> None:
        note(text)

    def status(self, text: str) -> None:
        if not self.quiet:
            stderr().print(text)

    def warn(self, text: str) -> None:
        warn(text)

    def progress(self, total: int | None, title: str) -> AbstractContextManager[Advance]:
        return progress_bar(total, title, self.quiet)
