"""Masks: saving is the identity, and every bad file is refused in one line."""

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.pipelines.bins import bin_within, bins_in
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.compat import check_fits, has_other_weights, without_adapters
from stereoclinic.sns.mask import NeuronMask

SITES = [Site("block.ff.net.2", "ff", 3), Site("block.to_out.0", "attention", 2)]
EDGES = torch.tensor([1000.0, 600.0, 200.0])
ENDINGS = [".pt", ".safetensors"]


GROUPS = ("female", "male", "other")


def make(**changes):
    generator = torch.Generator().manual_seed(0)
    fields = {
        "sites": SITES,
        "bin_edges": EDGES,
        "factors": torch.rand(2, 5, generator=generator),
        "roots": torch.randn(2, 5, generator=generator),
        "branch": "conditional",
        "metadata": {"axis": "gender", "seeds": [1, 2]},
    }
    return NeuronMask(**{**fields, **changes})


def allocating(**changes):
    generator = torch.Generator().manual_seed(1)
    fields = {
        "factors": torch.rand(3, 2, 5, generator=generator),
        "roots": torch.randn(3, 2, 5, generator=generator),
        "groups": GROUPS,
    }
    return make(**{**fields, **changes})


class Toy(nn.Module):
    def __init__(self, hidden=3):
        super().__init__()
        self.block = nn.Module()
        self.block.ff = nn.Module()
        self.block.ff.net = nn.ModuleList([nn.Linear(2, hidden), nn.Identity(), nn.Linear(hidden, 2)])
        self.block.to_out = nn.ModuleList([nn.Linear(2, 2)])


def same(one, two):
    assert (one.sites, one.branch, one.groups, one.metadata) == (two.sites, two.branch, two.groups, two.metadata)
    for name in ("bin_edges", "factors", "roots"):
        was, now = getattr(one, name), getattr(two, name)
        assert (was is None and now is None) or (was.dtype == now.dtype and torch.equal(was, now))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("with_roots", [True, False])
@pytest.mark.parametrize("kind", [make, allocating])
def test_save_then_load_is_the_identity(tmp_path, ending, with_roots, kind):
    mask = kind() if with_roots else kind(roots=None)
    mask.save(tmp_path / f"m{ending}")
    same(mask, NeuronMask.load(tmp_path / f"m{ending}"))
    assert os.listdir(tmp_path) == [f"m{ending}"]  # no temporary name is left


@pytest.mark.parametrize("ending", ENDINGS)
def test_saving_replaces_and_writes_the_same_bytes_each_time(tmp_path, ending):
    path = tmp_path / f"m{ending}"
    path.write_bytes(b"older")
    make().save(path)
    first = path.read_bytes()
    make().save(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_failed_save_keeps_the_old_file(tmp_path, ending, monkeypatch):
    path = tmp_path / f"m{ending}"
    make().save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        make(branch="both").save(path)
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
        make().save(folder)
    empty = tmp_path / f"empty{ending}"
    empty.touch()
    refused(empty, "empty")
    whole = tmp_path / f"whole{ending}"
    make().save(whole)
    content = whole.read_bytes()
    cut = tmp_path / f"cut{ending}"
    for length in (1, 8, 9, 100, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:length])
        refused(cut, "truncated|written by|not complete")
    cut.write_bytes(b"\x00\xff not a file of ours\n" * 20)
    refused(cut, "truncated")


def test_files_in_places_or_with_endings_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match=r"ends in '.ckpt'.*\.safetensors"):
        make().save(tmp_path / "m.ckpt")
    refused(tmp_path / "m", "ends in 'nothing'")
    with pytest.raises(InputError, match="folder that exists"):
        make().save(tmp_path / "no" / "such" / "m.pt")


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
    make().save(path)
    refused(path, "is a mask file; expected a relevance file", kind="relevance")
    save_tensors(path, "mask", 2, {"factors": torch.ones(2, 5)}, {"sites": [["a.conv2", "conv", 5]]})
    refused(path, "not complete")
    weights = {"conv.weight": torch.ones(3)}
    torch.save(weights, path) if ending == ".pt" else safetensors.torch.save_file(weights, path)
    refused(path, "not written by stereoclinic")


def test_a_group_is_a_plain_mask_and_a_window_cuts_every_group():
    mask = allocating()
    assert mask.allocates
    assert mask.damping.shape == (3, 2, 5)
    for k, name in enumerate(GROUPS):
        part = mask.group(name)
        same(part, make(factors=mask.factors[k], roots=mask.roots[k]))
        assert not part.allocates
        same(mask.windowed((700, 300)).group(name), part.windowed((700, 300)))
    with pytest.raises(InputError, match="group 'others' is not known; choose from female, male, other"):
        mask.group("others")
    with pytest.raises(InputError, match="group 'female' is not known; this mask has none"):
        make().group("female")


def test_a_folder_is_read_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # it would raise
    mask = allocating()
    folder = tmp_path / "a" / "b"
    assert mask.save_pretrained(folder) == folder / "mask.safetensors"
    same(mask, NeuronMask.from_pretrained(folder))
    same(mask, NeuronMask.from_pretrained(str(folder / "mask.safetensors")))
    make().save_pretrained(folder, "gender.pt")
    same(make(), NeuronMask.from_pretrained(folder, "gender.pt"))
    with pytest.raises(InputError, match=r"holds no age.pt; pass filename= \(it holds gender.pt, mask.safetensors\)"):
        NeuronMask.from_pretrained(folder, "age.pt")
    with pytest.raises(InputError, match="cannot be made"):
        mask.save_pretrained(folder / "mask.safetensors")


def test_the_hub_is_asked_for_anything_else(tmp_path, monkeypatch):
    mask = make()
    mask.save(tmp_path / "m.safetensors")
    asked = {}

    def download(repo_id, filename, **options):
        asked.update(options, repo_id=repo_id, filename=filename)
        return str(tmp_path / "m.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    same(mask, NeuronMask.from_pretrained("owner/mask", revision="v1"))
    assert (asked["repo_id"], asked["filename"], asked["revision"]) == ("owner/mask", "mask.safetensors", "v1")


@pytest.mark.parametrize("name", ["owner/mask", "not a name", "a/b/c"])
def test_a_hub_that_does_not_answer_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="is not a folder, and cannot be downloaded from the hub") as caught:
        NeuronMask.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_pushing_uploads_the_file_that_save_writes(tmp_path, monkeypatch):
    mask = allocating()
    sent = {}

    class Api:
        def __init__(self, token):
            sent["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            sent.update(private=private, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_file(self, path_or_fileobj, **options):
            sent.update(options, content=Path(path_or_fileobj).read_bytes())
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert mask.push_to_hub("gender", private=True) == "https://hub/commit"
    mask.save(tmp_path / "m.safetensors")
    assert sent["content"] == (tmp_path / "m.safetensors").read_bytes()
    assert (sent["repo_id"], sent["path_in_repo"], sent["private"]) == ("me/gender", "mask.safetensors", True)
    assert sent["commit_message"] == "Upload mask.safetensors"

    def refuse(*_, **__):
        raise OSError("401 Client Error.\nRepository Not Found")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(InputError, match=r"cannot be pushed to 'gender' \(401 Client Error\); check") as caught:
        mask.push_to_hub("gender")
    assert "\n" not in str(caught.value)


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
    tensors = {"bin_edges": EDGES, "factors": torch.ones(2, 5), name: value}
    rows = [[site.name, site.kind, site.width] for site in SITES]
    head = {"sites": rows, "branch": "both", "groups": [], "metadata": {}}
    save_tensors(tmp_path / f"m{ending}", "mask", 2, tensors, head)
    refused(tmp_path / f"m{ending}", match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sites": []}, "no sites"),
        ({"sites": [SITES[0], SITES[0]], "factors": torch.ones(2, 6), "roots": None}, "twice"),
        ({"sites": [Site("a", "odd", 5)]}, "'odd'"),
        ({"sites": [Site("a.conv2", "conv", 0)]}, "width 0"),
        ({"branch": "neither"}, "'neither'"),
        ({"roots": torch.zeros(5)}, "roots of shape"),
        ({"bin_edges": torch.tensor([1000.0])}, "two or more"),
        ({"metadata": "gender"}, "expected a dict"),
        ({"groups": ("a", "b")}, r"factors of shape \(2, 5\); expected \(2, 2, 5\), groups x timestep bins x neurons"),
        ({"factors": torch.ones(2, 2, 5)}, r"factors of shape \(2, 2, 5\); expected \(2, 5\)"),
        ({"groups": ("a", "b"), "factors": torch.ones(2, 2, 5)}, r"roots of shape \(2, 5\); expected \(2, 2, 5\)"),
        ({"groups": ("a",), "factors": torch.ones(1, 2, 5)}, "two or more that differ"),
        ({"groups": ("a", "a"), "factors": torch.ones(2, 2, 5)}, "two or more that differ"),
        ({"groups": "female"}, "expected names"),
        ({"groups": ("a", 3)}, "expected names"),
        ({"groups": ("a", " ")}, "expected names"),
        ({"sites": [Site("a.conv2", "conv", 10**30)]}, "factors of shape"),
    ],
)
def test_masks_that_cannot_be_made(changes, match):
    with pytest.raises(InputError, match=match):
        make(**changes)


@given(st.floats(-100, 1200))
def test_every_timestep_is_in_the_bin_whose_edges_hold_it(t):
    i = bin_within(t, EDGES)
    if t < 200:
        assert i is None
    else:
        assert t >= EDGES[i + 1]
        assert t < EDGES[i] or i == 0


@given(
    st.tuples(st.integers(100, 1100), st.integers(100, 1100)).filter(lambda w: w[0] > w[1]),
    st.integers(150, 1050),
)
def test_a_window_keeps_factors_inside_and_leaves_the_outside_untouched(window, t):
    mask = make()
    high, low = window
    if high <= 200 or low >= 1000:
        with pytest.raises(InputError, match="meets no timestep bin"):
            mask.windowed(window)
        return
    cut = mask.windowed(window)
    was, now = mask.bin_of(t), cut.bin_of(t)
    inside = low <= t and (t < high or high >= 1000)
    if inside and was is not None:
        assert torch.equal(cut.factors[now], mask.factors[was])
        assert torch.equal(cut.roots[now], mask.roots[was])
    else:
        assert now is None or (cut.factors[now] == 1).all()


def test_an_empty_window_is_refused():
    with pytest.raises(InputError, match="empty"):
        bins_in(EDGES, (300, 300))


def test_a_cast_changes_the_weights_digest_and_not_the_shapes_digest():
    torch.manual_seed(0)
    toy = Toy()
    shapes, weights = shapes_digest(toy), weights_digest(toy)
    assert (shapes_digest(toy), weights_digest(toy)) == (shapes, weights)
    toy.half()
    assert shapes_digest(toy) == shapes
    assert weights_digest(toy) != weights
    assert shapes_digest(Toy(4)) != shapes
    with pytest.raises(InputError, match="meta"):
        weights_digest(toy.to("meta"))


def test_a_single_changed_bit_changes_the_weights_digest():
    toy = Toy()
    before = weights_digest(toy)
    with torch.no_grad():
        bias = toy.block.to_out[0].bias
        bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))
    assert weights_digest(toy) != before


def test_a_mask_fits_the_model_it_was_made_for_and_no_other():
    torch.manual_seed(0)
    toy = Toy()
    digests = {"unet_shapes": shapes_digest(toy), "unet_weights": weights_digest(toy)}
    mask = make(metadata=digests)
    check_fits(mask, toy)
    check_fits(make(metadata={}), Toy())  # without digests the sites decide

    other = Toy()
    with pytest.raises(InputError, match="other weights"):
        check_fits(mask, other)
    check_fits(mask, other, force=True)

    other.extra = nn.Linear(2, 2)  # a few-step sibling may have a layer more; what is damped must be the same
    with pytest.raises(InputError, match="other shapes"):
        check_fits(mask, other)
    check_fits(mask, other, force=True)
    assert has_other_weights(mask, other) and not has_other_weights(mask, toy)
    for force in (False, True):
        with pytest.raises(InputError, match="has 3 neurons in the mask, 4 in this Toy"):
            check_fits(mask, Toy(4), force)
        absent = make(sites=[SITES[0], Site("far.to_out.0", "attention", 2)])
        with pytest.raises(InputError, match=r"no site 'far.to_out.0'"):
            check_fits(absent, toy, force)
        kind = make(sites=[SITES[0], Site("block.to_out.0", "conv", 2)])
        with pytest.raises(InputError, match="has kind conv in the mask, and is a Linear in this Toy"):
            check_fits(kind, toy, force)


def test_adapters_round_layers_are_looked_through():
    torch.manual_seed(0)
    toy = Toy()
    mask = make(metadata={"unet_shapes": shapes_digest(toy), "unet_weights": weights_digest(toy)})
    state = {name: value.clone() for name, value in toy.state_dict().items()}
    wrapped = get_peft_model(toy, LoraConfig(target_modules=["to_out.0", "net.2"])).base_model.model
    assert shapes_digest(wrapped) != mask.metadata["unet_shapes"]
    check_fits(mask, wrapped)
    bare = without_adapters(wrapped)
    assert bare.keys() == state.keys()
    assert all(torch.equal(bare[name], value) for name, value in state.items())
    with torch.no_grad():
        wrapped.block.to_out[0].base_layer.weight += 1
    with pytest.raises(InputError, match="other weights"):
        check_fits(mask, wrapped)
