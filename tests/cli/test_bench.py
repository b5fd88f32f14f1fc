"""`stereo bench` on a tiny model: what it prints, what it writes, and that the two agree."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image

from stereoclinic import judged
from stereoclinic.errors import InputError
from stereoclinic.evaluation.figures.registry import figure_of
from stereoclinic.evaluation.results import Results
from stereoclinic.evaluation.wording import number
from stereoclinic.sns.mask import NeuronMask

PROMPTS, IMAGES, GROUP_IMAGES = 2, 6, 1
ARMS = ["untreated", "gender", "random", "allocation oracle"]


@pytest.fixture(scope="module")
def settings(model, located) -> tuple[object, ...]:
    return (
        "bench", "--model", model, "--mask", located, "--limit", PROMPTS, "--images", IMAGES, "--group-images",
        GROUP_IMAGES, "--seed", 50, "--batch-size", 5, "--figures", "all",
    )  # fmt: skip


@pytest.fixture(scope="module")
def benched(settings, stereo, tmp_path_factory):
    """What `stereo bench` said and wrote, at two guidance scales."""
    out = tmp_path_factory.mktemp("bench") / "results"
    result = stereo(*settings, "--guidance", 1, "--guidance", 3, "--out", out)
    assert result.exit_code == 0, result.stderr
    return result, out


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


def test_the_folder_loads_by_its_card_as_a_data_set(benched, located, tmp_path):
    _, out = benched
    table = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == len((out / "images" / "metadata.jsonl").read_text().splitlines())
    assert table[0]["image"].size == (64, 64) and "arm" in table.column_names
    card = DatasetCard.load(out / "README.md")
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "images/**"}]
    for sentence in Results.load(out).verdict.splitlines():
        assert sentence.split(": ", 1)[1][:40] in card.text.replace("\\", "")
    mask = NeuronMask.load(located)
    mask.save_pretrained(tmp_path, results=judged(out))
    text = (tmp_path / "README.md").read_text()
    assert "**Verdict at guidance 3**" in text and "| parity gap" in text and "| untreated" in text
    for file in ("before_after.png", "before_after-guidance-3.png"):
        assert f"]({file})" in text and (tmp_path / file).read_bytes() == (out / file).read_bytes()
    with pytest.raises(InputError, match=r"this mask was not judged there \(it has gender\)"):
        replace(mask, metadata={}).save_pretrained(tmp_path / "other", results=judged(out))


def test_a_readme_of_somebody_else_is_not_replaced(model, refused, tmp_path):
    (tmp_path / "README.md").write_text("# mine")
    assert "README.md is there already and is not of an earlier run" in refused("bench", "--model", model, "-o", ".")


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


def test_all_arms_adds_two_and_changes_no_figure_of_the_others(benched, settings, stereo, tmp_path: Path):
    """Distances then have the floor that two samples show."""
    result = stereo(*settings, "--guidance", 1, "--all-arms", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    (results,) = json.loads((tmp_path / "results.json").read_text())["experiments"]
    arms, fewer = results["arms"], json.loads((benched[1] / "results.json").read_text())["experiments"][0]["arms"]
    assert list(arms) == [*ARMS[:3], "balanced oracle", *ARMS[3:], "other seeds"]
    floor = arms["untreated"]["frechet_to_other_seeds"]
    assert floor == pytest.approx(arms["other seeds"]["frechet_to_untreated"])  # the distance is symmetric
    assert arms["untreated"]["frechet_to_untreated"] is arms["other seeds"]["frechet_to_other_seeds"] is None
    rows = [line for line in result.stdout.splitlines() if line.lstrip().startswith("sampling noise")]
    assert any(number(floor, figure_of("frechet_to_other_seeds").unit.form) in row.split() for row in rows)
    gains = arms["balanced oracle"]["parity_gap_change"]["high"] < 0
    for name, arm in arms.items():
        assert ("share_of_balanced_oracle" in arm) == (gains and "parity_gap_change" in arm)
        assert ("frechet_within_groups" in arm) == (name != "other seeds")
    for name in ARMS:
        more = set(arms[name]) - set(fewer[name])
        assert more <= {"frechet_to_other_seeds", "kid_to_other_seeds", "share_of_balanced_oracle"}
        assert "frechet_to_other_seeds" in more
        assert all(arms[name][key] == value for key, value in fewer[name].items() if key != "seconds")


def test_side_effects_have_their_floors(benched):
    result, out = benched
    for results in json.loads((out / "results.json").read_text())["experiments"]:
        arms = results["arms"]
        assert "drift" not in arms["untreated"]
        for axis in ("age", "skin"):
            floor = results["noise_floor"][f"drift.{axis}"]
            assert 0 <= floor["mean"] <= floor["upper"]
            assert f"{floor['mean']:.2f} [below {floor['upper']:.2f}]" in result.stdout
        for name, arm in arms.items():
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
    assert len({line["file_name"] for line in lines}) == len(lines) == 5 * 2 + 3 * 2
    assert sorted(path.name for path in (tmp_path / "o").glob("*.png")) == [
        "before_after-1-my-mask.png", "before_after.png",
    ]  # fmt: skip


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
    assert found == [
        "README.md",
        "before_after-guidance-3.png",
        "before_after.png",
        "images",
        "report.html",
        "results.json",
    ]
    sheet = Image.open(out / "before_after.png")
    assert sheet.width > 2 * 6 * 128
    assert sheet.height > PROMPTS * 128


def test_a_second_run_replaces_the_first(model, stereo, tmp_path: Path):
    arguments = ("bench", "--model", model, "--group-images", 0, "--images", 2, "--out", tmp_path, "--quiet")
    assert stereo(*arguments, "--limit", 2).exit_code == 0
    assert stereo(*arguments, "--limit", 1).exit_code == 0
    lines = (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 2  # no mask: the model and two oracles
    assert len(list((tmp_path / "images").rglob("*.png"))) == len(lines)
    data = json.loads((tmp_path / "results.json").read_text())["experiments"][0]
    assert list(data["arms"]) == ["untreated", "balanced oracle", "allocation oracle"]
    written = ["README.md", "before_after.png", "images", "report.html", "results.json"]
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
