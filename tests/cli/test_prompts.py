"""What is said of prompts: those that name a group, those that are too long, and those that the gate leaves alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from stereoclinic.calls.inputs import own_axis
from stereoclinic.prompts.axes import Axis, gate_words, load_axis
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.policy import named_groups

MINE = """
name = "{name}"
groups = ["female", "male"]
unless = ["diva chair"]
[words]
female = "female"
male = "male"
[also]
female = ["diva", "\u5973"]
"""
#: More words than the tiny model reads, and the group's before or behind where it stops.
BEFORE = "a {group} doctor and a photo of a photo of a photo of a photo of a photo"
BEHIND = "a photo of a photo of a photo of a photo of a photo of a photo of a {group} doctor"
COMMANDS = [("locate", "--every", 1, "--bins", 2), ("plan",), ("bench",)]


@pytest.fixture
def notes(stereo, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Dry-run a command on some prompts; what it says on stderr, and its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(command: tuple, *prompts: str) -> tuple[list[str], int]:
        Path("p.txt").write_text("\n".join(prompts))
        result = stereo(*command, "--model", model, "--prompts", "p.txt", "--dry-run")
        return result.stderr.splitlines(), result.exit_code

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_neutral_prompts_that_name_a_group_are_counted_and_the_first_is_named(notes, command: tuple):
    assert notes(command, "a photo of a judge", "a photo of a doctor") == ([], 0)
    (line,), code = notes(command, "a photo of a judge", "a photo of a male nurse", "a photo of a female doctor")
    assert line.startswith("note: 2 of 3 prompts name a group") and "'a photo of a male nurse' (male)" in line
    assert code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_prompt_that_is_cut_is_named_and_refused_where_its_group_is_lost(notes, command: tuple):
    (line,), code = notes(command, BEFORE, "a photo of a doctor")
    assert code == 0 and line.startswith("note: prompt 'a doctor and a photo of")
    assert "the model ignores it from word 13 (a) on; so are 2 more" in line
    (line,), code = notes(command, BEHIND, "a photo of a doctor")
    assert code == 2 and "is the same as" in line and "that the prompt is not too long for the model" in line


def test_apply_says_which_prompt_is_cut(stereo, model, located):
    result = stereo("apply", "a photo of a doctor", "a photo " * 12, "--model", model, "--mask", located, "--dry-run")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("note: prompt 'a photo a photo") and "from word 15 (a) on" in line


@pytest.mark.parametrize("name", ["gender", "mine"])
@pytest.mark.parametrize("command", ["locate", "plan"])
def test_the_gate_knows_the_words_of_the_file_that_a_mask_was_made_for(
    stereo, model, tmp_path: Path, monkeypatch, name: str, command: str
):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(MINE.format(name=name))
    small = ("--axis", "mine.toml", "--limit", 1, "--seeds", 1, "--quiet", "-o", "m.pt", "--steps", 2)
    more = ("--bins", 1, "--every", 1) if command == "locate" else ("--check", 0, "--stay", "none", "--mu", 0)
    result = stereo(command, "--model", model, *small, *more)
    assert result.exit_code == 0, result.stderr
    texts = (
        "a photo of a diva",
        "a photo of a judge on a diva chair",
        "\u4e00\u4f4d\u5973\u533b",
        "a photo of a woman",
    )
    result = stereo("apply", *texts, "--model", model, "--mask", "m.pt", "-n", 1, "--steps", 1, "--quiet")
    assert result.exit_code == 0, result.stderr
    left = [line for line in result.stderr.splitlines() if "no mask was applied to" in line]
    assert [line.rsplit(": ", 1)[1] for line in left] == [f"{texts[0]}; {texts[2]}"]  # no word but the file's


def test_apply_takes_the_words_of_another_axis(stereo, model, located, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(MINE.format(name="gender"))
    shared = ("--model", model, "--mask", located, "-n", 1, "--steps", 1, "--quiet")
    texts = ("a photo of a diva", "a photo of a woman", "a photo of an old judge")
    for axes, expected in ((("mine.toml",), texts[:1]), (("mine.toml", "age"), texts[::2]), ((), texts[1:2])):
        result = stereo("apply", *texts, *shared, *(each for axis in axes for each in ("--axis", axis)), "--force")
        assert result.exit_code == 0, result.stderr
        (line,) = [line for line in result.stderr.splitlines() if "no mask was applied to" in line]
        assert line.rsplit(": ", 1)[1] == "; ".join(expected)
    result = stereo("apply", *texts, *shared, "--axis", "age", "--no-gate")
    assert result.exit_code == 2 and "leave out one of them" in result.stderr


def test_the_bench_s_own_gate_knows_the_words_of_the_mask_s_file(located):
    mask = NeuronMask.load(located)
    assert own_axis(mask) == load_axis("gender")
    words = gate_words(Axis("gender", ("a", "b"), ("female", "male"), also={"a": ("diva",)}))
    axis = own_axis(replace(mask, metadata={**mask.metadata, **words}))
    assert axis is not None and axis.reader == load_axis("gender").reader
    assert named_groups("a diva", axis) == ("female",) and named_groups("a woman", axis) == ()
