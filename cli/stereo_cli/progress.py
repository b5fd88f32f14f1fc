"""How far a command is: a bar on a terminal, lines elsewhere; and what is left of it when it is cut off."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from stereo_cli.common import is_rank_zero, stderr, warn
from stereoclinic.io.text import printable


class Advance(Protocol):
    """What `progress_bar` yields."""

    def __call__(self, count: int, description: str = "") -> None: ...


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


def refuse_left_over(place: Path, resume: bool) -> None:
    """What a run leaves behind that was cut off is gone on with when that is asked for, and never passed over.

    Raises:
        InputError: There is something, and it was not asked for.
    """
    from stereoclinic.errors import InputError

    if place.exists() and not resume:
        raise InputError(
            f"{place} holds what was done by a run that was cut off; go on with it by --resume, or remove it to start"
            " anew"
        )


@contextmanager
def says_what_is_kept(place: Path) -> Iterator[None]:
    """Whatever stops a run, what it came to is not lost: say how to go on. It lies in a file or a folder of files."""
    try:
        yield
    except BaseException:
        if any(place.glob("*.safetensors")) or place.is_file():
            warn(f"{place} keeps what was done; the same command with --resume goes on with it")
        else:
            with suppress(OSError):  # the disk was full before the first of it was written
                place.rmdir()
        raise
