"""`stereo mask`: what it chooses again is what `stereo locate` chose, and what does not fit is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stereo_cli.tables import mask_table
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.report.summary import mask_summary
from stereoclinic.sns.compose import compose
from stereoclinic.sns.fuse import fuse
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.select import Selection


@pytest.fixture
def file(located: Path) -> Path:
    return located.with_name("gender.relevance.safetensors")


@pytest.fixture
def made(stereo, tmp_path: Path):
    """Call `stereo mask` and return the mask that it wrote."""

    def call(*arguments: object, name: str = "made.pt") -> NeuronMask:
        result = stereo("mask", *arguments, "-o", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        return NeuronMask.load(tmp_path / name)

    return call


def same(a: NeuronMask, b: NeuronMask) -> bool:
    roots = a.roots is b.roots is None or torch.equal(a.roots, b.roots)
    alike = (a.sites, a.branch, a.groups) == (b.sites, b.branch, b.groups)
    return alike and roots and torch.equal(a.bin_edges, b.bin_edges) and torch.equal(a.factors, b.factors)


def test_chosen_again_it_is_the_mask_that_locate_wrote(made, located, file):
    again = made(file)
    assert same(again, NeuronMask.load(located))
    assert again.metadata == NeuronMask.load(located).metadata


@pytest.mark.parametrize(
    ("of_locate", "of_mask"),
    [
        (("--select", "top-k", "--top", 7, "--branch", "conditional", "--until", 0),) * 2,
        (
            ("--mu", 0.2, "--overshoot", 0.5, "--mask-root", "female"),
            ("--mu", 0.2, "--overshoot", 0.5, "--mask-root", "female"),
        ),
    ],
)
def test_other_options_agree_too(stereo, made, model, tmp_path: Path, of_locate, of_mask):
    arguments = ("--limit", 2, "--seeds", 2, "--every", 1, "--bins", 2, "-o", tmp_path / "first.safetensors")
    assert stereo("locate", "--model", model, *arguments, *of_locate).exit_code == 0
    first, again = (
        NeuronMask.load(tmp_path / "first.safetensors"),
        made(tmp_path / "first.relevance.safetensors", *of_mask),
    )
    assert same(again, first)
    assert {**again.metadata, "created": ""} == {**first.metadata, "created": ""}


def test_options_reach_the_choice(made, file):
    plan = made(file, "--at-most", 5, "--kinds", "ff, conv", "--one-for-all", "--until", 0, "--mu", 0.5)
    selection = plan.metadata["selection"]
    assert (selection["at_most"], selection["kinds"], selection["per_bin"]) == (5, ["ff", "conv"], False)
    assert (selection["mu"], selection["window"]) == (0.5, [1000.0, 0.0])
    assert 0 < (plan.factors < 1).any(0).sum() <= 5
    assert torch.equal(plan.factors[0], plan.factors[1])
    for site, span in plan.spans():
        assert site.kind != "attention" or (plan.factors[:, span] == 1).all()
    ranked = made(file, "--select", "top-k", "--top", 4, "--z", 0, "--per-bin", "--from", 500, "--until", 0)
    selection = ranked.metadata["selection"]
    assert (selection["k"], selection["z"], selection["per_bin"], selection["window"]) == (4, 0.0, True, [500.0, 0.0])
    assert (ranked.factors < 1).sum(1).tolist() == [0, 4]


def test_strength_scales_what_was_chosen(made, file):
    whole, half = made(file), made(file, "--strength", 0.5)
    torch.testing.assert_close(half.damping, whole.damping / 2)


def test_chosen_once_for_all_timesteps_it_can_be_fused(made, file, model):
    from stereoclinic.pipelines import open_pipeline

    pipe = open_pipeline(str(model))
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    fuse(pipe, made(file, "--one-for-all", "--until", 0))
    assert any(not torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_mask_is_converted_by_the_ending(made, located, ending):
    copy = made(located, name=f"copy.{ending}")
    assert same(copy, NeuronMask.load(located))
    assert copy.metadata == NeuronMask.load(located).metadata


def test_a_mask_is_narrowed_and_scaled_and_put_on_a_branch(made, located):
    mask = NeuronMask.load(located)
    less = made(located, "--strength", 0.25, "--from", 900, "--until", 700, "--branch", "conditional")
    narrow = mask.windowed((900, 700))
    torch.testing.assert_close(less.damping, narrow.damping / 4)
    assert torch.equal(less.bin_edges, narrow.bin_edges)
    assert less.branch == "conditional"
    assert less.metadata["unet_weights"] == mask.metadata["unet_weights"]
    assert same(made(located, "--until", 700), mask.windowed((1000, 700)))


def test_several_masks_are_composed(model, stereo, made, located, file, tmp_path: Path):
    second = made(file, "--select", "top-k", "--until", 0, name="second.pt")
    second = replace(second, metadata={**second.metadata, "axis": "age"})
    second.save(tmp_path / "second.pt")
    first = NeuronMask.load(located)
    both = made(located, tmp_path / "second.pt", "--strength", 0.5, "--strength", 1)
    assert same(both, compose([first, second], [0.5, 1.0]))
    assert same(made(located, tmp_path / "second.pt", "--strength", 0.5), compose([first, second], [0.5, 0.5]))
    narrow = made(located, tmp_path / "second.pt", "--until", 700, "--branch", "conditional")
    expected = replace(compose([first, second]).windowed((1000, 700)), branch="conditional")
    assert same(narrow, expected)
    result = stereo("mask", located, tmp_path / "second.pt", "-o", tmp_path / "both.pt")
    assert f"composed of {located}, {tmp_path / 'second.pt'}" in result.stdout
    assert f"next: stereo bench --mask {tmp_path / 'both.pt'} --model {model} --axis gender" in result.stdout
    other = replace(second, metadata={**second.metadata, "unet_weights": "0" * 64})
    other.save(tmp_path / "second.pt")
    arguments = ("mask", located, tmp_path / "second.pt", "-o", tmp_path / "both.pt")
    assert "or force" in refusal(stereo(*arguments))
    assert stereo(*arguments, "--force").exit_code == 0


def test_it_prints_the_table_of_locate_and_says_what_is_next(model, stereo, file, tmp_path: Path):
    out = tmp_path / "again.pt"
    result = stereo("mask", file, "-o", out)
    assert "neurons damped" in result.stdout
    said = " ".join(result.stdout.split())
    assert "Chosen by a linear plan from relevance; damped toward zero. Branch: both halves of guidance." in said
    assert result.stdout.splitlines()[-2:] == [
        f"wrote {out}, chosen with --select plan from {file}",
        f"next: stereo bench --mask {out} --model {model}",
    ]
    assert re.fullmatch(r"choosing among \d+ neurons by plan: 1 of 1 .*\n", result.stderr)
    assert max(map(len, result.stdout.splitlines()[:-2])) <= 110


def test_json_holds_what_the_table_shows(stereo, file, tmp_path: Path):
    result = stereo("mask", file, "-o", tmp_path / "m.pt", "--json", "--quiet")
    data = json.loads(result.stdout)
    assert result.stderr == ""
    assert data["mask"] == json.loads(json.dumps(mask_summary(NeuronMask.load(tmp_path / "m.pt"))))
    assert data["files"] == {"mask": str(tmp_path / "m.pt"), "from": [str(file)]}


def test_a_dry_run_writes_nothing(stereo, file, tmp_path: Path):
    result = stereo("mask", file, "-o", tmp_path / "m.pt", "--dry-run", "--quiet")
    assert result.stdout.startswith(f"would write {tmp_path / 'm.pt'}, chosen with --select plan from {file}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_config_is_read_and_flags_win(made, file, tmp_path: Path):
    (tmp_path / "c.yaml").write_text("mu: 9\nat-most: 3\nfrom: 900\nstrength: 0.5\n")
    mask = made(file, "--config", tmp_path / "c.yaml", "--mu", 2)
    selection = mask.metadata["selection"]
    assert (selection["mu"], selection["at_most"], selection["window"]) == (2.0, 3, [900.0, 600.0])
    assert mask.metadata["adjusted"] == [{"strength": 0.5, "window": None}]


def test_the_help_shows_the_defaults_that_are_used(stereo):
    shown = " ".join(stereo("mask", "--help-all").stdout.replace("│", " ").split())
    default = Selection()
    for name, value in (
        ("select", default.select), ("mu", default.mu), ("overshoot", default.overshoot), ("top", default.top),
        ("z", default.z), ("mask-root", default.root),
    ):  # fmt: skip
        assert re.search(rf"--{name} .*?\[default: {re.escape(str(value))}\]", shown), name
    assert "--until X Damp only from noise (timestep about 1000) down to this timestep; 0 damps at all" in shown
    assert f"[default: ({default.until:g})]" in shown
    assert f"[default: ({default.branch})]" in shown


def refusal(result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("stereo: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("mask", "--mu", 2), "--mu chooses neurons, but {mask} is a finished mask; give the relevance"),
        (("mask", "--kinds", "ff"), "--kinds chooses neurons"),
        (("mask", "--per-bin"), "--per-bin chooses neurons"),
        (("mask", "mask copy", "--at-most", 3), "--at-most chooses neurons"),
        (("mask", "--strength", 0.5, "--strength", 0.5), "--strength is given 2 times for 1 masks"),
        (("mask", "mask copy", "--strength", 1, "--strength", 1, "--strength", 1), "--strength is given 3 times for 2"),
        (("mask", "--branch", "left"), "--branch 'left': expected conditional or both"),
        (("mask", "--from", 300, "--until", 600), "window 300 to 600 is empty"),
        (("file", "mask"), "{file} is a relevance file, given with other files"),
        (("file", "file copy"), "give it alone, or give only masks"),
        (("mask", "mask"), "{mask} is given twice"),
        (("file", "--strength", 0.5, "--strength", 0.5), "--strength is given 2 times"),
        (("file", "--top", 3), "--top needs --select top-k, but --select is plan"),
        (("file", "--select", "top-k", "--mu", 3), "--mu needs --select plan, but --select is top-k"),
        (("file", "--select", "top-k", "--at-most", 3), "--at-most needs --select plan"),
        (("file", "--select", "best"), "expected plan or top-k"),
        (("file", "--mask-root", "nurse"), "root 'nurse' is not known"),
        (("file", "--kinds", "mlp"), "site kind 'mlp' is not known; choose from ff, attention, conv, other, image"),
        (("file", "--kinds", "text"), "no site has kind 'text'; choose from attention:image, conv:image, ff:image"),
        (("file", "--kinds", "ff:texts"), "site kind 'texts' is not known"),
        (("file", "--kinds", ","), "site kind '' is not known"),
        (("file", "--until", 2000), "nothing is left to damp; timesteps run from 1000 down to 0"),
        (("file", "--from", 100), "from 100 until 600: nothing is left"),
        (("file", "--select", "top-k", "--top", 0), "k = 0"),
        (("nothing.pt",), "No such file"),
    ],
)
def test_what_does_not_fit_is_refused(stereo, located, file, tmp_path_factory, tmp_path: Path, arguments, says):
    paths, copies = {"mask": located, "file": file}, tmp_path_factory.mktemp("copies")
    for name, path in list(paths.items()):
        paths[f"{name} copy"] = shutil.copyfile(path, copies / path.name)
    line = refusal(stereo("mask", *(paths.get(word, word) for word in arguments), "-o", tmp_path / "o.pt", "--quiet"))
    assert says.format(**paths) in line
    assert list(tmp_path.iterdir()) == []


def test_the_relevance_itself_is_not_written_over(stereo, file, tmp_path: Path):
    Relevance.load(file).save(tmp_path / "r.safetensors")
    before = (tmp_path / "r.safetensors").read_bytes()
    line = refusal(stereo("mask", tmp_path / "r.safetensors", "-o", tmp_path / "r.safetensors"))
    assert "would overwrite the relevance" in line
    assert (tmp_path / "r.safetensors").read_bytes() == before
    assert "ending in .pt or .safetensors" in refusal(stereo("mask", file, "-o", tmp_path / "m.ckpt"))


def test_out_and_a_file_are_asked_for(stereo):
    for arguments in (("mask", "x.pt"), ("mask", "-o", "x.pt")):
        result = stereo(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr


def test_an_allocating_mask_is_summed_up_by_the_mean_over_its_groups(stereo, located, tmp_path: Path):
    plain = NeuronMask.load(located)
    factors = torch.stack([plain.factors, 1 - 0.5 * plain.damping.flip(0)])
    mask = replace(plain, factors=factors, groups=("female", "male"), metadata={"axis": "gender"})
    whole, parts = mask_summary(mask), [mask_summary(mask.group(name)) for name in mask.groups]
    assert whole["groups"] == ["female", "male"]
    assert parts[0]["groups"] == []
    assert whole["total"]["damping"] == pytest.approx(sum(part["total"]["damping"] for part in parts) / 2)
    for i, row in enumerate(whole["bins"]):
        assert row["damping"] == pytest.approx(sum(part["bins"][i]["damping"] for part in parts) / 2)
        assert row["damped"] >= max(part["bins"][i]["damped"] for part in parts)
    json.dumps(whole, allow_nan=False)
    mask_table(whole)
    mask.save(tmp_path / "a.pt")
    result = stereo("mask", tmp_path / "a.pt", "--strength", 0.5, "-o", tmp_path / "b.safetensors")
    assert "allotted to (female, male)" in " ".join(result.stdout.split())
    torch.testing.assert_close(NeuronMask.load(tmp_path / "b.safetensors").damping, mask.damping / 2)


def test_a_dose_is_found_on_further_seeds_and_confirmed_by_images(model, located, stereo, tmp_path: Path):
    whole = NeuronMask.load(located)
    arguments = ("mask", located, "--model", model, "--limit", 2, "--seeds", 1, "--quiet", "--guidance", 2)
    none = stereo(*arguments, "--dose", 0, "-o", tmp_path / "none.pt")
    full, untreated = (float(x) for x in re.findall(r"target\| of ([\d.]+) \(([\d.]+) untreated", none.stderr)[0])
    assert none.exit_code == 2 and full < untreated and not (tmp_path / "none.pt").exists()
    bound = (full + untreated) / 2
    result = stereo(*arguments, "--dose", bound, "--confirm", 3, "-o", tmp_path / "dosed.pt", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["dose"]
    made = NeuronMask.load(tmp_path / "dosed.pt")
    assert found["left"] <= bound and 0 < found["strength"] < 1
    torch.testing.assert_close(made.damping, found["strength"] * whole.damping, rtol=0, atol=1e-6)
    # It was located on seeds 0 and 1; 2 doses it, and 3 to 5 confirm.
    seen = found["confirmed"]
    assert seen["seeds"] == [3, 5] and seen["images"] == 3 and made.metadata["dose"]["seeds"] == [2, 5]
    assert seen["change"]["estimate"] == pytest.approx(seen["after"]["estimate"] - seen["before"]["estimate"])
    for side in ("before", "after"):  # a percentile interval of so few images lies above its own estimate
        assert seen[side]["low"] <= seen[side]["estimate"] <= seen[side]["high"]
    assert seen["floor"]["mean"] > 0
    assert [2, 5] in made.made_on
    with pytest.MonkeyPatch.context() as patch:  # what a launcher started beside it plans, and leaves this to one
        patch.setenv("SLURM_STEP_NUM_TASKS", "2")
        said = stereo(*arguments, "--dose", bound, "--confirm", 2, "-o", tmp_path / "said.pt")
    assert "confirmed on 2 images per prompt, seeds 3 to 4: parity gap" in said.stdout
    unseen = stereo(*arguments, "--dose", bound, "--confirm", 0, "-o", tmp_path / "unseen.pt", "--json")
    assert json.loads(unseen.stdout)["dose"]["confirmed"] is None


def test_what_a_dose_refuses(model, located, stereo, tmp_path: Path):
    arguments = ("mask", located, "--model", model, "-o", tmp_path / "m.pt")
    for given, says in (
        (("--confirm", 4), "--confirm: give --dose"),
        (("--dose", 0.1, "--confirm", 1), "an interval needs at least 2 images"),
        (("--dose", 0.1, "--model", "nobody/nothing"), "nobody/nothing"),
    ):
        result = stereo(*arguments, *given)
        assert result.exit_code == 2 and says in result.stderr
        assert not (tmp_path / "m.pt").exists()
