"""What was cut off goes on where it was, on another number of devices too, and ends with the same figures."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stereoclinic.ddtd.checkpoint import Shards
from stereoclinic.ddtd.locate import DDTD
from stereoclinic.ddtd.relevance import STATES, Relevance
from stereoclinic.io.files import sole_writer


def figures(data: Any) -> Any:
    """Results apart from times."""
    if isinstance(data, dict):
        return {name: figures(value) for name, value in data.items() if name not in ("seconds", "provenance")}
    return [figures(value) for value in data] if isinstance(data, list) else data


@pytest.fixture(scope="module")
def bench(model, located) -> tuple[object, ...]:
    """One that draws long enough to be stopped."""
    return (
        "bench", "--model", model, "--mask", located, "--limit", 3, "--images", 4, "--group-images", 1, "--steps", 8,
        "--batch-size", 2, "--accelerator", "cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(bench, stereo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert stereo(*bench, "-o", out, "--quiet").exit_code == 0
    assert not (out / "bench-parts").exists()  # its work is done
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_bench_that_was_stopped_ends_the_same(bench, undisturbed: Path, tmp_path: Path, how: signal.Signals):
    out = tmp_path / "stopped"
    parts = out / "bench-parts"
    command = [sys.executable, "-m", "stereo_cli", *map(str, bench), "-o", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # What runs in the background of a shell is started deaf to Ctrl-C, and would start its children so.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hears) as run:
        until = time.monotonic() + 600
        while len(list(parts.glob("*.safetensors"))) < 3 and run.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        run.send_signal(how)
        _, said = run.communicate(timeout=300)
    drawn = {file.name: file.stat().st_mtime_ns for file in parts.glob("*.safetensors")}
    assert len(drawn) >= 3 and not (out / "results.json").exists(), said
    if how == signal.SIGINT:
        assert run.returncode == 130 and "interrupted" in said

    # On two devices, with the parts kept so that it can be seen which are new.
    run = subprocess.run(
        [*command, "--parts", str(parts), "--devices", "2"], env=environment, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    after = {file.name: file.stat().st_mtime_ns for file in parts.glob("*.safetensors")}
    assert len(after) > len(drawn) and all(after[name] == drawn[name] for name in drawn)

    results = [json.loads((folder / "results.json").read_text()) for folder in (out, undisturbed)]
    assert figures(results[0]) == figures(results[1])


def test_the_same_bench_twice_gives_the_same_results_apart_from_times(model, located, stereo, tmp_path: Path):
    arguments = ("bench", "--model", model, "--mask", located, "--limit", 2, "--images", 3, "--group-images", 1)
    arguments += ("--steps", 4, "--unrelated", "scenes", "--unrelated-images", 2, "--accelerator", "cpu", "--quiet")
    found = []
    for name in ("one", "two"):
        assert stereo(*arguments, "-o", tmp_path / name).exit_code == 0
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    one, two = ({**data["provenance"], "created": "", "command": ""} for data in found)
    assert figures(found[0]) == figures(found[1]) and one == two
    pictures = [sorted((tmp_path / name / "images").rglob("*.png")) for name in ("one", "two")]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]


def test_locate_goes_on_when_it_is_told_to(model, stereo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ("locate", "--model", model, "--limit", 3, "--seeds", 2, "--every", 1, "--bins", 2, "--quiet")
    arguments += ("--batch-size", 1, "--accelerator", "cpu")
    whole, cut, shards = tmp_path / "whole.pt", tmp_path / "cut.pt", tmp_path / "cut.shards"
    assert stereo(*arguments, "-o", whole).exit_code == 0
    step, write = DDTD.predict_step, Shards.write

    def interrupted(self: DDTD, batch: list[dict], batch_idx: int) -> Any:
        if batch_idx == 4:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", lambda self, *what: write(self, *what[:5], last=True))
        patch.setattr(DDTD, "predict_step", interrupted)
        result = stereo(*arguments, "-o", cut)
    assert result.exit_code == 130 and "with --resume continues it" in result.stderr
    assert shards.is_dir() and not cut.exists()

    with sole_writer(cut):  # progress of a run that is still running is no left-over
        result = stereo(*arguments, "-o", cut)
    assert result.exit_code == 2 and f"another run is writing {cut}" in result.stderr
    result = stereo(*arguments, "-o", cut)
    assert result.exit_code == 2 and "continue it with --resume" in result.stderr
    result = stereo(*arguments, "-o", cut, "--resume", "--guidance", 2)
    assert result.exit_code == 2 and "guidance was 1.0 and is 2.0" in result.stderr
    assert stereo(*arguments, "-o", cut, "--resume").exit_code == 0
    assert not shards.exists()
    one, two = (Relevance.load(path.with_name(f"{path.stem}.relevance.safetensors")) for path in (whole, cut))
    for name in STATES:
        a, b = getattr(one, name), getattr(two, name)
        assert (a - b).abs().max() <= 1e-6 * a.abs().max(), name
