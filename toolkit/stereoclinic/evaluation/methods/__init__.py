"""Comparators: published ways of making a model's pictures less stereotyped, each re-implemented from its paper.

One file each, and one row of `BASELINES`:

    prompt        the allotted group's word is written into the prompt
    conceptprune  weights that a group excites are set to zero           Chavhan et al. 2025
    uce           cross-attention keys and values edited in closed form  Gandikota et al. 2024
    h-space       a learned vector for each group, added at the mid block  Li et al. 2024
    equisteer     cross-attention outputs cleared of the axis, a group put back  Gaintseva et al. 2026
    icm           self-attention outputs moved along linear probes       Zaleska et al. 2026

    samples = calibration_samples(prompts, first=100, count=2, judged=range(5000, 5050))
    made = baseline_class("h-space").fit(model, axis, samples, Calibration(steps=20, guidance=2.0))
    with made:
        batch = made.begin(rows)
        draw(model, rows, steps, guidance, batch.prompts)

`kept.kept_baselines` makes several, for several ranks, and none twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from stereoclinic.evaluation.methods.baseline import Baseline
    from stereoclinic.evaluation.methods.oracles import PromptAllocation
    from stereoclinic.prompts.sets import Row


@dataclass(frozen=True)
class Entry:
    """Where a comparator lives; it is imported when it is asked for."""

    module: str
    name: str


BASELINES = {
    "prompt": Entry("oracles", "PromptAllocation"),
    "conceptprune": Entry("concept_prune", "ConceptPrune"),
    "uce": Entry("uce", "UnifiedConceptEditing"),
    "h-space": Entry("h_space", "HSpaceDirection"),
    "equisteer": Entry("equisteer", "EquiSteer"),
    "icm": Entry("icm", "ImplicitChoice"),
}


def check_names(names: Sequence[str]) -> None:
    """Raises InputError for a name that is no comparator's, or that is given twice; imports nothing."""
    for i, name in enumerate(names):
        if name not in BASELINES:
            raise InputError(f"baseline {name!r} is not known; choose from {', '.join(BASELINES)}")
        if name in names[:i]:
            raise InputError(f"baseline {name!r} is given twice")


def baseline_class(name: str) -> "type[Baseline] | type[PromptAllocation]":
    """The class of a comparator; raises InputError as `check_names`."""
    check_names([name])
    entry = BASELINES[name]
    found: type[Baseline] | type[PromptAllocation] = getattr(import_module(f"{__package__}.{entry.module}"), entry.name)
    return found


def calibration_samples(prompts: "Dataset", first: int, count: int, judged: range) -> "list[Row]":
    """Every prompt with seeds first, first + 1, ...

    Args:
        prompts: Neutral prompts.
        first: The first seed.
        count: Seeds a prompt.
        judged: Seeds that pictures are judged on.

    Raises:
        InputError: No seed, or one that is judged.
    """
    from stereoclinic.prompts.sets import with_seeds

    if count < 1:
        raise InputError(f"{count} calibration seeds: expected 1 or more")
    if both := sorted(set(range(first, first + count)) & set(judged)):
        raise InputError(f"seed {both[0]} is judged, and cannot be calibrated on as well; give another first seed")
    return list(with_seeds(prompts, first, count))
