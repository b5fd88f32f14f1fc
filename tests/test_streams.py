"""A streamed prompt set is cut up between ranks: everything once, whoever reads it, and no more read than needed."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset

from stereoclinic.ddtd.locate import run_ddtd
from stereoclinic.ddtd.relevance import STATES, Relevance
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts import streams
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds
from stereoclinic.prompts.streams import Stream

AXIS = load_axis("gender")
CPU = {"accelerator": "cpu", "devices": 1}
NAMES = ("doctor", "nurse", "teacher", "chef", "pilot", "judge", "farmer")
SETTINGS = Settings(steps=2, bins=2)


def table() -> Dataset:
    return Dataset.from_list([{"prompt": f"a photo of a {name}", "occupation": name} for name in NAMES])


@pytest.fixture
def names(tmp_path: Path) -> Path:
    table().to_csv(tmp_path / "names.csv", index=False)
    return tmp_path / "names.csv"


@pytest.fixture(params=["csv", "jsonl", "parquet in row groups"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "csv":
        path = tmp_path / "p.csv"
        table().to_csv(path, index=False)
    elif request.param == "jsonl":
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in table()))
    else:
        path = tmp_path / "p.parquet"
        pyarrow.parquet.write_table(table().data.table, path, row_group_size=2)  # 2 + 2 + 2 + 1
    return path


def of_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int, stream: Stream) -> list[dict]:
    monkeypatch.setattr(streams, "_place", lambda: (rank, ranks))
    return list(stream)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("limit", [None, 5])
def test_ranks_share_the_samples_out(file: Path, ranks: int, limit: int | None, monkeypatch: pytest.MonkeyPatch):
    whole = of_rank(monkeypatch, 0, 1, Stream(file, range(4, 6), limit))
    expected = {(f"a photo of a {name}", seed) for name in NAMES[:limit] for seed in (4, 5)}
    assert {(row["prompt"], row["seed"]) for row in whole} == expected and len(whole) == len(expected)
    assert [row["seed"] for row in whole[:4]] == [4, 5, 4, 5]  # a prompt's seeds together: it is encoded once
    numbers = {row["number"]: (row["prompt"], row["seed"]) for row in whole}
    assert len(numbers) == len(whole)
    parts = [of_rank(monkeypatch, rank, ranks, Stream(file, range(4, 6), limit)) for rank in range(ranks)]
    shared = [row for part in parts for row in part]
    assert len(shared) == len(whole)
    assert {row["number"]: (row["prompt"], row["seed"]) for row in shared} == numbers


def test_a_rank_does_not_read_the_parts_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A blank prompt would be passed over; one that names nobody is refused by whoever reads it."""
    broken = [*table(), {"prompt": "nobody", "occupation": "x"}, {"prompt": "nobody", "occupation": "x"}]
    pyarrow.parquet.write_table(Dataset.from_list(broken).data.table, tmp_path / "p.parquet", row_group_size=3)
    stream = Stream(tmp_path / "p.parquet", range(1))
    assert [row["label"] for row in of_rank(monkeypatch, 1, 3, stream)] == ["chef", "pilot", "judge"]
    with pytest.raises(InputError, match="does not name its occupation"):
        of_rank(monkeypatch, 2, 3, stream)


@pytest.mark.parametrize(("rows", "says"), [(3, "prompt 2 of part 3 has more than"), (9, "prompt 8 has more than")])
def test_an_error_says_which_prompt_it_is_about(tmp_path: Path, rows: int, says: str):
    broken = [*table(), {"prompt": "a photo of a " + "y" * 10_000, "occupation": None}]
    pyarrow.parquet.write_table(Dataset.from_list(broken).data.table, tmp_path / "p.parquet", row_group_size=rows)
    with pytest.raises(InputError, match=says):
        list(Stream(tmp_path / "p.parquet", range(1)))


def test_what_was_done_is_passed_over_whoever_did_it(file: Path, monkeypatch: pytest.MonkeyPatch):
    stream = Stream(file, range(3))
    done = [row["number"] for row in of_rank(monkeypatch, 1, 2, stream)]
    left = [row for rank in range(3) for row in of_rank(monkeypatch, rank, 3, stream.without(done))]
    other = of_rank(monkeypatch, 0, 2, stream)
    assert sorted(row["number"] for row in left) == sorted(row["number"] for row in other)


def test_a_built_in_set_and_bad_sources_are_refused(tmp_path: Path):
    for name in ("portraits", "protocol:sdisc"):
        with pytest.raises(InputError, match="built-in set"):
            Stream(name, range(1))
    (tmp_path / "p.csv").write_text("words\na photo of a doctor\n")
    for name, says in (("p.csv", "no column `prompt`"), ("none.csv", "no such file"), (".", "is a folder")):
        with pytest.raises(InputError, match=says):
            list(Stream(tmp_path / name, range(1)))


def by_label(relevance: Relevance, name: str) -> torch.Tensor:
    value = getattr(relevance, name)
    if value.shape[0] != len(relevance.labels):
        return value
    return value[[relevance.labels.index(label) for label in sorted(relevance.labels)]]


def test_a_stream_is_measured_as_the_same_prompts_are(little: Model, names: Path):
    expected = run_ddtd(little, AXIS, with_seeds(load_prompts(names), 0, 2), SETTINGS, **CPU)
    ticks: list[int] = []
    stream = Stream(names, range(2))
    found = run_ddtd(little, AXIS, stream, SETTINGS, batch_size=3, progress=ticks.append, **CPU)
    assert expected is not None and found is not None
    assert found.labels == sorted(NAMES) and sum(ticks) == 2 * len(NAMES) * SETTINGS.steps
    assert found.metadata["samples"] == 2 * len(NAMES) and "names.csv" in found.metadata["prompts"]
    for name in STATES:
        one, two = by_label(found, name), by_label(expected, name)
        assert (one - two).abs().max() <= 1e-4 * two.abs().max(), name


def test_a_stream_that_was_cut_off_goes_on(little: Model, names: Path, tmp_path: Path):
    expected = run_ddtd(little, AXIS, Stream(names, range(1)), SETTINGS, batch_size=1, **CPU)
    first = Stream(names, range(1), 3)
    first.about = Stream(names, range(1)).about  # type: ignore[method-assign]
    run_ddtd(little, AXIS, first, SETTINGS, batch_size=1, shards=tmp_path / "s", **CPU)
    ticks: list[int] = []
    found = run_ddtd(
        little, AXIS, Stream(names, range(1)), SETTINGS, batch_size=1, shards=tmp_path / "s",
        progress=ticks.append, **CPU,
    )  # fmt: skip
    assert expected is not None and found is not None
    assert sum(ticks) == (len(NAMES) - 3) * SETTINGS.steps
    assert found.labels == expected.labels and found.metadata["samples"] == len(NAMES)
    for name in STATES:
        one, two = getattr(found, name), getattr(expected, name)
        assert (one - two).abs().max() <= 1e-12 * two.abs().max(), name


def test_an_empty_stream_is_refused(little: Model, tmp_path: Path):
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(InputError, match="no prompts in it"):
        run_ddtd(little, AXIS, Stream(tmp_path / "p.txt", range(1)), SETTINGS, **CPU)


def test_more_labels_than_memory_holds_are_refused_before_they_are_made(
    little: Model, names: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1000}.__getitem__)
    for samples in (Stream(names, range(1)), with_seeds(load_prompts("portraits"), 0, 1)):
        with pytest.raises(InputError, match=r"labels of .* MiB each do not fit.*column `occupation`"):
            run_ddtd(little, AXIS, samples, SETTINGS, **CPU)
