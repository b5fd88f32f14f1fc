"""`stereo bench --reader` and `--protocol`: who reads, and whose evaluation is followed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.evaluation.readers.conftest import clip_folder as clip_folder
from tests.evaluation.readers.conftest import write_classifier
from tests.evaluation.test_extractors import Apart, Means
from tests.evaluation.test_results_schema import VALID

from stereoclinic.evaluation import instruments as extractors
from stereoclinic.evaluation.instruments import clip_scores, open_clip
from stereoclinic.evaluation.protocols import load_protocol
from stereoclinic.statistics.distances import frechet_between

OWN = '''
class Bright:
    """Reads gender off how bright a picture is; brings no features."""

    name, classes = "bright", {"gender": ("female", "male")}

    def read(self, images):
        p = images.mean((1, 2, 3)).clamp(0.05, 0.95)
        return {"gender": __import__("torch").stack([p, 1 - p], 1)}
'''

SMALL = ("--limit", 2, "--images", 2, "--group-images", 1, "--steps", 1, "--quiet")


@pytest.fixture
def judged(stereo, model, tmp_path: Path):
    def call(*arguments: object) -> dict:
        result = stereo("bench", "--model", model, "-o", tmp_path / "out", *arguments)
        assert result.exit_code == 0, result.stderr
        data = json.loads((tmp_path / "out" / "results.json").read_text())
        VALID.validate(data)
        return data

    return call


def test_clip_reads_what_it_is_asked_and_says_what_it_cannot(judged, stereo, model, clip_folder: Path):
    data = judged("--reader", f"clip:{clip_folder}", *SMALL)
    (found,) = data["experiments"]
    assert set(found["arms"]["untreated"]["prompts"][0]["shares"]) == {"female", "male"}
    assert "skin" not in found["arms"]["allocation oracle"].get("drift", {})
    assert "drift.skin" not in found["noise_floor"]
    assert data["provenance"]["reader"].startswith("clip") and data["provenance"]["reader_limits"]
    refused = stereo("bench", "--model", model, "--axis", "skin", "--reader", f"clip:{clip_folder}", *SMALL)
    assert refused.exit_code == 2 and "--allow-race" in refused.stderr
    allowed = judged("--axis", "skin", "--allow-race", "--reader", f"clip:{clip_folder}", *SMALL)
    assert allowed["provenance"]["reader_errors"]


def test_a_classifier_of_the_hub_reads_by_its_class_map(judged, tmp_path: Path):
    folder = write_classifier(tmp_path / "vit", ("woman", "man", "none"))
    data = judged("--reader", f"hf:{folder}", "--reader-classes", "woman=female,man=male", *SMALL)
    VALID.validate(data)
    arms = data["experiments"][0]["arms"]
    shares = arms["untreated"]["prompts"][0]["shares"]
    assert sum(each["estimate"] for each in shares.values()) == pytest.approx(1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "images" / "metadata.jsonl").read_text().splitlines()]
    for name, arm in arms.items():
        drawn = [line for line in lines if line["arm"] == name and line["wanted_group"] is None]
        unseen = [line["no_group"] > line["probability"] * (1 - line["no_group"]) for line in drawn]
        unsure = [line["probability"] * (1 - line["no_group"]) < 0.8 for line in drawn]
        assert arm["no_group"]["estimate"] == pytest.approx(sum(unseen) / len(drawn))
        assert arm["unsure"] == arm["unsure_interval"]["estimate"] == pytest.approx(sum(unsure) / len(drawn))
    assert "no group seen" in (tmp_path / "out" / "report.html").read_text()


def test_images_of_no_group_stand_in_the_table_where_the_reader_can_tell(stereo, model, tmp_path: Path):
    given = ("--reader-classes", "woman=female,man=male", "-o", tmp_path / "out", *SMALL)
    for labels, says in ((("woman", "man", "none"), True), (("woman", "man"), False)):
        folder = write_classifier(tmp_path / f"vit-{len(labels)}", labels)
        result = stereo("bench", "--model", model, "--reader", f"hf:{folder}", *given)
        assert result.exit_code == 0, result.stderr
        assert ("no group seen" in " ".join(result.stdout.split())) == says
        (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["experiments"]
        assert all(("no_group" in arm) == says for arm in found["arms"].values())


def test_an_ensemble_says_how_often_its_readers_agree(judged, tmp_path: Path):
    folder = write_classifier(tmp_path / "vit", ("female", "male"))
    found = judged("--reader", f"ensemble:hf:{folder}, portraits", *SMALL)["experiments"][0]
    for arm in found["arms"].values():
        assert 0 <= arm["readers_agree"]["low"] <= arm["readers_agree"]["estimate"] <= 1
        assert list(arm["readers_kappa"]) == [f"hf:{folder} and portraits"]
        assert set(arm["readers_agree_on"]) == {"female", "male"}
    assert "and portraits" in (tmp_path / "out" / "report.html").read_text()
    alone = judged(*SMALL)["experiments"][0]
    assert "readers_agree" not in alone["arms"]["untreated"]


def test_what_a_reader_measured_stays_with_each_image(judged, tmp_path: Path):
    data = judged("--axis", "skin", "--reader", "ensemble:ita,portraits", *SMALL)
    lines = [json.loads(line) for line in (tmp_path / "out" / "images" / "metadata.jsonl").read_text().splitlines()]
    people = [line for line in lines if line["part"] != "unrelated"]
    assert people and all(line["remark"] == "ita: no skin seen" or "ITA " in line["remark"] for line in people)
    assert all(0 <= arm["no_group"]["estimate"] <= 1 for arm in data["experiments"][0]["arms"].values())
    assert "tone" not in data["experiments"][0]["arms"]["untreated"].get("drift", {})  # a finer view of the same
    judged(*SMALL)
    assert "remark" not in (tmp_path / "out" / "images" / "metadata.jsonl").read_text()


def test_a_reader_of_ones_own_is_run_only_when_that_is_asked_for(judged, stereo, model, tmp_path: Path):
    (tmp_path / "mine.py").write_text(OWN)
    spec = f"{tmp_path / 'mine.py'}:Bright"
    refused = stereo("bench", "--model", model, "--reader", spec, *SMALL)
    assert refused.exit_code == 2 and "--allow-code" in refused.stderr
    found = judged("--reader", spec, "--allow-code", "--all-arms", *SMALL)["experiments"][0]
    folder = tmp_path / "out" / "images"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pixels = {}
    for arm in ("untreated", "other seeds"):
        drawn = [line for line in lines if line["arm"] == arm and line["wanted_group"] is None]
        pictures = torch.stack([read_image(folder / line["file_name"]) for line in drawn])
        pixels[arm] = torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 8).flatten(
            1
        )  # for it has no features
    expected = frechet_between(pixels["other seeds"], pixels["untreated"])
    assert found["arms"]["other seeds"]["frechet_to_untreated"] == pytest.approx(expected, rel=1e-4)


def test_an_ensemble_of_readers_without_features_is_compared_by_pixels(judged, tmp_path: Path):
    for name in ("mine", "other"):
        (tmp_path / f"{name}.py").write_text(OWN.replace('"bright"', f'"{name}"'))
    spec = f"ensemble:{tmp_path / 'mine.py'}:Bright,{tmp_path / 'other.py'}:Bright"
    given = ("--allow-code", "--all-arms", *SMALL)
    found = judged("--reader", spec, *given)["experiments"][0]
    alone = judged("--reader", f"{tmp_path / 'mine.py'}:Bright", *given)["experiments"][0]
    for name, arm in found["arms"].items():
        assert arm["readers_agree"]["estimate"] == 1
        assert arm["frechet_to_other_seeds"] == alone["arms"][name]["frechet_to_other_seeds"]


def test_the_clip_score_of_every_arm_stands_in_table_results_and_report(stereo, model, clip_folder, tmp_path: Path):
    result = stereo("bench", "--model", model, "-o", tmp_path, "--clip-score", clip_folder, *SMALL)
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "results.json").read_text())
    VALID.validate(data)
    opened = open_clip(str(clip_folder))
    lines = [json.loads(line) for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    for name, arm in data["experiments"][0]["arms"].items():
        drawn = [line for line in lines if line["arm"] == name and line["wanted_group"] is None]
        pictures = torch.stack([read_image(tmp_path / "images" / line["file_name"]) for line in drawn])
        expected = clip_scores(pictures, [line["prompt"] for line in drawn], opened).mean()
        assert arm["clip_score"]["estimate"] == pytest.approx(float(expected), abs=1e-3)
        assert f"{arm['clip_score']['estimate']:.1f} [" in result.stdout
    assert "CLIPScore" in (tmp_path / "report.html").read_text()
    assert data["provenance"]["clip_score"] == str(clip_folder)
    refused = stereo("bench", "--model", model, "-o", tmp_path / "other", "--clip-score", "nobody/nothing", *SMALL)
    assert refused.exit_code == 2 and "CLIPScore by 'nobody/nothing': no folder here" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_networks_that_are_not_there_are_refused_before_anything_is_drawn(stereo, model, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for given, says in (
        (("--features", "inception"), "pip install 'stereoclinic[inception]'"),
        (("--lpips",), "pip install 'stereoclinic[lpips]'"),
        (("--features", "vgg"), "choose from reader, inception"),
    ):
        result = stereo("bench", "--model", model, "-o", tmp_path / "out", *given, *SMALL)
        assert result.exit_code == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_a_network_in_their_place_gives_the_figures(stereo, model, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(extractors.FEATURES, "inception", Means)
    monkeypatch.setattr(extractors, "open_lpips", lambda device: Apart())
    given = ("--features", "inception", "--lpips")
    result = stereo("bench", "--model", model, "-o", tmp_path, *given, *SMALL)
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "results.json").read_text())
    VALID.validate(data)
    (found,) = data["experiments"]
    assert found["features"] == data["provenance"]["features"] == "inception"
    assert found["arms"]["balanced oracle"]["lpips_to_untreated"]["estimate"] > 0
    assert "inception features" in result.stdout and "LPIPS" in result.stdout
    assert "LPIPS to untreated" in (tmp_path / "report.html").read_text()


def read_image(path: Path) -> torch.Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_a_published_protocol_fixes_what_is_drawn_and_gives_its_figure(judged, stereo, model, tmp_path: Path):
    text = "\n".join(
        [
            'title = "Somebody, Something, 2026"', 'source = ["made up for a test"]', 'axis = "gender"',
            'occupations = ["doctor", "nurse"]', 'templates = ["a photo of a {group} {occupation}"]', "images = 3",
            'seeds = "any"', 'reader = "portraits"', 'formula = "deviation_ratio"', 'over = "prompt"',
            'model = "none"', "steps = 1", "guidance = 1.0",
        ]
    )  # fmt: skip
    (tmp_path / "some.toml").write_text(text)
    data = judged("--protocol", tmp_path / "some.toml", "--group-images", 0, "--quiet")
    (found,) = data["experiments"]
    assert found["images_per_prompt"] == 3 and found["labels"] == ["doctor", "nurse"] and found["guidance"] == 1
    arm = found["arms"]["untreated"]
    assert found["published"]["arms"]["untreated"] == pytest.approx(arm["deviation_ratio"]["estimate"])
    assert found["published"]["noise_floor"]["mean"] == pytest.approx(
        load_protocol(tmp_path / "some.toml").floor().mean
    )
    assert data["provenance"]["protocol"]["source"] == ["made up for a test"]
    result = stereo("bench", "--model", model, "--protocol", tmp_path / "some.toml", "--limit", 1)
    assert result.exit_code == 2 and "--limit: protocol some sets --limit itself" in result.stderr
    result = stereo("bench", "--model", model, "--protocol", "nothing")
    assert result.exit_code == 2 and "sdisc" in result.stderr


def test_a_reference_and_a_confusion_matrix_give_further_figures(judged, stereo, model, tmp_path: Path, monkeypatch):
    (tmp_path / "c.csv").write_text("group,read,count\nfemale,female,95\nfemale,male,5\nmale,male,95\nmale,female,5\n")
    found = judged("--reference", "planted", "--confusion", tmp_path / "c.csv", *SMALL)["experiments"][0]
    for name in found["arms"]:
        assert found["amplification"][name]["slope"]["low"] <= found["amplification"][name]["slope"]["high"]
        assert len(found["corrected_shares"][name]) == 2
    (tmp_path / "o.csv").write_text("label,group,share\ndoctor,woman,0.5\ndoctor,man,0.5\n")
    (tmp_path / "s.csv").write_text(
        "group,read,count\nfemale,female,50\nfemale,male,50\nmale,male,51\nmale,female,49\n"
    )
    monkeypatch.setattr("stereoclinic.evaluation.experiment.draw", None)  # refused before it
    for given, says in (
        (("--reference", tmp_path / "none.csv"), "cannot be read"),
        (("--reference", tmp_path / "o.csv"), "has groups woman, man; expected female, male"),
        (("--confusion", tmp_path / "s.csv"), "too near singular"),
        (("--reference", "planted", "--axis", "skin", "--confusion", tmp_path / "c.csv"), "expected two of"),
    ):
        result = stereo("bench", "--model", model, *given, *SMALL)
        assert result.exit_code == 2 and says in result.stderr
