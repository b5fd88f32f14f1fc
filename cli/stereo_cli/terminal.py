"""What is printed: consoles for tables, lines for the rest, from the first rank alone; and exit codes."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO, cast

import typer
from rich.console import Console
from rich.text import Text

from stereoclinic.io.text import printable
from stereoclinic.runtime.ranks import is_rank_zero

FAILED, BAD_INPUT, INCOMPLETE, FAULT, INTERRUPTED = 1, 2, 3, 70, 130


class PlainConsole(Console):
    """Lays out plain texts as they were written: in a name, nothing is markup, and nothing is obeyed by a terminal.

    What is to have a style is a `Text`, made of `printable` text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every plain text that is printed or measured comes through here."""
        return super().render_str(printable(text), **options)


def stdout() -> PlainConsole:
    """In a pipe or file, which have no width, tables get the 110 columns that they are laid out for."""
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return PlainConsole(quiet=not is_rank_zero(), width=None if wide else 110)


def say(text: str) -> None:
    """A line on stdout, not wrapped."""
    if is_rank_zero():
        print(printable(text))


def warn(text: str) -> None:
    """A line on stderr about something that stops nothing; from every rank, for each speaks of its own samples."""
    print(f"stereo: {_line(text)}", file=sys.stderr)


def note(text: str) -> None:
    """A line on stderr, from the first rank alone, about what the results may depend on."""
    if is_rank_zero():
        print(f"note: {_line(text)}", file=sys.stderr)


def _line(text: str) -> str:
    """Text in one line; other libraries break theirs."""
    return printable(" ".join(filter(None, map(str.strip, text.split("\n")))))


def stderr() -> PlainConsole:
    return PlainConsole(stderr=True, quiet=not is_rank_zero())


class _Lasting:
    """A stream that may be closed, by `| head` say, while the command continues to its own exit code."""

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, io.TextIOWrapper):  # not every terminal and pipe can show every sign
            stream.reconfigure(errors="replace")
        self._stream = stream
        #: What else stopped it, such as a full disk: what was printed is not all there.
        self.fault: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.fault = self.fault or error
            # What is left in its buffer would fail again when Python ends, and change the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def lasting_streams() -> Iterator[None]:
    """A closed stdout or stderr stops nothing; a stdout that could not take all that was printed is told at the end."""
    lasting = [_Lasting(stream or io.StringIO()) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(cast(TextIO, lasting[0])), redirect_stderr(cast(TextIO, lasting[1])):
        try:
            yield
        finally:
            for each in lasting:
                each.flush()
        if (fault := lasting[0].fault) is not None:
            fail(f"stdout cannot be written ({fault.strerror}); make room, or send it elsewhere", BAD_INPUT)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and out."""
    # plain print: rich would wrap the line and read brackets in a user's file name as markup
    print(f"stereo: {_line(message)}", file=sys.stderr)
    raise typer.Exit(code)


def print_json(data: Any) -> None:
    from stereoclinic.io.files import plain

    if is_rank_zero():
        print(json.dumps(plain(data), indent=2, allow_nan=False))
