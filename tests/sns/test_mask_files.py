"""Mask files: saving is the identity, and every bad file is refused in one line."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from tests.sns.conftest import SITES, SMALL_EDGES, assert_same, small_group_mask, small_mask

from stereoclinic.errors import InputError
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.sns.mask import NeuronMask

ENDINGS = [".pt", ".safetensors"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("with_roots", [True, False])
@pytest.mark.parametrize("kind", [small_mask, small_group_mask])
def test_save_then_load_is_the_identity(tmp_path, ending, with_roots, kind):
    mask = kind() if with_roots else kind(roots=None)
    mask.save(tmp_path / f"m{ending}")
    assert_same(mask, NeuronMask.load(tmp_path / f"m{ending}"))
    assert os.listdir(tmp_path) == [f"m{ending}"]  # no temporary name is left


@pytest.mark.parametrize("ending", ENDINGS)
def test_saving_replaces_and_writes_the_same_bytes_each_time(tmp_path, ending):
    path = tmp_path / f"m{ending}"
    path.write_bytes(b"older")
    small_mask().save(path)
    first = path.read_bytes()
    small_mask().save(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_failed_save_keeps_the_old_file(tmp_path, ending, monkeypatch):
    path = tmp_path / f"m{ending}"
    small_mask().save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        small_mask(branch="both").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def refused(path, match, kind="mask"):
    with pytest.raises(InputError, match=match) as caught:
        NeuronMask.load(path) if kind == "mask" else load_tensors(path, kind, 1)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_that_are_not_there_or_not_whole(tmp_path, ending):
    refused(tmp_path / f"none{ending}", "No such file")
    folder = tmp_path / f"folder{ending}"
    folder.mkdir()
    refused(folder, "is a folder")
    with pytest.raises(InputError, match="is a folder"):
        small_mask().save(folder)
    empty = tmp_path / f"empty{ending}"
    empty.touch()
    refused(empty, "empty")
    whole = tmp_path / f"whole{ending}"
    small_mask().save(whole)
    content = whole.read_bytes()
    cut = tmp_path / f"cut{ending}"
    for length in (1, 8, 9, 100, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:length])
        refused(cut, "truncated|written by|not complete")
    cut.write_bytes(b"\x00\xff not a file of ours\n" * 20)
    refused(cut, "truncated")


def test_files_in_places_or_with_endings_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match=r"ends in '.ckpt'.*\.safetensors"):
        small_mask().save(tmp_path / "m.ckpt")
    refused(tmp_path / "m", "has no file ending; expected .pt or .safetensors$")
    with pytest.raises(InputError, match="folder that exists"):
        small_mask().save(tmp_path / "no" / "such" / "m.pt")


def test_a_mistyped_name_is_answered_with_the_files_that_may_be_meant(tmp_path):
    small_mask().save(tmp_path / "gender.pt")
    refused(tmp_path / "gender", rf"has no file ending; .*; did you mean {tmp_path / 'gender.pt'}\?$")
    refused(tmp_path / "gendr.pt", rf"cannot be read .*; did you mean {tmp_path / 'gender.pt'}\?$")
    refused(tmp_path / "age.pt", "cannot be read .*; check the path$")
    small_mask().save(tmp_path / "gender.relevance.safetensors")
    refused(tmp_path / "gender", r"did you mean .*gender.pt or .*gender.relevance.safetensors\?$")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("how", ["pickle", "torch", "hidden in metadata"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, ending, how):
    proof = tmp_path / "proof"
    path = tmp_path / f"evil{ending}"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil(proof)))
    elif how == "torch":
        torch.save({"factors": Evil(proof)}, path)
    else:
        torch.save({"stereoclinic": Evil(proof), "factors": torch.ones(2, 5)}, path)
    assert not proof.exists()
    refused(path, "could run code" if ending == ".pt" else "truncated, or no .safetensors")
    assert not proof.exists()
    if ending == ".pt":  # the file does what is feared of it
        if how == "pickle":
            pickle.loads(path.read_bytes()).close()
        else:
            torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_other_kinds_and_versions(tmp_path, ending):
    path = tmp_path / f"f{ending}"
    save_tensors(path, "relevance", 1, {"factors": torch.ones(2, 5)}, {})
    refused(path, "is a relevance file; expected a mask file")
    save_tensors(path, "mask", 99, {"factors": torch.ones(2, 5)}, {})
    refused(path, "format version 99; this stereoclinic reads version 2")
    small_mask().save(path)
    refused(path, "is a mask file; expected a relevance file", kind="relevance")
    save_tensors(path, "mask", 2, {"factors": torch.ones(2, 5)}, {"sites": [["a.conv2", "conv", 5]]})
    refused(path, "not complete")
    weights = {"conv.weight": torch.ones(3)}
    torch.save(weights, path) if ending == ".pt" else safetensors.torch.save_file(weights, path)
    refused(path, "not written by stereoclinic")


@pytest.mark.parametrize("head", ["[]", "3", "{", '{"kind": "mask"}', '{"kind": "mask", "version": 2, "metadata": 3}'])
def test_heads_that_are_not_ours(tmp_path, head):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"factors": torch.ones(2)}, path, {"stereoclinic": head})
    refused(path, "not written by|not a table")


@pytest.mark.parametrize("odd", [torch.zeros(1).expand(10**12), torch.eye(3).to_sparse(), 3, "text"])
def test_contents_that_are_no_plain_tensor(tmp_path, odd):
    head = json.dumps({"kind": "mask", "version": 2, "metadata": {}})
    torch.save({"stereoclinic": head, "factors": odd}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "not a plain tensor")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("factors", torch.full((2, 5), torch.nan), "NaN"),
        ("factors", torch.full((2, 5), 1.5), "factors from 1.5 to 1.5"),
        ("factors", torch.full((2, 5), -0.1), "factors from -0.1"),
        ("factors", torch.ones(2, 4), r"shape \(2, 4\); expected \(2, 5\)"),
        ("factors", torch.ones(2, 5, dtype=torch.int64), "floating point"),
        ("roots", torch.full((2, 5), torch.inf), "infinity"),
        ("bin_edges", torch.tensor([0.0, 500.0, 1000.0]), "descend"),
    ],
)
def test_a_file_whose_values_are_no_mask(tmp_path, ending, name, value, match):
    tensors = {"bin_edges": SMALL_EDGES, "factors": torch.ones(2, 5), name: value}
    rows = [[site.name, site.kind, site.width] for site in SITES]
    head = {"sites": rows, "branch": "both", "groups": [], "metadata": {}}
    save_tensors(tmp_path / f"m{ending}", "mask", 2, tensors, head)
    refused(tmp_path / f"m{ending}", match)
