"""`stereo doctor --faithfulness` ranks composites, and `stereo locate --composite auto` takes the best."""

import json
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Call
from tests.cli.test_distributed import command, run
from tests.pipelines.tiny import save

from stereoclinic import LocateSettings, load_axis, load_prompts, locate, open_model, with_seeds
from stereoclinic.calls import faithfulness
from stereoclinic.calls.work import Reporter
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.ddtd.rules.composites import COMPOSITES
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError

SMALL = ("--limit", 3, "--every", 1, "--bins", 2, "--quiet")


@pytest.fixture(scope="module")
def ranked(model: Path, stereo: Call) -> tuple[dict, str]:
    result = stereo("doctor", "--model", model, "--limit", 3, "--seeds", 2, "--faithfulness", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_every_composite_is_ranked_and_the_next_command_takes_the_best(ranked, model: Path) -> None:
    data, said = ranked
    found = data["faithfulness"]
    names = [row["composite"] for row in found["ranking"]]
    assert sorted(names) == sorted(COMPOSITES) and not found["refused"]
    figures = [row["correlation"]["estimate"] for row in found["ranking"]]
    assert figures == sorted(figures, reverse=True) and all(-1 <= figure <= 1 for figure in figures)
    for row in found["ranking"]:
        assert row["correlation"]["low"] <= row["correlation"]["estimate"] <= row["correlation"]["high"]
        assert (row["difference"] is None) == (row["composite"] == found["best"] == names[0])
    assert found["samples"] == 6 and found["neurons"] == data["neurons"]["neurons"]
    assert data["next"] == f"stereo locate --model {model} --composite {names[0]}"
    # What it takes is said before it starts.
    said = " ".join(said.split())
    cost = f"{found['forward']:,} forward and {found['backward']:,} backward passes of one sample"
    assert 0 <= said.index(cost) < said.index("silencing groups of neurons")


def test_without_being_asked_nothing_is_silenced(model: Path, stereo: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithfulness.Silencing, "run", None)
    assert json.loads(stereo("doctor", "--model", model, "--json").stdout)["faithfulness"] is None


def test_the_table_is_whole_at_80_columns(ranked) -> None:
    from io import StringIO

    from rich.console import Console

    from stereo_cli.doctor_tables import doctor_tables

    data, _ = ranked
    console = Console(file=StringIO(), width=80)
    console.print(doctor_tables(data)[-1])
    shown = console.file.getvalue()
    assert "No room for" not in shown
    for row in data["faithfulness"]["ranking"]:
        (line,) = [line for line in shown.splitlines() if line.strip().startswith(f"{row['composite']} ")]
        assert f"{row['correlation']['estimate']:.2f}".replace("-", "\N{MINUS SIGN}") in line


def test_a_composite_file_is_ranked_too(model: Path, stereo: Call, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[rules]\nconvolution = { rule = "gamma", gamma = 1.0 }\n')
    result = stereo("doctor", "--model", model, "--limit", 2, "--faithfulness", "--composite", file, "--json")
    assert str(file) in {row["composite"] for row in json.loads(result.stdout)["faithfulness"]["ranking"]}


def test_locate_takes_the_best_and_says_so(ranked, model: Path, stereo: Call, tmp_path: Path) -> None:
    best = ranked[0]["faithfulness"]["best"]
    out = tmp_path / "g.pt"
    result = stereo("locate", "--model", model, *SMALL, "--seeds", 2, "--composite", "auto", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert f"composite {best}, chosen by auto" in " ".join(result.stderr.split())
    auto = Relevance.load(tmp_path / "g.relevance.safetensors")
    assert auto.metadata["composite"] == auto.metadata["composite_choice"]["composite"] == best
    assert auto.metadata["composite_choice"]["by"] == "auto"
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "g.relevance.safetensors"]  # what was kept is gone
    shown = stereo("inspect", tmp_path / "g.relevance.safetensors").stdout
    assert "composite_choice.correlation" in shown and "composite_choice.interval" in shown
    named = locate(str(model), "gender", "portraits", LocateSettings(composite=best, limit=3, every=1, bins=2, seeds=2))
    assert named is not None and torch.allclose(named.relevance_sum.float(), auto.relevance_sum.float(), atol=1e-5)


def test_the_choice_is_made_once_and_a_stale_one_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, axis, samples = open_model(model), load_axis("gender"), with_seeds(load_prompts("portraits", 2), 0, 1)
    kept = tmp_path / "g.composite.json"

    def choose(steps: int = 2, kept: Path | None = kept) -> dict:
        walk = Settings(steps=steps)
        return faithfulness.chosen_composite(opened, axis, samples, walk, Reporter(), 16, kept)

    first = choose()
    assert first == choose(kept=None)
    monkeypatch.setattr(faithfulness, "rank_composites", None)  # it is read from now on
    assert choose() == first
    with pytest.raises(InputError, match=r"g\.composite\.json was made in another configuration: steps was 2 and is 3"):
        choose(steps=3)
    data = json.loads(kept.read_text())
    for damage in ({**data, "choice": {**data["choice"], "composite": "none"}}, [1], {"made": {}}):
        kept.write_text(json.dumps(damage))
        with pytest.raises(InputError, match="chosen composite"):
            choose()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--stream",), "cannot be measured with --stream"),
        (("--devices", 2, "--strategy", "fsdp"), "cannot be measured with strategy fsdp"),
    ],
)
def test_where_it_cannot_be_measured_auto_is_refused(model: Path, stereo: Call, more: tuple, says: str) -> None:
    result = stereo("locate", "--model", model, "--composite", "auto", *more)
    assert result.exit_code == 2 and says in " ".join(result.stderr.split())


def test_several_devices_without_a_file_are_refused(model: Path) -> None:
    with pytest.raises(InputError, match="give out=PATH"):
        locate(str(model), settings=LocateSettings(composite="auto", devices=2))


@pytest.mark.slow
def test_two_ranks_take_what_one_takes(model: Path, tmp_path: Path) -> None:
    prompts, found = tmp_path / "two.csv", []
    prompts.write_text("prompt,occupation\na photo of a doctor,doctor\na photo of a nurse,nurse\n")
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        said = run(command(model, prompts, out, "--composite", "auto", "--devices", ranks), out)
        assert " ".join(said.split()).count("chosen by auto") == 1
        found.append(Relevance.load(tmp_path / f"{ranks}.relevance.safetensors"))
        assert not (tmp_path / f"{ranks}.composite.json").exists()
    one, two = found
    assert one.metadata["composite_choice"] == two.metadata["composite_choice"]
    assert torch.allclose(one.relevance_sum, two.relevance_sum, atol=1e-6 * float(one.relevance_sum.abs().max()))


def test_a_transformer_is_ranked(stereo: Call, tmp_path: Path) -> None:
    """One in the shape of Stable Diffusion 3, whose layers have other numbers of rows in the text stream."""
    folder = save("sd3", tmp_path / "sd3")
    options = ("--height", 16, "--width", 16, "--call", "max_sequence_length=24", "--steps", 2, "--limit", 2)
    result = stereo("doctor", "--model", folder, *options, "--seeds", 1, "--faithfulness", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["faithfulness"]["ranking"]) == len(COMPOSITES)
