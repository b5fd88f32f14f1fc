"""What pictures are measured with besides their reader: nothing of it is needed, each is asked for."""

from dataclasses import dataclass
from typing import Any

from stereoclinic.evaluation.alignment import clip_scores
from stereoclinic.evaluation.arms import Experiment
from stereoclinic.prompts import write


@dataclass(frozen=True)
class Instruments:
    """Opened before anything is drawn, so that what is missing is told at once.

    Args:
        clip: (model, processor) of `alignment.open_clip`, for CLIPScore.
    """

    clip: tuple[Any, Any] | None = None


def measure(experiment: Experiment, instruments: Instruments) -> None:
    """Give every arm of neutral prompts what the instruments show of its pictures.

    The CLIPScore is with the neutral prompt, also of pictures that were drawn from another: those of the allocation
    oracle, or of a baseline that writes the group into it.
    """
    if instruments.clip is None:
        return
    prompts = [write(row) for row in experiment.protocol.prompts]
    for arm in experiment.neutral:
        count = arm.images.shape[1]
        asked = [prompt for prompt in prompts for _ in range(count)]
        arm.clip = clip_scores(arm.images.flatten(0, 1), asked, instruments.clip).unflatten(0, (-1, count))
