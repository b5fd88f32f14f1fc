"""The baselines, each fitted once to the tiny model, and what they are fitted on."""

from collections.abc import Callable

import pytest
import torch
from tests.evaluation.conftest import AXIS
from torch import Tensor

from stereoclinic.evaluation.methods import baseline_class, calibration_samples, h_space, uce
from stereoclinic.evaluation.methods.calibration import Calibration
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import load_prompts, with_seeds

STEPS = 3
NEUTRAL, GROUPED = "a photo of a doctor", "a photo of a female doctor"
SMALL = {"h-space": h_space.DirectionSettings(updates=3, batch=2), "uce": uce.EditSettings(rounds=2, eta=1.0)}


class Alternating:
    """Sees another group in every other picture, whatever is on it, and the last of three pictures as the first's."""

    name, classes = "alternating", {"gender": AXIS.groups}

    def read(self, images: Tensor) -> dict[str, Tensor]:
        odd = torch.arange(len(images)) % 3 == 1
        return {"gender": torch.stack([~odd, odd], dim=1).float()}


@pytest.fixture(scope="session")
def samples() -> list[dict]:
    return calibration_samples(load_prompts("portraits", 2), 100, 3, range(5000, 5010))


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return list(with_seeds(load_prompts("portraits", 2), 40, 2))


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    return Calibration(STEPS, 2.0, Alternating(), batch_size=4)


@pytest.fixture(scope="session")
def fitted(model, samples, calibration) -> Callable:
    made: dict = {}

    def fit(name: str):
        if name not in made:
            made[name] = baseline_class(name).fit(model, AXIS, samples, calibration, settings=SMALL.get(name))
        return made[name]

    return fit


def draw(model: Model, mitigation, rows: list[dict], guidance: float = 2.0, most: int | None = None) -> Tensor:
    """Latents of the pictures."""
    with mitigation, torch.no_grad():
        prompts = mitigation.begin(rows).prompts
        return Walk(model, rows, STEPS, guidance, prompts, portions=AdaptiveBatch(most)).run("latent").images


def untreated(model: Model, rows: list[dict], guidance: float = 2.0) -> Tensor:
    with torch.no_grad():
        return Walk(model, rows, STEPS, guidance).run("latent").images
