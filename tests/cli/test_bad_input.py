"""Bad input: one clear line on stderr, exit code 2, nothing on stdout, and nothing written."""

import functools
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tests.pipelines.tiny import save

from stereoclinic.calls.apply import axes_of
from stereoclinic.errors import UncoveredOperation
from stereoclinic.pipelines.sites import Site
from stereoclinic.prompts.axes import load_axis
from stereoclinic.sns.compose import compose
from stereoclinic.sns.mask import NeuronMask

AXIS = 'name = "gender"\ngroups = {}\n[words]\nfemale = "female"\nmale = "male"\n'


@pytest.fixture
def refused(stereo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call the command line and return its one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = stereo(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("stereo: ")
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return call


def test_unknown_axis(refused, model):
    assert "unknown axis 'sex'; choose one of age, gender, skin" in refused("locate", "--model", model, "--axis", "sex")


def test_axis_file_with_one_group(refused, model, tmp_path: Path):
    (tmp_path / "one.toml").write_text(AXIS.format('["female"]'))
    assert "needs two or more" in refused("locate", "--model", model, "--axis", "one.toml")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "", "empty"),
        ("p.txt", "\n\n", "no prompts in it"),
        ("p.csv", "text\na photo of a doctor", "no column `prompt`"),
        ("p.jsonl", '{"text": "a photo of a doctor"}', "no column `prompt`"),
        ("p.xlsx", "x", "unknown ending"),
    ],
)
def test_prompt_files_without_prompts(refused, model, tmp_path: Path, name: str, content: str, says: str):
    (tmp_path / name).write_text(content)
    for command in ("locate", "bench"):
        assert says in refused(command, "--model", model, "--prompts", name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--limit", 1, "--seeds", 2, "--devices", 3), "2 samples for 3 devices"),
        (("--select", "best"), "expected plan or top-k"),
        (("--select", "best", "--top", 3), "expected plan or top-k"),
        (("--top", 200), "--top needs --select top-k, but --select is plan"),
        (("--select", "top-k", "--mu", 4), "--mu needs --select plan, but --select is top-k"),
        (("--composite", "magic"), "magic"),
        (("--root", "sideways"), "expected plain or rooted"),
        (("--precision", "17"), "--precision '17': expected one of 32-true"),
        (("--strategy", "fsdp", "--every", 1, "--bins", 2), "shares the weights out over devices"),
        (("--strategy", "fsdp", "--devices", 2, "--every", 1, "--bins", 2, "--composite", "deep-taylor"), "zplus-cp"),
        (("--strategy", "deepspeed", "--every", 1, "--bins", 2), "strategy 'deepspeed' shards the model's weights"),
        (("--accelerator", "abacus"), "--accelerator 'abacus': expected one of auto"),
        (("--accelerator", "mps"), "relevance is summed in float64"),
        (("--mask-root", "nurse"), "root 'nurse' is not known; choose zero, balanced, or a group: female, male"),
        (("--every", 1, "--bins", 2, "--select", "top-k", "--top", 0, "--dry-run"), "k = 0"),
        (("--every", 1, "--bins", 2, "--select", "top-k", "--top", 2.5, "--dry-run"), "k = 2.5"),
        (("--every", 1, "--bins", 2, "--select", "top-k", "--top", 1e6, "--dry-run"), "k = 1000000; expected 1 to"),
        (("--out", "mask.txt"), "ending in .pt or .safetensors"),
        (("--out", "nowhere/mask.pt"), "the folder nowhere does not exist or is not writable"),
        (("--mu", "inf", "--dry-run"), "mu inf: expected 0 or a positive number"),
        (("--overshoot", "inf", "--dry-run"), "overshoot inf: expected 0 or a positive number"),
    ],
)
def test_settings_of_locate(refused, model, arguments: tuple, says: str):
    assert says in refused("locate", "--model", model, *arguments)


@pytest.mark.parametrize("command", ["bench", "apply"])
def test_weights_are_shared_out_for_locating_alone(refused, model, command: str):
    arguments = ("a photo of a doctor", "--mask", "none.pt") if command == "apply" else ()
    says = refused(command, *arguments, "--model", model, "--devices", 2, "--strategy", "fsdp")
    assert "draw with ddp" in says


def test_a_folder_in_place_of_a_file(refused, model, tmp_path: Path):
    (tmp_path / "f.pt").mkdir()
    assert "f.pt: a folder; give a file name" in refused("locate", "--model", model, "--out", "f.pt")
    for command in (("bench",), ("apply", "a photo of a doctor")):
        assert "f.pt is a folder; give the file itself" in refused(*command, "--model", model, "--mask", "f.pt")
    assert "f.pt is a folder; give the file itself" in refused("inspect", "f.pt")
    assert "f.pt is a folder; --prompts takes a file" in refused("locate", "--model", model, "--prompts", "f.pt")


def test_a_file_in_place_of_a_folder(refused, model, located, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    for command in (("bench",), ("apply", "a photo of a doctor")):
        assert "out is a file" in refused(*command, "--model", model, "--mask", located, "--out", "out")
    assert "a file; a diffusers pipeline is a folder" in refused("locate", "--model", "out")


def test_images_of_someone_else_are_not_replaced(refused, model, located, tmp_path: Path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "holiday.png").write_bytes(b"mine")
    for command in (("bench",), ("apply", "a photo of a doctor")):
        line = refused(*command, "--model", model, "--mask", located, "--out", "out")
        assert "choose another folder" in line


@pytest.mark.parametrize("command", [("bench",), ("apply", "a photo of a doctor")])
def test_a_mask_for_another_model(refused, model, located, tmp_path: Path, command: tuple):
    mask = NeuronMask.load(located)
    other = NeuronMask(mask.sites, mask.bin_edges, mask.factors, metadata={**mask.metadata, "unet_weights": "0" * 64})
    other.save(tmp_path / "weights.pt")
    assert "other weights" in refused(*command, "--model", model, "--mask", "weights.pt")
    (site, *rest) = mask.sites
    moved = NeuronMask([type(site)("elsewhere.conv2", site.kind, site.width), *rest], mask.bin_edges, mask.factors)
    moved.save(tmp_path / "shapes.pt")
    for flags in ((), ("--force",)):
        assert "does not fit" in refused(*command, "--model", model, "--mask", "shapes.pt", *flags)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.98])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_truncated_mask(refused, model, located, tmp_path: Path, part: float, ending: str):
    path = tmp_path / f"m.{ending}"
    NeuronMask.load(located).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    says = "is empty" if part == 0 else "is truncated"
    assert says in refused("bench", "--model", model, "--mask", path)
    assert says in refused("inspect", path)


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def test_a_pickle_that_would_run_code(refused, model, tmp_path: Path):
    trace = tmp_path / "ran"
    torch.save({"stereoclinic": Payload(trace)}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(trace)))
    for name in ("zip.pt", "bare.pt"):
        for command in (("bench", "--mask"), ("inspect",), ("apply", "a photo of a doctor", "--mask")):
            flags = () if command == ("inspect",) else ("--model", model)
            assert name in refused(*command, name, *flags)
            assert not trace.exists()


def test_a_file_of_another_kind(refused, model, located):
    relevance = located.with_name("gender.relevance.safetensors")
    assert "is a relevance file; expected a mask file" in refused("bench", "--model", model, "--mask", relevance)


def test_seeds_that_the_mask_was_made_on(refused, model, located):
    line = refused("bench", "--model", model, "--mask", located, "--seed", 1, "--images", 3)
    assert "seeds 1 to 4 overlap seeds 0 to 1" in line
    assert "--seed 2" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--fail-above", "beauty=1"), "no figure 'beauty'; choose one of parity_gap"),
        (("--fail-above", "parity_gap"), "expected NAME=VALUE"),
        (("--axis", "sex"), "unknown axis"),
        (("--reader", "nowhere"), "unknown reader 'nowhere'; choose one of portraits"),
        (("--mask", "missing.pt"), "No such file"),
        (("--baseline", "uce", "--seed", 16, "--baseline-seed", 16, "--dry-run"), "seed 16 is judged"),
    ],
)
def test_settings_of_bench(refused, model, arguments: tuple, says: str):
    assert says in refused("bench", "--model", model, *arguments)


def test_a_hub_model_brings_no_reader_and_is_not_fetched_to_find_out(refused, monkeypatch):
    monkeypatch.setattr("stereoclinic.pipelines.open_model", None)
    line = refused("bench", "--model", "nobody/nothing")
    assert "'nobody/nothing' has no reader, because it is not a local folder; give --reader clip" in line


def test_an_operation_without_a_rule(refused, model, monkeypatch):
    def find_sites(*_):
        raise UncoveredOperation("fft has no relevance rule")

    monkeypatch.setattr("stereoclinic.ddtd.locate.find_sites", find_sites)
    line = refused("locate", "--model", model, "--every", 1, "--bins", 2, "--limit", 1, "--quiet")
    assert "fft has no relevance rule" in line


def test_a_mask_given_twice(refused, model, located):
    assert "given twice" in refused("bench", "--model", model, *("--mask", located) * 2)
    assert "given twice" in refused("apply", "a photo of a doctor", "--model", model, *("--mask", located) * 2)


def test_a_plan_of_no_step(refused, model):
    assert "no step lies above it" in refused("plan", "--model", model, "--until", 2000, "--dry-run")


LONG = "a photo of a doctor in the rain " * 20


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", f"{LONG}.pt"),
        ("compare", LONG, LONG),
        ("locate", "--prompts", f"{LONG}.txt", "--every", 1, "--bins", 2, "--dry-run"),
        ("locate", "--model", LONG, "--every", 1, "--bins", 2, "--dry-run"),
        ("locate", "-o", f"{LONG}.pt", "--every", 1, "--bins", 2, "--dry-run"),
        ("bench", "-o", LONG, "--dry-run"),
    ],
)
def test_a_name_that_no_file_can_have(refused, model, arguments: tuple):
    own = () if "--model" in arguments or arguments[0] in ("inspect", "compare") else ("--model", model)
    assert "too long" in refused(*arguments, *own)


def test_a_prompt_that_is_not_all_text(refused, model, located):
    line = refused("apply", "a photo of a \udce9 doctor", "--model", model, "--mask", located)
    assert "give it in UTF-8" in line


def test_a_mask_of_an_axis_that_only_has_a_shipped_name(refused, model, located, tmp_path: Path):
    mask = NeuronMask.load(located)
    own = {**mask.metadata, "words": ["agender", "bigender"]}
    NeuronMask(mask.sites, mask.bin_edges, mask.factors, metadata=own).save(tmp_path / "own.pt")
    assert "--axis gender.toml" in refused("bench", "--model", model, "--mask", "own.pt")
    (gate,) = axes_of(NeuronMask.load(tmp_path / "own.pt"))
    assert gate.words == ("agender", "bigender")


def test_a_mask_of_several_axes_is_judged_on_one(refused, model, located, tmp_path: Path):
    mask = NeuronMask.load(located)
    aged = {**mask.metadata, "axis": "age", "words": list(load_axis("age").words)}
    other = NeuronMask(mask.sites, mask.bin_edges, mask.factors, metadata=aged)
    compose([mask, other]).save(tmp_path / "both.pt")
    for command in ("bench", "--mask"), ("mask", "--dose", 0.3, "-o", "dosed.pt"):
        line = refused(*command, "both.pt", "--model", model)
        assert "choose one: --axis gender or --axis age" in line


def test_an_axis_the_reader_cannot_tell(refused, model, tmp_path: Path):
    (tmp_path / "mine.toml").write_text(AXIS.format('["female", "male"]'))
    assert "cannot tell the groups" in refused("bench", "--model", model, "--axis", "mine.toml")


def test_an_empty_prompt(refused, model, located):
    assert "empty" in refused("apply", " ", "--model", model, "--mask", located)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("colour: red", "no option colour; choose one of"),
        ("- a\n- b", "expected a mapping"),
        ("a: [", "config.yaml"),
    ],
)
def test_a_config_of_another_form(refused, tmp_path: Path, content: str, says: str):
    (tmp_path / "config.yaml").write_text(content)
    assert says in refused("locate", "--config", "config.yaml")
    assert "missing.yaml" in refused("locate", "--config", "missing.yaml")


@pytest.mark.parametrize("content", ["limit: many", "limit: 0", "seeds: [1, 2]"])
def test_a_config_with_a_wrong_value_exits_2(stereo, tmp_path: Path, content: str):
    (tmp_path / "config.yaml").write_text(content)
    result = stereo("locate", "--config", tmp_path / "config.yaml", "--dry-run")
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_a_config_whose_names_stand_for_copies(stereo, tmp_path: Path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]"
        for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "model: *j"]))
    for content in (None, "- " * 20_000, "[" * 20_000, "limit: " + "9" * 60_000, "#" * 70_000):
        if content is not None:
            (tmp_path / "c.yaml").write_text(content)
        result = stereo("locate", "--config", tmp_path / "c.yaml")
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("stereo: --config") and len(line) < 600


def test_an_unknown_model_without_a_network(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-m", "stereo_cli", "locate", "--model", "nobody/nothing"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith(
        "stereo: model 'nobody/nothing' is not a built-in model (portraits, portraits-flow), a pipeline folder"
    )
    assert "HF_HUB_OFFLINE is set" in line
    assert run.stdout == ""


def test_a_damaged_model_folder(refused, model, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in refused("locate", "--model", "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text((model / "model_index.json").read_text())
    assert "broken: broken cannot be opened" in refused("locate", "--model", "broken")


def test_weights_of_a_dtype_or_variant_that_is_not_there(refused, model):
    line = refused("locate", "--model", model, "--dtype", "int8")
    assert "dtype 'int8': weights are loaded in float32, bfloat16, float16" in line
    assert "cannot be opened" in refused("locate", "--model", model, "--variant", "ema")


@pytest.fixture
def opening(model, located) -> list[tuple]:
    """Every command that opens a model, called so that it does."""
    relevance = located.with_name("gender.relevance.safetensors")
    return [
        ("locate", "--model", model),
        ("plan", relevance, "--model", model, "--until", 0),
        ("mask", located, "--dose", 0.5, "--model", model, "-o", "dosed.pt"),
        ("bench", "--mask", located, "--model", model, "--reader", model / "reader"),
        ("apply", "a photo of a doctor", "--mask", located, "--model", model),
        ("inspect", relevance, "--images", "pictures", "--model", model),
        ("doctor", "--model", model),
    ]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("StableDiffusionImg2ImgPipeline", "it starts from a given image; give the text-to-image model"),
        ("StableDiffusionInpaintPipeline", "it fills in parts of a given image"),
        ("StableDiffusionControlNetPipeline", "a ControlNet steers it by images"),
        ("TextToVideoSDPipeline", "it makes videos"),
        ("NoSuchPipeline", "does not have; install a version that does"),
    ],
)
def test_a_pipeline_that_is_not_from_text_to_picture(refused, opening, model, tmp_path: Path, kind: str, says: str):
    shutil.copytree(model, tmp_path / "other")
    index = (model / "model_index.json").read_text().replace("StableDiffusionPipeline", kind)
    (tmp_path / "other" / "model_index.json").write_text(index)
    for command in opening:
        line = refused(*("other" if each == model else each for each in command))
        assert f"model 'other' is a {kind}" in line and says in line, command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--call", "true_cfg_scale=4"), "'true_cfg_scale' is not taken by StableDiffusionPipeline; it takes "),
        (("--call", "output_type=latent"), "call option 'output_type' is set by stereo itself"),
        (("--call", "guidance_scale=3"), "call option 'guidance_scale' is set by stereo itself"),
        (("--call", "blurry"), "--call 'blurry': expected KEY=VALUE, such as true_cfg_scale=4"),
        (("--call", "=4"), "--call '=4': expected KEY=VALUE"),
        (("--call", "eta=0", "--call", "eta=1"), "eta is given twice"),
        (("--height", 64, "--call", "height=64"), "height is given twice"),
        (("--height", 64), "only height is given; give both --height and --width"),
        (("--height", 20, "--width", 20), "divisible by 8"),
        (("--call", "height=tall", "--width", 64), "StableDiffusionPipeline refuses its call (2 steps)"),
    ],
)
def test_options_of_the_pipelines_own_call(refused, opening, arguments: tuple, says: str):
    for command in opening:
        assert says in refused(*command, *arguments), command


def test_a_denoiser_that_keeps_a_state_between_calls(refused, opening, monkeypatch: pytest.MonkeyPatch):
    forward, calls = UNet2DConditionModel.forward, []

    @functools.wraps(forward)
    def stateful(self, sample, *args, **kwargs):
        calls.append(sample)
        return forward(self, sample + len(calls) % 2, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", stateful)
    for command in opening:
        assert "it keeps a state between calls" in refused(*command), command


def test_a_text_encoder_that_gives_the_same_for_every_prompt(refused, opening, model, tmp_path: Path):
    shutil.copytree(model, tmp_path / "mute")
    (path,) = (tmp_path / "mute" / "text_encoder").glob("*.safetensors")
    state = load_file(path)
    save_file({name: 0 * value for name, value in state.items()}, path, {"format": "pt"})
    for command in opening:
        line = refused(*("mute" if each == model else each for each in command))
        assert "no argument of its denoiser depends on the prompt" in line, command


@pytest.mark.parametrize("command", [("locate",), ("plan", "--until", 0)])
def test_groups_that_the_model_does_not_tell_apart(refused, model, tmp_path: Path, command: tuple):
    words = AXIS.format('["female", "male"]').replace('= "female"', '= "flying"').replace('= "male"', '= "swimming"')
    (tmp_path / "mine.toml").write_text(words)
    save("sd1", tmp_path / "sd1")  # to whose tokenizer they are two unknown words
    small = ("--axis", "mine.toml", "--limit", 1, "--steps", 2, "--height", 16, "--width", 16, "--quiet")
    line = refused(*command, "--model", "sd1", *small)
    assert "is the same as 'a photo of a flying doctor' to this model" in line
    (tmp_path / "long.txt").write_text(f"a photo {'of a doctor ' * 40}and a {{group}} nurse")
    line = refused(*command, "--model", model, "--prompts", "long.txt", "--quiet")
    assert "is the same as" in line and "that the prompt is not too long for the model" in line


def test_a_mask_of_other_layers(refused, opening, located, tmp_path: Path):
    mask = NeuronMask.load(located)
    own = {name: mask.metadata[name] for name in ("axis", "words", "seeds")}
    layer = Site("transformer_blocks.0.attn.to_out.0", "attention", 32)
    NeuronMask([layer], mask.bin_edges, mask.factors[:, :32], metadata=own).save(tmp_path / "other.pt")
    renamed = [replace(site, name=site.name.replace("down_blocks.1", "down_blocks.7")) for site in mask.sites]
    NeuronMask(renamed, mask.bin_edges, mask.factors, metadata=own).save(tmp_path / "renamed.pt")
    cut = [replace(mask.sites[0], width=mask.sites[0].width - 1), *mask.sites[1:]]
    NeuronMask(cut, mask.bin_edges, mask.factors[:, 1:], metadata=own).save(tmp_path / "cut.pt")
    for name, says in (
        ("other.pt", "has no site 'transformer_blocks.0.attn.to_out.0'"),
        ("renamed.pt", "has no site 'down_blocks.7"),
        ("cut.pt", f"has {cut[0].width} neurons in the mask, {cut[0].width + 1} in this UNet2DConditionModel"),
    ):
        commands = [each for each in opening if located in each]
        assert [each[0] for each in commands] == ["mask", "bench", "apply"]
        for command in commands:
            assert says in refused(*(name if each == located else each for each in command)), command


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "reader/model.safetensors"])
def test_truncated_weights(refused, model, tmp_path: Path, part: str):
    shutil.copytree(model, tmp_path / "cut")
    whole = (tmp_path / "cut" / part).read_bytes()
    (tmp_path / "cut" / part).write_bytes(whole[: len(whole) // 2])
    says = "no portraits reader in cut/reader: " if "reader" in part else "cannot be opened"
    assert says in refused("bench", "--model", "cut")
