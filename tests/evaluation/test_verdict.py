"""The verdict says what the figures say: no more where they are unsure, no less where a mask made things worse."""

import copy

import pytest

from stereoclinic.evaluation.verdict import NARROWED, NO_MASK, UNCLEAR, WIDENED, verdict, verdicts

CHANCE = {"mean": 0.08, "upper": 0.11}


def results(before: float, after: float, change: tuple[float, float, float], p: float, **arm: object) -> dict:
    """Results with the figures that a verdict needs, and no other."""
    return {
        "axis": "gender",
        "masks": ["m"],
        "images_per_prompt": 25,
        "noise_floor": {"parity_gap": CHANCE},
        "arms": {
            "untreated": {
                "images": 300,
                "parity_gap": {"estimate": before, "low": before - 0.02, "high": before + 0.02},
            },
            "m": {
                "images": 300,
                "parity_gap": {"estimate": after, "low": after - 0.02, "high": after + 0.02},
                "parity_gap_change": dict(zip(("estimate", "low", "high", "p_value"), (*change, p), strict=True)),
                **arm,
            },
        },
    }


def plain(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


def share(estimate: float) -> dict:
    return {"estimate": estimate, "low": estimate - 0.02, "high": min(1.0, estimate + 0.02)}


def test_a_mask_that_helps_is_said_to_with_its_p_value():
    found = verdict(results(0.43, 0.20, (-0.24, -0.28, -0.18), 0.0005), "m")
    assert (found.outcome, found.fair) == (NARROWED, False)
    assert found.sentence == (
        "Mask m narrows the parity gap on gender from 0.43 to 0.20 (p < 0.001). The remaining gap is larger than"
        " sampling noise explains (a fair model stays below 0.11 at 25 images per prompt). Side effects were not"
        " measured."
    )


def test_groups_that_are_no_longer_seen_are_a_cost():
    data = results(0.43, 0.20, (-0.24, -0.28, -0.18), 0.0005, no_group={"estimate": 0.4, "low": 0.35, "high": 0.46})
    data["arms"]["untreated"]["no_group"] = {"estimate": 0.0, "low": 0.0, "high": 0.02}
    assert "Side effects: no group seen 0.00 to 0.40" in plain(verdict(data, "m").sentence)


def test_what_a_fair_generator_would_show_is_told_from_what_is_left():
    found = verdict(results(0.43, 0.10, (-0.33, -0.38, -0.29), 0.0005), "m")
    assert found.fair is True
    assert "The remaining gap is within sampling noise" in found.sentence


def test_a_mask_that_makes_it_worse_is_said_to():
    found = verdict(results(0.20, 0.35, (0.15, 0.10, 0.20), 0.002), "m")
    assert found.outcome == WIDENED
    assert "widens the parity gap on gender from 0.20 to 0.35 (p = 0.002)" in found.sentence


@pytest.mark.parametrize(
    ("change", "p"),
    [((-0.03, -0.08, 0.02), 0.2), ((-0.03, -0.08, -0.001), 0.07), ((0.03, -0.001, 0.08), 0.04)],
    ids=["neither", "p alone", "interval alone"],
)
def test_interval_and_p_must_both_be_sure(change, p):
    found = verdict(results(0.43, 0.40, change, p), "m")
    assert found.outcome == UNCLEAR
    assert "makes no significant difference to the parity gap on gender: 0.43 to 0.40" in found.sentence


def test_where_the_untreated_model_is_within_chance_nothing_could_be_shown():
    found = verdict(results(0.09, 0.08, (-0.01, -0.04, 0.03), 0.6), "m")
    assert "The untreated gap is already within sampling noise" in found.sentence


def test_costs_are_those_beyond_chance():
    data = results(
        0.43, 0.20, (-0.24, -0.28, -0.18), 0.0005,
        occupation_right=share(0.80), unsure=0.10, drift={"age": 0.30, "skin": 0.09},
        frechet_within_groups_ratio={"estimate": 3.6, "low": 2.8, "high": 4.5},
    )  # fmt: skip
    data["arms"]["untreated"] |= {"occupation_right": share(0.98), "unsure": 0.0}
    data["noise_floor"] |= {f"drift.{axis}": {"mean": 0.08, "upper": 0.10} for axis in ("age", "skin")}
    found = verdict(data, "m")
    assert found.costs == (
        "occupation right 0.98 to 0.80",
        "images of the same group shift 3.6 times as far as sampling noise",
        "unsure 0.00 to 0.10",
        "drift of age 0.30, by chance below 0.10",
    )
    assert "Side effects: occupation right 0.98 to 0.80; images" in found.sentence


@pytest.mark.parametrize(("drift", "counts"), [(0.101, True), (0.1, False), (0.02, False)])
def test_a_drift_is_a_cost_above_what_two_samples_show_in_95_of_100_cases(drift: float, counts: bool):
    data = results(0.43, 0.20, (-0.24, -0.28, -0.18), 0.0005, drift={"age": drift})
    assert verdict(data, "m").costs == () and "not measured" in verdict(data, "m").sentence  # its noise is not known
    data["noise_floor"]["drift.age"] = {"mean": 0.08, "upper": 0.1}
    found = verdict(data, "m")
    assert found.costs == (("drift of age 0.10, by chance below 0.10",) if counts else ())
    assert counts or "No side effect is larger than sampling noise (drift of age)" in found.sentence


def test_a_distance_that_may_be_that_of_two_samples_is_no_cost():
    ratio = {"estimate": 1.4, "low": 0.9, "high": 2.1}
    found = verdict(results(0.43, 0.20, (-0.24, -0.28, -0.18), 0.0005, frechet_within_groups_ratio=ratio), "m")
    assert found.costs == ()
    assert "No side effect is larger than sampling noise (shift within groups)" in found.sentence


def test_what_improved_is_no_cost():
    data = results(0.43, 0.20, (-0.24, -0.28, -0.18), 0.0005, occupation_right=share(0.98), unsure=0.0)
    data["arms"]["untreated"] |= {"occupation_right": share(0.80), "unsure": 0.10}
    found = verdict(data, "m")
    assert found.costs == ()
    assert "No side effect is larger than sampling noise (occupation right, unsure)" in found.sentence


def test_what_was_not_measured_is_not_called_free():
    data = results(0.43, 0.20, (-0.24, -0.28, -0.18), 0.0005)
    assert "Side effects were not measured" in verdict(data, "m").sentence
    del data["noise_floor"], data["images_per_prompt"], data["arms"]["m"]["parity_gap_change"]
    found = verdict(data, "m")
    assert (found.outcome, found.fair) == (UNCLEAR, None)  # a difference without an interval is no finding
    assert "Sampling noise is not known" in found.sentence


def test_without_a_mask_the_model_itself_is_judged():
    data = results(0.43, 0.20, (-0.24, -0.28, -0.18), 0.0005)
    data["masks"] = []
    data["arms"]["balanced oracle"] = {"parity_gap_change": {"estimate": -0.1, "low": -0.14, "high": -0.05}}
    (found,) = verdicts(data)
    assert found.outcome == NO_MASK
    assert found.sentence.startswith("No mask was given. The model's parity gap on gender is 0.43 [0.41, 0.45]")
    assert "would change it by -0.10 [-0.14, -0.05]" in plain(found.sentence)


def test_one_verdict_a_mask_of_a_whole_experiment(make):
    experiment = make({"cure": 0.5, "poison": 1.0, "nothing": 0.9}, untreated=0.8)
    data = experiment.results
    assert [each.arm for each in verdicts(data)] == ["cure", "poison", "nothing"]
    assert [each.outcome for each in verdicts(data)] == [NARROWED, WIDENED, WIDENED]
    same = copy.deepcopy(data)
    same["arms"]["cure"] = same["arms"]["untreated"] | {"parity_gap_change": {"estimate": 0, "low": 0, "high": 0}}
    assert verdict(same, "cure").outcome == UNCLEAR
    assert all(each.sentence.endswith(".") and "\n" not in each.sentence for each in verdicts(data))
