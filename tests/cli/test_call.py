"""Options of the pipeline's own call, and layers in place of the built-in table: given, recorded, taken over."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stereoclinic.calls.inputs import call_of
from stereoclinic.calls.settings import ModelSettings, call_options, call_texts, checked
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.errors import InputError
from stereoclinic.sns.mask import NeuronMask

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(call=st.dictionaries(st.from_regex(r"[a-g_][a-z0-9_]*", fullmatch=True), VALUES))
def test_written_and_read_again_is_the_same(call: dict):
    read = call_options(call_texts(call))
    assert read == call and json.dumps(read, sort_keys=True) == json.dumps(call, sort_keys=True)


def test_values_are_json_where_they_can_be():
    words = [
        "a=4",
        "b=4.5",
        "c=true",
        "d=null",
        "e=[1, 2]",
        'f="4"',
        "g=blurry, dark",
        "h=NaN",
        "max-length=2",
        "i=a=b",
        "j=",
    ]
    assert call_of(ModelSettings(call=words, height=64, width=32)) == {
        "height": 64, "width": 32, "a": 4, "b": 4.5, "c": True, "d": None, "e": [1, 2], "f": "4", "g": "blurry, dark",
        "h": "NaN", "max_length": 2, "i": "a=b", "j": "",
    }  # fmt: skip


def test_what_a_file_was_made_with_holds_where_nothing_else_is_given():
    made = {"call": {"height": 64, "width": 64, "eta": 0.5}}
    assert call_of(ModelSettings(call=["eta=1"], width=32), made) == {"height": 64, "eta": 1, "width": 32}
    assert call_of(ModelSettings(), {}) == {}
    for wrong in ([], "eta", 4, None):
        with pytest.raises(InputError, match="the file's call options are"):
            call_of(ModelSettings(), {"call": wrong})


def test_a_setting_of_another_form_is_one_line_with_its_flag():
    wrong = {"--height: ": {"height": 0}, "--call 'x': expected": {"call": ["x"]}, "--size: ": {"size": 1}}
    for says, settings in wrong.items():
        with pytest.raises(InputError, match=says):
            checked(ModelSettings, settings)


def test_it_is_recorded_and_taken_over(model, stereo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    call = {"height": 64, "width": 32, "eta": 0.5}
    options = ("--height", 64, "--width", 32, "--call", "eta=0.5")
    small = ("--limit", 1, "--seeds", 1, "--until", 0)
    result = stereo("locate", "--model", model, *options, *small, "-o", "g.pt")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith("--call eta=0.5 --call height=64 --call width=32")
    file = "g.relevance.safetensors"
    assert Relevance.load(file).metadata["call"] == NeuronMask.load("g.pt").metadata["call"] == call
    # Of a file that is read, but for what is given anew.
    plan = ("plan", file, *small, "--mu", 0.001, "--keep", 0, "--stay", "none", "--replans", 1, "--check", 0, "--quiet")
    for more, eta in (((), 0.5), (("--call", "eta=0"), 0)):
        assert stereo(*plan, *more, "-o", "a.pt").exit_code == 0
        assert NeuronMask.load("a.pt").metadata["call"] == {**call, "eta": eta}
    result = stereo("mask", "g.pt", "--dose", 100, "--limit", 1, "--confirm", 0, "--quiet", "-o", "d.pt")
    assert result.exit_code == 0, result.stderr
    assert "--call eta=0.5 --call height=64 --call width=32" in result.stdout.splitlines()[-1]
    result = stereo("apply", "a photo of a doctor", "--model", model, "--mask", "g.pt", *options, "-n", 1, "--quiet")
    assert result.exit_code == 0 and "made with other call options" not in result.stderr
    for picture in Path("stereo-apply/images").rglob("*.png"):
        assert Image.open(picture).size == (32, 64)


def test_another_call_than_a_mask_was_made_with_is_said_in_one_line(model, located, stereo, tmp_path: Path):
    drawing = ("--model", model, "--mask", located, "--steps", 1, "--call", "eta=0.5", "--quiet")
    judging = ("--limit", 1, "--images", 2, "--group-images", 0)
    for command in (("bench", *judging), ("apply", "a photo of a doctor", "-n", 1)):
        result = stereo(*command, *drawing, "-o", tmp_path / command[0])
        assert result.exit_code == 0, result.stderr
        name = "gender" if command[0] == "bench" else "gender.pt"
        said = f"note: mask {name} was made with other call options (none) than are used now (eta=0.5)"
        assert [line for line in result.stderr.splitlines() if "call" in line] == [said]
    assert json.loads((tmp_path / "bench" / "results.json").read_text())["provenance"]["call"] == {"eta": 0.5}


def test_layers_that_are_named_are_watched_in_place_of_the_table(
    model, stereo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    small = ("--limit", 1, "--seeds", 1, "--until", 0, "--quiet")
    result = stereo(
        "locate", "--model", model, "--sites", "ff.net.0.proj", "--sites", "resnets.*.conv1", *small, "-o", "g.pt"
    )
    assert result.exit_code == 0, result.stderr
    relevance = Relevance.load("g.relevance.safetensors")
    assert {site.kind for site in relevance.sites} == {"other", "conv"}
    assert all(site.layer.endswith(("ff.net.0.proj", "conv1")) for site in relevance.sites)
    assert relevance.metadata["patterns"] == ["ff.net.0.proj", "resnets.*.conv1"]
    plan = ("plan", "g.relevance.safetensors", *small, "--mu", 0.001, "--keep", 0, "--stay", "none", "--check", 0)
    assert stereo(*plan, "--among", 0.5, "--replans", 1, "-o", "a.pt").exit_code == 0
    assert NeuronMask.load("a.pt").sites == relevance.sites
    result = stereo("locate", "--model", model, "--sites", "experts.*", *small, "-o", "n.pt")
    assert result.exit_code == 2 and "--sites 'experts.*' fits no layer of this UNet2DConditionModel" in result.stderr
    assert not Path("n.pt").exists()
