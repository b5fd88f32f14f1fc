"""What an experiment's results hold: that figures hang together, and agree with the functions they come from."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from stereoclinic.evaluation.arms import ALLOCATION, BALANCED, OTHER, UNTREATED
from stereoclinic.evaluation.figures.bias import KL_DRAWS
from stereoclinic.evaluation.figures.case import DRAWS
from stereoclinic.evaluation.figures.intersections import joint_reads
from stereoclinic.evaluation.figures.summarise import summarise
from stereoclinic.evaluation.figures.values import values_of
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.statistics.distances import frechet_within_groups
from stereoclinic.statistics.gaps import gap_intervals
from stereoclinic.statistics.intervals import wilson_interval
from stereoclinic.statistics.shares import GAPS, parity_gap, shares_from_reads
from stereoclinic.statistics.significance import benjamini_hochberg, holm

SETS = (None, "soft", "pooled", "pooled_soft")


THREE = Axis("hair", ("dark", "fair", "red"), ("dark-haired", "fair-haired", "red-haired"))


@pytest.mark.parametrize("axis", [None, THREE])
def test_every_gap_is_there_from_hard_and_soft_reads_by_prompt_and_pooled(make, axis):
    experiment = make({"gender": 0.6}, axis=axis, figures="all")
    for arm in experiment.neutral:
        figures = experiment.results["arms"][arm.name]
        for name in SETS:
            found = figures if name is None else figures[name]
            shares = shares_from_reads(arm.reads, hard=name in (None, "pooled"))
            shares = shares.mean(0, keepdim=True) if name and "pooled" in name else shares
            for gap, function in GAPS.items():
                assert found[gap]["estimate"] == pytest.approx(float(function(shares, None).mean()), abs=1e-12)
            for figure in (*GAPS, "normalised_entropy"):
                assert found[figure]["low"] <= found[figure]["estimate"] <= found[figure]["high"]


@pytest.mark.parametrize("axis", [None, THREE])
def test_gaps_in_other_units_have_the_interval_that_is_their_own(make, axis):
    experiment = make(axis=axis, figures="all")
    figures = experiment.results["arms"][BALANCED]
    own, finer = (gap_intervals(experiment.arm(BALANCED).reads, GAPS, resamples=n) for n in (DRAWS, KL_DRAWS))
    own["kl"] = finer["kl"]
    for name in GAPS:
        assert figures[name] == pytest.approx(vars(own[name]), abs=1e-9)


def test_opposite_stereotypes_cancel_in_the_pooled_figures_alone(make):
    figures = make(labels=("doctor", "nurse"), figures="pooled").results["arms"][UNTREATED]
    assert figures["parity_gap"]["low"] > 0.2
    assert figures["pooled"]["parity_gap"]["estimate"] == pytest.approx(0)
    assert figures["pooled"]["normalised_entropy"]["estimate"] == pytest.approx(1)


def test_prompts_are_tested_one_by_one_on_the_same_seeds_and_corrected_for_how_many_there_are(make):
    arms = make({"gender": 0.5, "none": 0.9}).results["arms"]
    for name, figures in arms.items():
        assert all(("change" in row) == (name not in (UNTREATED, OTHER)) for row in figures["prompts"])
    treated = [row["change"] for row in arms["gender"]["prompts"]]
    plain = [each["p_value"] for each in treated]
    assert [each["p_value_holm"] for each in treated] == holm(plain)
    assert [each["p_value_benjamini_hochberg"] for each in treated] == benjamini_hochberg(plain)
    assert all(each["moved"] == 8 and each["p_value"] == pytest.approx(2 / 2**8) for each in treated)
    assert all(row["change"]["p_value_holm"] == 1 for row in arms["none"]["prompts"])


@pytest.mark.parametrize("axis", [None, THREE])
def test_soft_shares_of_a_prompt_are_means_of_its_reads_with_an_interval_that_has_a_width(make, axis):
    experiment = make({"gender": 0.6}, axis=axis)
    for arm in experiment.neutral:
        soft = shares_from_reads(arm.reads, hard=False)
        for p, row in enumerate(experiment.results["arms"][arm.name]["prompts"]):
            assert [each["estimate"] for each in row["soft_shares"].values()] == pytest.approx(
                soft[p].tolist(), abs=1e-4
            )
            assert all(0 <= each["low"] < each["estimate"] < each["high"] <= 1 for each in row["soft_shares"].values())
            assert row["soft_parity_gap"] == pytest.approx(float(parity_gap(soft[p])), abs=1e-4)
        arm.reads = shares_from_reads(arm.reads[:, :, None], hard=True).float()  # sure reads: soft is hard
    for arm in summarise(experiment, ["gender"])["arms"].values():
        for row in arm["prompts"]:
            hard = {
                group: {end: share[end] for end in ("estimate", "low", "high")}
                for group, share in row["shares"].items()
            }
            assert row["soft_shares"] == {group: pytest.approx(share, abs=1e-4) for group, share in hard.items()}
            assert row["soft_parity_gap"] == pytest.approx(row["parity_gap"], abs=1e-4)


@pytest.mark.parametrize("images", [10, 25, 100])
@pytest.mark.parametrize("shape", [(0.3, 0.3), (0.2, 0.6), (2.0, 2.0), (8.0, 2.0)])
def test_the_interval_of_a_soft_share_holds_it_95_times_in_100_or_more(images, shape):
    reads = np.random.default_rng(0).beta(*shape, size=(1000, images)).mean(1)
    ends = [wilson_interval(mean * images, images) for mean in reads]
    truth = shape[0] / sum(shape)
    assert np.mean([each.low <= truth <= each.high for each in ends]) >= 0.95


def test_unsure_reads_have_an_interval_beside_the_number(make):
    experiment = make({"gender": 0.5})
    experiment.arm("gender").reads[0, :6] = torch.tensor([0.45, 0.55])
    figures = summarise(experiment, ["gender"])["arms"]["gender"]
    assert figures["unsure"] == pytest.approx(0.1)
    assert figures["unsure_interval"] == pytest.approx(vars(wilson_interval(6, 60)))
    whole = values_of({"arms": {"m": figures}}, "m")
    assert vars(whole["unsure"]) == pytest.approx(figures["unsure_interval"])
    assert "unsure_interval" not in whole
    older = {key: value for key, value in figures.items() if key != "unsure_interval"}
    assert values_of({"arms": {"m": older}}, "m")["unsure"] == whole["unsure"]


def test_images_of_no_group_are_counted_and_unsure_and_change_no_share(make):
    experiment = make({"gender": 0.5})
    plain = experiment.results["arms"]
    assert all("no_group" not in figures for figures in plain.values())
    for arm in experiment.neutral:
        arm.no_group = torch.zeros(3, 20)
    experiment.arm("gender").no_group[0, :12] = 0.98
    experiment.arm("gender").no_group[1, :3] = 0.3  # the group is seen, though not surely
    arms = summarise(experiment, ["gender"])["arms"]
    judged = {name: arms[name].pop("no_group") for name in arms}
    assert judged["gender"] == pytest.approx(vars(wilson_interval(12, 60)))
    assert judged[UNTREATED]["estimate"] == 0 < judged[UNTREATED]["high"]
    assert arms["gender"].pop("unsure") == pytest.approx(15 / 60) and plain["gender"].pop("unsure") == 0
    assert arms["gender"].pop("unsure_interval") != plain["gender"].pop("unsure_interval")
    assert json.dumps(arms) == json.dumps(plain)


def test_distances_have_floors_and_a_same_arm_none(make):
    arms = make({"gender": 0.5}, side=16).results["arms"]
    assert arms[UNTREATED]["kid_to_untreated"] is arms[OTHER]["kid_to_other_seeds"] is None
    assert arms[UNTREATED]["kid_to_other_seeds"] == pytest.approx(arms[OTHER]["kid_to_untreated"])
    assert "ssim_to_untreated" not in arms[UNTREATED]
    similar = {name: arm["ssim_to_untreated"] for name, arm in arms.items() if name != UNTREATED}
    assert all(-0.2 < each["low"] <= each["estimate"] <= each["high"] < 0.2 for each in similar.values())  # noise
    for arm in arms.values():
        assert arm["diversity_within_groups"] == pytest.approx(arm["diversity_within_groups_reference"], rel=0.3)
    assert "ssim_to_untreated" not in make(side=8).results["arms"][BALANCED]  # smaller than its window


def test_axes_meet_where_several_were_read(make):
    experiment = make({"gender": 0.5})
    assert experiment.results["intersections"] == {}
    experiment.protocol = replace(
        experiment.protocol, others=(load_axis("age"),), shares={"female": 0.25, "male": 0.75}
    )
    meeting = summarise(experiment, ["gender"])["intersections"]["gender+age"]
    assert meeting["groups"] == ["female+old", "female+young", "male+old", "male+young"]
    assert meeting["target_shares"] == pytest.approx([0.125, 0.125, 0.375, 0.375])
    for arm in experiment.neutral:
        figures = meeting["arms"][arm.name]
        shares = shares_from_reads(joint_reads([arm.reads, arm.others["age"]]), hard=True)
        expected = parity_gap(shares, torch.tensor(meeting["target_shares"])).mean()
        assert figures["parity_gap"]["estimate"] == pytest.approx(float(expected))
        assert sum(share["estimate"] for share in figures["shares"].values()) == pytest.approx(1)
    assert set(meeting["noise_floor"]) == {"parity_gap", "deviation_ratio"}


def test_a_pooled_gap_has_a_noise_floor_of_all_images(make):
    results = make(labels=("a", "b", "c", "d"), figures="pooled").results
    pooled, by_prompt = results["noise_floor_pooled"]["parity_gap"], results["noise_floor"]["parity_gap"]
    assert pooled["mean"] == pytest.approx(by_prompt["mean"] / 2, rel=0.1)


def test_readers_agree_where_there_are_several(make):
    experiment = make()
    assert "readers_agree" not in experiment.results["arms"][UNTREATED]
    for arm in experiment.neutral:
        one = torch.eye(2)[torch.arange(20) % 2].expand(3, 20, 2)
        arm.by_reader = {"a": one, "b": torch.where((torch.arange(20) < 16)[:, None], one, 1 - one)}
    figures = summarise(experiment, [])["arms"][ALLOCATION]
    agree, (kappa,) = figures["readers_agree"], figures["readers_kappa"].values()
    assert agree["estimate"] == pytest.approx(0.8) and agree["low"] < 0.8 < agree["high"]
    assert list(figures["readers_kappa"]) == ["a and b"]
    assert kappa["estimate"] == pytest.approx(0.6) and kappa["low"] < 0.6 < kappa["high"]  # half by chance
    assert set(figures["readers_agree_on"]) == {"female", "male"}


def test_of_three_readers_each_pair_has_its_kappa_and_agreement_is_of_all(make):
    experiment = make()
    for arm in experiment.neutral:
        one = torch.eye(2)[torch.arange(20) % 2].expand(3, 20, 2)
        arm.by_reader = {"a": one, "b": one, "c": 1 - one}
    figures = summarise(experiment, [])["arms"][ALLOCATION]
    assert figures["readers_agree"]["estimate"] == 0
    assert {pair: each["estimate"] for pair, each in figures["readers_kappa"].items()} == pytest.approx(
        {"a and b": 1, "a and c": -1, "b and c": -1}
    )
    assert "readers_agree_on" not in figures


def test_distances_within_groups_are_to_other_people_of_the_same_groups(make):
    experiment = make({"a": 0.5}, images=60)
    arms = experiment.results["arms"]
    oracle = arms[ALLOCATION]  # it shows the reference's people, as many of each: its distance is the floor
    assert oracle["frechet_within_groups"] == pytest.approx(oracle["frechet_within_groups_floor"])
    arm, fair, other = experiment.arm("a"), experiment.arm(ALLOCATION), experiment.reference
    cells = [
        (each.features.flatten(0, 1), (torch.arange(3)[:, None] * 2 + of).flatten())
        for each, of in ((arm, arm.reads.argmax(2)), (other, other.allotted), (fair, fair.allotted))
    ]
    expected = frechet_within_groups(*cells, 6)
    found = arms["a"]["frechet_within_groups"], arms["a"]["frechet_within_groups_floor"]
    assert found == pytest.approx(expected) and found[0] != pytest.approx(found[1])


def test_where_the_gate_leaves_every_prompt_alone_none_is_obeyed_or_not(make):
    experiment = make({"a": 0.5})
    assert "allotment_obeyed" in experiment.results["arms"][ALLOCATION]
    experiment.arm("a").allotted = torch.full(experiment.arm("a").reads.shape[:2], -1)
    assert "allotment_obeyed" not in summarise(experiment, ["a"])["arms"]["a"]


def test_clip_scores_are_averaged_and_compared_on_the_same_seeds(make):
    experiment = make({"gender": 0.5})
    assert "clip_score" not in experiment.results["arms"][UNTREATED]
    noise = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).double()
    for arm in experiment.neutral:  # far more between images than between arms
        arm.clip = 25 + 5 * noise - (0.5 if arm.name == "gender" else 0)
    arms = summarise(experiment, ["gender"])["arms"]
    for name, figures in arms.items():
        assert figures["clip_score"]["estimate"] == pytest.approx(float(experiment.arm(name).clip.mean()))
        assert figures["clip_score"]["low"] < figures["clip_score"]["estimate"] < figures["clip_score"]["high"]
        assert ("clip_score_change" in figures) == (name not in (UNTREATED, OTHER))
    change = arms["gender"]["clip_score_change"]
    assert change["low"] == pytest.approx(-0.5) and change["high"] == pytest.approx(-0.5) and change["p_value"] < 0.01
    assert arms[BALANCED]["clip_score_change"]["p_value"] == 1


def test_results_are_plain_data(make):
    results = make({"gender": 0.5}).results
    assert json.loads(json.dumps(results)) == results


def test_the_order_of_images_does_not_matter(make):
    experiment = make({"gender": 0.6}, figures="all")
    before = experiment.results["arms"]["gender"]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for arm in experiment.neutral:
        arm.reads = arm.reads[:, order]
    after = summarise(experiment, ["gender"])["arms"]["gender"]
    for name in GAPS:
        assert after[name] == pytest.approx(before[name])
    assert [row["change"] for row in after["prompts"]] == [row["change"] for row in before["prompts"]]


def test_the_most_memory_is_a_figure_where_it_is_known(make):
    experiment = make()
    assert not any("peak_memory" in arm for arm in experiment.results["arms"].values())
    experiment.arm(UNTREATED).memory = 3 << 19
    results = summarise(experiment, [])
    assert results["arms"][UNTREATED]["peak_memory"] == 1.5 and "peak_memory" not in results["arms"][BALANCED]
    assert values_of(results, UNTREATED)["peak_memory"].estimate == 1.5
