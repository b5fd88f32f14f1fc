"""The errors that StereoClinic raises; the command line turns each into its exit code."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """The input is invalid (exit code 2).

    The message is one line: the value that came, what was expected, and what to try next.
    """


class Incomplete(RuntimeError):
    """Work stopped early: a rank failed or samples are missing (exit code 3). No result was written; run it again."""


class UncoveredOperation(RuntimeError):
    """An operation that mixes its inputs has no relevance rule, so relevance would be wrong (exit code 2)."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; an InputError becomes one line on stderr and exit code 2, as in `stereo`."""
    try:
        main()
    except InputError as error:
        print(_plain(str(error)), file=sys.stderr)
        raise SystemExit(2) from None


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to be part of one line of ours."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return _plain(line)


def _plain(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)
