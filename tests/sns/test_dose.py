"""The dose: leans are measured where the treatment leads, and the search keeps to what it measured."""

import pytest
import torch
from datasets import Dataset

from stereoclinic.axes import load_axis
from stereoclinic.ddtd.neurons import find_sites
from stereoclinic.ddtd.trajectory import Settings, walk
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.errors import InputError
from stereoclinic.prompts import load_prompts, with_seeds
from stereoclinic.sns import dose
from stereoclinic.sns.dose import find_dose, lean_left
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.planning import plan_stepwise
from stereoclinic.sns.stepwise import Stepwise

AXIS = load_axis("gender")


@pytest.fixture
def denoiser(little: Denoiser) -> Denoiser:
    return little


@pytest.fixture(scope="module")
def samples() -> Dataset:
    return with_seeds(load_prompts("portraits", 2), 0, 2)


@pytest.fixture(scope="module")
def mask(little: Denoiser, samples: Dataset) -> NeuronMask:
    quick = Stepwise(mu=0.01, keep=0.0, until=500.0, cotangents=1, steps=4, guidance=2.0)
    return plan_stepwise(little, AXIS, samples, quick, allocate=True)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_at_no_strength_it_is_the_untreated_lean(
    denoiser: Denoiser, samples: Dataset, mask: NeuronMask, guidance: float
) -> None:
    """Of a plain mask, whose target is 0, and over the steps that it treats."""
    plain = mask.group("female")
    walked = list(walk(denoiser, find_sites(denoiser.unet), AXIS, list(samples), Settings(steps=4, guidance=guidance)))
    expected = torch.stack([each.lean.abs().mean() for each in walked if plain.bin_of(each.timestep) is not None])
    found = lean_left(denoiser, AXIS, samples, plain, 0.0, 4, guidance)
    assert found.shape == (len(samples),) and found.mean().item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_the_plan_leaves_what_it_said(denoiser: Denoiser, samples: Dataset, mask: NeuronMask) -> None:
    """Every sample allotted to one group walks the trajectory that was planned for it."""
    for k, group in enumerate(mask.groups):
        shares = [{name: float(name == group) for name in mask.groups}]
        ticks: list[int] = []
        found = lean_left(denoiser, AXIS, samples, mask, 1.0, 4, 2.0, shares, batch_size=3, progress=ticks.append)
        said = mask.metadata["selection"]["steps"][k]
        assert found.mean().item() == pytest.approx(sum(each["after"] for each in said) / len(said), rel=1e-3)
        assert ticks == [3, 3, 1, 1]  # two treated steps of each batch


def test_the_search_ends_at_the_bound(
    denoiser: Denoiser, samples: Dataset, mask: NeuronMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dose, "lean_left", lambda *arguments: torch.tensor([1.1, 0.9]) - 0.9 * arguments[4])
    told: list[tuple[float, float]] = []
    found = find_dose(denoiser, AXIS, samples, mask, 0.46, 4, 2.0, progress=lambda *each: told.append(each))
    assert 0.6 <= found.strength <= 0.65 and found.left == pytest.approx(1 - 0.9 * found.strength)
    assert found.tried == sorted(told)
    assert find_dose(denoiser, AXIS, samples, mask, 2.0, 4, 2.0).strength == 0
    with pytest.raises(InputError, match=r"leaves a mean \|lean - target\| of 0.100 \(1.000 untreated\), above 0.05"):
        find_dose(denoiser, AXIS, samples, mask, 0.05, 4, 2.0)
    with pytest.raises(InputError, match="expected a bound of 0 or more"):
        find_dose(denoiser, AXIS, samples, mask, float("nan"), 4, 2.0)
