"""Loaded masks treat each image as it was allotted: of several masks, under guidance, and made of images."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from tests.sns.conftest import AGE, GENDER, beside, draw, random_mask

from stereoclinic.errors import InputError
from stereoclinic.sns.adapter import (
    allot_masks,
    disable_masks,
    enable_masks,
    load_mask,
    set_masks,
    unload_mask,
)
from stereoclinic.sns.compose import compose
from stereoclinic.sns.damp import suppress


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("images", [1, 2])
def test_each_image_gets_its_groups_with_guidance_or_without(pipe, unet, guidance, images):
    mask = random_mask(unet, 3, rooted=True, groups=GENDER, branch="conditional")
    count = 2 * images
    drawn = {None: draw(pipe, guidance=guidance, images=images)}
    for group in GENDER:
        with suppress(pipe, mask.group(group)):
            drawn[group] = draw(pipe, guidance=guidance, images=images)
    load_mask(pipe, mask)
    for samples in (["female", "male", None, "female"][:count], [None] * count, ["male"] * count):
        allot_masks(pipe, samples)
        got = draw(pipe, guidance=guidance, images=images)
        for i, group in enumerate(samples):
            assert torch.equal(got[i], drawn[group][i])
    allot_masks(pipe, "male")
    assert torch.equal(draw(pipe, guidance=guidance, images=images), drawn["male"])


def test_several_allocating_masks_and_a_plain_one_by_image(pipe, unet):
    gender, age = random_mask(unet, 1, groups=GENDER), random_mask(unet, 2, True, AGE)
    plain = random_mask(unet, 3)
    untreated = draw(pipe)
    for name, mask, strength in (("gender", gender, 1.0), ("age", age, 0.5), ("plain", plain, 1.0)):
        load_mask(pipe, mask, name, strength)
    expected = {}
    for key, masks, strengths in (
        ("both", [gender.group("female"), age.group("old"), plain], [1.0, 0.5, 1.0]),
        ("age alone", [gender.group("female"), age.group("young"), plain], [0.0, 0.5, 1.0]),
        ("plain alone", [plain], [1.0]),
        ("not plain", [gender.group("male"), age.group("young")], [1.0, 0.5]),
    ):
        other = beside(pipe, copy.deepcopy(unet))
        unload_mask(other)
        with suppress(other, compose(masks, strengths)):
            expected[key] = draw(other)
    allot_masks(pipe, [{"gender": "female", "age": "old"}, {"gender": None, "age": "young"}])
    got = draw(pipe)
    torch.testing.assert_close(got[0], expected["both"][0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got[1], expected["age alone"][1], atol=1e-9, rtol=1e-9)
    allot_masks(pipe, [{"gender": None, "age": None}, {"gender": "male", "age": "young", "plain": False}])
    got = draw(pipe)
    torch.testing.assert_close(got[0], expected["plain alone"][0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got[1], expected["not plain"][1], atol=1e-9, rtol=1e-9)
    allot_masks(pipe, None)
    assert torch.equal(draw(pipe), untreated)


def test_masks_that_share_groups_go_by_one_name_and_plain_ones_may_be_gated(pipe, unet):
    untreated = draw(pipe)
    load_mask(pipe, random_mask(unet, 1), "plain")
    treated = draw(pipe)
    allot_masks(pipe, [True, None])
    assert torch.equal(draw(pipe), torch.stack([treated[0], untreated[1]]))
    unload_mask(pipe)
    one, two = random_mask(unet, 1, groups=GENDER), random_mask(unet, 2, groups=GENDER)
    load_mask(pipe, one, "one")
    load_mask(pipe, two, "two")
    allot_masks(pipe, ["female", None])
    got = draw(pipe)
    unload_mask(pipe)
    with suppress(pipe, compose([one, two])) as suppression:
        suppression.allot(["female", None])
        assert torch.equal(draw(pipe), got)
    assert torch.equal(got[1], untreated[1])


def test_an_allotment_holds_until_the_active_masks_change(pipe, unet):
    load_mask(pipe, random_mask(unet, 1, groups=GENDER), "gender")
    with pytest.raises(InputError, match=r"images to female, male, and nothing was allotted yet; .*allot_masks\(pipe"):
        draw(pipe)
    allot_masks(pipe, ["female", "male"])
    first = draw(pipe)
    assert torch.equal(draw(pipe), first)
    disable_masks(pipe)
    draw(pipe)
    enable_masks(pipe)
    assert torch.equal(draw(pipe), first)
    set_masks(pipe, "gender", 0.5)
    with pytest.raises(InputError, match="nothing was allotted yet"):
        draw(pipe)
    allot_masks(pipe, ["female"] * 3)
    with pytest.raises(InputError, match="3 samples are allotted, but the call draws 2"):
        draw(pipe)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_made_of_images_get_each_their_own_group(pipe, unet, guidance):
    """Image to image at less than full strength, two images a prompt: as if all images of the call had that group."""
    other = beside(pipe, kind=StableDiffusionImg2ImgPipeline)
    side = 4 * pipe.vae_scale_factor
    options = {"guidance": guidance, "images": 2, "strength": 0.5}
    image = torch.rand(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = draw(other, image=image, **options)
    load_mask(pipe, random_mask(unet, 1, branch="conditional", groups=GENDER))
    drawn = {}
    for samples in (["female"] * 4, ["male"] * 4, ["female", "male", None, "female"]):
        allot_masks(pipe, samples)
        drawn[tuple(samples)] = draw(other, image=image, **options)
    female, male, mixed = drawn.values()
    assert torch.allclose(mixed, torch.stack([female[0], male[1], before[2], female[3]]))
    assert not torch.allclose(female, male)
    unload_mask(other)
    assert torch.equal(draw(other, image=image, **options), before)


def test_a_mask_of_no_effect_on_any_neuron_is_fine(pipe, unet):
    before = draw(pipe)
    mask = random_mask(unet, 1, groups=GENDER)
    load_mask(pipe, replace(mask, factors=torch.ones_like(mask.factors)))
    allot_masks(pipe, ["female", "male"])
    assert torch.equal(draw(pipe), before)
