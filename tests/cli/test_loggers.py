"""`--logger` of locate and bench: what is logged is what was written, and nothing is lost where a logger fails."""

import csv
from pathlib import Path

import pytest

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.evaluation.figures.values import values_of
from stereoclinic.evaluation.results import Results

LOCATE = ("locate", "--limit", 2, "--seeds", 2, "--every", 1, "--bins", 2, "--quiet")
BENCH = ("bench", "--limit", 2, "--images", 3, "--group-images", 1, "--steps", 1, "--quiet")


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_missing_package_or_a_wrong_name_is_refused_before_any_work(model, refused, monkeypatch):
    for command in (LOCATE, BENCH):
        line = refused(*command, "--model", model, "--logger", "csv", "--logger", "tensorbord")
        assert line.endswith("'tensorbord' is not known; choose from csv, tensorboard, wandb, mlflow")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    for command in (LOCATE, BENCH):
        line = refused(*command, "--model", model, "--logger", "wandb")
        assert line == "stereo: --logger wandb needs the package wandb: pip install wandb"


def test_locate_logs_the_curves_of_its_relevance(model, stereo, tmp_path: Path):
    result = stereo(*LOCATE, "--model", model, "--logger", "csv", "-o", tmp_path / "m.pt")
    assert (result.exit_code, result.stderr.strip()) == (0, "")
    relevance = Relevance.load(tmp_path / "m.relevance.safetensors")
    logged = rows(tmp_path / "m.logs" / "gender")
    assert [float(row["timestep"]) for row in logged] == relevance.timesteps.tolist()
    curve, errors = relevance.curve()[..., 0], relevance.curve_stderr()[..., 0]
    for p, label in enumerate(relevance.labels):
        tag = f"lean/female/{p:02d}-{label}"
        assert [float(row[tag]) for row in logged] == pytest.approx(curve[p].tolist())
        assert [float(row[f"{tag}/stderr"]) for row in logged] == pytest.approx(errors[p].tolist())


def test_bench_logs_the_figures_of_its_results(model, located, stereo, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    out = tmp_path / "out"
    loggers = ("--logger", "csv", "--logger", f"tensorboard:{tmp_path / 'board'}")
    result = stereo(*BENCH, "--model", model, "--mask", located, *loggers, "-o", out)
    assert result.exit_code == 0, result.stderr
    results = Results.load(out).data["experiments"][0]
    runs = sorted(path.name for path in (out / "logs").iterdir())
    assert runs == sorted(path.name for path in (tmp_path / "board").iterdir())
    assert runs[:2] == ["00-untreated", "01-gender"] and len(runs) == len(results["arms"])
    (row,) = rows(out / "logs" / "01-gender")
    gap = values_of(results, "gender")["parity_gap"]
    assert float(row[f"parity_gap/guidance {results['guidance']:g}"]) == pytest.approx(gap.estimate)


def test_where_a_logger_fails_the_work_is_kept(model, stereo, tmp_path: Path, monkeypatch):
    locate = (*LOCATE, "--model", model, "--logger", "csv", "-o", tmp_path / "m.pt")
    bench = (*BENCH, "--model", model, "--logger", "csv", "-o", tmp_path / "out")
    with monkeypatch.context() as broken:
        broken.setattr("lightning.pytorch.loggers.CSVLogger.log_metrics", lambda *_: 1 / 0)
        for command in (locate, bench):
            result = stereo(*command)
            assert (result.exit_code, result.stdout) == (2, "")
            assert "stereo: --logger csv failed (division by zero); what was computed is kept" in result.stderr
    assert (tmp_path / "m.pt").is_file() and (tmp_path / "out" / "results.json").is_file()
    assert stereo(*locate, "--resume").exit_code == stereo(*bench).exit_code == 0
    assert rows(tmp_path / "m.logs" / "gender") and rows(tmp_path / "out" / "logs" / "00-untreated")
    assert not (tmp_path / "m.shards").exists() and not (tmp_path / "out" / "bench-parts").exists()
