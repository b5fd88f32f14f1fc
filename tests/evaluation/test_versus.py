"""Two results compared: what differs significantly, what does not, and what cannot be compared."""

import copy
import json
from pathlib import Path

import pytest

from stereoclinic.errors import InputError
from stereoclinic.evaluation.compare import (
    BETTER,
    DIFFERS,
    NO_INTERVAL,
    NOT_SIGNIFICANT,
    OTHER_SIZE,
    SAME,
    WORSE,
    compare_results,
    judge,
)
from stereoclinic.evaluation.figures.registry import FIGURES, figure_of
from stereoclinic.evaluation.figures.values import values_of
from stereoclinic.evaluation.results import Results
from stereoclinic.prompts.axes import load_axis
from stereoclinic.statistics.intervals import Interval

LOW, HIGH = Interval(0.1, 0.08, 0.12), Interval(0.3, 0.28, 0.32)


def data_of(*experiments) -> dict:
    results = [json.loads(json.dumps(each.results)) for each in experiments]
    return {"schema": 2, "provenance": {"model": "portraits", "unet_weights": "a" * 64}, "experiments": results}


@pytest.fixture
def pair(make) -> tuple[dict, dict]:
    """A mask that leaves most of the gap, and one that leaves none of it."""
    return data_of(make({"m": 0.8}, images=60)), data_of(make({"m": 0.5}, images=60))


def figures(found: dict, arm: str) -> dict[str, dict]:
    (experiment,) = found["experiments"]
    (its,) = [each for each in experiment["arms"] if arm in (each["a"], each["b"])]
    return {row["figure"]: row for row in its["figures"]}


def test_lower_is_better_for_a_gap_and_higher_for_fidelity():
    assert judge("parity_gap", HIGH, LOW) == BETTER and judge("parity_gap", LOW, HIGH) == WORSE
    assert judge("occupation_right", HIGH, LOW) == WORSE and judge("group_prompts.all", LOW, HIGH) == BETTER
    assert judge("a_figure_nobody_knows", LOW, HIGH) == DIFFERS


def test_what_is_not_significant_gets_no_verdict():
    assert judge("parity_gap", HIGH, Interval(0.31, 0.27, 0.35)) == NOT_SIGNIFICANT
    assert judge("seconds", Interval(1.0), Interval(9.0)) == NO_INTERVAL
    assert judge("parity_gap", HIGH, HIGH) == SAME
    assert judge("parity_gap", HIGH, LOW, same_size=False) == OTHER_SIZE
    assert judge("occupation_right", HIGH, LOW, same_size=False) == WORSE  # a share is one of any number


def test_every_known_figure_that_can_be_better_is_judged():
    for key, figure in FIGURES.items():
        if figure.sign:
            member = f"{key}x" if key.endswith(".") else key
            assert {judge(member, LOW, HIGH), judge(member, HIGH, LOW)} == {BETTER, WORSE}, key


def test_a_better_mask_is_found_better_and_the_rest_the_same(pair):
    found = compare_results(*pair)
    assert found["notes"] == []
    gap = figures(found, "m")["parity_gap"]
    assert gap["verdict"] == BETTER
    assert gap["difference"]["estimate"] == pytest.approx(gap["b"]["estimate"] - gap["a"]["estimate"])
    assert gap["difference"]["low"] < gap["difference"]["estimate"] < gap["difference"]["high"] < 0
    assert {row["verdict"] for row in figures(found, "untreated").values()} == {SAME}
    assert figures(compare_results(*pair[::-1]), "m")["parity_gap"]["verdict"] == WORSE


def test_what_stands_beside_the_arms_is_compared_and_another_reference_said(pair):
    for data, slope, published in zip(pair, (LOW, HIGH), (0.2, 0.3), strict=True):
        (found,) = data["experiments"]
        found["amplification"] = {"m": {"slope": dict(vars(slope)), "labels": ["doctor"]}}
        found["published"] = {"name": "time", "arms": {"m": published}}
    pair[1]["provenance"]["reference"] = "planted"
    found = compare_results(*pair)
    assert found["notes"] == ["reference: none in A, planted in B"]
    assert figures(found, "m")["amplification.slope"]["verdict"] == DIFFERS
    assert figures(found, "m")["published.time"]["verdict"] == NO_INTERVAL
    pair[1]["experiments"][0]["published"]["name"] = "sdisc"  # no figure of both
    assert not any(key.startswith("published.") for key in figures(compare_results(*pair), "m"))


def test_results_beside_themselves_are_the_same(pair):
    found = compare_results(pair[0], copy.deepcopy(pair[0]))
    for arm in found["experiments"][0]["arms"]:
        assert {row["verdict"] for row in arm["figures"]} == {SAME}
        expected = values_of(pair[0]["experiments"][0], arm["a"])
        assert {row["figure"] for row in arm["figures"]} | {"images", "frechet_within_groups_floor"} >= expected.keys()
        assert all(figure_of(row["figure"]).title == row["title"] for row in arm["figures"])


def test_a_single_mask_is_compared_whatever_its_name(make):
    a, b = data_of(make({"old": 0.8})), data_of(make({"new": 0.5}))
    (experiment,) = compare_results(a, b)["experiments"]
    assert [(arm["a"], arm["b"]) for arm in experiment["arms"]][:2] == [("untreated", "untreated"), ("old", "new")]
    several = data_of(make({"new": 0.5, "newer": 0.5}))
    (experiment,) = compare_results(a, several)["experiments"]
    assert (experiment["only_a"], experiment["only_b"]) == (["old"], ["new", "newer"])


def test_other_sizes_are_noted_and_gaps_then_not_judged(make):
    found = compare_results(data_of(make({"m": 0.8}, images=20)), data_of(make({"m": 0.5}, images=60)))
    assert any(note.startswith("images per prompt: 20 in A, 60 in B") for note in found["notes"])
    assert figures(found, "m")["parity_gap"]["verdict"] == OTHER_SIZE
    assert figures(found, "m")["occupation_right"]["verdict"] != OTHER_SIZE


def test_what_else_differs_is_noted(pair):
    a, b = pair
    b["experiments"][0] |= {"seeds": [100, 159], "steps": 50}
    b["provenance"]["unet_weights"] = "b" * 64
    assert compare_results(a, b)["notes"] == [
        "seeds: 5000, 5059 in A, 100, 159 in B",
        "steps: 6 in A, 50 in B",
        "model's weights: aaaaaaaaaaaa... in A, bbbbbbbbbbbb... in B",
    ]


def test_guidance_scales_are_matched(make):
    a = data_of(make({"m": 0.8}, guidance=1.0), make({"m": 0.8}, guidance=2.0))
    b = data_of(make({"m": 0.5}, guidance=2.0), make({"m": 0.5}, guidance=3.0))
    found = compare_results(a, b)
    assert [each["guidance"] for each in found["experiments"]] == [2.0]
    assert found["notes"] == ["guidance 1 is in A only", "guidance 3 is in B only"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"axis": load_axis("skin")}, "axis gender in A, skin in B"),
        ({"labels": ("doctor", "nurse", "pilot")}, "different prompts (3 in A, 3 in B)"),
        ({"labels": ("doctor", "nurse")}, "different prompts (3 in A, 2 in B)"),
        ({"guidance": 3.0}, "guidance 2 in A, 3 in B"),
    ],
)
def test_what_cannot_be_compared_is_refused(make, pair, changes, says):
    with pytest.raises(InputError) as error:
        compare_results(pair[0], data_of(make({"m": 0.5}, **changes)))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_other_shares_are_refused(pair):
    pair[1]["experiments"][0]["target_shares"] = [0.3, 0.7]
    with pytest.raises(InputError, match=r"target shares 0\.5, 0\.5 in A, 0\.3, 0\.7 in B"):
        compare_results(*pair)


def test_files_that_are_no_results_are_refused(pair, tmp_path: Path):
    whole = {**pair[0]}
    cut = copy.deepcopy(whole)
    del cut["experiments"][0]["axis"]
    for content, says in (
        ("{", "cannot be read"),
        ("[1]", "expected a results.json"),
        ("{}", "expected a results.json"),
        (json.dumps({**whole, "schema": 1}), "has schema 1; this stereoclinic reads 2"),
        (json.dumps({**whole, "experiments": []}), "expected a results.json"),
        (json.dumps(cut), "is damaged: experiments.0.axis"),
    ):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match=says):
            Results.load(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        Results.load(tmp_path / "none.json")
    (tmp_path / "results.json").write_text(json.dumps(whole))
    assert Results.load(tmp_path).data == Results.load(tmp_path / "results.json").data == whole
