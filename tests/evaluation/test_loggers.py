"""Loggers get every figure of every arm, the sheets, and the curves of leans; a missing package is one line."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stereoclinic.errors import InputError
from stereoclinic.evaluation.figures.values import values_of
from stereoclinic.report.card import sheets
from stereoclinic.report.loggers import LOGGERS, Log, log_figures, log_leans, logs_of
from stereoclinic.report.report import before_after

ARMS = ["00-untreated", "01-m", "02-random"]
PICTURES = ["before_after/guidance 2", "before_after/guidance 3"]


@pytest.fixture
def judged(make, tmp_path: Path) -> tuple[list[dict], Path]:
    """Results at two guidance scales, and the folder of their sheets."""
    experiments = [make({"m": 0.5}), make({"m": 0.6}, guidance=3.0)]
    results = [experiment.results for experiment in experiments]
    folder = tmp_path / "out"
    folder.mkdir()
    for i, arm, file in sheets(results):
        before_after(experiments[i], arm).save(folder / file)
    return results, folder


def expected(experiments: list[dict], arm: str) -> dict[str, float]:
    found = {}
    for results in experiments:
        for key, value in values_of(results, arm).items():
            tag = f"{key.replace('.', '/')}/guidance {results['guidance']:g}"
            found[tag] = value.estimate
            if value.has_ends:
                found |= {f"{tag}/low": value.low, f"{tag}/high": value.high}
    return found


@pytest.mark.parametrize("name", [name for name, (install, _) in LOGGERS.items() if install])
def test_without_the_package_the_error_says_what_to_install(name, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    install = "'stereoclinic[tensorboard]'" if name == "tensorboard" else name
    with pytest.raises(InputError) as caught:
        logs_of([name], tmp_path)
    assert str(caught.value) == f"--logger {name} needs the package {name}: pip install {install}"


def test_names_and_folders_are_checked(tmp_path: Path):
    (tmp_path / "file").write_text("")
    other = tmp_path / "a:b"
    assert logs_of(["csv", f"csv:{other}"], tmp_path) == [Log("csv", tmp_path), Log("csv", other)]
    assert logs_of([], None) == []
    for text, folder, says in (
        ("neptune", tmp_path, r"'neptune' is not known; choose from csv, tensorboard, wandb, mlflow"),
        ("", tmp_path, "'' is not known"),
        ("csv", None, "give csv:FOLDER"),
        (f"csv:{tmp_path / 'file'}", None, "is a file, or below one; give a folder"),
        ("csv", tmp_path / "file" / "logs", "is a file, or below one; give a folder"),
    ):
        with pytest.raises(InputError, match=says):
            logs_of([text], folder)


def test_csv_has_a_run_for_each_arm(judged, tmp_path: Path):
    results, folder = judged
    log_figures(logs_of(["csv"], tmp_path / "logs"), results, folder)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir())[:3] == ARMS
    for arm, run in (("untreated", ARMS[0]), ("m", ARMS[1])):
        with (tmp_path / "logs" / run / "metrics.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert row.pop("step") == "0"
        assert {tag: float(value) for tag, value in row.items()} == pytest.approx(expected(results, arm))


def test_tensorboard_has_figures_and_pictures(judged, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results, folder = judged
    log_figures(logs_of(["tensorboard"], tmp_path / "logs"), results, folder)
    for arm, run in (("untreated", ARMS[0]), ("m", ARMS[1])):
        events = EventAccumulator(str(tmp_path / "logs" / run))
        events.Reload()
        logged = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        assert {tag: each[0].value for tag, each in logged.items()} == pytest.approx(expected(results, arm), rel=1e-6)
        assert {(len(each), each[0].step) for each in logged.values()} == {(1, 0)}
        pictures = events.Tags()["images"]
        assert pictures == (PICTURES if arm == "m" else [])
        for tag, (_, _, file) in zip(pictures, sheets(results), strict=bool(pictures)):
            with Image.open(folder / file) as sheet:
                assert (events.Images(tag)[0].width, events.Images(tag)[0].height) == sheet.size


def test_wandb_offline_has_figures_and_pictures(judged, tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    results, folder = judged
    log_figures(logs_of(["wandb"], tmp_path / "logs"), results, folder)
    assert not (tmp_path / "wandb").exists()
    runs = sorted((tmp_path / "logs" / "wandb").glob("offline-run-*"))
    assert len(runs) == len(results[0]["arms"])
    pictures = [path for run in runs for path in run.glob("files/media/images/before_after/*.png")]
    assert sorted(path.name.split("_")[0] for path in pictures) == ["guidance 2", "guidance 3"]
    written = b"".join(path.read_bytes() for run in runs for path in run.glob("*.wandb"))
    assert b"parity_gap/guidance 2" in written and b"01-m" in written


def test_mlflow_offline_has_figures_and_pictures(judged, tmp_path: Path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    results, folder = judged
    log_figures(logs_of(["mlflow:mine"], None), results, folder)
    assert not (tmp_path / "mlruns").exists()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mine/mlflow.db")
    experiment = client.get_experiment_by_name("stereoclinic")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs)[:3] == ARMS
    assert runs[ARMS[1]].data.metrics == pytest.approx(expected(results, "m"))
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    pictures = client.list_artifacts(runs[ARMS[1]].info.run_id, "before_after")
    assert [each.path for each in pictures] == [f"{tag}.png" for tag in PICTURES]


def test_a_logger_that_fails_is_one_line(judged, tmp_path: Path, monkeypatch):
    results, folder = judged
    for _, _, file in sheets(results):
        (folder / file).write_text("no picture")
    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.save", lambda self: 1 / 0)
    with pytest.raises(InputError, match=r"^--logger csv failed \(division by zero\); what was computed is kept$"):
        log_figures([Log("csv", tmp_path)], results, folder)


def test_leans_are_curves_over_measured_timesteps(tmp_path: Path):
    cells = [{"lean": 0.5, "stderr": 0.1, "n": 2}, {"lean": None, "stderr": None, "n": 0}]
    row = {"label": "a/b, 医生", "curve": cells}
    toward = {"toward": "f.x", "rows": [row, row], "mean_absolute": {"curve": [0.5, None]}}
    leans = {"axis": "Gender", "timesteps": [900.0, 100.0], **toward, "others": [{**toward, "toward": "女"}]}
    log_leans([Log("csv", tmp_path)], leans)
    with (tmp_path / "gender" / "metrics.csv").open() as file:
        first, second = csv.DictReader(file)
    curves = {f"lean/{group}/{label}" for group in ("f/x", "u5973") for label in ("00-a-b", "01-a-b")}
    names = {"step", "timestep", "mean_absolute/f/x", "mean_absolute/u5973", *curves, *(f"{c}/stderr" for c in curves)}
    assert set(first) == names
    assert [(each["step"], float(each["timestep"])) for each in (first, second)] == [("0", 900.0), ("1", 100.0)]
    assert np.array([float(first[curve]) for curve in curves]) == pytest.approx(0.5)
    assert not any(second[name] for name in names - {"step", "timestep"})
