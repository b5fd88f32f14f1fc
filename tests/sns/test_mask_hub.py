"""Masks in folders and on the hub."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.sns.conftest import assert_same, small_group_mask, small_mask

from stereoclinic.errors import InputError
from stereoclinic.sns.mask import NeuronMask


def test_a_folder_is_read_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # it would raise
    mask = small_group_mask()
    folder = tmp_path / "a" / "b"
    assert mask.save_pretrained(folder) == folder / "mask.safetensors"
    assert_same(mask, NeuronMask.from_pretrained(folder))
    assert_same(mask, NeuronMask.from_pretrained(str(folder / "mask.safetensors")))
    small_mask().save_pretrained(folder, "gender.pt")
    assert_same(small_mask(), NeuronMask.from_pretrained(folder, "gender.pt"))
    with pytest.raises(InputError, match=r"holds no age.pt; pass filename= \(it holds gender.pt, mask.safetensors\)"):
        NeuronMask.from_pretrained(folder, "age.pt")
    with pytest.raises(InputError, match="cannot be made"):
        mask.save_pretrained(folder / "mask.safetensors")


def test_the_hub_is_asked_for_anything_else(tmp_path, monkeypatch):
    mask = small_mask()
    mask.save(tmp_path / "m.safetensors")
    asked = {}

    def download(repo_id, filename, **options):
        asked.update(options, repo_id=repo_id, filename=filename)
        return str(tmp_path / "m.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_same(mask, NeuronMask.from_pretrained("owner/mask", revision="v1"))
    assert (asked["repo_id"], asked["filename"], asked["revision"]) == ("owner/mask", "mask.safetensors", "v1")


@pytest.mark.parametrize("name", ["owner/mask", "not a name", "a/b/c"])
def test_a_hub_that_does_not_answer_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="is not a folder, and cannot be downloaded from the hub") as caught:
        NeuronMask.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_pushing_uploads_the_file_that_save_writes(tmp_path, monkeypatch):
    mask = small_group_mask()
    sent = {}

    class Api:
        def __init__(self, token):
            sent["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            sent.update(private=private, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def file_exists(self, repo, name, revision):
            return False

        def upload_folder(self, folder_path, **options):
            names = sorted(path.name for path in Path(folder_path).iterdir())
            sent.update(options, names=names, content=(Path(folder_path) / "mask.safetensors").read_bytes())
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert mask.push_to_hub("gender", private=True) == "https://hub/commit"
    mask.save(tmp_path / "m.safetensors")
    assert sent["content"] == (tmp_path / "m.safetensors").read_bytes()
    assert (sent["repo_id"], sent["names"], sent["private"]) == ("me/gender", ["README.md", "mask.safetensors"], True)
    assert sent["commit_message"] == "Upload mask.safetensors"

    def refuse(*_, **__):
        raise OSError("401 Client Error.\nRepository Not Found")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(InputError, match=r"cannot be pushed to 'gender' \(401 Client Error\); check") as caught:
        mask.push_to_hub("gender")
    assert "\n" not in str(caught.value)
