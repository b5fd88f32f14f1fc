"""Experiments made of given shares, without a model: every figure is real, the pictures are noise. And a tiny model."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from datasets import Dataset

from stereoclinic.evaluation.arms import (
    ALLOCATION,
    BALANCED,
    OTHER,
    RANDOM,
    REFERENCE,
    UNTREATED,
    Drawn,
    Experiment,
    Protocol,
)
from stereoclinic.evaluation.draw import Part, model_digest
from stereoclinic.evaluation.figures.summarise import summarise
from stereoclinic.evaluation.methods.base import Mitigation
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds

Make = Callable[..., Experiment]

AXIS = load_axis("gender")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny random model with its reader; a test that changes it puts it back."""
    from tests.cli.conftest import write_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, seed=0)
    return open_model(folder)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Three prompts with two seeds."""
    return list(with_seeds(load_prompts("portraits", 3), 40, 2))


def parts(model: Model, rows: list[dict], mitigation: Mitigation, size: int = 2, /, **how: Any) -> list[Part]:
    """What draws an arm, cut by a number of rows."""
    how = {"steps": 2, "guidance": 1.0, "model": model_digest(model), **how}
    return [Part(mitigation, rows[start : start + size], **how) for start in range(0, len(rows), size)]


@pytest.fixture(scope="session")
def make() -> Make:
    """Make an experiment: `make({"gender": 0.5})` has one mask that gives the first group half of the images.

    Untreated, the first group has nine in ten images of every other prompt and one in ten of the rest.
    """
    return make_experiment


def make_experiment(*given: Any, **named: Any) -> Experiment:
    """A copy of one that is made once: a second goes on the figures of each."""
    key = repr((given, named))
    if key not in _MADE:
        _MADE[key] = _made(*given, **named)
    return copy.deepcopy(_MADE[key])


_MADE: dict[str, Experiment] = {}


def _made(
    masks: Mapping[str, float] | None = None,
    axis: Axis | None = None,
    labels: tuple[str, ...] = ("doctor", "nurse", "chef"),
    images: int = 20,
    guidance: float = 2.0,
    side: int = 8,
    untreated: float = 0.9,
    right: Mapping[str, float] | None = None,
    unrelated: tuple[str, ...] = (),
    figures: str = "default",
    all_arms: bool = True,
) -> Experiment:
    masks, axis = masks or {}, axis or load_axis("gender")
    rows = [{"label": label, "pattern": "a photo of {person}", "article": "a", "person": label} for label in labels]
    plain = [{"label": prompt, "pattern": prompt, "article": "", "person": ""} for prompt in unrelated]
    protocol = Protocol(
        axis, Dataset.from_list(rows), images, 2, 5000, 6, guidance,
        unrelated=Dataset.from_list(plain) if plain else None, figures=figures,
        all_arms=all_arms,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    groups, prompts = len(axis), len(labels)

    def drawn(name: str, share: float, tilts: bool, allots: bool = False, count: int = images, rows: int = prompts):
        """Every prompt's images, `share` of them of the first group (or all but that, for every other prompt)."""
        reads = torch.full((rows, count, groups), 0.04 / (groups - 1))
        top = torch.zeros(rows, count, dtype=torch.long)
        for p in range(rows):
            of_first = round(count * (1 - share if tilts and p % 2 else share))
            top[p, of_first:] = 1 + torch.arange(count - of_first) % (groups - 1)
        reads.scatter_(2, top[..., None], 0.96)
        return Drawn(
            name,
            reads,
            (torch.arange(count) < round(count * (right or {}).get(name, 1.0))).float().expand(rows, count).clone(),
            torch.randn(rows, count, 6, generator=generator),
            torch.randint(0, 256, (rows, count, 3, side, side), generator=generator, dtype=torch.uint8),
            1.5,
            {"age": torch.eye(2).repeat(rows, count, 1)[:, :count]},
            top.clone() if allots else None,
        )

    neutral = [drawn(UNTREATED, untreated, True)]
    neutral += [drawn(name, share, True) for name, share in masks.items()]
    neutral += [drawn(RANDOM, untreated, True)] if masks else []
    neutral += [drawn(BALANCED, 0.7, True)] if all_arms or not masks else []
    neutral += [drawn(ALLOCATION, 1 / groups, False, True)]
    neutral += [drawn(OTHER, untreated, True)] if all_arms else []
    grouped = []
    for name in (UNTREATED, *masks):
        arm = drawn(name, 1.0, False, count=2, rows=prompts * groups)
        arm.reads = torch.eye(groups).repeat(prompts, 1)[:, None].expand(-1, 2, -1).clone()
        grouped.append(arm)
    reference = drawn(REFERENCE, 1 / groups, False, True)
    apart = [
        drawn(name, untreated, True, count=protocol.unrelated_images, rows=len(plain))
        for name in (UNTREATED, *masks, OTHER)
        if plain
    ]
    experiment = Experiment(protocol, neutral, grouped, reference, apart)
    experiment.results = summarise(experiment, list(masks))
    return experiment
