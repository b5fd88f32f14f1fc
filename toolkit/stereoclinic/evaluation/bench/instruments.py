"""What pictures are measured with besides their reader: nothing of it is needed, each is asked for."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import nn

from stereoclinic.evaluation.bench.arms import Drawn, Experiment
from stereoclinic.evaluation.metrics.alignment import clip_scores
from stereoclinic.evaluation.metrics.extractors import READER, extracted, perceptual_distance
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


def measure(experiment: Experiment, instruments: Instruments, warn: Callable[[str], None] = warnings.warn) -> None:
    """Give every arm of neutral and of unrelated prompts what the instruments show of its pictures.

    The CLIPScore is with the prompt as it is asked, also of pictures that were drawn from another: those of the
    allocation oracle, or of a baseline that writes the group into it.
    """
    protocol = experiment.protocol
    _measure(experiment.neutral, protocol.prompts, instruments, warn)
    if protocol.unrelated is not None:
        _measure(experiment.unrelated, protocol.unrelated, instruments, warn)
    if instruments.features is not None and experiment.reference is not None:
        experiment.reference.features = extracted(instruments.features, experiment.reference.images)


def _measure(arms: list[Drawn], rows: Dataset, instruments: Instruments, warn: Callable[[str], None]) -> None:
    """The arms of one set of prompts, of which the untreated one is the first."""
    before, prompts = arms[0], [write(row) for row in rows]
    for arm in arms:
        if instruments.clip is not None:
            count = arm.images.shape[1]
            asked = [prompt for prompt in prompts for _ in range(count)]
            told = warn if arm is before else _no_more
            scores = clip_scores(arm.images.flatten(0, 1), asked, instruments.clip, told)
            arm.clip = scores.unflatten(0, (-1, count))
        if instruments.lpips is not None and arm is not before:
            arm.lpips = perceptual_distance(instruments.lpips, arm.images, before.images)
        if instruments.features is not None:
            arm.features = extracted(instruments.features, arm.images)


def _no_more(said: str) -> None:
    """Of every arm it would be the same."""
