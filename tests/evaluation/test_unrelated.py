"""Drift of unrelated prompts: figures agree with the functions they come from, and have their floors."""

import copy
import json

import pytest
import torch
from tests.evaluation.conftest import make_experiment

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import OTHER, UNTREATED, Protocol
from stereoclinic.evaluation.compare import compare_results
from stereoclinic.evaluation.figures.registry import figure_of
from stereoclinic.evaluation.figures.summarise import summarise
from stereoclinic.evaluation.figures.values import values_of
from stereoclinic.evaluation.instruments import structural_similarity
from stereoclinic.evaluation.verdict import verdicts
from stereoclinic.prompts.sets import load_plain_prompts, load_prompts
from stereoclinic.report.page import build_page
from stereoclinic.statistics.distances import frechet_between, kernel_distance

SCENES = ("a photo of a mountain", "a photo of a female lion", "a photo of a teapot")


@pytest.fixture(scope="module")
def experiment():
    """One mask that changes half of the images of each prompt, and one that changes none."""
    made = make_experiment({"some": 0.5, "none": 0.5}, side=16, unrelated=SCENES)
    before, some, none = made.unrelated[:3]
    for part in ("images", "features"):
        changed = getattr(before, part).clone()
        changed[:, ::2] = getattr(some, part)[:, ::2]
        setattr(some, part, changed)
        setattr(none, part, getattr(before, part).clone())
    made.results = summarise(made, ["some", "none"])
    return made


def test_distances_are_of_the_same_seeds_with_intervals_and_of_sets_with_floors(experiment):
    found = experiment.results["unrelated"]["arms"]
    before, some, *_ = experiment.unrelated
    similar = structural_similarity(some.images, before.images)
    assert found["some"]["ssim_to_untreated"]["estimate"] == pytest.approx(float(similar.mean()))
    assert (
        found["some"]["ssim_to_untreated"]["low"] < float(similar.mean()) < found["some"]["ssim_to_untreated"]["high"]
    )
    apart = torch.linalg.vector_norm((some.features - before.features).double(), dim=2)
    assert found["some"]["feature_distance_to_untreated"]["estimate"] == pytest.approx(float(apart.mean()))
    flat = {arm.name: arm.features.flatten(0, 1) for arm in experiment.unrelated}
    for name in ("some", UNTREATED):
        assert found[name]["frechet_to_other_seeds"] == pytest.approx(frechet_between(flat[name], flat[OTHER]))
        assert found[name]["kid_to_other_seeds"] == pytest.approx(kernel_distance(flat[name], flat[OTHER]))
    floor = found[OTHER]["feature_distance_to_untreated"]["estimate"]
    assert floor > found["some"]["feature_distance_to_untreated"]["estimate"] > 0
    assert "ssim_to_untreated" not in found[UNTREATED] and found[OTHER]["frechet_to_other_seeds"] is None


def test_a_treatment_that_changes_nothing_shows_it(experiment):
    none = experiment.results["unrelated"]["arms"]["none"]
    assert none["ssim_to_untreated"] == pytest.approx({"estimate": 1, "low": 1, "high": 1})
    assert none["feature_distance_to_untreated"] == {"estimate": 0, "low": 0, "high": 0}
    assert none["frechet_to_untreated"] == pytest.approx(0, abs=1e-9)
    untreated = experiment.results["unrelated"]["arms"][UNTREATED]
    assert none["frechet_to_other_seeds"] == pytest.approx(untreated["frechet_to_other_seeds"])


def test_what_the_gate_leaves_alone_is_counted_and_results_are_plain_data(experiment):
    found = experiment.results["unrelated"]
    assert found["prompts"] == list(SCENES) and found["left_alone"] == 1  # the lion
    assert (found["images_per_prompt"], found["seeds"]) == (4, [5000, 5003])
    assert json.loads(json.dumps(experiment.results)) == experiment.results


def test_without_unrelated_prompts_there_is_nothing_of_them(make):
    assert "unrelated" not in make({"a": 0.5}).results


def test_they_are_figures_of_their_arm_and_stand_in_the_report(experiment):
    values = values_of(experiment.results, "some")
    key = "unrelated.ssim_to_untreated"
    assert values[key].has_ends and figure_of(key).part == "cost"
    page = build_page({"schema": 2, "provenance": {}, "experiments": [experiment.results]})
    for name in ("similarity to untreated", "feature distance to untreated", "Fréchet distance to other seeds"):
        assert f"unrelated prompts: {name}" in page


def test_a_treatment_that_moves_them_far_is_told_in_the_verdict(experiment):
    results = copy.deepcopy(experiment.results)
    results["unrelated"]["arms"]["none"]["frechet_to_other_seeds"] = 1000.0
    said = {each.arm: each.costs for each in verdicts(results)}
    assert any("unrelated prompts" in cost for cost in said["none"])
    assert not any("unrelated prompts" in cost for cost in said["some"])


def test_other_unrelated_prompts_are_not_compared(make):
    first, other = (
        {"provenance": {}, "experiments": [make({"m": 0.5}, unrelated=prompts).results]}
        for prompts in (SCENES, SCENES[:2])
    )
    same = copy.deepcopy(first)

    def compared(a, b):
        keys = {each["figure"] for arm in compare_results(a, b)["experiments"][0]["arms"] for each in arm["figures"]}
        return any(key.startswith("unrelated.") for key in keys)

    assert compared(first, same) and not compared(first, other)
    assert any("unrelated prompts" in note for note in compare_results(first, other)["notes"])
    assert not any("unrelated prompts" in note for note in compare_results(first, same)["notes"])


def test_a_single_picture_is_refused(make):
    protocol = make().protocol
    with pytest.raises(InputError, match="2 images or more"):
        Protocol(
            protocol.axis, load_prompts("portraits"), unrelated=load_plain_prompts("scenes", 1), unrelated_images=1
        )
