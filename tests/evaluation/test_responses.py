"""What neurons respond to: the labels that are drawn, the files that are written, and what is left alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.pipelines.tiny import TINY, build

from stereoclinic.ddtd.relevance import SKETCHES, Relevance
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.prompts.sets import load_prompts, occupation_prompts
from stereoclinic.report import responses
from stereoclinic.report.responses import (
    Response,
    View,
    axis_of,
    check_folder,
    loudest,
    respond,
    samples,
    settings_of,
    write_responses,
)

GROUPS = ("female", "male")


def neuron(place: str = "up 1 conv 0", **values: float) -> dict:
    return {
        "site": "up_blocks.1.resnets.0.conv2",
        "place": place,
        "neuron": 3,
        "bin": {"number": 0, "from": 1000.0, "to": 500.0},
        "mean": 0.5,
        "stderr": 0.1,
        "t": 5.0,
        "profile": [
            {"label": label, "lean": 0.1, "relevance": {"female": value, "male": -value}}
            for label, value in values.items()
        ],
    }


def response(place: str = "up 1 conv 0", views: int = 2, size: tuple[int, int] = (16, 24)) -> Response:
    generator = torch.Generator().manual_seed(0)
    return Response(
        neuron(place, doctor=0.5, nurse=-0.5),
        [
            View(
                f"job {i}", f"a photo of a job {i}", 7, torch.rand(3, *size, generator=generator),
                torch.randn(4, 6, generator=generator),
            )
            for i in range(views)
        ],
    )  # fmt: skip


def relevance(sites: Sequence[Site] = (Site("a.conv2", "conv", 4),), **metadata: object) -> Relevance:
    n = sum(site.width for site in sites)
    zeros = {
        "count": (1, 2), "lean_sum": (1, 2, 2), "lean_sq": (1, 2, 2), "relevance_sum": (1, 2, 2, n),
        "stereotype_sum": (1, 2, n), "stereotype_sq": (2, n), "collateral": (1, 2, SKETCHES, n), "root_sum": (2, 2, n),
    }  # fmt: skip
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in zeros.items()}
    edges = torch.tensor([1000.0, 500.0, 0.0])
    return Relevance(list(sites), GROUPS, ["doctor"], edges, **sums, metadata=metadata)


def test_the_loudest_labels_either_way_from_one_group_to_the_other() -> None:
    each = neuron(doctor=-0.4, nurse=0.3, chef=0.01, pilot=-0.02, judge=-0.9, farmer=0.5)
    assert loudest(each, "female") == ["farmer", "nurse", "doctor", "judge"]
    assert loudest(each, "male", 2) == ["judge", "farmer"]
    each["profile"][0]["relevance"]["female"] = None  # never measured
    assert "doctor" not in loudest(each, "female")


def test_each_label_is_drawn_once() -> None:
    neurons = [neuron(doctor=0.4, nurse=0.3), neuron(nurse=0.2, chef=0.1)]
    rows = samples(load_prompts("portraits"), neurons, "female", 5)
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("a photo of a doctor", 5),
        ("a photo of a nurse", 5),
        ("a photo of a chef", 5),
    ]
    with pytest.raises(InputError, match=r"no prompt has the label 'nurse'.*the prompts have doctor; give the prompts"):
        samples(occupation_prompts(["doctor"]), neurons, "female", 5)


def test_settings_and_axis_are_those_that_were_located_with() -> None:
    located = relevance(
        composite="gradient", root="rooted", steps=7, every=3, guidance=2.5, target="contrast", axis="gender",
        words=["female", "male"], samples=3,
    )  # fmt: skip
    settings = settings_of(located)
    assert (settings.composite, settings.root, settings.steps, settings.every) == ("gradient", "rooted", 7, 3)
    assert (settings.guidance, settings.target, settings.bins) == (2.5, "contrast", 2)
    assert settings_of(located, "epsilon-cp").composite == "epsilon-cp"
    assert (axis_of(located).groups, axis_of(located).words) == (GROUPS, ("female", "male"))
    with pytest.raises(InputError, match="does not hold the words of its axis"):
        axis_of(relevance())
    with pytest.raises(InputError, match="explains a classifier, which the file does not hold"):
        settings_of(relevance(target="classifier"))
    with pytest.raises(InputError, match="settings cannot be read"):
        settings_of(relevance(steps="many"))


def respond_of(name: str, warn: Callable[[str], None]) -> list[Response]:
    """One neuron of each site of a tiny pipeline."""
    tiny = TINY[name]
    model = Model(build(name), name, call=tiny.call)
    sites = find_sites(model.network)
    neurons = [{**neuron(doctor=0.4), "site": site.name} for site in sites]
    rows = samples(occupation_prompts(["doctor"]), neurons, "female", 5)
    settings = Settings(steps=tiny.steps, guidance=tiny.guidance, bins=2, composite="gradient")
    located = relevance(sites, axis="gender", words=["female", "male"])
    return respond(model, located, neurons, rows, settings, warn=warn)


def test_neurons_of_text_tokens_have_no_place_in_a_picture() -> None:
    warned: list[str] = []
    shown = respond_of("flux", warned.append)
    assert [each.neuron["site"] for each in shown] == [
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.0.ff.net.2",
    ]
    assert all(each.views[0].map.shape == (4, 4) for each in shown)
    assert warned == ["4 of 6 neurons work on text tokens too: they have no place in an image"]


def test_tokens_that_are_no_picture_are_refused() -> None:
    """Krea 2 puts text before the image in layers whose names do not say so."""
    with pytest.raises(InputError, match="none of the top 8 neurons works on image tokens alone"):
        respond_of("krea2", lambda text: None)


def test_a_sheet_a_picture_a_neuron_and_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    seen = [response(), response("../../etc/passwd ff", views=1)]
    write_responses(folder, seen, GROUPS, {"model": "tiny", "guidance": 1.0})
    index = json.loads((folder / "index.json").read_text())
    files = [each["file"] for each in index["neurons"]]
    assert files == ["01-up-1-conv-0-3.png", "02-etc-passwd-ff-3.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, "index.json", "sheet.png"])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    sheet, one = Image.open(folder / "sheet.png"), Image.open(folder / files[0])
    assert sheet.width > 400 and sheet.height / 120 > one.height / 160  # in inches: two rows against one
    for each, made in zip(index["neurons"], seen, strict=True):
        assert [view["relevance"] for view in each["views"]] == pytest.approx(
            [float(view.map.sum()) for view in made.views]
        )
        assert all(view["map"] == [4, 6] and view["seed"] == 7 for view in each["views"])
    assert (index["model"], index["toward"]) == ("tiny", "female")


def test_a_second_run_takes_the_place_of_the_first(tmp_path: Path) -> None:
    write_responses(tmp_path / "o", [response(), response()], GROUPS, {})
    write_responses(tmp_path / "o", [response()], GROUPS, {})
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "01-up-1-conv-0-3.png",
        "index.json",
        "sheet.png",
    ]


def test_a_run_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_responses(tmp_path / "o", [response()], GROUPS, {})
    before = (tmp_path / "o" / "sheet.png").read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(responses, "draw", full)
    with pytest.raises(OSError, match="no space left"):
        write_responses(tmp_path / "o", [response()], GROUPS, {})
    assert (tmp_path / "o" / "sheet.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_folders_of_someone_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "index.json").write_text('{"schema": "other"}')
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty")
    check_folder(tmp_path / "new")
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "file")
    with pytest.raises(InputError, match="no earlier run wrote"):
        check_folder(tmp_path / "theirs")
    with pytest.raises(InputError, match="make it first"):
        check_folder(tmp_path / "no" / "where")
    assert (tmp_path / "theirs" / "index.json").is_file()
