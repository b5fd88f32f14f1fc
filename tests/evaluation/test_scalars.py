"""TensorBoard gets every figure of every arm; without the package the error says what to install."""

import importlib.util
from pathlib import Path

import pytest

from stereoclinic.errors import InputError
from stereoclinic.evaluation.figures.values import values_of
from stereoclinic.report.loggers import check_tensorboard, log_scalars


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for refuse in (lambda: check_tensorboard(tmp_path), lambda: log_scalars(tmp_path, [])):
        with pytest.raises(InputError, match=r"pip install 'stereoclinic\[tensorboard\]'"):
            refuse()


def test_every_figure_is_logged_once_an_arm_and_guidance_scale(make, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    experiments = [make({"m": 0.5}).results, make({"m": 0.6}, guidance=3.0).results]
    log_scalars(tmp_path, experiments, step=7)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders[:3] == ["00-untreated", "01-m", "02-random"]
    for name, folder in (("untreated", "00-untreated"), ("m", "01-m")):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        logged = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        expected = {}
        for results in experiments:
            for key, value in values_of(results, name).items():
                tag = f"{key.replace('.', '/')}/guidance {results['guidance']:g}"
                expected[tag] = value.estimate
                if value.has_ends:
                    expected |= {f"{tag}/low": value.low, f"{tag}/high": value.high}
        assert {tag: each[0].value for tag, each in logged.items()} == pytest.approx(expected, rel=1e-6)
        assert {(len(each), each[0].step) for each in logged.values()} == {(1, 7)}


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    (tmp_path / "log").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_tensorboard(tmp_path / "log")
