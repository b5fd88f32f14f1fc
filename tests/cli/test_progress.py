"""Progress, and lines of one rank alone."""

import pytest

from stereo_cli import terminal
from stereo_cli.progress import progress_bar


@pytest.mark.parametrize("name", ["LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"])
def test_other_ranks_are_silent(monkeypatch, capsys, name: str):
    monkeypatch.setenv(name, "0")
    terminal.say("first")
    monkeypatch.setenv(name, "1")
    terminal.say("second")
    assert capsys.readouterr().out == "first\n"


def test_progress_stops_at_its_total(capsys):
    with progress_bar(10, "locating", quiet=False) as advance:
        advance(8)
        advance(8)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("locating: 10 of 10 (") and last.endswith("/s, 0 s left)")


def test_progress_of_a_stream_counts_without_a_total(capsys):
    with progress_bar(None, "locating", quiet=False) as advance:
        for _ in range(9):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [f"locating: {done}" for done in (1, 2, 4, 8)]
    assert all(line.endswith("/s)") for line in lines)
