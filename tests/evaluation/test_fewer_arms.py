"""An experiment of the arms that a bench draws by default, without the balanced oracle and other seeds, is whole."""

import json
from pathlib import Path

import pytest
import torch
from tests.evaluation.test_results_schema import PROVENANCE, VALID

from stereoclinic.evaluation.arms import Protocol
from stereoclinic.evaluation.compare import SAME, compare_results
from stereoclinic.evaluation.experiment import arms_of
from stereoclinic.evaluation.figures.summarise import summarise
from stereoclinic.evaluation.results import Results
from stereoclinic.evaluation.verdict import NARROWED, verdict
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_plain_prompts, load_prompts
from stereoclinic.report.report import write_results
from stereoclinic.sns.mask import NeuronMask

ARMS = ["untreated", "m", "random", "allocation oracle"]
NEED_MORE = {"share_of_balanced_oracle", "frechet_to_other_seeds", "kid_to_other_seeds"}


@pytest.fixture
def few(make):
    return make({"m": 0.5}, unrelated=("a mountain", "a sea"), all_arms=False, side=16)


@pytest.fixture
def written(few, tmp_path: Path) -> dict:
    write_results(tmp_path, [few], PROVENANCE)
    return json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("all_arms", [True, False])
def test_two_arms_are_drawn_on_request_and_the_balanced_oracle_wherever_there_is_no_mask(model, with_mask, all_arms):
    sites = find_sites(model.network)
    mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), torch.ones(1, sum(site.width for site in sites)))
    scenes = load_plain_prompts("scenes", 2)
    protocol = Protocol(
        load_axis("gender"), load_prompts("portraits", 1), 2, unrelated=scenes, unrelated_images=2, all_arms=all_arms
    )
    arms = arms_of(model, protocol, {"m": mask} if with_mask else {}, force=True)
    asked = ["balanced oracle"] * (all_arms or not with_mask), ["other seeds"] * all_arms
    assert [arm.name for arm in arms.neutral] == [
        "untreated", *["m", "random"] * with_mask, *asked[0], "allocation oracle", *asked[1],
    ]  # fmt: skip
    assert arms.unrelated[-1].name == "other seeds"  # unrelated prompts need their noise


def test_results_are_valid_and_lack_only_figures_that_need_the_two_arms(make, written, tmp_path: Path):
    VALID.validate(written)
    assert Results.load(tmp_path).data == written
    (found,), whole = written["experiments"], make({"m": 0.5}, unrelated=("a mountain", "a sea"), side=16).results
    assert list(found["arms"]) == ARMS
    for name in ARMS:
        assert set(whole["arms"][name]) - set(found["arms"][name]) <= NEED_MORE
        assert NEED_MORE.isdisjoint(found["arms"][name])
    assert found["unrelated"]["arms"]["m"]["frechet_to_other_seeds"] > 0  # those have other seeds


def test_an_experiment_without_a_mask_is_written_beside_the_balanced_oracle(make, tmp_path: Path):
    write_results(tmp_path, [make(all_arms=False)], PROVENANCE | {"masks": {}})
    (found,) = Results.load(tmp_path).data["experiments"]
    assert list(found["arms"]) == ["untreated", "balanced oracle", "allocation oracle"]
    assert "(the balanced oracle) would change it by" in Results.load(tmp_path).verdict


def test_every_picture_of_unrelated_prompts_on_other_seeds_has_a_folder_and_its_seed(written, few, tmp_path: Path):
    lines = [json.loads(line) for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    distant = [line for line in lines if line["arm"] == "other seeds"]
    n = few.protocol.unrelated_images
    assert len(distant) == 2 * n and {line["part"] for line in distant} == {"unrelated"}
    assert {line["seed"] for line in distant} == set(range(5000 + n, 5000 + 2 * n))
    assert len({line["file_name"] for line in lines}) == len(lines)
    assert all((tmp_path / "images" / line["file_name"]).is_file() for line in lines)


def test_the_report_shows_the_arms_and_the_noise_of_the_drift(written, tmp_path: Path):
    page = (tmp_path / "report.html").read_text()
    floor = written["experiments"][0]["noise_floor"]["drift.age"]
    assert "balanced oracle" not in page and "allocation oracle" in page
    assert "drift of age" in page and f"below {floor['upper']:.2f}" in page


def test_it_is_compared_with_an_experiment_of_all_arms(make, written):
    whole = make({"m": 0.5}, side=16).results
    other = json.loads(json.dumps({"schema": 2, "provenance": PROVENANCE, "experiments": [whole]}))
    for a, b in ((written, other), (other, written)):
        (found,) = compare_results(a, b)["experiments"]
        assert [each["a"] for each in found["arms"]] == ARMS
        figures = {row["figure"]: row["verdict"] for row in found["arms"][1]["figures"]}
        assert figures["parity_gap"] == SAME and NEED_MORE.isdisjoint(figures)


def test_its_verdict_names_a_drift_that_two_samples_do_not_show(few):
    found = verdict(few.results, "m")
    assert found.outcome == NARROWED and "drift of age" in found.sentence and not found.costs
    upper, after = few.results["noise_floor"]["drift.age"]["upper"], few.arm("m").others["age"]
    for moved in range(1, 8):  # images of each prompt, of twenty; every other one is old
        after[:, 2 * moved - 2] = torch.tensor([0.0, 1.0])
        results = summarise(few, ["m"])
        drift = results["arms"]["m"]["drift"]["age"]
        assert drift == pytest.approx(moved / 20)
        assert any("drift of age" in cost for cost in verdict(results, "m").costs) == (drift > upper)
    assert 1 / 20 < upper < drift
