"""The errors that StereoClinic raises; the command line turns each into its exit code."""


class InputError(ValueError):
    """The input is invalid (exit code 2).

    The message is one line: the value that came, what was expected, and what to try next.
    """


class Incomplete(RuntimeError):
    """Work stopped early: a rank failed or samples are missing (exit code 3). No result was written; run it again."""


class UncoveredOperation(RuntimeError):
    """An operation that mixes its inputs has no relevance rule, so relevance would be wrong (exit code 2)."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to be part of one line of ours."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return "".join(each if each.isprintable() else "?" for each in line)
