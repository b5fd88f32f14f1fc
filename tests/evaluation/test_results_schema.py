"""The results model and its generated schema take results as they are written, and refuse what is wrong."""

import copy
import json

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from stereoclinic.evaluation.results import Results

SCHEMA = Results.model_json_schema()
PROVENANCE = {
    "model": "portraits", "unet_shapes": "a", "unet_weights": "b", "axis": "gender", "prompts": "c", "strength": 1.0,
    "masks": {"m": {"file": "m.pt"}}, "versions": {"torch": "2.13.0", "stereoclinic": None}, "created": "2026-11-24",
}  # fmt: skip
VALID = Draft202012Validator(SCHEMA)


def check(data: dict) -> None:
    """Model and schema take it, and the model changes nothing."""
    VALID.validate(data)
    assert Results.model_validate(data).data == data


def refuse(data: dict) -> None:
    """Neither model nor schema takes it."""
    assert not VALID.is_valid(data)
    with pytest.raises(ValidationError):
        Results.model_validate(data)


@pytest.fixture
def data(make) -> dict:
    results = [make({"m": 0.5}, unrelated=("a mountain", "a sea")).results, make(guidance=1.0).results]
    return json.loads(json.dumps({"schema": 2, "provenance": PROVENANCE, "experiments": results}))


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


def test_results_and_further_figures_are_taken(data):
    check(data)
    arm = data["experiments"][0]["arms"]["m"]
    arm |= {"new_distance": 1.5, "new_interval": {"estimate": 1, "low": 0, "high": 2}, "nested": {"a": [1]}}
    arm["parity_gap"]["p_value"] = 0.1
    data["experiments"][0]["new"] = data["provenance"]["new"] = data["new"] = {}
    check(data)


def test_a_value_that_rounding_moved_past_its_bound_is_read(data):
    for arm in data["experiments"][0]["arms"].values():
        arm["normalised_entropy"] = {"estimate": 1 + 2**-52, "low": 0.9, "high": 1 + 2**-52}
    assert Results.model_validate(data).data == data


def test_what_was_asked_for_is_taken_where_it_is_not_defined_too(data):
    arm = data["experiments"][0]["arms"]["m"]
    arm |= {
        "clip_score": {"estimate": 25.0, "low": 24.0, "high": 26.0},
        "readers_kappa": {"a and b": {"estimate": None, "low": -0.1, "high": 1.0}},
        "no_group": {"estimate": 0.1, "low": 0.0, "high": 0.2},
    }
    check(data)


def test_results_of_before_there_were_soft_shares_are_taken(data):
    for experiment in data["experiments"]:
        for arm in experiment["arms"].values():
            del arm["unsure_interval"]
            for row in arm["prompts"]:
                del row["soft_shares"], row["soft_parity_gap"]
    check(data)


@pytest.fixture
def asked(data) -> dict:
    """With a reference, corrected shares, a published figure and another method."""
    names = list(data["experiments"][0]["arms"])
    third = {"estimate": 0.3, "low": 0.2, "high": 0.4}
    data["experiments"][0] |= {
        "amplification": {
            name: {"slope": {"estimate": 1.9, "low": -0.1, "high": 2.4}, "excess": {"estimate": -0.1, "low": -0.2,
            "high": 0.0}, "distance": dict(third), "labels": ["doctor"]} for name in names
        },
        "corrected_shares": {name: [{"female": dict(third), "male": dict(third)}] for name in names},
        "published": {
            "name": "time", "figure": "kl", "arms": dict.fromkeys(names, 1.2), "noise_floor": {"mean": 0, "upper": 0.1},
        },
        "baselines": {
            "random": {"needs": "prompts", "source": "", "strength": 1.0, "seconds": 0.0, "images": 0, "forward": 0,
            "backward": 0},
        },
    }  # fmt: skip
    return data


def test_what_was_asked_for_beside_the_pictures_is_taken(asked):
    check(asked)


WRONG_ASKED = {
    "a slope that is a bare number": lambda found: found["amplification"]["m"].update(slope=1.5),
    "an excess above 1": lambda found: found["amplification"]["m"]["excess"].update(high=1.5),
    "a distance below 0": lambda found: found["amplification"]["m"]["distance"].update(low=-0.1),
    "a reference of no prompt": lambda found: found["amplification"]["m"].update(labels=[]),
    "no reference of untreated": lambda found: found["amplification"].pop("untreated"),
    "a corrected share above 1": lambda found: found["corrected_shares"]["m"][0]["female"].update(high=1.1),
    "a corrected share without its interval": lambda found: found["corrected_shares"]["m"][0]["female"].pop("low"),
    "corrected shares of no prompt": lambda found: found["corrected_shares"].update(m=[]),
    "a published figure without its floor": lambda found: found["published"].pop("noise_floor"),
    "a published figure below 0": lambda found: found["published"]["arms"].update(m=-0.1),
    "a published figure of no name": lambda found: found["published"].pop("name"),
    "a method without its cost": lambda found: found["baselines"]["random"].pop("forward"),
    "a method with half an image": lambda found: found["baselines"]["random"].update(images=0.5),
}


@pytest.mark.parametrize("wrong", WRONG_ASKED.values(), ids=WRONG_ASKED)
def test_what_is_wrong_with_that_is_refused(asked, wrong):
    wrong(asked["experiments"][0])
    refuse(asked)


WRONG = {
    "another schema": lambda data, arm: data.update(schema=1),
    "no provenance": lambda data, arm: data.pop("provenance"),
    "no experiment": lambda data, arm: data.update(experiments=[]),
    "no floor": lambda data, arm: data["experiments"][0].pop("noise_floor"),
    "no untreated arm": lambda data, arm: data["experiments"][0]["arms"].pop("untreated"),
    "a gap without its interval": lambda data, arm: arm["parity_gap"].pop("low"),
    "a gap that is a bare number": lambda data, arm: arm.update(parity_gap=0.4),
    "a gap above 1": lambda data, arm: arm["parity_gap"].update(high=1.2),
    "a share above 1": lambda data, arm: arm["prompts"][0]["shares"]["female"].update(estimate=1.5),
    "a share below 0": lambda data, arm: arm["prompts"][0]["shares"]["female"].update(low=-0.1),
    "a rate in percent": lambda data, arm: arm.update(unsure=12.0),
    "an interval of unsure that is a number": lambda data, arm: arm.update(unsure_interval=0.1),
    "no group without an interval": lambda data, arm: arm.update(no_group=0.1),
    "a soft share above 1": lambda data, arm: arm["prompts"][0]["soft_shares"]["female"].update(high=1.5),
    "a soft gap with an interval": lambda data, arm: arm["prompts"][0].update(soft_parity_gap={"estimate": 0.1}),
    "a change without p": lambda data, arm: arm["parity_gap_change"].pop("p_value"),
    "a CLIPScore above 100": lambda data, arm: arm.update(clip_score={"estimate": 250, "low": 240, "high": 260}),
    "a kappa above 1": lambda data, arm: arm.update(readers_kappa={"a and b": {"estimate": 2, "low": 0, "high": 3}}),
    "an unrelated similarity that is a bare number": lambda data, arm: data["experiments"][0]["unrelated"]["arms"][
        "m"
    ].update(ssim_to_untreated=0.5),
    "unrelated prompts without other seeds": lambda data, arm: data["experiments"][0]["unrelated"]["arms"].pop(
        "other seeds"
    ),
    "no prompts": lambda data, arm: arm.update(prompts=[]),
    "one group": lambda data, arm: data["experiments"][0].update(groups=["female"]),
    "seeds that are a number": lambda data, arm: data["experiments"][0].update(seeds=5000),
    "a mask without its file": lambda data, arm: data["provenance"]["masks"]["m"].pop("file"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused(data, wrong):
    broken = copy.deepcopy(data)
    wrong(broken, broken["experiments"][0]["arms"]["m"])
    refuse(broken)
