"""`compare`: which figures of two results differ, by how much, and whether B is better or worse."""

from pathlib import Path
from typing import Any

from stereoclinic.evaluation.compare import compare_results
from stereoclinic.evaluation.results import Results


def compare(a: str | Path | Results, b: str | Path | Results) -> dict[str, Any]:
    """Compare two results of `evaluate`. This is `stereo compare`.

    Arms are compared by their names; a single mask on each side is compared even if the names differ.

    Args:
        a: A results.json, the folder that it is in, or what `evaluate` returned.
        b: The same.

    Returns:
        Plain data, see `evaluation.compare.compare_results`.

    Raises:
        InputError: One cannot be read, or they cannot be compared: another axis, shares, prompts or guidance scales.
    """
    first, second = (each if isinstance(each, Results) else Results.load(each) for each in (a, b))
    return compare_results(first.data, second.data)
