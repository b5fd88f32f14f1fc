"""What tests of relevance share: samples, axes, and a walk's measured steps as a list."""

from typing import Any

from torch import Tensor

from stereoclinic.ddtd.rules.functions import RuleFunction
from stereoclinic.ddtd.step import Measured
from stereoclinic.ddtd.trajectory import Settings, walk
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.sets import Row, load_prompts, with_seeds

AXIS = load_axis("gender")
THREE = Axis("age", ("young", "middle", "old"), ("young", "middle-aged", "old"))


def rows(prompts: int = 2, seeds: int = 2) -> list[Row]:
    """Samples of the first prompts."""
    return list(with_seeds(load_prompts("portraits", prompts), 0, seeds))


def measured(
    model: Model, sites: list[Site], axis: Axis, samples: list[Row], settings: Settings, *rest: Any, **named: Any
) -> list[Measured]:
    """What `walk` measures, step by step."""
    found: list[Measured] = []
    walk(model, sites, axis, samples, settings, found.append, *rest, **named)
    return found


def close(one: Tensor, two: Tensor) -> None:
    """Equal to a ten thousandth of the largest value."""
    assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def leak(x: Tensor) -> Tensor:
    """A rule that hands a tenth too little on."""
    return RuleFunction.apply(lambda x: (x.clone(), (), lambda g: 0.9 * g), x)
