"""Files that strangers made, through the command line: one line and exit code 2, whatever they say of themselves."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.fuzz.made import MADE, a_mask, a_relevance

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.errors import InputError
from stereoclinic.evaluation.provenance import provenance
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.evaluation.readers.base import as_reader
from stereoclinic.io.metadata import check_metadata
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts
from stereoclinic.sns.compose import compose
from stereoclinic.sns.mask import NeuronMask

#: Of every kind of JSON, and too long.
WRONG: list[Any] = [[], [[]], [1], {}, {"a": []}, "x", 7, 1.5, True, "a" * 6000, ["a" * 6000], [{}]]


def held(form: Any, value: Any) -> bool:
    """Whether a wrong value is of the kind of the right one after all."""
    if isinstance(form, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(form, list) and form and isinstance(value, list):
        return all(held(form[0], each) for each in value) and not isinstance(form[0], int)
    return type(value) is type(form) and not (isinstance(value, str) and len(value) > 5000)


@pytest.mark.parametrize("key", [*(key for key in MADE if key != "versions"), "selection", "adjusted", "dose"])
def test_what_a_file_says_of_itself_is_of_the_form_that_is_asked_for(key: str):
    right = {**MADE, "selection": {"method": "plan"}, "adjusted": [{}], "dose": {}}
    for value in WRONG:
        metadata = {**right, key: value}
        for where in (metadata, {"selection": {"of": [metadata]}}):
            if held(right[key], value):
                check_metadata(where)
            else:
                with pytest.raises(InputError, match=rf"metadata (selection\.of\.)?{key} is .*; expected "):
                    check_metadata(where)
    check_metadata({**right, key: None, "another": WRONG})


@pytest.mark.parametrize("made", [a_mask, a_relevance])
def test_metadata_is_checked_where_it_is_read(tmp_path: Path, made: Any):
    path, kind = tmp_path / "one.pt", "mask" if made is a_mask else "relevance"
    made().save(path)
    tensors, head = load_tensors(path, kind, 2)
    (head["metadata"] if kind == "mask" else head)["words"] = {"female": 1}
    save_tensors(path, kind, 2, tensors, head)
    with pytest.raises(InputError, match=r"metadata words is \{'female': 1\}; expected a list of names"):
        (NeuronMask if kind == "mask" else Relevance).load(path)


@pytest.mark.parametrize("command", [("inspect",), ("bench", "--mask"), ("apply", "a photo of a doctor", "--mask")])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("branch", ["both"]),
        ("groups", {"a": 1}),
        ("sites", {"a": 1}),
        ("metadata", []),
        ("axis", ["gender"]),
        ("seeds", {}),
    ],
)
def test_a_mask_whose_parts_are_of_other_kinds(stereo, tmp_path: Path, command: tuple, key: str, value: Any):
    path = tmp_path / "m.safetensors"
    a_mask().save(path)
    tensors, head = load_tensors(path, "mask", 2)
    (head if key in head else head["metadata"])[key] = value
    save_tensors(path, "mask", 2, tensors, head)
    result = stereo(*command, path)
    assert result.exit_code == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("stereo: mask")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('limit: !!int ""', "a tag"), ("quiet: !!bool maybe", "a tag"), ("model: !!python/name:os.system x", "a tag"),
        ("model: &a x", "an anchor"), ("model: *a", "an alias"), ("%TAG ! x:\n---\nmodel: a", "a directive"),
        ("model: 2020-99-99", "month must be in 1..12"), ("model: 2020-01-01", "expected one value, not date"),
        ("mu: .nan", "not finite"), ("mu: .inf", "not finite"), ("limit: 0x_", "invalid literal"),
        ("=: 3", "no option ="),
        ("<<: 3", "expected a mapping"), ("? [a]\n: b", "unhashable key"), ('model: "\\x1b[2J"', "control character"),
        ("allow-code: true", "allow-code: give this on the command line only"),
        ("allow_code: false", "allow_code: give this on the command line only"),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_more_than_plain_values(stereo, tmp_path: Path, content: str, says: str):
    (tmp_path / "c.yaml").write_text(content)
    result = stereo("bench", "--config", tmp_path / "c.yaml", "--axis", "none")
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("stereo: --config") and says in line, line


def test_what_was_judged_is_named_whatever_the_mask_says_of_itself(little):
    said = {"file": "another.pt", "other_weights": False, "unet_weights": "0" * 64, "axis": "gender"}
    mask = NeuronMask(a_mask().sites, torch.tensor([1000.0, 0.0]), torch.ones(1, 7), metadata=said)
    reader = as_reader(SimpleNamespace(name="mine", classes={}, read=dict))
    rows, paths = load_prompts("portraits", 1), {"m": Path("m.pt")}
    found = provenance(little, "gender", rows, {"m": mask}, paths, 1.0, reader)
    assert found["masks"]["m"] == {**said, "file": "m.pt", "other_weights": True}


def test_relevance_is_of_its_own_sites_whatever_its_metadata_says(tmp_path: Path):
    made = a_relevance()
    made.metadata.update(sites=[], groups=["x"], labels=[])
    made.save(tmp_path / "r.pt")
    found = Relevance.load(tmp_path / "r.pt")
    assert (found.sites, found.groups, found.labels) == (made.sites, made.groups, made.labels)


@pytest.mark.parametrize("value", [[], ["a"], 3, None, "nowhere", {"a": []}])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("model_index.json", "_class_name"), ("model_index.json", "unet"), ("model_index.json", "text_encoder"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"), ("unet/config.json", "down_block_types"),
        ("unet/config.json", "block_out_channels"), ("vae/config.json", "latent_channels"),
        ("text_encoder/config.json", "vocab_size"), ("stereoclinic.json", "steps"), ("stereoclinic.json", "guidance"),
    ],
)  # fmt: skip
def test_a_model_whose_configurations_hold_something_else(model: Path, tmp_path: Path, file: str, key: str, value: Any):
    shutil.copytree(model, tmp_path / "m")
    data = json.loads((model / file).read_text())
    (tmp_path / "m" / file).write_text(json.dumps({**data, key: value}))
    if value is None and key in ("text_encoder", "latent_channels", "num_train_timesteps"):
        return  # may mean that there is none, or the library's default
    if value == 3 and isinstance(data[key], int | float):
        return
    with pytest.raises(InputError) as error:
        open_model(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_weights_that_would_need_unpickling(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "m")
    for path in (tmp_path / "m" / "text_encoder").glob("*.safetensors"):
        path.unlink()
    torch.save({"weights": SimpleNamespace(a=1)}, tmp_path / "m" / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"m cannot be opened: "):
        open_model(tmp_path / "m")


@pytest.mark.parametrize(
    "config",
    [
        [], {}, {"classes": []}, {"classes": {"occupation": "doctor"}}, {"classes": {"occupation": [1]}},
        {"classes": {"occupation": ["a"] * 2000}}, {"classes": {"occupation": ["a"], "": ["b"]}},
        {"classes": {"occupation": ["a"], "a.b": ["b"]}}, {"classes": {"gender": ["a"]}},
    ],
)  # fmt: skip
def test_a_reader_whose_configuration_holds_something_else(model: Path, tmp_path: Path, config: Any):
    shutil.copytree(model / "reader", tmp_path / "r")
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no portraits reader in") as error:
        PortraitsReader(tmp_path / "r")
    assert "\n" not in str(error.value)


def test_masks_that_compose_to_far_more_than_they_are():
    def made(name: str, first: float) -> NeuronMask:
        edges = first - torch.arange(2001, dtype=torch.float64) / 4
        site = type(a_mask().sites[0])(f"{name}.ff.net.2", "ff", 40)
        return NeuronMask([site], edges, torch.full((2000, 40), 0.5))

    small = compose([made("a", 1000.0), made("b", 999.9)])
    assert small.factors.shape == (4001, 80)
    wide = [
        NeuronMask(
            [type(a_mask().sites[0])(f"{i}.ff.net.2", "ff", 2)], 1000.0 - i / 100 - torch.arange(2001).double() / 4,
            torch.full((10, 2000, 2), 0.5), groups=tuple(f"{i}-{k}" for k in range(10)),
        )
        for i in range(4)
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"the masks compose to 642,800,960 factors in 8,003 timestep bins"):
        compose(wide)


def test_sizes_of_a_mask_are_bounded(tmp_path: Path):
    site, edges = a_mask().sites[0], -torch.arange(10_002, dtype=torch.float64)
    NeuronMask([site], edges[:-1], torch.ones(10_000, 3))
    with pytest.raises(InputError, match="10,001 timestep bins; expected up to 10,000"):
        NeuronMask([site], edges, torch.ones(10_001, 3))
    for groups in (("a", "b" * 201), tuple(map(str, range(101))), ("a", "b\u202e")):
        with pytest.raises(InputError, match="expected names"):
            NeuronMask([site], edges[:2], torch.ones(len(groups), 1, 3), groups=groups)


@pytest.mark.parametrize("name", ["a" * 201, "a\u202eb"])
def test_names_in_an_axis_file_are_short_and_printable(tmp_path: Path, name: str):
    text = f'name = "mine"\ngroups = ["{name}", "b"]\n[words]\n"{name}" = "x"\nb = "y"\n'
    for content in (
        text,
        text.replace(name, "a", 2).replace('"x"', f'"{name}"'),
        text.replace(name, "a").replace("mine", name),
    ):
        (tmp_path / "a.toml").write_text(content)
        with pytest.raises(InputError, match=r"is not a name of up to 200 printable characters|expected names"):
            load_axis(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("text_encoder/config.json", "num_hidden_layers", 2**40), ("unet/config.json", "layers_per_block", [1, 1001])],
)
def test_a_model_that_asks_for_layers_without_end(model: Path, tmp_path: Path, file: str, key: str, value: Any):
    shutil.copytree(model, tmp_path / "m")
    data = json.loads((model / file).read_text())
    (tmp_path / "m" / file).write_text(json.dumps({**data, "text_config": {key: value}}))
    with pytest.raises(InputError, match=rf"asks for {key} .*; models have up to 1000"):
        open_model(tmp_path / "m")


def test_weights_that_a_configuration_asks_for_and_no_file_holds(model: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = open_model(model).pipe
    pipe.unet.conv_out.to("meta")  # where the library leaves them
    monkeypatch.setattr("stereoclinic.pipelines.opening._from_pretrained", lambda *_, **__: pipe)
    with pytest.raises(InputError, match=r"its unet lacks the weights conv_out\.weight, which"):
        open_model(model)


def test_a_denoiser_that_cannot_run(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "m")
    path = tmp_path / "m" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "downsample_padding": 2**40}))
    with pytest.raises(InputError, match="its denoiser cannot run: "):
        schedule_of(open_model(tmp_path / "m"), 2, 1.0)
