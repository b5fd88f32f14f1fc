"""What each image gets of a mask: by its own prompt and seed, and nothing where the gate leaves it alone."""

from collections import Counter

import pytest
import torch

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site
from stereoclinic.prompts.axes import load_axis
from stereoclinic.sns.compose import compose
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.policy import Treatment, allotments

GENDER = load_axis("gender")
SITES = [Site("conv_out", "conv", 4)]
EDGES = torch.tensor([1000.0, 0.0])
PLAIN = NeuronMask(SITES, EDGES, torch.full((1, 4), 0.5))
ALLOCATING = NeuronMask(SITES, EDGES, torch.full((2, 1, 4), 0.5), groups=GENDER.groups)
PROMPTS = ["a photo of a doctor"] * 40 + ["a photo of a female doctor", "a photo of a nurse"]
SEEDS = [*range(40), 0, 0]


def test_a_group_goes_by_the_images_own_prompt_and_seed() -> None:
    found = allotments(ALLOCATING, PROMPTS, SEEDS, [GENDER])
    assert found[:40].count("female") == 20
    assert found[40] is None  # it names one already
    backwards = allotments(ALLOCATING, PROMPTS[::-1], SEEDS[::-1], [GENDER])
    assert backwards[::-1] == found
    assert [allotments(ALLOCATING, [text], [seed], [GENDER]) for text, seed in zip(PROMPTS, SEEDS, strict=True)] == [
        [each] for each in found
    ]


def test_shares_and_an_open_gate() -> None:
    found = allotments(ALLOCATING, PROMPTS, SEEDS, shares=[{"female": 1.0, "male": 0.0}])
    assert found == ["female"] * 42


def test_a_mask_that_allots_nothing_has_its_gate() -> None:
    assert allotments(PLAIN, PROMPTS, SEEDS, [GENDER]) == [True] * 40 + [None, True]


def test_several_masks_are_allotted_together() -> None:
    age = NeuronMask(SITES, EDGES, torch.full((2, 1, 4), 0.5), groups=("old", "young"))
    masks = {"gender": ALLOCATING, "age": age, "again": ALLOCATING, "plain": PLAIN}
    found = allotments(masks, PROMPTS, SEEDS, [GENDER])
    assert found[40] is None and all(each["plain"] is True and each["again"] == each["gender"] for each in found[:40])
    pairs = Counter((each["gender"], each["age"]) for each in found[:40])
    assert len(pairs) == 4 and all(abs(count - 10) <= 1 for count in pairs.values())
    joint = allotments(compose([ALLOCATING, age]), PROMPTS, SEEDS, [GENDER])  # as their composition does
    assert joint == [each and f"{each['gender']}+{each['age']}" for each in found]
    shares = [{"female": 1.0, "male": 0.0}, {"old": 0.25, "young": 0.75}]
    uneven = Counter((each["gender"], each["age"]) for each in allotments(masks, PROMPTS[:40], SEEDS[:40], (), shares))
    assert set(uneven) == {("female", "old"), ("female", "young")} and abs(uneven["female", "old"] - 10) <= 1
    assert allotments({"gender": ALLOCATING}, PROMPTS, SEEDS) == [
        {"gender": each} for each in allotments(ALLOCATING, PROMPTS, SEEDS)
    ]
    assert allotments({"plain": PLAIN}, PROMPTS[:1], [0]) == [{"plain": True}] and allotments({}, ["a"], [0]) == [{}]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="42 prompts and 2 seeds"):
        allotments(ALLOCATING, PROMPTS, [0, 1])
    with pytest.raises(InputError, match="no group 'woman'"):
        allotments(ALLOCATING, PROMPTS, SEEDS, shares=[{"woman": 1.0}])


def test_a_treatment_allots_the_same(denoiser) -> None:
    treatment = Treatment(denoiser.pipe, ALLOCATING, [GENDER], force=True)
    rows = [{"prompt": text, "seed": seed} for text, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert treatment.allotment(rows) == allotments(ALLOCATING, PROMPTS, SEEDS, [GENDER])
    # Conditioned on another text, an image keeps the group of its own prompt.
    other = treatment.allotment(rows[:40], ["a portrait of a doctor"] * 40)
    assert other == allotments(ALLOCATING, PROMPTS, SEEDS)[:40]
