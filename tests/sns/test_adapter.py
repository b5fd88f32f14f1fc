"""Masks as adapters: loaded then unloaded is nothing, active ones are composed, a refusal changes nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sns.conftest import AGE, GENDER, beside, draw, hooks, random_mask

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.adapter import (
    active_masks,
    allot_masks,
    disable_masks,
    enable_masks,
    load_mask,
    loaded_masks,
    set_masks,
    unload_mask,
)
from stereoclinic.sns.compose import compose
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.fuse import fuse, unfuse


@settings(max_examples=8)
@given(st.lists(st.sampled_from(["load", "unload", "set", "disable", "enable", "draw"]), max_size=8), st.randoms())
def test_whatever_was_done_unloading_leaves_the_model_as_it_was(original, what, random):
    unet = original.unet
    learnt_of(Model(original), 7.5)  # what is known of a pipeline stays
    before, state, count, attributes = draw(original), weights_digest(unet), hooks(unet), set(vars(unet))
    keys = list(unet.state_dict())
    for i, step in enumerate(what):
        names = list(loaded_masks(original))
        if step == "load":
            load_mask(original, random_mask(unet, i, rooted=random.random() < 0.5), f"m{i}", random.random())
        elif names and step == "unload":
            unload_mask(original, random.choice(names))
        elif names and step == "set":
            set_masks(original, random.sample(names, random.randint(1, len(names))), random.random())
        elif names and step in ("disable", "enable"):
            (disable_masks if step == "disable" else enable_masks)(original)
        elif step == "draw":
            draw(original)
        assert list(unet.state_dict()) == keys
        assert weights_digest(unet) == state
    if loaded_masks(original):
        unload_mask(original)
    assert torch.equal(draw(original), before)
    assert hooks(unet) == count
    assert set(vars(unet)) == attributes
    assert loaded_masks(original) == {} and active_masks(original) == {}


@pytest.mark.parametrize("rooted", [False, True])
def test_active_masks_act_as_their_composition_through_one_hook_a_site(pipe, unet, rooted):
    one, two = random_mask(unet, 1, rooted), random_mask(unet, 2, rooted)
    count = hooks(unet)
    with suppress(pipe, compose([one, two], [0.5, 1.0])):
        expected = draw(pipe)
    load_mask(pipe, one, "one", 0.5)
    load_mask(pipe, two, "two")
    assert torch.equal(draw(pipe), expected)
    assert hooks(unet) == count + 1 + len(one.sites)  # and where a pass begins
    assert list(loaded_masks(pipe)) == ["one", "two"]
    assert active_masks(pipe) == {"one": 0.5, "two": 1.0}

    for names, strengths, expected in (
        ("two", None, {"two": 1.0}),
        (["one"], None, {"one": 0.5}),
        (["two", "one"], [0.3, 0.2], {"two": 0.3, "one": 0.2}),
        (["one", "two"], 0.7, {"one": 0.7, "two": 0.7}),
    ):
        set_masks(pipe, names, strengths)
        assert active_masks(pipe) == expected
        drawn = draw(pipe)
        other = beside(pipe, copy.deepcopy(unet))
        unload_mask(other)
        masks = [{"one": one, "two": two}[name] for name in expected]
        with suppress(other, compose(masks, list(expected.values()))):
            assert torch.equal(draw(other), drawn)


def test_disabled_masks_do_nothing_and_come_back(pipe, unet):
    before = draw(pipe)
    load_mask(pipe, random_mask(unet, 1), "one")
    treated = draw(pipe)
    disable_masks(pipe)
    assert active_masks(pipe) == {}
    assert torch.equal(draw(pipe), before)
    load_mask(pipe, random_mask(unet, 2), "two")  # it stays off
    assert torch.equal(draw(pipe), before)
    set_masks(pipe, "one")
    assert torch.equal(draw(pipe), before)
    enable_masks(pipe)
    assert active_masks(pipe) == {"one": 1.0}
    assert torch.equal(draw(pipe), treated)


def test_masks_are_loaded_from_files_folders_and_the_hub(pipe, unet, tmp_path, monkeypatch):
    mask = random_mask(unet, 1)
    mask.save(tmp_path / "a.pt")
    mask.save_pretrained(tmp_path / "folder")
    load_mask(pipe, tmp_path / "a.pt", "file")
    load_mask(pipe, str(tmp_path / "folder"), "folder")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "folder/mask.safetensors"))
    load_mask(pipe, "owner/mask-1.5", "hub")
    assert all(torch.equal(found.factors, mask.factors) for found in loaded_masks(pipe).values())
    with pytest.raises(InputError, match="No such file"):
        load_mask(pipe, tmp_path / "b.safetensors", "absent")


def test_a_refused_change_changes_nothing(pipe, unet):
    load_mask(pipe, random_mask(unet, 1), "one")
    treated = draw(pipe)
    with pytest.raises(InputError, match="one mask cannot do both"):
        load_mask(pipe, random_mask(unet, 2, branch="conditional"), "two")
    elsewhere = random_mask(unet, 2, sites=[Site("far.conv2", "conv", 256)])
    with pytest.raises(InputError, match=r"has no site 'far.conv2'"):
        load_mask(pipe, elsewhere, "three")
    assert list(loaded_masks(pipe)) == ["one"]
    assert torch.equal(draw(pipe), treated)


def test_masks_that_cannot_be_loaded(pipe, unet):
    digests = {"unet_shapes": shapes_digest(unet), "unet_weights": "of another"}
    load_mask(pipe, random_mask(unet, 1), "one")
    for options, match in (
        ({"name": "one"}, "named 'one' is loaded already; unload it first"),
        ({"name": ""}, "mask name ''"),
        ({"strength": 1.5}, "strength 1.5; expected 0"),
        ({"strength": "full"}, "strength 'full'"),
    ):
        with pytest.raises(InputError, match=match):
            load_mask(pipe, random_mask(unet, 2), **options)
    with pytest.raises(InputError, match="other weights"):
        load_mask(pipe, random_mask(unet, 2, metadata=digests))
    load_mask(pipe, random_mask(unet, 2, metadata=digests), force=True)
    with pytest.raises(InputError, match="cannot damp a str"):
        load_mask("pipe", random_mask(unet, 2))
    unload_mask(pipe)
    fuse(pipe, random_mask(unet, factors=torch.full_like(random_mask(unet).factors, 0.5)))
    with pytest.raises(InputError, match="unfuse it first"):
        load_mask(pipe, random_mask(unet, 2, groups=GENDER))
    with pytest.raises(InputError, match="a fused mask treats all images alike; unfuse it"):
        allot_masks(pipe, ["female", "male"])
    unfuse(pipe)


def test_names_strengths_and_allotments_that_cannot_be(pipe, unet):
    for call in (
        lambda: unload_mask(pipe),
        lambda: set_masks(pipe, "one"),
        lambda: enable_masks(pipe),
        lambda: disable_masks(pipe),
        lambda: allot_masks(pipe, None),
    ):
        with pytest.raises(InputError, match="no mask is loaded; load one with load_mask"):
            call()
    load_mask(pipe, random_mask(unet, 1, groups=GENDER), "gender")
    load_mask(pipe, random_mask(unet, 2, groups=AGE), "age")
    load_mask(pipe, random_mask(unet, 3), "plain")
    for call, match in (
        (lambda: unload_mask(pipe, "other"), "mask 'other' is not loaded; those are gender, age, plain"),
        (lambda: set_masks(pipe, ["age", "other"]), "mask 'other' is not loaded"),
        (lambda: set_masks(pipe, []), "no mask is named"),
        (lambda: set_masks(pipe, ["age", "age"]), "named twice"),
        (lambda: set_masks(pipe, ["age", "gender"], [0.5]), "1 strengths for 2 masks"),
        (lambda: set_masks(pipe, "age", -0.1), "strength -0.1"),
        (lambda: allot_masks(pipe, []), "no image is allotted"),
        (
            lambda: allot_masks(pipe, ["somebody"]),
            "group 'somebody' is not known; choose from female, male, old, young",
        ),
        (lambda: allot_masks(pipe, ["female"]), "mask 'age' is allotted 'female'; expected one of old, young, or None"),
        (lambda: allot_masks(pipe, [True]), "mask 'gender' is allotted nothing; expected one of female, male"),
        (lambda: allot_masks(pipe, [{"gender": "female"}]), "mask 'age' is allotted nothing"),
        (lambda: allot_masks(pipe, [{"sex": "female"}]), "mask 'sex' is not active; those are gender, age, plain"),
        (
            lambda: allot_masks(pipe, [{"gender": None, "age": None, "plain": "x"}]),
            "'plain' is allotted 'x'; expected True",
        ),
    ):
        with pytest.raises(InputError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    set_masks(pipe, "plain")
    with pytest.raises(InputError, match="the active masks have none; expected True or None"):
        allot_masks(pipe, ["female"])
