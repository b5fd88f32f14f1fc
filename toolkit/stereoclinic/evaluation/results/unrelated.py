"""What a treatment does to prompts that have nothing to do with its axis: a mountain should stay that mountain.

Every figure stands beside what other seeds of the untreated model show. Of pictures of one seed that is how far apart
two seeds are; of sets of pictures, how far apart two samples are.
"""

from typing import Any

import torch
from torch import Tensor

from stereoclinic.evaluation.bench.arms import OTHER, UNTREATED, Drawn, Experiment
from stereoclinic.evaluation.metrics.per_image import mean_interval
from stereoclinic.evaluation.results.side_effects import asked_for, distances
from stereoclinic.prompts import write
from stereoclinic.sns.gate import is_neutral


def unrelated_figures(experiment: Experiment) -> dict[str, Any]:
    """Figures of the unrelated prompts as plain data: `prompts`, how they were drawn, and by arm what became of them.

    `left_alone` counts the prompts that the gate leaves alone, for they name a group; they cannot change.
    """
    protocol, arms = experiment.protocol, {arm.name: arm for arm in experiment.unrelated}
    assert protocol.unrelated is not None
    prompts, n = [write(row) for row in protocol.unrelated], protocol.unrelated_images
    seeds = arms[UNTREATED].seeds_from(protocol.seed)
    return {
        "prompts": prompts,
        "left_alone": sum(not is_neutral(prompt, protocol.axis) for prompt in prompts),
        "images_per_prompt": n,
        "seeds": [seeds[0], seeds[-1]],
        "arms": {name: _arm(arm, arms[UNTREATED], arms[OTHER]) for name, arm in arms.items()},
    }


def _arm(arm: Drawn, before: Drawn, distant: Drawn) -> dict[str, Any]:
    figures = distances(arm, before, distant)
    if arm is not before:
        figures["feature_distance_to_untreated"] = vars(mean_interval(feature_distance(arm, before)))
    return figures | asked_for(arm, None if arm is before or arm is distant else before)


def feature_distance(arm: Drawn, before: Drawn) -> Tensor:
    """Euclidean distance of the features of each picture to those of the other arm's in its place: (P, n)."""
    distance: Tensor = torch.linalg.vector_norm(arm.features.double() - before.features.double(), dim=-1)
    return distance
