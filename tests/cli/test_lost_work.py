"""Work is not lost: progress is kept until what it leads to is written, and a run that was killed is put right."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stereoclinic.ddtd.checkpoint import Shards
from stereoclinic.errors import InputError
from stereoclinic.io import files
from stereoclinic.io.files import repair, sole_writer, whole_folder, whole_results
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import Unfinished

LOCATE = ("--limit", 1, "--seeds", 1, "--every", 1, "--bins", 1, "--quiet", "--accelerator", "cpu")
PLAN = ("--limit", 1, "--seeds", 2, "--steps", 2, "--until", 0, "--mu", 0.01, "--keep", 0, "--check", 0, "--quiet")
DRAW = ("--steps", 1, "--quiet", "--accelerator", "cpu")


def no_room(*_: object, **__: object) -> None:
    raise InputError("mask file g.pt cannot be written (No space left on device)")


@pytest.mark.parametrize(
    ("command", "progress", "measures"),
    [
        (("locate", *LOCATE), "g.shards", (Shards, "write")),
        (("plan", *PLAN, "--stay", "none"), "g.unfinished.safetensors", (Unfinished, "keep")),
    ],
)
def test_progress_is_kept_until_the_mask_is_written(
    model: Path, stereo, tmp_path: Path, monkeypatch, command: tuple, progress: str, measures: tuple
):
    arguments = (*command, "--model", model, "-o", tmp_path / "g.pt")
    with monkeypatch.context() as patch:
        patch.setattr(NeuronMask, "save", no_room)
        result = stereo(*arguments)
    assert result.exit_code == 2 and "No space left" in result.stderr
    assert f"{progress} keeps the progress" in " ".join(result.stderr.split())
    assert (tmp_path / progress).exists() and not (tmp_path / "g.pt").exists()
    monkeypatch.setattr(*measures, lambda *_, **__: pytest.fail("it is measured again"))
    result = stereo(*arguments, "--resume")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "g.pt").is_file() and not (tmp_path / progress).exists()


@pytest.mark.parametrize("command", ["bench", "apply"])
def test_pictures_are_kept_until_the_results_are_written(
    model: Path, located: Path, stereo, tmp_path: Path, monkeypatch, command: str
):
    given = {
        "apply": ("a photo of a doctor", "-n", 1),
        "bench": ("--limit", 1, "--images", 2, "--group-images", 0),
    }[command]
    arguments = (command, *given, "--model", model, "--mask", located, *DRAW, "-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.Image.save", no_room)
        assert stereo(*arguments).exit_code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{command}-parts"]


class Killed(BaseException):
    """From here on the process does nothing any more."""


def killed_after(steps: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether an act was killed after so many of its renames, removals and the like."""
    left = steps

    def counted(real: Callable) -> Callable:
        def step(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for where, name in ((os, "replace"), (shutil, "rmtree"), (Path, "unlink"), (Path, "rmdir"), (Path, "mkdir")):
            patch.setattr(where, name, counted(getattr(where, name)))
        try:
            act()
        except Killed:
            return True
    return False


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(folder: Path, run: str) -> None:
    (folder / "images").mkdir()
    for name in (f"images/{run}.png", "images/metadata.jsonl", "results.json", "report.html", "before_after.png"):
        (folder / name).write_text(run)


def test_results_are_those_of_one_run_whenever_it_is_killed(tmp_path: Path, monkeypatch):
    """At no moment do files of one run stand beside those of another, and the next run puts right what is not whole."""

    def results(out: Path, run: str) -> None:
        with whole_results(out / "images") as temporary:
            write(temporary, run)

    whole = {}
    for run in ("old", "new"):
        results(tmp_path / run, run)
        whole[run] = contents(tmp_path / run)
    seen, steps, killed = set(), 0, True
    while killed:
        out = tmp_path / f"killed after {steps}"
        shutil.copytree(tmp_path / "old", out)
        killed = killed_after(steps, lambda out=out: results(out, "new"), monkeypatch)
        there = {name: run for name, run in contents(out).items() if not name.startswith(".")}
        files = {run for name, run in there.items() if not name.startswith("images/")}
        assert len(files) <= 1 and (not files or files == {there.get("images/metadata.jsonl")}), (steps, there)
        with sole_writer(out / "images") as said:
            pass
        assert contents(out) in whole.values(), steps
        seen.add((contents(out) == whole["new"], bool(said)))
        steps += 1
    assert steps > 8 and {(False, False), (True, True), (True, False)} <= seen


def test_a_folder_that_gave_up_its_place_for_nothing_gets_it_back(tmp_path: Path, monkeypatch):
    def replaced(run: str) -> None:
        with whole_folder(tmp_path / "out") as temporary:
            (temporary / "sheet.png").write_text(run)

    replaced("old")
    steps, seen = 0, set()
    while killed_after(steps, lambda: replaced("new"), monkeypatch):
        said = repair(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        run = (tmp_path / "out" / "sheet.png").read_text()
        assert not said or (run == "old" and "it is there again as it was" in said[0])
        seen.add((run, bool(said)))
        steps += 1
        shutil.rmtree(tmp_path / "out")
        replaced("old")
    assert seen == {("old", False), ("old", True), ("new", False)}


def test_an_error_while_results_are_written_leaves_what_was_there(tmp_path: Path):
    with whole_results(tmp_path / "images") as temporary:
        write(temporary, "old")
    before = contents(tmp_path)
    with pytest.raises(ZeroDivisionError), whole_results(tmp_path / "images") as temporary:
        write(temporary, "new")
        raise ZeroDivisionError
    (tmp_path / "notes").mkdir()
    with pytest.raises(InputError, match="notes is a folder"), whole_results(tmp_path / "images") as temporary:
        (temporary / "notes").write_text("new")
    assert contents(tmp_path) == before


def test_leftovers_of_killed_runs_go_with_the_next_run_of_the_same_output(tmp_path: Path):
    (tmp_path / "g.shards").mkdir()
    ours = [".g.pt.0123abcd.tmp", ".g.pt.lock", "g.shards/.a-0.safetensors.0123abcd.tmp"]
    others = ["g.pt", ".other.pt.0123abcd.tmp", ".g.pt.notours.tmp", "g.shards/a-0.safetensors", "mine.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("")
    (tmp_path / ".g.pt.4567cdef.tmp").mkdir()
    (tmp_path / ".g.pt.4567cdef.tmp" / "part").write_text("")
    with sole_writer(tmp_path / "g.pt"), sole_writer(tmp_path / "g.shards"):
        pass
    assert sorted(contents(tmp_path)) == sorted(others)


@pytest.mark.parametrize(
    ("command", "out", "taken"),
    [
        (("locate", *LOCATE), "g.safetensors", "g.relevance.safetensors"),
        (("locate", *LOCATE), "g.safetensors", "g.shards"),
        (("plan", *PLAN), "g.safetensors", "g.unfinished.safetensors"),
        (("bench", "--limit", 1, "--images", 2, *DRAW), "out", "out/images"),
        (("apply", "a photo of a doctor", "-n", 1, *DRAW), "out", "out/images"),
    ],
)
def test_a_second_run_that_would_write_one_of_the_same_files(
    model: Path, located: Path, stereo, tmp_path: Path, command: tuple, out: str, taken: str
):
    """`locate -o g.pt` and `locate -o g.safetensors` write one relevance file, `bench` and `apply` one folder."""
    masks = ("--mask", located) if command[0] in ("bench", "apply") else ()
    with sole_writer(tmp_path / taken):
        result = stereo(*command, "--model", model, *masks, "-o", tmp_path / out)
    assert result.exit_code == 2 and result.stdout == ""
    assert f"another run is writing {tmp_path / taken}" in " ".join(result.stderr.split())


def test_whatever_a_command_writes_is_claimed(model: Path, located: Path, stereo, tmp_path: Path, monkeypatch):
    claimed: list[Path] = []
    monkeypatch.setattr(files, "sole_writer", lambda place: (claimed.append(place.resolve()), sole_writer(place))[1])
    relevance = located.with_name("gender.relevance.safetensors")
    for i, command in enumerate(
        [
            ("locate", "--model", model, *LOCATE, "-o", "g.pt"),
            ("plan", "--model", model, *PLAN, "--stay", "none", "-o", "g.pt"),
            ("mask", located, "-o", "g.pt"),
            ("inspect", located, "--picture", "g.png"),
            ("inspect", relevance, "--images", "pictures", "--top", 1, "--quiet"),
            ("export", located, "--static", "--format", "checkpoint", "-o", "fused"),
            ("export", located, "--static", "-o", "m.safetensors"),
        ]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        monkeypatch.chdir(folder)
        claimed.clear()
        result = stereo(*command)
        assert result.exit_code == 0, (command, result.stderr)
        written = {path.resolve() for path in folder.iterdir()}
        assert written and written <= set(claimed), command
        assert not list(folder.glob(".*"))


_SPEAKS = """
import sys
import typer
from stereo_cli import terminal
from stereo_cli.command import guarded

@guarded
def command():
    terminal.say("x" * int(sys.argv[1]))
    terminal.stdout().print("y")
    terminal.say("z" * int(sys.argv[1]))
    terminal.warn("w")
    open(sys.argv[2], "w").write("written")
    if sys.argv[3] != "0":
        terminal.fail("above its limit", int(sys.argv[3]))

try:
    command()
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a pipe, and a device that is full")
@pytest.mark.parametrize(
    ("size", "redirect", "code", "ends"),
    [
        (1, "| true", 0, 0), (1, "| true", 1, 1), (100_000, "| true", 1, 1), (100_000, "2>&1 | true", 1, 1),
        (1, ">&-", 1, 1), (1, ">/dev/full", 0, 2), (1, ">/dev/full", 1, 1),
    ],
)  # fmt: skip
def test_a_stdout_that_is_closed_or_full_hides_no_exit_code(
    tmp_path: Path, size: int, redirect: str, code: int, ends: int
):
    script = f'("$@"; echo $? >code) {redirect}'
    arguments = [sys.executable, "-c", _SPEAKS, str(size), "out.txt", str(code)]
    run = subprocess.run(
        ["sh", "-c", script, "sh", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (tmp_path / "code").read_text().strip() == str(ends), run.stderr
    assert (tmp_path / "out.txt").read_text() == "written"
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr
