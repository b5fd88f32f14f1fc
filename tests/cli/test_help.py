"""`stereo --help` answers at once: nothing heavy is imported before a command runs."""

import subprocess
import sys
import textwrap
from collections import Counter
from functools import cache
from inspect import cleandoc
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from stereo_cli.main import app

HEAVY = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "datasets", "matplotlib", "safetensors")
COMMANDS = (
    "locate", "plan", "mask", "inspect", "diff", "apply", "export", "bench", "compare", "doctor", "reader check",
)  # fmt: skip


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from stereo_cli.main import app\n"
        "app(['--help'], standalone_mode=False)\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit('imported ' + ', '.join(found) if found else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "stereo locate" in run.stdout


@pytest.mark.parametrize(
    "modules",
    [
        "stereoclinic.calls.compare, stereo_cli.bench_tables",
        "stereoclinic.sns.diff, stereo_cli.diff_tables",
        "stereoclinic.sns.linear, stereoclinic.ddtd.relevance, stereoclinic.report.summary",
    ],
)
def test_commands_that_run_no_model_import_torch_alone(modules: str):
    heavy = {*HEAVY, "scipy", "statsmodels", "pandas"} - {"torch", "safetensors"}
    code = f"import sys, {modules}; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stderr


def test_it_starts_as_a_module():
    run = subprocess.run([sys.executable, "-m", "stereo_cli", "--help"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stderr == ""
    assert "Usage: stereo" in run.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str):
    shown = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="stereo")
    assert shown.exit_code == 0 and shown.stderr == ""
    assert f"Usage: stereo {command}" in shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_what_a_first_run_needs(command: str):
    """No panel is a list too long to read, and those of the machinery come after the unnamed one."""
    parameters = command_of(command).params
    panels = Counter(each.rich_help_panel for each in parameters if each.param_type_name == "option")
    assert max(panels.values()) <= 12, panels
    text = CliRunner().invoke(app, [*command.split(), "--help-all"]).stdout
    places = [text.index(f"─ {panel or 'Options'} ─") for panel in [None, *panels]]
    assert places[0] == min(places)


@pytest.mark.parametrize("command", COMMANDS)
def test_common_options_fit_one_screen_and_the_rest_is_in_help_all(command: str):
    runner = CliRunner(env={"COLUMNS": "80"})
    common, everything = (runner.invoke(app, [*command.split(), flag]).stdout for flag in ("--help", "--help-all"))
    assert len(common.splitlines()) <= 40
    for parameter in command_of(command).params:
        assert all(flag in everything for flag in parameter.opts if flag.startswith("--"))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_no_python_types_and_one_pair_of_brackets(command: str):
    """An argument stands once in brackets, as in [RELEVANCE]; a flag has no value such as <bool>."""
    arguments = [*command.split(), "--help-all"] if command else ["--help"]
    text = CliRunner(env={"COLUMNS": "100"}).invoke(app, arguments).stdout
    assert [part for part in ("<bool>", "<path>", "list[", "[[", "{{", "......") if part in text] == []


@cache
def shown(command: str, width: int) -> tuple[Any, list[str]]:
    """A command, or all of them, and the lines of its help without their frames."""
    arguments = [*command.split(), "--help-all"] if command else ["--help"]
    lines = CliRunner(env={"COLUMNS": str(width)}).invoke(app, arguments).stdout.splitlines()
    assert max(map(len, lines)) <= width
    return command_of(command), lines


def command_of(name: str) -> Any:
    """A command, such as "bench" or "reader check", or all of them."""
    found: Any = typer.main.get_command(app)
    for each in name.split():
        found = found.commands[each]
    return found


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_paragraphs_wrap_where_the_terminal_ends(command: str, width: int):
    """Every line of a paragraph is as full as its words let it be, and every line of an example is whole."""
    found, lines = shown(command, width)
    plain = [line.strip() for line in lines]
    for part in cleandoc(found.help).split("\n\n"):
        if part.startswith("\b"):
            assert all(f" {line}" in [each.rstrip() for each in lines] for line in part.strip("\b\n").split("\n"))
        else:
            wrapped = wrap(part, width - 2)
            assert wrapped in [plain[i : i + len(wrapped)] for i in range(len(plain))], part


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_an_option_does_wraps_where_its_column_ends(command: str, width: int):
    found, lines = shown(command, width)
    cells = [line.strip("│ ") for line in lines]
    assert width < 80 or not any("…" in line for line in lines)  # a word that is longer than its column

    def stands(help_text: str, column: int) -> bool:
        wrapped = [line if len(line) <= column else f"{line[: column - 1]}…" for line in wrap(help_text, column)]
        return any(
            all(cells[i + j].endswith(each) for j, each in enumerate(wrapped[:-1]))
            and wrapped[-1] in cells[i + len(wrapped) - 1]
            for i in range(len(cells) - len(wrapped) + 1)
        )

    column = width
    for parameter in found.params:
        if (text := getattr(parameter, "help", None)) and not stands(text, column):
            column = next((n for n in range(width, 8, -1) if stands(text, n)), 0)
            assert column, (parameter.name, text)


def wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def test_no_arguments_show_help_and_a_wrong_command_exits_2():
    run = subprocess.run([sys.executable, "-m", "stereo_cli"], capture_output=True, text=True, timeout=60)
    assert "stereo locate" in run.stdout + run.stderr
    run = subprocess.run([sys.executable, "-m", "stereo_cli", "lacote"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
