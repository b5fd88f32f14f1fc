"""`stereo apply` on a tiny model."""

import json
from pathlib import Path

from datasets import load_dataset
from PIL import Image


def test_apply_draws_both_sides_from_the_same_seeds(model, located, stereo, tmp_path: Path):
    texts = ["a photo of a doctor", "a photo of a female nurse"]
    result = stereo(
        "apply", *texts, "--model", model, "--mask", located, "-n", 2, "--seed", 9, "--batch-size", 3,
        "-o", tmp_path / "o", "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    images = json.loads(result.stdout)["images"]
    assert [(each["arm"], each["prompt"], each["seed"]) for each in images] == [
        (arm, text, seed) for arm in ("untreated", "treated") for text in texts for seed in (9, 10)
    ]
    assert all(Path(each["file_name"]).is_file() for each in images)
    table = load_dataset("imagefolder", data_dir=str(tmp_path / "o" / "images"), split="train")
    assert len(table) == 8
    assert Image.open(tmp_path / "o" / "side_by_side.png").height > 2 * 128


def test_apply_at_no_strength_changes_nothing(model, located, stereo, tmp_path: Path):
    shared = ("--model", model, "--mask", located, "-n", 2, "--quiet", "-o", tmp_path / "o")
    sides = ("untreated", "treated")
    for guidance in (1, 3):
        assert stereo("apply", "a photo of a doctor", *shared, "--strength", 0, "--guidance", guidance).exit_code == 0
        files = [sorted((tmp_path / "o" / "images" / side).glob("*.png")) for side in sides]
        assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert stereo("apply", "a photo of a doctor", *shared).exit_code == 0
    files = [sorted((tmp_path / "o" / "images" / side).glob("*.png")) for side in sides]
    assert [path.read_bytes() for path in files[0]] != [path.read_bytes() for path in files[1]]
