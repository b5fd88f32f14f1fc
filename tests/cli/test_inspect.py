"""`stereo inspect` on a tiny model: tables, pictures and JSON of masks and relevance, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from stereo_cli import inspect_tables, tables
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.report.located import relevance_summary
from stereoclinic.report.summary import mask_summary
from stereoclinic.sns.mask import NeuronMask


@pytest.fixture(scope="module")
def file(located) -> Path:
    """The relevance that the mask was made from."""
    return located.with_name("gender.relevance.safetensors")


def printed(*renderables: object) -> str:
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    for each in renderables:
        console.print(each)
    return console.export_text()


def test_a_mask(located, stereo, tmp_path: Path):
    picture = tmp_path / "mask.png"
    result = stereo("inspect", located, "--picture", picture)
    assert result.exit_code == 0, result.stderr
    for title in ("Mask for gender", "By depth", "Most damped"):
        assert title in result.stdout
    assert f"wrote {picture}" in result.stdout
    assert Image.open(picture).width > 400
    data = json.loads(stereo("inspect", located, "--json").stdout)
    mask = NeuronMask.load(located)
    assert data["kind"] == "mask"
    assert data["total"]["damping"] == pytest.approx(float((1 - mask.factors).sum(1).mean()), rel=1e-5)
    for rows in (data["kinds"], data["blocks"]):
        assert sum(row["neurons"] for row in rows) == mask.factors.shape[1]
        assert sum(row["damped"] for row in rows) == data["total"]["damped"]
    for t, row in enumerate(data["bins"]):
        assert row["damping"] == pytest.approx(sum(site["bins"][t] for site in data["sites"]))


def test_relevance(file, stereo, tmp_path: Path):
    result = stereo("inspect", file, "--top", 3, "--picture", tmp_path / "relevance.png")
    assert result.exit_code == 0, result.stderr
    for title in ("Lean toward female", "Relevance for gender", "By timestep", "By depth", "Strongest neurons"):
        assert title in result.stdout
    assert Image.open(tmp_path / "relevance.png").width > 400
    data = json.loads(stereo("inspect", file, "--top", 3, "--json").stdout)
    assert data["kind"] == "relevance"
    assert data["lean"]["toward"] == "female"
    assert [row["name"] for row in data["blocks"]] == ["down 0", "down 1", "mid", "up 0", "up 1"]
    relevance = Relevance.load(file)
    mean, stderr = relevance.stereotype()
    assert len(data["neurons"]) == 3
    for row in data["neurons"]:
        assert f"#{row['neuron']}" in result.stdout
        start = 0
        for site in relevance.sites:
            if site.name == row["site"]:
                break
            start += site.width
        j, t = start + row["neuron"], row["bin"]["number"]
        assert row["mean"] == pytest.approx(float(mean[t, j]))
        assert row["stderr"] == pytest.approx(float(stderr[t, j]))
        assert [each["label"] for each in row["profile"]] == relevance.labels
        for p, each in enumerate(row["profile"]):
            assert each["relevance"]["female"] == pytest.approx(float(relevance.rows()[p, t, 0, j]))


def test_tables_fit_80_columns(file, located):
    """With the longest figures that there can be, none of them cut."""
    summary = relevance_summary(Relevance.load(file))
    for row in (*summary["kinds"], *summary["blocks"], *summary["sites"]):
        row |= {"share": 1.0, "chance": 0.995, "net": -10.15, "net_stderr": 0.12, "neurons": 95040, "bins": [1.0, 1.0]}
    for row in summary["timesteps"]:
        row |= {"n": 28800, "size": 10.1, "chance": 0.995, "half": 40000}
    mask = mask_summary(NeuronMask.load(located))
    text = printed(
        *inspect_tables.relevance_tables(summary, 5),
        tables.mask_table(mask),
        *inspect_tables.mask_tables(mask, 5),
        inspect_tables.metadata_table(mask["metadata"]),
    )
    assert max(map(len, text.splitlines())) <= 80
    cut = [line for line in text.splitlines() if "…" in line and "unet_" not in line]
    assert cut == []


def test_sixty_blocks_have_a_line_each(file, located):
    """A large transformer's, with streams."""
    summary, mask = relevance_summary(Relevance.load(file)), mask_summary(NeuronMask.load(located))
    names = [f"single block {i}" for i in range(60)]
    for found in (summary, mask):
        found["blocks"] = [{**found["blocks"][0], "name": name} for name in names]
        found["streams"] = [{**found["kinds"][0], "name": "image and text tokens"}]
    for tables_of in (inspect_tables.relevance_tables(summary, 5), inspect_tables.mask_tables(mask, 5)):
        text = printed(*tables_of)
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        assert all(f" {name} " in text for name in names)
    assert "image and text" in printed(*inspect_tables.relevance_tables(summary, 5))


def test_bars():
    assert inspect_tables.bars([0.0, 0.5, 1.0, None], 1.0) == " ▄█?"
    assert inspect_tables.bars([0.0, 0.0], 0.0) == "  "
    assert inspect_tables.two_sided([2.0, 1.0, 0.0, -1.0, -2.0, None]) == ("█▄   ?", "   ▀█?")
    assert inspect_tables.two_sided([0.0, None]) == (" ?", " ?")


def test_a_profile_of_many_labels_shows_the_largest(file):
    summary = relevance_summary(Relevance.load(file), 2)
    for n, row in enumerate(summary["neurons"]):
        row["profile"] = [
            {"label": f"job {p}", "lean": p - 20.0, "relevance": {"female": p * (-1.0) ** n, "male": -p * (-1.0) ** n}}
            for p in range(40)
        ]
    text = " ".join(printed(*inspect_tables.relevance_tables(summary, 5)).split())
    most = inspect_tables.WIDEST
    assert f"left to right: {', '.join(f'job {p}' for p in range(39, 39 - most, -1))} (and {40 - most} more" in text


def test_bins_that_nothing_fell_into(file, stereo, tmp_path: Path):
    relevance = Relevance.load(file)
    half = {name: getattr(relevance, name).clone() for name in ("count", "stereotype_sum", "relevance_sum")}
    for tensor in half.values():
        tensor[:, 1] = 0
    replace(relevance, **half).save(tmp_path / "half.safetensors")
    result = stereo("inspect", tmp_path / "half.safetensors", "--picture", tmp_path / "half.png")
    assert result.exit_code == 0, result.stderr
    assert "nan" not in result.stdout and "None" not in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["500-0"]]
    assert rows == [["500-0", "0", *"-------"]]
    data = json.loads(stereo("inspect", tmp_path / "half.safetensors", "--json").stdout)
    assert all(site["bins"][1] is None for site in data["sites"])
    assert sum(site["share"] for site in data["sites"]) == pytest.approx(1)


def test_images_of_what_neurons_respond_to(file, stereo, tmp_path: Path):
    folder = tmp_path / "seen"
    result = stereo("inspect", file, "--top", 2, "--images", folder, "--seed", 7, "--batch-size", 2)
    assert result.exit_code == 0, result.stderr
    assert f"wrote {folder}" in result.stdout
    assert "6 of 6" in result.stderr  # three labels, two measured steps
    index = json.loads((folder / "index.json").read_text())
    found = json.loads(stereo("inspect", file, "--top", 2, "--json").stdout)["neurons"]
    assert [(each["site"], each["neuron"]) for each in index["neurons"]] == [
        (row["site"], row["neuron"]) for row in found
    ]
    for each in index["neurons"]:
        assert Image.open(folder / each["file"]).width > 400
        assert {view["label"] for view in each["views"]} == {"doctor", "nurse", "teacher"}
        assert all(view["seed"] == 7 for view in each["views"])
    assert Image.open(folder / "sheet.png").width > 400


def test_maps_add_up_to_what_was_located(model, file, stereo, tmp_path: Path):
    """On the seeds of the run itself, one step a bin, the mean over seeds of a map's sum is the neuron's profile."""
    asked = ("inspect", file, "--top", 1, "--quiet")
    row = json.loads(stereo(*asked, "--json").stdout)["neurons"][0]
    sums: dict[str, list[float]] = {}
    for seed in (0, 1):
        data = json.loads(stereo(*asked, "--images", tmp_path / str(seed), "--seed", seed, "--json").stdout)
        index = json.loads(Path(data["images"]).with_name("index.json").read_text())
        for view in index["neurons"][0]["views"]:
            sums.setdefault(view["label"], []).append(view["relevance"])
    for each in row["profile"]:
        assert sum(sums[each["label"]]) / 2 == pytest.approx(each["relevance"]["female"], rel=1e-3, abs=1e-7)


def refusal(result) -> str:
    assert result.exit_code == 2, result.stdout
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    return line


def test_what_does_not_fit_is_refused_with_the_reason(file, located, model, stereo, tmp_path: Path):
    relevance = Relevance.load(file)
    folder = ("--images", tmp_path / "o", "--quiet")
    line = refusal(stereo("inspect", located, *folder))
    assert "is a mask; give the relevance that it was made from" in line
    replace(relevance, metadata={**relevance.metadata, "unet_weights": "0" * 64}).save(tmp_path / "w.safetensors")
    assert "relevance was made for other weights" in refusal(stereo("inspect", tmp_path / "w.safetensors", *folder))
    assert stereo("inspect", tmp_path / "w.safetensors", *folder, "--top", 1, "--force").exit_code == 0
    assert "relevance does not fit" in refusal(stereo("inspect", file, *folder, "--model", "portraits", "--force"))
    unnamed = {name: value for name, value in relevance.metadata.items() if name != "model"}
    replace(relevance, metadata=unnamed).save(tmp_path / "u.safetensors")
    assert "does not name its model; give --model" in refusal(stereo("inspect", tmp_path / "u.safetensors", *folder))
    (tmp_path / "p.txt").write_text("a photo of a pilot\n")
    line = refusal(stereo("inspect", file, *folder, "--prompts", tmp_path / "p.txt"))
    assert "no prompt has the label" in line and "the prompts have pilot" in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").write_bytes(b"mine")
    assert "no earlier run wrote" in refusal(stereo("inspect", file, "--images", tmp_path / "mine"))
    assert "expected a file name ending in .png" in refusal(stereo("inspect", file, "--picture", tmp_path / "x.jpg"))
    relevance_of_a_classifier = replace(relevance, metadata={**relevance.metadata, "target": "classifier"})
    relevance_of_a_classifier.save(tmp_path / "c.safetensors")
    assert "explains a classifier" in refusal(stereo("inspect", tmp_path / "c.safetensors", *folder))
