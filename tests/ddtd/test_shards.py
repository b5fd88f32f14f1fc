"""A run that was cut off goes on, and ends with the same sums."""

from pathlib import Path

import pytest
import torch

from stereoclinic.ddtd.checkpoint import Checkpoint, Shards
from stereoclinic.ddtd.locate import DDTD, run_ddtd
from stereoclinic.ddtd.relevance import BY_LABEL, STATES, Relevance
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds

AXIS = load_axis("gender")
CPU = {"accelerator": "cpu", "devices": 1}
SETTINGS = Settings(steps=2, bins=2)


class Cut(Exception):
    """Stands for whatever stops a run."""


@pytest.fixture
def samples():
    return with_seeds(load_prompts("portraits", 3), 0, 2)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write after every batch."""
    write = Shards.write
    monkeypatch.setattr(Shards, "write", lambda self, *what, last=True: write(self, *what[:5], last=True))


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch):
    """Stop the loop in the middle of a batch, after so many whole ones."""

    def after(batches: int) -> None:
        step = DDTD.predict_step

        def predict_step(self: DDTD, batch: list[dict], batch_idx: int):
            if batch_idx == batches:
                self.progress = stop
            return step(self, batch, batch_idx)

        def stop(count: int) -> None:
            raise Cut

        monkeypatch.setattr(DDTD, "predict_step", predict_step)

    yield after
    monkeypatch.undo()


def same(one: Relevance, two: Relevance) -> None:
    for name in STATES:
        a, b = getattr(one, name), getattr(two, name)
        assert (a - b).abs().max() <= 1e-12 * a.abs().max(), name


@pytest.mark.usefixtures("often")
def test_what_was_measured_before_a_stop_counts_and_nothing_twice(little: Model, samples, stops, tmp_path: Path):
    expected = run_ddtd(little, AXIS, samples, SETTINGS, batch_size=1, **CPU)
    with pytest.raises(Cut):
        stops(3)
        run_ddtd(little, AXIS, samples, SETTINGS, batch_size=1, shards=tmp_path / "s", **CPU)
    stops(100)
    (file,) = (tmp_path / "s").iterdir()
    before = file.read_bytes()
    ticks: list[int] = []
    found = run_ddtd(little, AXIS, samples, SETTINGS, batch_size=1, shards=tmp_path / "s", progress=ticks.append, **CPU)
    assert expected is not None and found is not None
    assert sum(ticks) == 3 * SETTINGS.steps  # the other three samples
    assert file.read_bytes() == before and len(list((tmp_path / "s").iterdir())) == 2
    same(found, expected)
    # Everything is there by now, and is only added up.
    again = run_ddtd(little, AXIS, samples, SETTINGS, batch_size=1, shards=tmp_path / "s", progress=ticks.append, **CPU)
    assert again is not None and len(ticks) == 3 * SETTINGS.steps
    same(again, expected)
    assert again.metadata | {"created": ""} == expected.metadata | {"created": ""}


@pytest.mark.usefixtures("often")
def test_batches_may_be_cut_otherwise_but_nothing_else_may_change(little: Model, samples, stops, tmp_path: Path):
    with pytest.raises(Cut):
        stops(1)
        run_ddtd(little, AXIS, samples, SETTINGS, batch_size=2, shards=tmp_path, **CPU)
    stops(100)
    for changed, says in (
        (Settings(steps=3, bins=2), "steps was 2 and is 3"),
        (Settings(steps=2, bins=1), "bins was 2 and is 1"),
        (Settings(steps=2, bins=2, composite="epsilon-cp"), "composite was 'gradient' and is 'epsilon-cp'"),
        (Settings(steps=2, bins=2, guidance=2.0), "guidance was 1.0 and is 2.0"),
    ):
        with pytest.raises(InputError, match=says):
            run_ddtd(little, AXIS, samples, changed, shards=tmp_path, **CPU)
    with pytest.raises(InputError, match="axis was 'gender' and is 'age'"):
        run_ddtd(little, load_axis("age"), samples, SETTINGS, shards=tmp_path, **CPU)
    with pytest.raises(InputError, match="samples was 6 and is 3, seeds was"):
        run_ddtd(little, AXIS, with_seeds(samples.prompts, 0, 1), SETTINGS, shards=tmp_path, **CPU)
    found = run_ddtd(little, AXIS, samples, SETTINGS, batch_size=4, shards=tmp_path, **CPU)
    assert found is not None and int(found.count.sum()) == len(samples) * SETTINGS.steps


def test_nothing_is_written_before_it_is_time_but_the_last_of_it(tmp_path: Path):
    sums = {name: torch.ones(2, dtype=torch.float64) for name in STATES}
    shards = Shards(tmp_path / "s", {"a": 1}, interval=1000)
    shards.write(0, sums, [1], ["a"], 0)
    assert shards.kept() == Checkpoint() and not (tmp_path / "s").exists()
    shards.write(0, sums, [], [], 0, last=True)
    assert not (tmp_path / "s").exists()
    shards.write(0, sums, [1, 2], ["a", "b"], 1, last=True)
    Shards(tmp_path / "s", {"a": 1}).write(0, sums, [0], ["b", "c"], 0, last=True)
    kept = shards.kept()
    assert sorted(kept.done) == [0, 1, 2] and kept.dropped == 1 and len(kept.files) == 2
    assert kept.labels == ["a", "b", "c"] or kept.labels == ["b", "c", "a"]
    for name, value in kept.sums(["c", "b", "a"], dict.fromkeys(STATES, (2,))).items():
        expected = [1.0, 2.0, 1.0] if name in BY_LABEL else [2.0, 2.0]
        assert value.tolist() == expected, name


def test_labels_of_another_run_are_refused(tmp_path: Path):
    sums = {name: torch.ones(2, dtype=torch.float64) for name in STATES}
    shards = Shards(tmp_path, {"a": 1}, interval=0)
    shards.write(0, sums, [0], ["a", "b"], 0)
    with pytest.raises(InputError, match="label 'b' does not belong to this run"):
        shards.kept().sums(["a"], dict.fromkeys(STATES, (2,)))
    shards.write(0, sums, [0], ["a", "a"], 0, last=True)
    with pytest.raises(InputError, match="labels that are not distinct texts"):
        shards.kept()


def test_damaged_and_doubled_shards_are_refused(tmp_path: Path):
    sums = {name: torch.ones(2, dtype=torch.float64) for name in STATES}
    one, two = (Shards(tmp_path, {"a": 1}, interval=0) for _ in range(2))
    one.write(0, sums, [0, 1], ["a", "b"], 0)
    two.write(0, sums, [1], ["a", "b"], 0)
    with pytest.raises(InputError, match="a sample twice"):
        one.kept()
    for file in tmp_path.glob(f"{two.attempt}*"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="truncated"):
        one.kept()
    two.write(0, {"count": torch.ones(1)}, [2], ["a"], 0, last=True)
    with pytest.raises(InputError, match="lacks lean_sum"):
        one.kept()
