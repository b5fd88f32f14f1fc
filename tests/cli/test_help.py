"""`stereo --help` answers at once: nothing heavy is imported before a command runs."""

import subprocess
import sys
from collections import Counter

import pytest
import typer
from typer.testing import CliRunner

from stereo_cli.main import app

HEAVY = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "datasets", "matplotlib", "safetensors")
COMMANDS = ("locate", "plan", "mask", "inspect", "diff", "apply", "bench", "compare", "doctor")


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


def test_it_starts_as_a_module():
    run = subprocess.run([sys.executable, "-m", "stereo_cli", "--help"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stderr == ""
    assert "Usage: stereo" in run.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str):
    shown = CliRunner().invoke(app, [command, "--help"], prog_name="stereo")
    assert shown.exit_code == 0 and shown.stderr == ""
    assert f"Usage: stereo {command}" in shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_what_a_first_run_needs(command: str):
    """No panel is a list too long to read, and those of the machinery come after the unnamed one."""
    parameters = typer.main.get_command(app).commands[command].params
    panels = Counter(each.rich_help_panel for each in parameters if each.param_type_name == "option")
    assert max(panels.values()) <= 12, panels
    text = CliRunner().invoke(app, [command, "--help"]).stdout
    places = [text.index(f"─ {panel or 'Options'} ─") for panel in [None, *panels]]
    assert places[0] == min(places)


@pytest.mark.parametrize("command", COMMANDS)
def test_paragraphs_wrap_where_the_terminal_ends(command: str):
    """No line break of the source stands inside a paragraph, but for examples."""
    whole = typer.main.get_command(app).commands[command].help
    for part in whole.split("\n\n"):
        assert part.startswith("\b") or "\n" not in part
    shown = CliRunner(env={"COLUMNS": "60"}).invoke(app, [command, "--help"]).stdout
    for part in whole.split("\n\n"):
        assert part.startswith("\b") or " ".join(part.split()) in " ".join(shown.split())


def test_no_arguments_show_help_and_a_wrong_command_exits_2():
    run = subprocess.run([sys.executable, "-m", "stereo_cli"], capture_output=True, text=True, timeout=60)
    assert "stereo locate" in run.stdout + run.stderr
    run = subprocess.run([sys.executable, "-m", "stereo_cli", "lacote"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
