"""Laws of amplification: the reference itself, exaggerations of it, and references as files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.errors import InputError
from stereoclinic.evaluation.references import load_reference
from stereoclinic.statistics.amplification import amplification, reference_shares

LABELS, GROUPS = ["doctor", "nurse"], ["female", "male"]
TABLE = {"doctor": {"female": 0.4, "male": 0.6}, "nurse": {"female": 0.8, "male": 0.2}}


def reads_of(first: list[float], n: int = 100) -> torch.Tensor:
    """Sure reads (P, n, 2) with exactly these shares of the first group."""
    groups = torch.stack([(torch.arange(n) >= round(share * n)).long() for share in first])
    return torch.nn.functional.one_hot(groups, 2).double()


def measured(first: list[float], **settings):
    return amplification(reads_of(first), LABELS, GROUPS, TABLE, resamples=200, **settings)


@given(factor=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5]))
def test_a_reference_that_is_exaggerated_by_a_factor_has_that_slope(factor):
    found = measured([0.5 - 0.1 * factor, 0.5 + 0.3 * factor])
    assert found.slope.estimate == pytest.approx(factor)
    assert found.slope.low <= found.slope.estimate <= found.slope.high
    assert found.excess.estimate == pytest.approx(0.2 * (abs(factor) - 1))
    assert found.distance.estimate == pytest.approx(0.2 * abs(factor - 1))


def test_the_target_is_where_leaning_is_counted_from():
    """From 0.4 on, the doctors of the table do not lean at all, and twice the nurses' lean is a slope of two."""
    wide = {**TABLE, "nurse": {"female": 0.6, "male": 0.4}}
    target = torch.tensor([0.4, 0.6])
    found = amplification(reads_of([0.4, 0.8]), LABELS, GROUPS, wide, target, resamples=100)
    assert found.slope.estimate == pytest.approx(2)


def test_relabelling_prompts_and_groups_changes_nothing():
    reads = reads_of([0.3, 0.9])
    one = amplification(reads, LABELS, GROUPS, TABLE, resamples=50)
    other = amplification(reads.flip(0).flip(2), LABELS[::-1], GROUPS[::-1], TABLE, resamples=50)
    for name in ("slope", "excess", "distance"):
        assert getattr(one, name).estimate == pytest.approx(getattr(other, name).estimate)


def test_labels_that_the_table_lacks_are_left_out():
    reads = torch.cat([reads_of([0.3, 0.9]), reads_of([0.0])])
    found = amplification(reads, [*LABELS, "poet"], GROUPS, TABLE, resamples=50)
    assert found.labels == ("doctor", "nurse")
    assert found.slope.estimate == pytest.approx(measured([0.3, 0.9]).slope.estimate)


def test_a_reference_is_read_from_a_csv(tmp_path: Path):
    path = tmp_path / "labour.csv"
    path.write_text("label,group,share,source\ndoctor,female,0.4,x\ndoctor,male,0.6,x\n\nnurse,female,0.8,x\n")
    assert load_reference(path) == {"doctor": {"female": 0.4, "male": 0.6}, "nurse": {"female": 0.8}}
    shares = reference_shares(TABLE, ["poet", "nurse"], GROUPS)
    assert shares[0].isnan().all() and shares[1].tolist() == [0.8, 0.2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("label,share\na,0.5\n", "no column group"),
        ("label,group,share\na,b,half\n", "line 2: share 'half'"),
        ("label,group,share\na,b,1.5\n", "between 0 and 1"),
        ("label,group,share\na,b,0.5\na,b,0.5\n", "line 3: a label or group is missing or there twice"),
        ("label,group,share\na,,0.5\n", "is missing"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, said: str):
    path = tmp_path / "labour.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        load_reference(path)


def test_tables_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        load_reference(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="expected female, male"):
        reference_shares({"doctor": {"female": 1.0}}, ["doctor"], GROUPS)
    with pytest.raises(InputError, match="sum to 1"):
        reference_shares({"doctor": {"female": 0.9, "male": 0.9}}, ["doctor"], GROUPS)
    with pytest.raises(InputError, match="none of the labels poet"):
        reference_shares(TABLE, ["poet"], GROUPS)
    fair = {label: {"female": 0.5, "male": 0.5} for label in LABELS}
    with pytest.raises(InputError, match="no tilt"):
        amplification(reads_of([0.3, 0.9]), LABELS, GROUPS, fair)
