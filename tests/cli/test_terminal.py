"""What reaches a terminal: no name is obeyed or read as markup, and at any width names and figures are whole."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Group
from tests.evaluation.conftest import make_experiment
from typer.testing import CliRunner

from stereo_cli import compare, inspect_tables, progress, tables, terminal
from stereo_cli.bench_tables import bench_tables, reader_says
from stereo_cli.command import guarded
from stereo_cli.diff_tables import diff_tables
from stereo_cli.doctor_tables import doctor_tables
from stereo_cli.main import app
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.evaluation.compare import compare_results
from stereoclinic.io.text import printable
from stereoclinic.pipelines.sites import Site
from stereoclinic.prompts.axes import Axis
from stereoclinic.report.anatomy import KINDS, places
from stereoclinic.report.located import relevance_summary
from stereoclinic.report.summary import lean_summary, mask_summary
from stereoclinic.sns.diff import compare as compared
from stereoclinic.sns.mask import NeuronMask

HOSTILE = "a\x1b[31m\r\u202e[/x][bold]:smile:\n\x9b2J"
SHOWN = r"a\x1b[31m\r\u202e[/x][bold]:smile:\n\x9b2J"
MARKUP = "[/x][bold]:smile:"  # all that a name of an axis or a group can hold: it is printable
LAYER = HOSTILE.replace("[", "(")  # no layer's name has brackets
WIDTHS = (60, 70, 80, 110)


def safe(text: str) -> bool:
    return all(printable(line) == line for line in text.split("\n"))


def printed(table: Any, width: int) -> str:
    console = terminal.PlainConsole(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def benched(name: str = "gender-allocated", label: str = "doctor", axis: Axis | None = None) -> list[Any]:
    """All that `stereo bench` and `stereo compare` print, of three prompts, with whatever can be asked for."""
    experiment = make_experiment(
        {name: 0.5}, labels=(label, "nurse", "firefighter"), **({"axis": axis} if axis else {})
    )
    results = experiment.results | {"corrected_shares": None}
    del results["corrected_shares"]
    some = results["arms"]["untreated"]["parity_gap"]
    arms = {arm: {"slope": some, "excess": some, "distance": some, "labels": [label]} for arm in results["arms"]}
    floor = {"mean": 0.1, "upper": 0.2}
    cost = {"needs": f"400 images of {label}", "seconds": 12.0, "images": 9, "forward": 4321, "backward": 17}
    for arm in results["arms"].values():
        change = results["arms"][name]["parity_gap_change"]
        arm |= {"clip_score": some, "clip_score_change": change, "no_group": some, "readers_agree": some}
        arm |= {"lpips_to_untreated": some, "readers_kappa": {f"{name} / clip": some}}
    more = {
        **results,
        "amplification": arms,
        "published": {"name": name, "figure": label, "arms": {name: 0.1}, "noise_floor": floor},
        "baselines": {"random": cost},
    }
    bare = json.loads(json.dumps({"schema": 2, "provenance": {}, "experiments": [experiment.results]}))
    found = compare_results(bare, bare)["experiments"][0]
    said = reader_says({"reader": name, "reader_limits": [label], "reader_errors": [label]})
    return [
        *bench_tables(more, "all"), said,
        *(compare._table(found["guidance"], arm) for arm in found["arms"]),
    ]  # fmt: skip


def of_files(mask: NeuronMask, relevance: Relevance) -> list[Any]:
    """All that `stereo locate`, `mask`, `inspect` and `diff` print."""
    summary, damping = relevance_summary(relevance, 3), mask_summary(mask)
    other = replace(mask, factors=1 - 0.5 * mask.damping, metadata={**mask.metadata, "model": "other"})
    known = places(mask.sites)
    both = compared(mask, other, lambda site: KINDS[known[site].kind])
    return [
        tables.lean_table(lean_summary(relevance)), tables.mask_table(damping),
        *inspect_tables.relevance_tables(summary, 3), *inspect_tables.mask_tables(damping, 3),
        inspect_tables.metadata_table(mask.metadata), *diff_tables(both),
    ]  # fmt: skip


def of_doctor(name: str) -> list[Any]:
    """All that `stereo doctor` prints."""
    model = {
        "name": name, "family": name, "folder": name, "call": {"key": name}, "unet": name, "parameters": 1,
        "dtype": "float32", "latents": [4, 8, 8], "calls": [[True, False]], "conditions": [name], "scheduler": name,
        "prediction": name, "draws": False, "steps": 2, "guidance": 1.0, "timesteps": [999.0, 1.0], "told": [],
        "added": None,
    }  # fmt: skip
    shares = dict.fromkeys(("text", "time", "bias", "skip_connections", "modulation", "image", "sum"), 0.5)
    cuts = [{"before": f"down_blocks.0.{name}", **shares, "error": 1e-6}]
    kinds = [{"kind": "attention", "stream": "image", "sites": 2, "neurons": 8}]
    interval = {"estimate": 0.9, "low": 0.8, "high": 0.95}
    behind = {"estimate": -0.2, "low": -0.3, "high": -0.1, "p_value": 0.001}
    ranking = [
        {"composite": composite, "correlation": interval, "difference": change, "by_size": [0.9, 0.8]}
        for composite, change in ((name, None), ("epsilon-cp", behind))
    ]
    faithfulness = {
        "axis": name, "ranking": ranking, "sizes": [2, 4], "groups": 16, "samples": 12, "timesteps": [900.0],
        "neurons": 8, "refused": {name: name},
    }  # fmt: skip
    return doctor_tables(
        {
            "model": model,
            "neurons": {"streams": kinds, "sites": 2, "neurons": 8},
            "uncovered": {name: 2},
            "conservation": {
                "composite": name, "dtype": "float32", "samples": 1, "cuts": cuts, "absorbs": False, "meaning": name,
                "fault": name, "timestep": 999.0,
            },
            "memory": {"unet_weights": 9, "kept_by_a_sample": 9, "batch": 2, "batch_total": 9},
            "devices": [{"name": "cuda:0", "what": name, "memory": None, "used": True}],
            "time": {"why": name},
            "faithfulness": faithfulness,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(located: Path) -> tuple[NeuronMask, Relevance]:
    return NeuronMask.load(located), Relevance.load(located.with_name("gender.relevance.safetensors"))


@pytest.fixture(scope="module")
def hostile(files) -> list[Any]:
    """Every table, of files and results whose every name is hostile."""
    mask, relevance = files
    sites = [replace(site, name=f"{LAYER}.{i}.{site.name}") for i, site in enumerate(mask.sites)]
    metadata = {
        "axis": HOSTILE, HOSTILE: HOSTILE, "target": HOSTILE,
        "selection": {"method": HOSTILE, "root": HOSTILE, "bins": [{"lean_before": 0.1}] * len(mask.factors)},
    }  # fmt: skip
    labels = [f"{HOSTILE}{i}" for i in range(len(relevance.labels))]
    groups = (MARKUP, f"{MARKUP} 2")
    allots = replace(mask, sites=sites, metadata=metadata)
    located = replace(relevance, sites=sites, labels=labels, groups=groups, metadata={**relevance.metadata, **metadata})
    axis = Axis(MARKUP, groups, groups)
    return [*benched(HOSTILE, HOSTILE, axis), *of_files(allots, located), *of_doctor(HOSTILE)]


@pytest.mark.parametrize("width", [20, *WIDTHS, 2_000])
def test_no_name_in_a_table_is_obeyed(hostile, width: int):
    for table in hostile:
        text = printed(table, width)
        assert safe(text) and max(map(len, text.splitlines())) <= width
    if width == 2_000:  # where there is room, names are as they are written
        whole = "".join(printed(table, width) for table in hostile)
        assert whole.count(SHOWN) + whole.count(MARKUP) > 90 and "No room" not in whole


def rich_tables(parts: Any) -> list[Any]:
    return [each for part in parts if isinstance(part, Group) for each in part.renderables if hasattr(each, "table")]


@pytest.mark.parametrize("width", WIDTHS)
def test_names_and_intervals_are_whole_at_any_width(files, width: int):
    """What there is no room for is a column, and it is named; names stay, and so does whatever else is shown."""
    tables_of = rich_tables([*benched(), *of_files(*files), *of_doctor("portraits")])
    assert len(tables_of) > 25
    for fitted in tables_of:
        text = printed(fitted, width)
        lines, columns = text.splitlines(), fitted.table.columns
        assert max(map(len, lines)) <= width
        named = " ".join(text[text.index("No room for: ") :].split()) if "No room" in text else ""
        for i, column in enumerate(columns):
            heading = " ".join(str(column.header).split())
            cells = [cell if isinstance(cell, str) else cell.plain for cell in column.cells]
            folds = column.overflow == "fold"
            if not folds and i and heading in named and not all(cell in text for cell in cells):
                continue
            for cell in cells:
                parts = [word for word in cell.split() if len(word) <= 12] if folds else cell.split("\n")
                assert all(part in text for part in parts), (heading, cell)
        for cell in re.findall(r"-?\d[\d.]* \[[^\]\n]*(?:\]|$)", text, re.MULTILINE):
            assert re.fullmatch(r"\S+ \[(\S+, \S+|below \S+)\]", cell), cell


@pytest.mark.parametrize("width", WIDTHS)
def test_the_first_columns_of_a_bench_stay(width: int):
    bias, effects = (
        printed(table, width) for table in bench_tables(make_experiment({"gender-allocated": 0.5}).results)[:2]
    )
    for name in ("untreated", "gender-allocated", "balanced oracle", "allocation oracle", "other seeds"):
        for text in (bias, effects):
            assert re.search(rf"^ {name}  +\d", text, re.MULTILINE), name
    assert re.search(r"change of the gap +p ", bias)  # a p-value stands next to what it is of


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_of_a_bench_is_printed_at_any_width(width: int):
    for table in rich_tables(bench_tables(make_experiment({"a": 0.5}).results, "all")):
        text = printed(table, width)
        words = {word for column in table.table.columns for word in str(column.header).split()}
        assert "No room" not in text and words and all(word in text for word in words)


def test_the_verdict_of_a_comparison_is_left_out_last(files):
    arm = benched()[-1].renderables[1]
    text = printed(arm, 60)
    assert "B is" in text.splitlines()[1] and "No room for: A, B; --json has all." in text


def test_a_name_of_any_length_folds(files):
    label = "a photo of a person who works as a firefighter in a large city " * 3
    for table in bench_tables(make_experiment({"a": 0.5}, labels=(label, "x", "y")).results, "all"):
        assert max(map(len, printed(table, 60).splitlines())) <= 60
    shown = printed(bench_tables(make_experiment({"a": 0.5}, labels=(label, "x", "y")).results, "all")[-1], 60)
    assert all(word in shown for word in label.split())


def test_lines_are_lines(capsys: pytest.CaptureFixture[str]):
    terminal.say(HOSTILE)
    terminal.warn(HOSTILE)
    terminal.note(HOSTILE)
    with pytest.raises(terminal.typer.Exit):
        terminal.fail(HOSTILE, 2)
    with progress.progress_bar(1, HOSTILE, quiet=False) as advance:
        advance(1, HOSTILE)
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}\n"
    assert safe(err) and err.count(r"a\x1b[31m\r\u202e[/x][bold]:smile:") == 5
    assert len(err.splitlines()) >= 4


def test_a_bar_on_a_terminal_is_of_plain_text(monkeypatch: pytest.MonkeyPatch):
    file = io.StringIO()
    console = terminal.PlainConsole(file=file, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(progress, "stderr", lambda: console)
    with progress.progress_bar(2, HOSTILE, quiet=False) as advance:
        advance(1, HOSTILE)
    shown = file.getvalue()
    assert SHOWN in shown and "\u202e" not in shown and "\x1b[31m" not in shown and "\x9b" not in shown


def test_the_traceback_of_a_fault_is_not_obeyed(capsys: pytest.CaptureFixture[str]):
    @guarded
    def broken() -> None:
        raise RuntimeError(HOSTILE)

    with pytest.raises(terminal.typer.Exit):
        broken()
    err = capsys.readouterr().err
    assert safe(err) and "Traceback" in err and "RuntimeError: a\\x1b[31m" in err


@pytest.mark.parametrize(
    "arguments",
    [
        (HOSTILE,), (f"--{HOSTILE}",), ("locate", f"--{HOSTILE}"), ("locate", f"--seeds={HOSTILE}"),
        ("locate", HOSTILE), ("diff", "a.pt", "b.pt", HOSTILE), ("locate", "--model", "x", "--precision", HOSTILE),
        ("locate", "--call", HOSTILE), ("locate", "--axis", HOSTILE), ("locate", "--prompts", HOSTILE),
        ("bench", "--mask", f"{HOSTILE}.pt"), ("inspect", HOSTILE), ("bench", "--strategy", f"fsdp{HOSTILE}"),
    ],
)  # fmt: skip
def test_what_was_given_wrongly_is_quoted_safely(arguments: tuple[str, ...]):
    result = CliRunner(env={"COLUMNS": "110"}).invoke(app, list(arguments))
    assert result.exit_code == 2
    assert safe(result.output) and result.stdout == ""
    assert r"\x1b" in result.output or "valid integer" in result.output


def test_files_of_hostile_names_are_named_safely(located: Path, stereo, tmp_path: Path):
    mine = tmp_path / "a\x1b[31m\u202e[x]$\\frac$\r.pt"
    mine.write_bytes(located.read_bytes())
    own = "a\\x1b[31m\\u202e[x]$\\frac$\\r"
    other = mine.with_name(f"b{mine.name}")
    for command in (
        ("mask", mine, "--strength", 0.5, "-o", other), ("inspect", mine, "--picture", mine.with_suffix(".png")),
        ("diff", mine, other), ("inspect", mine, "--json"),
    ):  # fmt: skip
        result = stereo(*command)
        assert result.exit_code == 0, result.stderr
        assert safe(result.output), command
        if "--json" in command:
            assert result.stdout.isascii() and json.loads(result.stdout)["file"] == str(mine)
        else:
            assert own in result.stdout
        if command[0] == "mask":
            assert own in next(line for line in result.stdout.splitlines() if line.startswith("next: "))


def test_sites_of_hostile_names_are_inspected(located: Path, stereo, tmp_path: Path):
    """Files with control characters are refused; these signs may be in one."""
    mask, name = NeuronMask.load(located), "a\r\n\u202e\u2028(/x)$^{$"
    sites = [Site(f"{name}.{i}", "other", site.width) for i, site in enumerate(mask.sites)]
    replace(mask, sites=sites, metadata={"axis": f"{name}[/x]", name: name}).save(tmp_path / "a.safetensors")
    for more in ((), ("--picture", tmp_path / "a.png"), ("--json",)):
        result = stereo("inspect", tmp_path / "a.safetensors", *more)
        assert result.exit_code == 0, result.stderr
        assert safe(result.output)
        assert more or r"a\r\n\u202e\u2028(/x)$^{$[/x]" in result.stdout
