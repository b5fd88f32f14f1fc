"""`stereo reader check`: a reader on pictures whose group is known, and the confusion file that a bench takes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stereoclinic import CheckReaderSettings, check_reader
from stereoclinic.evaluation.references import load_confusion
from stereoclinic.statistics.intervals import wilson_interval

OWN = '''
import torch


class Bright:
    """Reads female off a bright picture, and nobody off a black one."""

    name, classes = "bright", {"gender": ("female", "male", "nobody")}

    def read(self, images):
        light = images.mean((1, 2, 3))
        nobody = (light == 0).float()
        return {"gender": torch.stack([light * (1 - nobody), (1 - light) * (1 - nobody), nobody], 1)}
'''


def picture(path: Path, light: float, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), round(255 * light), np.uint8)).save(path)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(OWN)
    return f"{tmp_path / 'mine.py'}:Bright"


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Of ten women nine are bright and one is dark; of eight men six are dark, one is bright and one black."""
    root = tmp_path / "faces"
    for i in range(10):
        picture(root / "Woman" / f"{i}.png", 0.9 if i else 0.1, (8, 8 + i % 2))
    for i, light in enumerate([0.1] * 5 + [0.4] + [0.9, 0.0]):
        picture(root / "male" / "deeper" / f"{i}.jpg", light)
    picture(root / "cats" / "cat.png", 0.5)
    return root


def test_it_counts_what_is_read_of_each_group_and_writes_what_a_bench_takes(stereo, spec, faces, tmp_path: Path):
    out = tmp_path / "c.csv"
    result = stereo("reader", "check", spec, faces, "--allow-code", "-o", out, "--batch-size", 3, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "left out" in result.stderr and "cats (1)" in result.stderr
    found = json.loads(result.stdout)
    assert found["counts"] == {"female": {"female": 9, "male": 1}, "male": {"female": 1.5, "male": 6.5}}
    assert found["right"]["female"] == pytest.approx(vars(wilson_interval(9, 10)))
    assert found["right"]["all"] == pytest.approx(vars(wilson_interval(15.5, 18)))
    assert found["no_group"]["female"]["estimate"] == 0 and found["no_group"]["male"]["estimate"] == 1 / 8
    assert found["unsure"]["male"]["estimate"] == 2 / 8  # the one at 0.4, and the black one
    assert load_confusion(out, ("female", "male")).tolist() == [[9, 1], [1.5, 6.5]]
    shown = stereo("reader", "check", spec, faces, "--allow-code").stdout
    assert "bright on 18 pictures: gender" in shown and "0.90 [0.60, 0.98]" in shown and "no group seen" in shown


def test_labels_may_stand_in_a_table(stereo, spec, faces, tmp_path: Path):
    rows = [(path.relative_to(faces), path.parts[len(faces.parts)]) for path in sorted(faces.rglob("*.*"))]
    with (faces / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "gender", "sex"), *((name, label, "") for name, label in rows)])
    settings = CheckReaderSettings(allow_code=True)
    by_table = check_reader(spec, faces, settings=settings)
    assert by_table.counts.tolist() == [[9, 1], [1.5, 6.5]] and by_table.left_out == {"cats": 1}
    (faces / "metadata.csv").unlink()
    lines = [json.dumps({"file_name": str(name), "presents": label}) for name, label in rows]
    (faces / "metadata.jsonl").write_text("\n".join(lines))
    named = check_reader(spec, faces, settings=settings.model_copy(update={"column": "presents"}))
    assert named.data == by_table.data


def test_the_built_in_reader_and_an_ensemble_are_measured_too(stereo, spec, tmp_path: Path):
    for group in ("female", "male"):
        picture(tmp_path / "faces" / group / "0.png", 0.5, (64, 64))
    for reader in ("portraits", f"ensemble:portraits,{spec}"):
        result = stereo("reader", "check", reader, tmp_path / "faces", "--allow-code", "--json")
        assert result.exit_code == 0, result.stderr
        assert sum(sum(row.values()) for row in json.loads(result.stdout)["counts"].values()) == 2


def test_bad_input_is_one_line(stereo, spec, faces, tmp_path: Path):
    def refused(*arguments: object) -> str:
        result = stereo("reader", "check", *arguments, "--allow-code")
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    assert "no such folder" in refused(spec, tmp_path / "nowhere")
    assert "expected a file name ending in .csv" in refused(spec, faces, "-o", tmp_path / "c.txt")
    assert "has no metadata.csv" in refused(spec, faces, "--column", "sex")
    assert "cannot tell the groups of axis 'age' apart" in refused(spec, labelled(tmp_path / "ages"), "--axis", "age")
    assert "unknown reader" in refused("clop", faces)
    (empty := tmp_path / "empty").mkdir()
    assert "holds no labelled pictures" in refused(spec, empty)
    picture(empty / "female" / "0.png", 1)
    assert "no pictures of some of female, male; its labels are female" in refused(spec, empty)
    (empty / "male").mkdir()
    (empty / "male" / "0.png").write_text("no picture")
    assert "cannot be read as a picture" in refused(spec, empty)
    (empty / "metadata.csv").write_text("file_name,gender\n../../secret.png,male\nfemale/0.png,female\n")
    assert "is outside the folder" in refused(spec, empty)
    (empty / "metadata.csv").write_text("file_name,sex\nfemale/0.png,female\n")
    assert "no column 'gender'; it has file_name, sex" in refused(spec, empty)


def labelled(root: Path) -> Path:
    for group in ("old", "young"):
        picture(root / group / "0.png", 0.5)
    return root
