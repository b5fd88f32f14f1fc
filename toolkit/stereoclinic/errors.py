"""The errors that StereoClinic raises on purpose; the command line turns each into its exit code."""


class InputError(ValueError):
    """The user's input is at fault (exit code 2).

    The message is one line: the value that came, what was expected, and what to try next.
    """


class Incomplete(RuntimeError):
    """Work stopped before it was whole: a rank failed or samples are missing (exit code 3).

    What was finished is on disk, so the same command resumes.
    """


class UncoveredOperation(RuntimeError):
    """An operation that mixes its inputs has no relevance rule, so relevance would pass through it unseen."""
