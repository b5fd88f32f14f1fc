"""What is judged was not made on: seeds, and under a published protocol occupations and templates too."""

from pathlib import Path

import pytest

from stereoclinic.evaluation.methods import equisteer, uce
from stereoclinic.evaluation.protocols import load_protocol
from stereoclinic.prompts.sets import write
from stereoclinic.sns.mask import NeuronMask

PROTOCOL = """
title = "Somebody, Something, 2026"
source = ["made up for a test"]
axis = "gender"
occupations = ["doctor", "nurse"]
templates = ["a photo of a {group} {occupation}"]
images = 2
seeds = "any"
reader = "portraits"
formula = "deviation_ratio"
over = "prompt"
model = "none"
steps = 1
guidance = 1.0
held_out = ["doctor", "judge", "chef"]
"""


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    path = tmp_path / "some.toml"
    path.write_text(PROTOCOL)
    return path


def test_other_methods_are_made_on_what_a_protocol_does_not_judge(stereo, model, protocol, tmp_path, monkeypatch):
    made: dict[str, list[str]] = {}
    for kind in (equisteer.EquiSteer, uce.UnifiedConceptEditing):

        def spied(run, settings, kind=kind, fit=kind._fit):
            made[kind.title] = [row["prompt"] for row in run.rows]
            return fit(run, settings)

        monkeypatch.setattr(kind, "_fit", spied)
    arguments = ("--protocol", protocol, "--group-images", 0, "--baseline-seeds", 1, "--quiet", "-o", tmp_path / "out")
    result = stereo("bench", "--model", model, *arguments, "--baseline", "equisteer", "--baseline", "uce")
    assert result.exit_code == 0, result.stderr
    published = load_protocol(protocol)
    assert made["EquiSteer"] == [write(row) for row in published.calibration()]
    assert not any("doctor" in prompt or "nurse" in prompt for prompt in made["EquiSteer"])
    assert made["UCE"] == [write(row) for row in published.prompts()]  # it edits the words of those it treats


def test_a_mask_that_was_made_on_judged_occupations_is_told(stereo, model, protocol, tmp_path: Path):
    def noted(*prompts: object) -> str:
        located = stereo(
            "locate", "--model", model, *prompts, "--seeds", 1, "--steps", 2, "--bins", 1, "-o", tmp_path / "m.pt"
        )
        assert located.exit_code == 0, located.stderr
        arguments = ("--protocol", protocol, "--mask", tmp_path / "m.pt", "--dry-run")
        result = stereo("bench", "--model", model, *arguments)
        assert result.exit_code == 0, result.stderr
        return " ".join(result.stderr.split())

    assert "made on 1 of the 2 occupations that some judges (doctor)" in noted("--limit", 1)
    assert "occupations" not in noted("--prompts", f"protocol:{protocol}")
    assert NeuronMask.load(tmp_path / "m.pt").metadata["labels"] == ["judge", "chef"]


def test_group_pictures_too_are_of_seeds_that_no_mask_was_made_on(stereo, model, tmp_path: Path):
    arguments = ("--model", model, "--limit", 1)
    located = stereo(
        "locate", *arguments, "--seed", 12, "--seeds", 2, "--steps", 2, "--bins", 1, "-o", tmp_path / "m.pt"
    )
    assert located.exit_code == 0, located.stderr
    judged = ("bench", *arguments, "--mask", tmp_path / "m.pt", "--seed", 8, "--images", 2, "--dry-run")
    assert stereo(*judged, "--group-images", 4).exit_code == 0
    refused = stereo(*judged, "--group-images", 5)
    assert refused.exit_code == 2 and "judged seeds 8 to 12 overlap seeds 12 to 13" in refused.stderr


def test_an_unknown_protocol_is_one_line(stereo, model):
    result = stereo("locate", "--model", model, "--prompts", "protocol:nothing", "--dry-run")
    assert result.exit_code == 2 and "unknown protocol 'nothing'" in result.stderr
    arguments = ("--prompts", "protocol:sdisc", "--limit", 2, "--bins", 1, "--dry-run")
    limited = stereo("locate", "--model", model, *arguments)
    assert limited.exit_code == 0 and "(2 prompts x " in limited.stdout
