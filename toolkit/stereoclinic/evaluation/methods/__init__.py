"""Baselines: published ways of making a model's images less stereotyped, re-implemented from their papers.

    prompt        the allotted group's word is written into the prompt
    conceptprune  weights that a group excites are set to zero                Chavhan et al. 2025
    uce           cross-attention keys and values edited in closed form       Gandikota et al. 2024
    h-space       a learned vector for each group, added at the mid block     Li et al. 2024
    equisteer     cross-attention outputs cleared of the axis, a group put back  Gaintseva et al. 2026
    icm           self-attention outputs moved along linear probes            Zaleska et al. 2026

    samples = calibration_samples(prompts, first=100, count=2, judged=range(5000, 5050))
    baseline = baseline_class("h-space").fit(model, axis, samples, Calibration(steps=20, guidance=2.0))
    with baseline:
        batch = baseline.begin(rows)
        draw(model, rows, steps, guidance, batch.prompts)

A new baseline is a subclass of `Baseline` in a file of its own, and one row of `BASELINES`.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from stereoclinic.evaluation.methods.baseline import Baseline
    from stereoclinic.prompts.sets import Row

#: Name -> module and class, imported on use.
BASELINES = {
    "prompt": ("prompt", "PromptAllocation"),
    "conceptprune": ("concept_prune", "ConceptPrune"),
    "uce": ("uce", "UnifiedConceptEditing"),
    "h-space": ("h_space", "HSpaceDirection"),
    "equisteer": ("equisteer", "EquiSteer"),
    "icm": ("icm", "ImplicitChoice"),
}


def check_names(names: Sequence[str]) -> None:
    """Refuse an unknown baseline, or one that is given twice, with an InputError; imports nothing."""
    for i, name in enumerate(names):
        if name not in BASELINES:
            raise InputError(f"baseline {name!r} is not known; choose from {', '.join(BASELINES)}")
        if name in names[:i]:
            raise InputError(f"baseline {name!r} is given twice")


def baseline_class(name: str) -> "type[Baseline]":
    """The class of a baseline; raises InputError as `check_names`."""
    check_names([name])
    module, kind = BASELINES[name]
    found: type[Baseline] = getattr(import_module(f"{__package__}.{module}"), kind)
    return found


def calibration_samples(prompts: "Dataset", first: int, count: int, judged: range) -> "list[Row]":
    """Every prompt with seeds first, first + 1, ...

    Args:
        prompts: Neutral prompts.
        first: The first seed.
        count: Seeds per prompt.
        judged: Seeds that images are judged on.

    Raises:
        InputError: No seed, or one that is judged.
    """
    from stereoclinic.prompts.sets import with_seeds

    if count < 1:
        raise InputError(f"{count} calibration seeds: expected 1 or more")
    if both := sorted(set(range(first, first + count)) & set(judged)):
        raise InputError(f"seed {both[0]} is judged, and cannot be calibrated on as well; give another first seed")
    return list(with_seeds(prompts, first, count))
