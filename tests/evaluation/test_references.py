"""References and confusion matrices from files: what they say of an experiment, and what they may not be."""

from pathlib import Path

import pytest
import torch

from stereoclinic.errors import InputError
from stereoclinic.evaluation.references import amplified, corrected, load_confusion, reference_named

GROUPS = ("female", "male")


def test_an_arm_against_itself_neither_exaggerates_nor_differs(make, tmp_path: Path):
    experiment = make()
    arm = experiment.neutral[0]
    labels = experiment.protocol.prompts["label"]
    shares = (arm.reads == arm.reads.amax(2, keepdim=True)).double().mean(1)
    rows = [
        f"{label},{group},{float(shares[p, k])}"
        for p, label in enumerate(labels)
        for k, group in enumerate(experiment.protocol.axis.groups)
    ]
    (tmp_path / "own.csv").write_text("label,group,share\n" + "\n".join(rows))
    found = amplified(experiment, reference_named(str(tmp_path / "own.csv"), "gender"))[arm.name]
    assert found["slope"]["estimate"] == pytest.approx(1)
    assert found["excess"]["estimate"] == pytest.approx(0, abs=1e-12)
    assert found["distance"]["estimate"] == pytest.approx(0, abs=1e-12)
    assert set(amplified(experiment, reference_named(str(tmp_path / "own.csv"), "gender"))) == {
        each.name for each in experiment.neutral
    }


def test_planted_shares_are_those_of_the_embedded_world():
    table = reference_named("planted", "gender")
    assert table["nurse"]["female"] > 0.8 > 0.2 > table["mechanic"]["female"]
    assert all(sum(each.values()) == pytest.approx(1) for each in table.values())
    with pytest.raises(InputError, match="no axis 'height'"):
        reference_named("planted", "height")


def test_a_reader_without_error_corrects_nothing(make, tmp_path: Path):
    experiment = make()
    (tmp_path / "c.csv").write_text("group,read,count\nfemale,female,90\nmale,male,50\nmale,male,50\n")
    counts = load_confusion(tmp_path / "c.csv", GROUPS)
    assert counts.tolist() == [[90, 0], [0, 100]]
    arm = experiment.neutral[0]
    found = corrected(experiment, counts)[arm.name]
    shares = (arm.reads == arm.reads.amax(2, keepdim=True)).double().mean(1)
    for p, row in enumerate(found):
        assert [row[group]["estimate"] for group in GROUPS] == pytest.approx(shares[p].tolist())
        assert all(each["low"] <= each["estimate"] <= each["high"] for each in row.values())


def test_a_reader_that_errs_is_corrected_away_from_the_middle(make):
    experiment = make()
    arm = experiment.neutral[0]
    counts = torch.tensor([[900.0, 100.0], [100.0, 900.0]], dtype=torch.float64)
    for row, reads in zip(corrected(experiment, counts)[arm.name], arm.reads, strict=True):
        seen = float((reads[:, 0] > reads[:, 1]).double().mean())
        expected = min(1.0, max(0.0, (seen - 0.1) / 0.8))
        assert row["female"]["estimate"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("group,read\nfemale,female\n", "no column count"),
        ("group,read,count\nfemale,other,3\n", "line 2"),
        ("group,read,count\nfemale,female,-3\n", "line 2"),
        ("group,read,count\nfemale,female,3\n", "no image of male"),
        ("", "no column group"),
    ],
)
def test_confusion_files_that_are_refused(tmp_path: Path, text: str, says: str):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        load_confusion(tmp_path / "c.csv", GROUPS)
    with pytest.raises(InputError, match="cannot be read"):
        load_confusion(tmp_path / "none.csv", GROUPS)
