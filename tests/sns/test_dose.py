"""The dose: leans are measured where the treatment leads, and the search keeps to what it measured."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset

from stereoclinic.ddtd.trajectory import Measured, Settings, walk
from stereoclinic.errors import InputError
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds
from stereoclinic.sns import dose
from stereoclinic.sns.compose import compose
from stereoclinic.sns.dose import Dose, dosed, find_dose, lean_left
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import plan_stepwise
from stereoclinic.sns.stepwise import Stepwise

AXIS = load_axis("gender")


@pytest.fixture(scope="module")
def samples() -> Dataset:
    return with_seeds(load_prompts("portraits", 2), 0, 2)


@pytest.fixture(scope="module")
def mask(little: Model, samples: Dataset) -> NeuronMask:
    quick = Stepwise(mu=0.01, keep=0.0, until=500.0, steps=4, guidance=2.0)
    return plan_stepwise(little, AXIS, samples, quick, allocate=True)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_at_no_strength_it_is_the_untreated_lean(
    little: Model, samples: Dataset, mask: NeuronMask, guidance: float
) -> None:
    """Of a plain mask, whose target is 0, and over the steps that it treats."""
    plain = mask.group("female")
    walked, settings = list[Measured](), Settings(steps=4, guidance=guidance)
    walk(little, find_sites(little.network), AXIS, list(samples), settings, walked.append)
    expected = torch.stack([each.lean.abs().mean() for each in walked if plain.bin_of(each.timestep) is not None])
    found = lean_left(little, AXIS, samples, plain, 0.0, 4, guidance)
    assert found.shape == (len(samples),) and found.mean().item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_the_plan_leaves_what_it_said(little: Model, samples: Dataset, mask: NeuronMask) -> None:
    """Every sample allotted to one group walks the trajectory that was planned for it."""
    for k, group in enumerate(mask.groups):
        shares = [{name: float(name == group) for name in mask.groups}]
        ticks: list[int] = []
        found = lean_left(little, AXIS, samples, mask, 1.0, 4, 2.0, shares, batch_size=3, progress=ticks.append)
        said = mask.metadata["selection"]["steps"][k]
        assert found.mean().item() == pytest.approx(sum(each["after"] for each in said) / len(said), rel=1e-3)
        assert ticks == [3, 3, 1, 1]  # two treated steps of each batch


def test_a_batch_that_does_not_fit_in_memory_is_parted(little: Model, samples: Dataset, mask: NeuronMask) -> None:
    whole = lean_left(little, AXIS, samples, mask, 1.0, 4, 2.0)
    refused: list[int] = []

    def fits_four(network: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if (rows := len(kwargs["sample"])) > 4:  # of two samples, with guidance
            refused.append(rows)
            raise torch.OutOfMemoryError("out of memory")

    with little.network.register_forward_pre_hook(fits_four, with_kwargs=True):
        torch.testing.assert_close(lean_left(little, AXIS, samples, mask, 1.0, 4, 2.0), whole)
    assert refused


def test_a_mask_of_several_axes_is_measured_on_each(little: Model, samples: Dataset, mask: NeuronMask) -> None:
    """Old and young are allotted for nothing here: both damp alike."""
    other = replace(mask, factors=torch.ones_like(mask.factors), groups=("old", "young"))
    joint = compose([mask, other])
    shares = [{"female+old": 1.0, "female+young": 0.0, "male+old": 0.0, "male+young": 0.0}]
    found = lean_left(little, AXIS, samples, joint, 1.0, 4, 2.0, shares)
    own = lean_left(little, AXIS, samples, mask, 1.0, 4, 2.0, [{"female": 1.0, "male": 0.0}])
    torch.testing.assert_close(found, own)
    with pytest.raises(InputError, match="allots old, young, not the groups of axis gender"):
        lean_left(little, AXIS, samples, other, 1.0, 4, 2.0)


def test_a_mask_that_treats_no_step_has_no_dose(little: Model, samples: Dataset, mask: NeuronMask) -> None:
    with pytest.raises(InputError, match="treats none of the sampler's 2 steps"):
        find_dose(little, AXIS, samples, mask.windowed((700.0, 650.0)), 0.3, 2, 2.0)


def test_every_dose_is_remembered(samples: Dataset, mask: NeuronMask) -> None:
    """Also of a mask that was dosed before, and of one that is composed of such: none of its seeds may judge it."""
    once = dosed(mask, Dose(0.5, 0.2, []), 0.3, with_seeds(samples.prompts, 200, 6))
    twice = dosed(once, Dose(0.8, 0.2, []), 0.3, with_seeds(samples.prompts, 300, 6))
    torch.testing.assert_close(twice.damping, 0.4 * mask.damping)
    assert "bins" in mask.metadata["selection"] and "bins" not in once.metadata["selection"]  # its forecast held at 1
    assert sorted(twice.made_on) == [[0, 1], [200, 205], [300, 305]]
    both = dosed(compose([mask, mask]), Dose(0.5, 0.2, []), 0.3, with_seeds(samples.prompts, 400, 6))
    assert [400, 405] in compose([both, twice]).made_on and [200, 205] in compose([both, twice]).made_on


def test_the_search_ends_at_the_bound(
    little: Model, samples: Dataset, mask: NeuronMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dose, "lean_left", lambda *arguments, **_: torch.tensor([1.1, 0.9]) - 0.9 * arguments[4])
    told: list[tuple[float, float]] = []
    found = find_dose(little, AXIS, samples, mask, 0.46, 4, 2.0, progress=lambda *each: told.append(each))
    assert 0.6 <= found.strength <= 0.65 and found.left == pytest.approx(1 - 0.9 * found.strength)
    assert found.tried == sorted(told)
    assert find_dose(little, AXIS, samples, mask, 2.0, 4, 2.0).strength == 0
    with pytest.raises(InputError, match=r"leaves a mean \|lean - target\| of 0.100 \(1.000 untreated\), above 0.05"):
        find_dose(little, AXIS, samples, mask, 0.05, 4, 2.0)
    with pytest.raises(InputError, match="expected a bound of 0 or more"):
        find_dose(little, AXIS, samples, mask, float("nan"), 4, 2.0)
