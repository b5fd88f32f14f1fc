"""`stereo plan`, and allocating masks in `stereo bench` and `stereo apply`, on a tiny model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from stereoclinic.io.files import sole_writer
from stereoclinic.sns.allocate import allotted_group
from stereoclinic.sns.compose import compose
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import Unfinished

SMALL = ("--limit", 2, "--seeds", 2, "--steps", 3, "--until", 300, "--mu", 0.01, "--keep", 0)


@pytest.fixture(scope="module")
def planned(model, stereo, tmp_path_factory) -> Path:
    """An allocating mask for the tiny model, planned on seeds 0 and 1."""
    path = tmp_path_factory.mktemp("planned") / "gender-allocated.pt"
    result = stereo("plan", "--model", model, *SMALL, "--stay", "age", "-o", path)
    assert result.exit_code == 0, result.stderr
    assert "allotted to (female, male)" in " ".join(result.stdout.split())
    assert f"next: stereo bench --mask {path} --model {model}\n" in result.stdout
    said = re.search(r"mean distance of the lean from its target: ([\d.]+) ±([\d.]+) on 4 new samples", result.stdout)
    assert said is not None and 0 < float(said[1]) < 10 and float(said[2]) > 0
    return path


def test_plan_writes_an_allocating_mask(planned: Path):
    mask = NeuronMask.load(planned)
    assert mask.groups == ("female", "male") and mask.branch == "conditional"
    selection = mask.metadata["selection"]
    assert (selection["method"], selection["stay"], selection["root"]) == ("stepwise", ["age"], "zero")
    assert mask.metadata["seeds"] == [0, 1] and mask.metadata["axis"] == "gender"
    for row in selection["bins"]:
        assert row["lean_after"] < row["lean_before"]


def test_a_plan_that_was_cut_off_goes_on_when_it_is_told_to(
    planned: Path, model, stereo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ("plan", "--model", model, *SMALL, "--stay", "age", "--check", 0, "-o", tmp_path / "g.pt", "--quiet")
    unfinished = tmp_path / "g.unfinished.safetensors"
    keep = Unfinished.keep

    def interrupted(self: Unfinished, steps: list) -> None:
        keep(self, steps)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "keep", interrupted)
        result = stereo(*arguments)
    assert result.exit_code == 130 and f"{unfinished} keeps the progress" in " ".join(result.stderr.split())
    assert unfinished.is_file() and not (tmp_path / "g.pt").exists()
    with sole_writer(tmp_path / "g.pt"):  # progress of a run that is still running is no left-over
        result = stereo(*arguments)
    assert result.exit_code == 2 and f"another run is writing {tmp_path / 'g.pt'}" in " ".join(result.stderr.split())
    result = stereo(*arguments)
    assert result.exit_code == 2 and "continue it with --resume" in " ".join(result.stderr.split())
    result = stereo(*arguments, "--resume", "--mu", 1)
    assert result.exit_code == 2 and "mu was 0.01 and is 1.0" in " ".join(result.stderr.split())
    assert stereo(*arguments, "--resume").exit_code == 0
    assert not unfinished.exists()
    assert torch.equal(NeuronMask.load(tmp_path / "g.pt").factors, NeuronMask.load(planned).factors)


def test_balance_among_located_neurons_and_a_dose(model, located, stereo, tmp_path: Path):
    relevance = located.with_name("gender.relevance.safetensors")
    arguments = ("plan", relevance, "--balance", "--among", 0.5, "--model", model, *SMALL, "--stay", "none", "--json")
    result = stereo(*arguments, "-o", tmp_path / "m.pt", "--quiet")
    assert result.exit_code == 0, result.stderr
    whole = NeuronMask.load(tmp_path / "m.pt")
    held = json.loads(result.stdout)["held_out"]
    assert held["seeds"] == [2, 3] and held["samples"] == 4  # after those it was planned on
    planned = [each["lean_after"] for each in whole.metadata["selection"]["bins"]]
    assert held["planned"] == pytest.approx(sum(planned) / len(planned))
    neurons = whole.factors.shape[-1]
    assert not whole.allocates
    assert 0 < (whole.factors < 1).any(0).sum() <= round(0.5 * neurons)
    result = stereo(*arguments, "-o", tmp_path / "e.pt", "--quiet", "--dose", 0)
    assert result.exit_code == 2 and "plan a stronger one" in result.stderr
    assert torch.equal(NeuronMask.load(tmp_path / "e.pt").factors, whole.factors)  # what took minutes is not lost
    full, untreated = (
        float(each) for each in re.findall(r"target\| of ([\d.]+) \(([\d.]+) untreated", result.stderr)[0]
    )
    assert full < untreated
    bound = (full + untreated) / 2
    result = stereo(*arguments, "-o", tmp_path / "d.pt", "--quiet", "--dose", bound)
    assert result.exit_code == 0, result.stderr
    dose = json.loads(result.stdout)["dose"]
    dosed = NeuronMask.load(tmp_path / "d.pt")
    assert dose["left"] <= bound and 0 < dose["strength"] < 1
    torch.testing.assert_close(1 - dosed.factors, dose["strength"] * (1 - whole.factors), rtol=0, atol=1e-6)
    # Confirmed on four images a prompt after the one seed it was dosed on.
    assert dosed.metadata["dose"]["confirmed"]["seeds"] == [3, 6] and dosed.metadata["dose"]["seeds"] == [2, 6]
    # None of the seeds it was planned on, dosed on, or confirmed on may judge it.
    for seed, first in ((0, 0), (2, 2), (6, 2)):
        result = stereo("bench", "--model", model, "--mask", tmp_path / "d.pt", "--seed", seed, "--images", 2)
        assert result.exit_code == 2 and f"overlap seeds {first} to" in result.stderr


def test_bench_judges_an_allocating_mask(model, planned, stereo, tmp_path: Path):
    asked = (
        "bench", "--model", model, "--mask", planned, "--limit", 2, "--images", 4, "--group-images", 1, "--steps", 3,
        "--seed", 50, "--shares", "female=0.25,male=0.75", "--out", tmp_path / "o", "--quiet",
    )  # fmt: skip
    result = stereo(*asked, "--json")
    assert result.exit_code == 0, result.stderr
    (results,) = json.loads(result.stdout)["experiments"]
    assert results["target_shares"] == [0.25, 0.75]
    for name in ("gender-allocated", "random", "allocation oracle"):
        assert 0 <= results["arms"][name]["allotment_obeyed"]["estimate"] <= 1
    assert "allotment_obeyed" not in results["arms"]["untreated"]
    gap = results["arms"]["untreated"]["prompts"][0]
    female = gap["shares"]["female"]["estimate"]
    assert gap["parity_gap"] == pytest.approx(abs(female - 0.25))
    # Groups that are dealt evenly are not to be held against independent draws of a fair model.
    assert "allotted groups are dealt evenly" in " ".join(stereo(*asked).stdout.split())


def test_apply_allots_by_prompt_and_seed(model, planned, stereo, tmp_path: Path):
    texts = ["a photo of a doctor", "a photo of a female nurse"]
    shared = ("--model", model, "--mask", planned, "-n", 3, "--seed", 9, "--json", "--quiet", "--steps", 3)
    whole = stereo("apply", *texts, *shared, "-o", tmp_path / "a", "--allocate")
    assert whole.exit_code == 0, whole.stderr
    assert "no mask was applied to prompts that name a group" in whole.stderr and texts[1] in whole.stderr
    images = [each for each in json.loads(whole.stdout)["images"] if each["arm"] == "treated"]
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    expected = [allotted_group({"prompt": texts[0], "seed": seed}, half) for seed in (9, 10, 11)]
    assert [each["allotted"] for each in images] == [("female", "male")[k] for k in expected] + [None] * 3
    # Alone, and in other batches, a picture is the same.
    alone = stereo("apply", texts[0], *shared, "-o", tmp_path / "b", "--batch-size", 1)
    again = [each for each in json.loads(alone.stdout)["images"] if each["arm"] == "treated"]
    for one, two in zip(images[:3], again, strict=True):
        pictures = [
            torch.frombuffer(bytearray(Image.open(each["file_name"]).tobytes()), dtype=torch.uint8)
            for each in (one, two)
        ]
        assert (pictures[0].int() - pictures[1].int()).abs().max() <= 1
    # And one that names a group is the untreated one, to the byte.
    untreated = [each for each in json.loads(whole.stdout)["images"] if each["arm"] == "untreated"]
    for one, two in zip(images[3:], untreated[3:], strict=True):
        assert Path(one["file_name"]).read_bytes() == Path(two["file_name"]).read_bytes()
    shares = stereo("apply", texts[0], *shared, "-o", tmp_path / "c", "--shares", "female=0,male=1")
    assert {each["allotted"] for each in json.loads(shares.stdout)["images"]} == {None, "male"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", "--among", 0.1), "give the relevance file"),
        (("plan", "--among", 0), "expected a share above 0"),
        (("plan", "--root", "balanced", "--seeds", 1), "expected zero or group"),
        (("plan", "--until", 1000, "--limit", 1, "--seeds", 1, "--steps", 2), "no step lies above it"),
        (("plan", "-o", "m.txt"), "expected a file name ending in .pt or .safetensors"),
        (("plan", "--confirm", 4), "--confirm: give --dose BOUND"),
        (("plan", "--dose", 0.1, "--confirm", 1), "an interval needs at least 2 images"),
        (("plan", *SMALL, "--mu", 1e12, "-o", "m.pt", "--quiet"), "m.pt is not written; give a lower --mu"),
        (("plan", "nowhere.safetensors"), "nowhere.safetensors"),
        (("apply", "a nurse", "--mask", "MASK", "--shares", "female=0.5"), "none given for male"),
        (("apply", "a nurse", "--mask", "MASK", "--shares", "female"), "expected GROUP=SHARE"),
        (("apply", "a nurse", "--mask", "MASK", "--shares", "a=0.5,a=0.5"), "a is given twice"),
        (("apply", "a nurse", "--mask", "PLAIN", "--allocate"), "need a mask that allots groups"),
        (("export", "MASK", "--format", "checkpoint", "-o", "x"), "it allocates images to female, male"),
        (("apply", "--mask", "PLAIN"), "a prompt is missing or empty"),
        (("bench", "--mask", "MASK", "--shares", "female=0.6,male=0.6"), "add up to 1.2"),
    ],
)
def test_bad_input_is_one_line(model, planned, located, stereo, tmp_path, monkeypatch, arguments: tuple, says: str):
    monkeypatch.chdir(tmp_path)
    named = {"MASK": planned, "PLAIN": located}
    result = stereo(*(named.get(each, each) for each in arguments), "--model", model)
    assert result.exit_code == 2, result.stdout
    assert says in result.stderr and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_composed_mask_is_not_judged_on_the_seeds_of_its_parts(model, planned, stereo, tmp_path: Path):
    first = NeuronMask.load(planned)
    second = replace(first, metadata={**first.metadata, "seeds": [70, 71]})
    both = compose([first, second])
    assert [each["seeds"] for each in both.origins] == [[0, 1], [70, 71]] and first.origins == [first.metadata]
    both.save(tmp_path / "both.pt")
    for seed in (0, 70):
        result = stereo("bench", "--model", model, "--mask", tmp_path / "both.pt", "--seed", seed, "--images", 2)
        assert result.exit_code == 2 and f"overlap seeds {seed} to" in result.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_plan_in_half_precision(model, stereo, tmp_path: Path, dtype: str):
    """Directions of another axis and of the text are put together with wide ones; half of them are noise here."""
    path = tmp_path / "m.pt"
    how = ("--limit", 2, "--seeds", 2, "--steps", 2, "--until", 600, "--mu", 0.01, "--keep", 0.01, "--guidance", 3)
    result = stereo("plan", "--model", model, *how, "--stay", "age", "--dtype", dtype, "-o", path, "--quiet")
    assert result.exit_code == 0, result.stderr
    mask = NeuronMask.load(path)
    assert mask.metadata["dtype"] == dtype and mask.damping.isfinite().all() and mask.damping.any()
    assert f"--dtype {dtype} --guidance 3.0" in result.stdout.splitlines()[-1]
