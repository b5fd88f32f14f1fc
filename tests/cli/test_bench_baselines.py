"""What `stereo bench` draws beside the mask: other methods, made on seeds that are not judged; unrelated prompts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_resume import figures
from tests.evaluation.test_results_schema import VALID
from torch import Tensor

from stereoclinic.calls.evaluate import mask_names
from stereoclinic.evaluation.methods.calibration import Run

SMALL = ("--limit", 2, "--images", 2, "--group-images", 1, "--steps", 2, "--quiet", "--baseline-seeds", 1)


def test_other_methods_stand_beside_the_mask_with_what_they_cost(stereo, model, located, tmp_path: Path):
    arguments = ("bench", "--model", model, "--mask", located, "-o", tmp_path, *SMALL)
    result = stereo(*arguments, "--baseline", "prompt", "--baseline", "equisteer")
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "results.json").read_text())
    VALID.validate(data)
    found = data["experiments"][0]
    names = list(found["baselines"])
    assert len(names) == 2 and set(names) < set(found["arms"]) and set(names) < set(found["group_prompts"])
    prompt, steering = (found["baselines"][name] for name in names)
    assert prompt["forward"] == 0 and steering["forward"] > 0 and steering["source"] and steering["needs"]
    # What practice does is the allocation oracle, on neutral prompts.
    oracle = found["arms"]["allocation oracle"]
    assert found["arms"][names[0]]["prompts"] == oracle["prompts"]
    assert "Other methods" in result.stdout and names[1] in result.stdout


def test_what_was_made_is_not_made_again(stereo, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts, made = tmp_path / "parts", []
    run = Run.draw

    def draw(self: Run, *how: Any) -> Tensor:
        made.append(self.name)
        return run(self, *how)

    monkeypatch.setattr(Run, "draw", draw)
    arguments = ("bench", "--model", model, *SMALL, "--parts", parts, "--baseline", "prompt", "--baseline", "equisteer")
    for out in ("one", "two"):
        result = stereo(*arguments, "-o", tmp_path / out)
        assert result.exit_code == 0, result.stderr
        assert made == ["EquiSteer"] * 3  # neutral prompts, and those of two groups
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two")]
    assert figures(results[0]) == figures(results[1])

    (file,) = parts.glob("equisteer-*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = stereo(*arguments, "-o", tmp_path / "one")
    assert result.exit_code == 2 and f"{file} holds something else than was made; remove it" in result.stderr
    assert stereo(*arguments, "--baseline-seed", 200, "-o", tmp_path / "one").exit_code == 0  # is made from others
    file.unlink()
    assert stereo(*arguments, "-o", tmp_path / "one").exit_code == 0
    assert made == ["EquiSteer"] * 9 and file.exists()


def test_unrelated_prompts_are_drawn_untreated_with_the_mask_and_on_other_seeds(stereo, model, located, tmp_path: Path):
    (tmp_path / "scenes.txt").write_text("a mountain\nan old man\n")
    arguments = ("bench", "--model", model, "--mask", located, "-o", tmp_path / "out", *SMALL)
    result = stereo(*arguments, "--unrelated", tmp_path / "scenes.txt", "--unrelated-images", 2)
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    VALID.validate(data)
    found = data["experiments"][0]["unrelated"]
    assert list(found["arms"]) == ["untreated", "gender", "other seeds"] and found["seeds"] == [5000, 5001]
    assert found["arms"]["gender"]["feature_distance_to_untreated"]["estimate"] > 0  # treated, with the gate as it is
    assert "Unrelated prompts" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "images" / "metadata.jsonl").read_text().splitlines()]
    apart = [line for line in lines if line["part"] == "unrelated"]
    assert len(apart) == 3 * 2 * 2 and all(line["group"] is None for line in apart)
    assert {(line["arm"], line["seed"]) for line in apart} == {
        *(("untreated", seed) for seed in (5000, 5001)), *(("gender", seed) for seed in (5000, 5001)),
        *(("other seeds", seed) for seed in (5002, 5003)),
    }  # fmt: skip
    assert all((tmp_path / "out" / "images" / line["file_name"]).is_file() for line in apart)
    dry = stereo(*arguments, "--unrelated", tmp_path / "scenes.txt", "--dry-run").stdout
    plain = stereo(*arguments, "--dry-run").stdout
    drawn = [int(re.search(r"would draw (\d+)", text)[1]) for text in (dry, plain)]
    assert drawn[0] - drawn[1] == 3 * 2 * 4
    refused = stereo(*arguments, "--unrelated", "nothing")
    assert refused.exit_code == 2 and "no built-in set (scenes)" in refused.stderr


def test_a_mask_of_a_methods_name_goes_by_its_path(stereo, model, located, tmp_path: Path):
    (tmp_path / "UCE.pt").write_bytes(located.read_bytes())
    assert list(mask_names([tmp_path / "UCE.pt"], ["uce"])) == [str(tmp_path / "UCE.pt")]
    assert list(mask_names([tmp_path / "UCE.pt"], [])) == ["UCE"]


def test_what_baselines_refuse(stereo, model, tmp_path: Path):
    arguments = ("bench", "--model", model, "-o", tmp_path, *SMALL)
    for given, says in (
        (("--baseline", "nothing"), "choose from prompt"),
        (("--baseline", "uce", "--baseline", "uce"), "given twice"),
        (("--baseline", "prompt", "--seed", 99), "seed 100 is judged"),
    ):
        result = stereo(*arguments, *given)
        assert result.exit_code == 2 and says in result.stderr, result.stderr
