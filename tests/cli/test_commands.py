"""The commands end to end on a tiny model: what they print, what they write, and that the two agree."""

import json
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image

from stereo_cli import tables, terminal
from stereo_cli.progress import progress_bar
from stereoclinic.ddtd.relevance import STATES, Relevance
from stereoclinic.evaluation.figures.registry import figure_of
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.evaluation.wording import number
from stereoclinic.report.summary import lean_summary, mask_summary
from stereoclinic.runtime.devices import device_of
from stereoclinic.sns.mask import NeuronMask

PROMPTS, IMAGES, GROUP_IMAGES = 2, 6, 1
ARMS = ["untreated", "gender", "random", "balanced oracle", "allocation oracle", "other seeds"]


@pytest.fixture(scope="module")
def benched(model, located, stereo, tmp_path_factory):
    """What `stereo bench` said and wrote, at two guidance scales."""
    out = tmp_path_factory.mktemp("bench") / "results"
    result = stereo(
        "bench", "--model", model, "--mask", located, "--limit", PROMPTS, "--images", IMAGES, "--group-images",
        GROUP_IMAGES, "--seed", 50, "--guidance", 1, "--guidance", 3, "--batch-size", 5, "--figures", "all",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return result, out


def test_locate_writes_a_mask_and_its_relevance(located):
    mask = NeuronMask.load(located)
    relevance = Relevance.load(located.with_name("gender.relevance.safetensors"))
    assert mask.sites == relevance.sites
    assert mask.metadata["axis"] == "gender"
    assert mask.metadata["seeds"] == [0, 1]
    assert relevance.labels == ["doctor", "nurse", "teacher"]
    assert relevance.count.sum() == 3 * 2 * 2  # prompts x seeds x steps
    assert sorted(path.name for path in located.parent.iterdir()) == ["gender.pt", "gender.relevance.safetensors"]
    # What the faithfulness and mitigation benchmarks chose, and the README's figures were measured with.
    plan = mask.metadata["selection"]
    assert (relevance.metadata["composite"], relevance.metadata["root"]) == ("gradient", "plain")
    assert (plan["method"], plan["mu"], plan["overshoot"], plan["window"]) == ("plan", 1.0, 0.0, [1000.0, 600.0])
    assert (plan["root"], plan["per_bin"]) == ("zero", False)


def test_locate_prints_what_it_wrote(model, stereo, located, tmp_path: Path):
    """The same run again: as tables, and as JSON with the same figures."""
    arguments = ("locate", "--model", model, "--limit", 3, "--seeds", 2, "--every", 1, "--bins", 2)
    result = stereo(*arguments, "-o", tmp_path / "a.safetensors")
    assert "Lean toward female" in result.stdout
    for label in ("doctor", "nurse", "teacher"):
        assert label in result.stdout
    data = json.loads(stereo(*arguments, "-o", tmp_path / "b.pt", "--json", "--quiet").stdout)
    relevance = Relevance.load(located.with_name("gender.relevance.safetensors"))
    expected = lean_summary(relevance)
    assert [row["label"] for row in data["lean"]["rows"]] == relevance.labels
    for row, other in zip(data["lean"]["rows"], expected["rows"], strict=True):
        assert row["mean"]["lean"] == pytest.approx(other["mean"]["lean"], rel=1e-4)
    assert data["files"]["mask"] == str(tmp_path / "b.pt")
    assert data["mask"]["total"]["neurons"] == relevance.relevance_sum.shape[-1]
    a, b = NeuronMask.load(tmp_path / "a.safetensors"), NeuronMask.load(tmp_path / "b.pt")
    assert torch.equal(a.factors, b.factors)


def test_json_is_json_where_a_figure_is_not_finite(capsys: pytest.CaptureFixture[str]):
    def refuse(text: str) -> None:
        raise AssertionError(text)

    terminal.print_json({"kl": float("inf"), "rows": [{"kappa": float("nan"), "n": 2}]})
    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {"kl": None, "rows": [{"kappa": None, "n": 2}]}


def test_top_k_and_a_users_config(model, stereo, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\nlimit: 2\nseeds: 2\nevery: 1\nbins: 1\nselect: top-k\ntop: 5\njson: true\n"
    )
    data = json.loads(stereo("locate", "--config", tmp_path / "run.yaml", "--top", 3, "-o", tmp_path / "m.pt").stdout)
    assert data["mask"]["total"]["damped"] == 3  # the flag wins over the file


def test_a_config_may_give_one_value_where_several_are_allowed(model, located, stereo, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(f"model: {model}\nmask: {located}\nguidance: 2\nlimit: 1\ndry-run: true\n")
    result = stereo("bench", "--config", tmp_path / "run.yaml", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "1 mask(s)" in result.stdout
    assert "guidance 2" in result.stdout


def test_results_hold_together(benched):
    _, out = benched
    data = json.loads((out / "results.json").read_text())
    assert data["schema"] == 2
    assert {"model", "unet_weights", "masks", "versions", "reader", "created"} <= set(data["provenance"])
    assert data["provenance"]["masks"]["gender"]["axis"] == "gender"
    assert [each["guidance"] for each in data["experiments"]] == [1.0, 3.0]
    for results in data["experiments"]:
        assert list(results["arms"]) == ARMS
        assert results["labels"] == ["doctor", "nurse"]
        assert list(results["group_prompts"]) == ["untreated", "gender"]
        for arm in results["arms"].values():
            assert arm["images"] == PROMPTS * IMAGES
            gaps = []
            for row in arm["prompts"]:
                shares = [share["estimate"] for share in row["shares"].values()]
                assert sum(shares) == pytest.approx(1)
                assert row["parity_gap"] == pytest.approx(sum(abs(share - 0.5) for share in shares) / 2)
                assert all(share["low"] <= share["estimate"] <= share["high"] for share in row["shares"].values())
                gaps.append(row["parity_gap"])
            assert arm["parity_gap"]["estimate"] == pytest.approx(sum(gaps) / len(gaps))
            assert arm["sdtv"]["estimate"] == pytest.approx(arm["parity_gap"]["estimate"])  # two groups
        change = results["arms"]["gender"]["parity_gap_change"]["estimate"]
        before, after = (results["arms"][name]["parity_gap"]["estimate"] for name in ("untreated", "gender"))
        assert change == pytest.approx(after - before)


def test_tables_say_what_the_results_hold(benched):
    result, out = benched
    for results in json.loads((out / "results.json").read_text())["experiments"]:
        for name, arm in results["arms"].items():
            gap = arm["parity_gap"]
            row = f"{gap['estimate']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}]"
            assert any(line.strip().startswith(name) and row in line for line in result.stdout.splitlines())
        upper = results["noise_floor"]["parity_gap"]["upper"]
        assert f"[below {upper:.2f}]" in result.stdout
        for row in results["arms"]["gender"]["prompts"]:
            share = row["shares"]["female"]
            cell = f"{share['estimate']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"
            assert any(row["label"] in line and cell in line for line in result.stdout.splitlines())
    assert "perceived presentation" in result.stdout
    assert "dealt evenly" not in " ".join(result.stdout.split())  # no mask of these allots
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 110


def test_progress_counts_every_image(benched):
    result, _ = benched
    neutral = (len(ARMS) + 1) * PROMPTS * IMAGES  # and the reference, which is no arm
    grouped = 2 * PROMPTS * 2 * GROUP_IMAGES
    total = 2 * (neutral + grouped)
    assert f"{total} of {total}" in result.stderr


def test_images_load_as_an_imagefolder(benched):
    _, out = benched
    table = load_dataset("imagefolder", data_dir=str(out / "images"), split="train")
    assert len(table) == 2 * (len(ARMS) * PROMPTS * IMAGES + 2 * PROMPTS * 2 * GROUP_IMAGES)
    assert {"image", "arm", "guidance", "label", "prompt", "seed", "group", "probability"} <= set(table.column_names)
    assert table[0]["image"].size == (64, 64)
    lines = [json.loads(line) for line in (out / "images" / "metadata.jsonl").read_text().splitlines()]
    assert len({line["file_name"] for line in lines}) == len(lines)
    assert all((out / "images" / line["file_name"]).is_file() for line in lines)
    results = json.loads((out / "results.json").read_text())["experiments"][1]
    for p, label in enumerate(results["labels"]):
        read = [
            line["group"]
            for line in lines
            if (line["arm"], line["label"], line["guidance"], line["wanted_group"]) == ("gender", label, 3.0, None)
        ]
        row = results["arms"]["gender"]["prompts"][p]
        assert read.count("female") / len(read) == pytest.approx(row["shares"]["female"]["estimate"])
        soft = [
            line["probabilities"]["female"]
            for line in lines
            if (line["arm"], line["label"], line["guidance"], line["wanted_group"]) == ("gender", label, 3.0, None)
        ]
        assert sum(soft) / len(soft) == pytest.approx(row["soft_shares"]["female"]["estimate"], abs=2e-4)
    assert all(line["probability"] == line["probabilities"][line["group"]] for line in lines)
    assert not any("no_group" in line for line in lines)  # this reader cannot say so
    wanted = [line for line in lines if line["wanted_group"]]
    assert all(line["prompt"] == f"a photo of a {line['wanted_group']} {line['label']}" for line in wanted)


def test_distances_have_the_floor_that_two_samples_show(benched):
    result, out = benched
    for results in json.loads((out / "results.json").read_text())["experiments"]:
        arms = results["arms"]
        floor = arms["untreated"]["frechet_to_other_seeds"]
        assert floor == pytest.approx(arms["other seeds"]["frechet_to_untreated"])  # the distance is symmetric
        assert arms["untreated"]["frechet_to_untreated"] is arms["other seeds"]["frechet_to_other_seeds"] is None
        rows = [line for line in result.stdout.splitlines() if line.lstrip().startswith("sampling noise")]
        assert any(number(floor, figure_of("frechet_to_other_seeds").unit.form) in row.split() for row in rows)
        for arm in arms.values():
            gains = arms["balanced oracle"]["parity_gap_change"]["high"] < 0
            assert ("share_of_balanced_oracle" in arm) == (gains and "parity_gap_change" in arm)


def test_side_effects_have_their_floors(benched):
    result, out = benched
    for results in json.loads((out / "results.json").read_text())["experiments"]:
        arms = results["arms"]
        assert "drift" not in arms["untreated"]
        for name, arm in arms.items():
            assert ("frechet_within_groups" in arm) == (name != "other seeds")
            if name != "other seeds":
                distance, floor = arm["frechet_within_groups"], arm["frechet_within_groups_floor"]
                if (ratio := arm["frechet_within_groups_ratio"]) is not None:
                    assert ratio["estimate"] == pytest.approx(distance / floor)
                    assert ratio["low"] <= ratio["estimate"] <= ratio["high"]
            if name != "untreated":
                assert list(arm["drift"]) == ["age", "skin"] and all(0 <= each <= 1 for each in arm["drift"].values())
        assert results["gate"] == {"group_prompts": 4, "missed": 0, "neutral_prompts": 2, "false_alarms": 0}
        assert results["target_shares"] == [0.5, 0.5]
    printed = " ".join(result.stdout.split())
    assert (
        "drift" in printed
        and "sampling noise" in printed
        and "The gate applies no mask to 4 of 4 group prompts and 0 of 2 neutral prompts." in printed
    )


def test_masks_whose_names_a_file_name_cannot_tell_apart(model, located, stereo, tmp_path: Path):
    masks = []
    for name in ("my mask.pt", "my-mask.pt"):
        NeuronMask.load(located).save(tmp_path / name)
        masks += ["--mask", tmp_path / name]
    result = stereo(
        "bench", "--model", model, *masks, "--limit", 1, "--images", 2, "--group-images", 1, "--steps", 1,
        "--out", tmp_path / "o", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "o" / "images" / "metadata.jsonl").read_text().splitlines()]
    assert len({line["file_name"] for line in lines}) == len(lines) == 7 * 2 + 3 * 2
    assert sorted(path.name for path in (tmp_path / "o").glob("*.png")) == [
        "before_after-1-my-mask.png", "before_after.png",
    ]  # fmt: skip


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


@pytest.mark.parametrize(("there", "chosen"), [(True, "mps"), (False, "cpu")])
def test_float64_is_not_asked_of_mps(monkeypatch, there: bool, chosen: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    assert device_of("auto") == chosen
    assert device_of("auto", float64=True) == "cpu"


def test_a_picture_in_larger_pixels_reads_the_same(model):
    reader = PortraitsReader(model / "reader")
    small = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(reader.features(large), reader.features(small))
    for head, probabilities in reader.read(small).items():
        torch.testing.assert_close(reader.read(large)[head], probabilities)


def test_an_occupation_that_the_reader_does_not_know_is_not_counted(model, stereo, tmp_path: Path):
    for name, people in (("both", ("doctor", "astronaut")), ("none", ("astronaut",))):
        (tmp_path / f"{name}.txt").write_text("".join(f"a photo of a {person}\n" for person in people))
        result = stereo(
            "bench", "--model", model, "--prompts", tmp_path / f"{name}.txt", "--images", 2, "--group-images", 1,
            "--steps", 1, "--out", tmp_path / name, "--json", "--quiet",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        arm = json.loads(result.stdout)["experiments"][0]["arms"]["untreated"]
        assert ("occupation_right" in arm) == (name == "both")
        if name == "both":
            assert arm["occupation_right"]["estimate"] in (0, 0.5, 1)  # of the doctor's two images


def test_sheets_and_nothing_else_is_left(benched):
    _, out = benched
    found = sorted(path.name for path in out.iterdir())
    assert found == ["before_after-guidance-3.png", "before_after.png", "images", "report.html", "results.json"]
    sheet = Image.open(out / "before_after.png")
    assert sheet.width > 2 * 6 * 128
    assert sheet.height > PROMPTS * 128


def test_a_second_run_replaces_the_first(model, stereo, tmp_path: Path):
    arguments = ("bench", "--model", model, "--group-images", 0, "--images", 2, "--out", tmp_path, "--quiet")
    assert stereo(*arguments, "--limit", 2).exit_code == 0
    assert stereo(*arguments, "--limit", 1).exit_code == 0
    lines = (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 4 * 2  # no mask: the model, two oracles, other seeds
    assert len(list((tmp_path / "images").rglob("*.png"))) == len(lines)
    data = json.loads((tmp_path / "results.json").read_text())["experiments"][0]
    assert list(data["arms"]) == ["untreated", "balanced oracle", "allocation oracle", "other seeds"]
    written = ["before_after.png", "images", "report.html", "results.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written


@pytest.mark.parametrize(
    ("bound", "code"),
    [("parity_gap=-1", 1), ("parity-gap=1", 0), ("frechet_to_untreated=9", 1)],  # without a mask there is no distance
)
def test_fail_above(model, stereo, tmp_path: Path, bound: str, code: int):
    result = stereo(
        "bench", "--model", model, "--limit", 1, "--images", 2, "--group-images", 0, "--steps", 1,
        "--out", tmp_path / "o", "--fail-above", "sdtv=2", "--fail-above", bound, "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == code
    data = json.loads(result.stdout)
    assert len(data["exceeded"]) == code
    assert len(result.stderr.splitlines()) == code
    assert (tmp_path / "o" / "results.json").is_file()  # written either way


def test_fail_above_is_of_the_mask_where_there_is_one(model, located, stereo, tmp_path: Path):
    """No bound below 0 is kept, and only a mask has a distance to the untreated model."""
    result = stereo(
        "bench", "--model", model, "--mask", located, "--limit", 1, "--images", 2, "--group-images", 0, "--steps", 1,
        "--out", tmp_path / "o", "--fail-above", "unsure=-1", "--fail-above", "frechet_to_untreated=1e9",
        "--fail-above", "frechet-to-untreated=-1", "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    arm = data["experiments"][0]["arms"]["gender"]
    assert data["exceeded"] == [
        f"unsure of gender at guidance 1 is {arm['unsure']:.4g}, above -1",
        f"frechet_to_untreated of gender at guidance 1 is {arm['frechet_to_untreated']:.4g}, above -1",
    ]
    assert "frechet_to_untreated of gender" in result.stderr


def test_judging_on_another_axis_is_said(model, located, stereo, tmp_path: Path):
    result = stereo(
        "bench", "--model", model, "--mask", located, "--axis", "age", "--limit", 1, "--images", 2, "--group-images", 1,
        "--steps", 1, "--out", tmp_path / "o", "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "made for axis gender, and is judged on age" in result.stderr
    (experiment,) = json.loads(result.stdout)["experiments"]
    assert experiment["groups"] == ["old", "young"]


def test_force_accepts_other_weights(model, located, stereo, tmp_path: Path):
    mask = NeuronMask.load(located)
    metadata = {**mask.metadata, "unet_weights": "0" * 64}
    NeuronMask(mask.sites, mask.bin_edges, mask.factors, metadata=metadata).save(tmp_path / "m.pt")
    shared = ("--model", model, "--mask", tmp_path / "m.pt", "--steps", 1, "--force", "--quiet", "--json")
    bench = ("bench", "--limit", 1, "--images", 2, "--group-images", 1, "--out", tmp_path / "o")
    assert stereo(*bench, *shared).exit_code == 0
    assert stereo("apply", "a photo of a doctor", "-n", 1, "--out", tmp_path / "a", *shared).exit_code == 0


def test_apply_draws_both_sides_from_the_same_seeds(model, located, stereo, tmp_path: Path):
    texts = ["a photo of a doctor", "a photo of a female nurse"]
    result = stereo(
        "apply", *texts, "--model", model, "--mask", located, "-n", 2, "--seed", 9, "--batch-size", 3,
        "-o", tmp_path / "o", "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    images = json.loads(result.stdout)["images"]
    assert [(each["arm"], each["prompt"], each["seed"]) for each in images] == [
        (arm, text, seed) for arm in ("untreated", "treated") for text in texts for seed in (9, 10)
    ]
    assert all(Path(each["file_name"]).is_file() for each in images)
    table = load_dataset("imagefolder", data_dir=str(tmp_path / "o" / "images"), split="train")
    assert len(table) == 8
    assert Image.open(tmp_path / "o" / "side_by_side.png").height > 2 * 128


def test_apply_at_no_strength_changes_nothing(model, located, stereo, tmp_path: Path):
    shared = ("--model", model, "--mask", located, "-n", 2, "--quiet", "-o", tmp_path / "o")
    sides = ("untreated", "treated")
    for guidance in (1, 3):
        assert stereo("apply", "a photo of a doctor", *shared, "--strength", 0, "--guidance", guidance).exit_code == 0
        files = [sorted((tmp_path / "o" / "images" / side).glob("*.png")) for side in sides]
        assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert stereo("apply", "a photo of a doctor", *shared).exit_code == 0
    files = [sorted((tmp_path / "o" / "images" / side).glob("*.png")) for side in sides]
    assert [path.read_bytes() for path in files[0]] != [path.read_bytes() for path in files[1]]


@pytest.mark.parametrize("command", [("locate",), ("bench",), ("apply", "a photo of a doctor")])
def test_a_dry_run_writes_nothing(model, located, stereo, tmp_path: Path, monkeypatch, command: tuple):
    monkeypatch.chdir(tmp_path)
    mask = () if command == ("locate",) else ("--mask", located)
    bins = ("--every", 1, "--bins", 2) if command == ("locate",) else ()
    result = stereo(*command, "--model", model, *mask, *bins, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("would ")
    assert list(tmp_path.iterdir()) == []


def test_summaries_add_up(located):
    relevance = Relevance.load(located.with_name("gender.relevance.safetensors"))
    leans = lean_summary(relevance)
    for p, row in enumerate(leans["rows"]):
        values = [cell["lean"] for cell in row["bins"]]
        assert row["mean"]["lean"] == pytest.approx(sum(values) / len(values))
        assert values == pytest.approx(relevance.lean()[p, :, 0].tolist())
        assert sum(cell["n"] for cell in row["bins"]) == row["mean"]["n"] == 4
    json.dumps([leans, mask_summary(NeuronMask.load(located))], allow_nan=False)


def test_bins_that_nothing_fell_into_are_none(located):
    relevance = Relevance.load(located.with_name("gender.relevance.safetensors"))
    for name in STATES:
        tensor = getattr(relevance, name)
        axis = tensor.shape.index(2) if name == "stereotype_sq" else 1
        tensor.select(axis, 1).zero_()
    leans = lean_summary(relevance)
    assert all(row["bins"][1] == {"lean": None, "stderr": None, "n": 0} for row in leans["rows"])
    assert leans["mean_absolute"]["bins"][1] is None
    json.dumps(leans, allow_nan=False)
    tables.lean_table(leans)
