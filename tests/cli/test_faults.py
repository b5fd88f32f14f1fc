"""What goes wrong round a run, and how it ends; docs/reference/faults.md tells users of each of these."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stereoclinic.ddtd.checkpoint import Shards
from stereoclinic.ddtd.locate import DDTD
from stereoclinic.ddtd.relevance import STATES
from stereoclinic.errors import InputError
from stereoclinic.io.files import sole_writer
from stereoclinic.io.tensors import save_tensors

ROOT = Path(__file__).parents[2]
SMALL = ("--limit", 2, "--seeds", 1, "--every", 1, "--bins", 1, "--quiet", "--accelerator", "cpu")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def mounts() -> bool:
    run = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return run.returncode == 0


def on_disk(options: str, *arguments: object) -> subprocess.CompletedProcess:
    """The command line in a folder of a small file system of its own, which goes when the process ends."""
    place = tempfile.mkdtemp()
    script = f'mount -t tmpfs -o {options} none {place} && cd {place} && "$@" ; code=$?; ls -A . >&2; exit $code'
    command = [sys.executable, "-m", "stereo_cli", *map(str, arguments)]
    try:
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", *command],
            capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
        )  # fmt: skip
    finally:
        os.rmdir(place)


needs_mounts = pytest.mark.skipif(not mounts(), reason="file systems can be mounted by root alone")


@needs_mounts
@pytest.mark.slow
def test_a_full_disk(model: Path):
    run = on_disk("size=8k", "locate", "--model", model, *SMALL, "-o", "gender.pt")
    assert run.returncode == 2 and run.stdout == ""
    line, *left = run.stderr.splitlines()
    assert re.match(r"stereo: .* cannot be written \(No space left on device\)", line), run.stderr
    assert not left, run.stderr  # no file, and no half of one


def test_a_disk_that_fills_up_while_pictures_are_written(model: Path, stereo, tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a.png")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    result = stereo(
        "bench", "--model", model, "--limit", 1, "--images", 2, "--group-images", 0, "--steps", 1, "--quiet",
        "--accelerator", "cpu", "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("stereo: a.png cannot be written (No space left on device)")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench-parts"]  # what was drawn is kept


@needs_mounts
@pytest.mark.slow
def test_a_folder_that_is_read_only():
    run = on_disk("ro", "locate", "-o", "gender.pt")
    assert run.returncode == 2 and "does not exist or is not writable" in run.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to give a folder away")
def test_a_folder_of_somebody_else(tmp_path: Path):
    os.chown(tmp_path, 65534, 65534)
    os.chmod(tmp_path, 0o755)
    # Root may write anywhere, by this one capability.
    command = [
        "setpriv",
        "--bounding-set=-dac_override",
        sys.executable,
        "-m",
        "stereo_cli",
        "locate",
        "-o",
        "gender.pt",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert run.returncode == 2, run.stderr
    assert "does not exist or is not writable" in run.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_damaged(model: Path, stereo, tmp_path: Path):
    (tmp_path / "g.shards").mkdir()
    (tmp_path / "g.shards" / "a-0.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not what it was")
    result = stereo("locate", "--model", model, *SMALL, "-o", tmp_path / "g.pt", "--resume")
    assert result.exit_code == 2 and "a-0.safetensors is truncated" in result.stderr
    assert not (tmp_path / "g.pt").exists()


def test_a_clock_that_is_set_back_or_ahead(tmp_path: Path, monkeypatch):
    sums = {name: torch.ones(2, dtype=torch.float64) for name in STATES}
    due, waiting = (Shards(tmp_path, {"samples": 2}, interval=seconds) for seconds in (0.0, 1000.0))
    monkeypatch.setattr(time, "time", lambda: 1e11)
    waiting.write(0, sums, [1], ["a", "b"], 0)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(time, "time", lambda: -1e9)
    due.write(0, sums, [0], ["a", "b"], 0)
    (file,) = tmp_path.iterdir()
    os.utime(file, (4e9, 4e9))  # in the year 2096
    assert waiting.kept().done == [0]


@pytest.mark.parametrize("command", ["locate", "bench"])
def test_a_second_run_on_the_same_output(model: Path, stereo, tmp_path: Path, command: str):
    out = tmp_path / "g.pt" if command == "locate" else tmp_path / "out"
    small = SMALL if command == "locate" else ("--limit", 1, "--images", 2, "--steps", 1, "--accelerator", "cpu")
    with sole_writer(out if command == "locate" else out / "results.json"):
        result = stereo(command, "--model", model, *small, "-o", out)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "another run is writing" in line
    assert not list(tmp_path.rglob(".*.lock"))


def test_a_run_that_was_killed_leaves_no_lock(tmp_path: Path):
    code = "import sys, time; from pathlib import Path; from stereoclinic.io.files import sole_writer\n"
    code += "with sole_writer(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "g.pt")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with pytest.raises(InputError, match="another run is writing"), sole_writer(tmp_path / "g.pt"):
            pass
        other.kill()
    with sole_writer(tmp_path / "g.pt"):
        assert list(tmp_path.iterdir()) == [tmp_path / ".g.pt.lock"]
    assert not list(tmp_path.iterdir())


def test_a_sample_that_does_not_fit_in_memory(model: Path, stereo, tmp_path: Path, monkeypatch):
    def step(self: DDTD, batch: list[dict], batch_idx: int) -> None:
        def compute(portion: slice) -> None:
            raise torch.OutOfMemoryError("out of memory")

        self.portions.each(compute, len(batch))

    monkeypatch.setattr(DDTD, "predict_step", step)
    result = stereo("locate", "--model", model, *SMALL, "-o", tmp_path / "g.pt")
    assert result.exit_code == 2 and "a single sample does not fit in memory" in result.stderr


def test_a_model_that_gives_nan(model: Path, stereo, tmp_path: Path):
    shutil.copytree(model, tmp_path / "nan")
    weights = tmp_path / "nan" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.weight"][0] = torch.nan
    save_file(state, weights, {"format": "pt"})
    result = stereo("locate", "--model", tmp_path / "nan", *SMALL, "-o", tmp_path / "g.pt")
    assert result.exit_code == 3 and "not finite" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "g.pt").exists()


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are looked for in /proc")
@pytest.mark.parametrize("killed", ["rank", "launcher"])
def test_a_process_that_is_killed_ends_the_job(model: Path, tmp_path: Path, killed: str):
    arguments = ("locate", "--model", model, "--seeds", 400, "--batch-size", 1, "--devices", 2, *SMALL[4:])
    command = [sys.executable, "-m", "stereo_cli", *map(str, arguments), "-o", str(tmp_path / "g.pt")]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as job:
        ranks: list[int] = []
        try:
            until = time.monotonic() + 240
            while not ranks and job.poll() is None and time.monotonic() < until:
                time.sleep(0.2)
                # Lightning's own, by its arguments: libraries start short-lived processes as well.
                ranks = [
                    child for child in children(job.pid) if b"stereo_cli" in Path(f"/proc/{child}/cmdline").read_bytes()
                ]
            assert ranks, job.stderr and job.stderr.read()
            time.sleep(15)  # into the run, or on the way to it: either must end well
            os.kill(ranks[0] if killed == "rank" else job.pid, signal.SIGKILL)
            began = time.monotonic()
            _, said = job.communicate(timeout=60)
            if killed == "rank":
                assert job.returncode == 3, said
                assert "stereo: rank 1 was killed (SIGKILL" in said
            while any(map(alive, ranks)) and time.monotonic() - began < 60:
                time.sleep(0.2)
            assert not any(map(alive, ranks))
        finally:
            for process in (job.pid, *ranks):
                if alive(process):
                    os.kill(process, signal.SIGKILL)
    assert not (tmp_path / "g.pt").exists()
    with sole_writer(tmp_path / "g.pt"):  # and no lock is left behind
        pass


def named_in(rows: list[str]) -> list[tuple[str, str]]:
    """File and name of the tests of each row, all of which there are."""
    named = []
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert tests, row
        named += tests
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), test
    return named


def test_each_row_of_odd_input_names_tests_that_there_are():
    lines = (ROOT / "docs" / "reference" / "input.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| input |", "| --- |"))]
    assert len(named_in(rows)) >= len(rows) > 40


def test_the_table_names_a_test_for_each_fault_and_each_test_has_a_row():
    rows = [
        line for line in (ROOT / "docs" / "reference" / "faults.md").read_text().splitlines() if line.startswith("| ")
    ][2:]
    assert all(re.search(r"\| (0|2|3|70|130|137) \|", row) for row in rows)
    named = named_in(rows)
    here = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), re.MULTILINE))
    of_tables = {
        "test_the_table_names_a_test_for_each_fault_and_each_test_has_a_row",
        "test_each_row_of_odd_input_names_tests_that_there_are",
    }
    assert here - {test for _, test in named} == of_tables


def test_a_fault_of_its_own_is_not_taken_for_a_figure_above_its_limit(stereo, model: Path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr("stereoclinic.pipelines.open_model", broken)
    result = stereo("locate", "--model", model, "--dry-run")
    assert result.exit_code == 70
    assert "nobody thought of this" in result.stderr and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("stereo: internal error")


def test_signs_that_a_pipe_cannot_show(located: Path):
    """Bars, where there is nothing but ASCII."""
    run = subprocess.run(
        [sys.executable, "-m", "stereo_cli", "inspect", located],
        capture_output=True, timeout=120, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert b"feed-forward" in run.stdout and run.stdout.isascii()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_disk_that_fills_up_under_a_file(name: str, tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        save_tensors(tmp_path / name, "mask", 1, {"a": torch.zeros(3)}, {})
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_kept_outlive_those_that_are_not(stereo, model: Path, located: Path, tmp_path: Path):
    """`--parts` in the very folder of the results, which another run writes as well."""
    (tmp_path / "out" / "parts").mkdir(parents=True)
    (tmp_path / "out" / "parts" / "kept.safetensors").write_bytes(b"mine")
    drawn = (
        "--model",
        model,
        "--mask",
        located,
        "--steps",
        1,
        "--quiet",
        "--accelerator",
        "cpu",
        "-o",
        tmp_path / "out",
    )
    assert stereo("apply", "a photo of a doctor", "--images", 1, *drawn).exit_code == 0
    assert stereo("bench", "--limit", 1, "--images", 2, "--group-images", 0, *drawn).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "parts" in names and not [name for name in names if name.endswith("-parts")]
    assert (tmp_path / "out" / "parts" / "kept.safetensors").read_bytes() == b"mine"
