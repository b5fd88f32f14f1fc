"""What pictures are measured with besides their reader: nothing of it is needed, each is asked for."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from stereoclinic.evaluation.alignment import clip_scores
from stereoclinic.evaluation.arms import UNTREATED, Experiment
from stereoclinic.evaluation.extractors import READER, extracted, perceptual_distance
from stereoclinic.prompts import write


@dataclass(frozen=True)
class Instruments:
    """Opened before anything is drawn, so that what is missing is told at once.

    Args:
        clip: (model, processor) of `alignment.open_clip`, for CLIPScore.
        features: Network of `extractors.open_features`, for distances between sets of pictures; None: the reader's own.
        lpips: Network of `extractors.open_lpips`, for distances of the same seeds.
        features_name: Of that network, as results give it.
    """

    clip: tuple[Any, Any] | None = None
    features: nn.Module | None = None
    lpips: nn.Module | None = None
    features_name: str = READER


def measure(experiment: Experiment, instruments: Instruments) -> None:
    """Give every arm of neutral prompts what the instruments show of its pictures.

    The CLIPScore is with the neutral prompt, also of pictures that were drawn from another: those of the allocation
    oracle, or of a baseline that writes the group into it.
    """
    before = experiment.arm(UNTREATED)
    prompts = [write(row) for row in experiment.protocol.prompts]
    for arm in experiment.neutral:
        if instruments.clip is not None:
            count = arm.images.shape[1]
            asked = [prompt for prompt in prompts for _ in range(count)]
            arm.clip = clip_scores(arm.images.flatten(0, 1), asked, instruments.clip).unflatten(0, (-1, count))
        if instruments.lpips is not None and arm is not before:
            arm.lpips = perceptual_distance(instruments.lpips, arm.images, before.images)
    if instruments.features is not None:
        for arm in [*experiment.neutral, *([experiment.reference] if experiment.reference else [])]:
            arm.features = extracted(instruments.features, arm.images)
