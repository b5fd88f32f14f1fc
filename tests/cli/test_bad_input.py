"""Bad input: one clear line on stderr, exit code 2, nothing on stdout, and nothing written."""

from pathlib import Path

import pytest
from tests.cli.conftest import AXIS_FILE


def test_unknown_axis(refused, model):
    assert "unknown axis 'sex'; choose one of age, gender, skin, tone" in refused(
        "locate", "--model", model, "--axis", "sex"
    )


def test_axis_file_with_one_group(refused, model, tmp_path: Path):
    (tmp_path / "one.toml").write_text(AXIS_FILE.format('["female"]'))
    assert "needs two or more" in refused("locate", "--model", model, "--axis", "one.toml")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "", "empty"),
        ("p.txt", "\n\n", "no prompts in it"),
        ("p.csv", "text\na photo of a doctor", "no column `prompt`"),
        ("p.jsonl", '{"text": "a photo of a doctor"}', "no column `prompt`"),
        ("p.xlsx", "x", "unknown ending"),
    ],
)
def test_prompt_files_without_prompts(refused, model, tmp_path: Path, name: str, content: str, says: str):
    (tmp_path / name).write_text(content)
    for command in ("locate", "bench"):
        assert says in refused(command, "--model", model, "--prompts", name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--limit", 1, "--seeds", 2, "--devices", 3), "2 samples for 3 devices"),
        (("--select", "best"), "expected plan or top-k"),
        (("--select", "best", "--top", 3), "expected plan or top-k"),
        (("--top", 200), "--top needs --select top-k, but --select is plan"),
        (("--select", "top-k", "--mu", 4), "--mu needs --select plan, but --select is top-k"),
        (("--composite", "magic"), "magic"),
        (("--root", "sideways"), "expected plain or rooted"),
        (("--precision", "17"), "--precision '17': expected one of 32-true"),
        (("--strategy", "fsdp", "--every", 1, "--bins", 2), "shares the weights out over devices"),
        (("--strategy", "fsdp", "--devices", 2, "--every", 1, "--bins", 2, "--composite", "deep-taylor"), "zplus-cp"),
        (("--strategy", "deepspeed", "--every", 1, "--bins", 2), "strategy 'deepspeed' shards the model's weights"),
        (("--accelerator", "abacus"), "--accelerator 'abacus': expected one of auto"),
        (("--accelerator", "mps"), "relevance is summed in float64"),
        (("--mask-root", "nurse"), "root 'nurse' is not known; choose zero, balanced, or a group: female, male"),
        (("--every", 1, "--bins", 2, "--select", "top-k", "--top", 0, "--dry-run"), "k = 0"),
        (("--every", 1, "--bins", 2, "--select", "top-k", "--top", 2.5, "--dry-run"), "k = 2.5"),
        (("--every", 1, "--bins", 2, "--select", "top-k", "--top", 1e6, "--dry-run"), "k = 1000000; expected 1 to"),
        (("--out", "mask.txt"), "ending in .pt or .safetensors"),
        (("--out", "nowhere/mask.pt"), "the folder nowhere does not exist or is not writable"),
        (("--mu", "inf", "--dry-run"), "mu inf: expected 0 or a positive number"),
        (("--overshoot", "inf", "--dry-run"), "overshoot inf: expected 0 or a positive number"),
    ],
)
def test_settings_of_locate(refused, model, arguments: tuple, says: str):
    assert says in refused("locate", "--model", model, *arguments)


@pytest.mark.parametrize("command", ["bench", "apply"])
def test_weights_are_shared_out_for_locating_alone(refused, model, command: str):
    arguments = ("a photo of a doctor", "--mask", "none.pt") if command == "apply" else ()
    says = refused(command, *arguments, "--model", model, "--devices", 2, "--strategy", "fsdp")
    assert "draw with ddp" in says


def test_a_folder_in_place_of_a_file(refused, model, tmp_path: Path):
    (tmp_path / "f.pt").mkdir()
    assert "f.pt: a folder; give a file name" in refused("locate", "--model", model, "--out", "f.pt")
    for command in (("bench",), ("apply", "a photo of a doctor")):
        assert "f.pt is a folder; give the file itself" in refused(*command, "--model", model, "--mask", "f.pt")
    assert "f.pt is a folder; give the file itself" in refused("inspect", "f.pt")
    assert "f.pt is a folder; --prompts takes a file" in refused("locate", "--model", model, "--prompts", "f.pt")


def test_a_file_in_place_of_a_folder(refused, model, located, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    for command in (("bench",), ("apply", "a photo of a doctor")):
        assert "out is a file" in refused(*command, "--model", model, "--mask", located, "--out", "out")
    assert "a file; a diffusers pipeline is a folder" in refused("locate", "--model", "out")


def test_images_of_someone_else_are_not_replaced(refused, model, located, tmp_path: Path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "holiday.png").write_bytes(b"mine")
    for command in (("bench",), ("apply", "a photo of a doctor")):
        line = refused(*command, "--model", model, "--mask", located, "--out", "out")
        assert "choose another folder" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--fail-above", "beauty=1"), "no figure 'beauty'; choose one of parity_gap"),
        (("--fail-above", "parity_gap"), "expected NAME=VALUE"),
        (("--axis", "sex"), "unknown axis"),
        (("--reader", "nowhere"), "unknown reader 'nowhere'; choose one of portraits"),
        (("--mask", "missing.pt"), "No such file"),
        (("--baseline", "uce", "--seed", 16, "--baseline-seed", 16, "--dry-run"), "seed 16 is judged"),
    ],
)
def test_settings_of_bench(refused, model, arguments: tuple, says: str):
    assert says in refused("bench", "--model", model, *arguments)


def test_a_plan_of_no_step(refused, model):
    assert "no step lies above it" in refused("plan", "--model", model, "--until", 2000, "--dry-run")


LONG = "a photo of a doctor in the rain " * 20


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", f"{LONG}.pt"),
        ("compare", LONG, LONG),
        ("locate", "--prompts", f"{LONG}.txt", "--every", 1, "--bins", 2, "--dry-run"),
        ("locate", "--model", LONG, "--every", 1, "--bins", 2, "--dry-run"),
        ("locate", "-o", f"{LONG}.pt", "--every", 1, "--bins", 2, "--dry-run"),
        ("bench", "-o", LONG, "--dry-run"),
    ],
)
def test_a_name_that_no_file_can_have(refused, model, arguments: tuple):
    own = () if "--model" in arguments or arguments[0] in ("inspect", "compare") else ("--model", model)
    assert "too long" in refused(*arguments, *own)


def test_a_prompt_that_is_not_all_text(refused, model, located):
    line = refused("apply", "a photo of a \udce9 doctor", "--model", model, "--mask", located)
    assert "give it in UTF-8" in line


def test_an_axis_the_reader_cannot_tell(refused, model, tmp_path: Path):
    (tmp_path / "mine.toml").write_text(AXIS_FILE.format('["female", "male"]'))
    assert "cannot tell the groups" in refused("bench", "--model", model, "--axis", "mine.toml")


def test_an_empty_prompt(refused, model, located):
    assert "empty" in refused("apply", " ", "--model", model, "--mask", located)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("colour: red", "no option colour; choose one of"),
        ("- a\n- b", "expected a mapping"),
        ("a: [", "config.yaml"),
    ],
)
def test_a_config_of_another_form(refused, tmp_path: Path, content: str, says: str):
    (tmp_path / "config.yaml").write_text(content)
    assert says in refused("locate", "--config", "config.yaml")
    assert "missing.yaml" in refused("locate", "--config", "missing.yaml")


@pytest.mark.parametrize("content", ["limit: many", "limit: 0", "seeds: [1, 2]"])
def test_a_config_with_a_wrong_value_exits_2(stereo, tmp_path: Path, content: str):
    (tmp_path / "config.yaml").write_text(content)
    result = stereo("locate", "--config", tmp_path / "config.yaml", "--dry-run")
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_a_config_whose_names_stand_for_copies(stereo, tmp_path: Path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]"
        for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "model: *j"]))
    for content in (None, "- " * 20_000, "[" * 20_000, "limit: " + "9" * 60_000, "#" * 70_000):
        if content is not None:
            (tmp_path / "c.yaml").write_text(content)
        result = stereo("locate", "--config", tmp_path / "c.yaml")
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("stereo: --config") and len(line) < 600
