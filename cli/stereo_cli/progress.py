"""How far a command is: a bar on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from stereo_cli.terminal import note, stderr, warn
from stereoclinic.calls.work import Advance, Reporter
from stereoclinic.io.text import printable
from stereoclinic.runtime.ranks import is_rank_zero


@contextmanager
def progress_bar(total: int | None, what: str, quiet: bool) -> Iterator[Advance]:
    """A bar on stderr; yields `advance(count, description)`. Not a terminal: a line each tenth of the way.

    It stops at the total: the first rank speaks for all, and may have a sample more than the others. Of a stream no
    total is known: the bar then counts and gives the rate, and a line comes each time that twice as much is done.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    console = stderr()
    if quiet or not is_rank_zero():

        def nothing(count: int, description: str = "") -> None:
            pass

        yield nothing
        return

    done, began = 0, time.monotonic()

    def capped(count: int) -> int:
        return count if total is None else min(count, total - done)

    if not console.is_terminal:

        def line(count: int, description: str = "") -> None:
            nonlocal done
            before, done = done, done + capped(count)
            # How many lines are due: ten in all, or one for each doubling.
            due = [n.bit_length() if total is None else n * 10 // max(total, 1) for n in (before, done)]
            if due[1] > due[0]:
                rate = done / max(time.monotonic() - began, 1e-3)
                of = "" if total is None else f" of {total}"
                left = "" if total is None else f", {(total - done) / rate:.0f} s left"
                console.print(f"{what}: {done}{of} {description}".rstrip() + f" ({rate:.3g}/s{left})")

        yield line
        return

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.3g}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), Rate(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(printable(what), total=total)

        def move(count: int, description: str = "") -> None:
            nonlocal done
            count = capped(count)
            done += count
            bar.update(task, advance=count, description=printable(description or what))

        yield move


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
