"""The card of a mask: its header, what it says, that metadata stay text, and whose README.md is kept."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tests.sns.conftest import assert_same, small_group_mask, small_mask

from stereoclinic.errors import InputError
from stereoclinic.sns.mask import NeuronMask

HOSTILE = "<script>x</script> ![i](http://e.vil/i.png) [l](http://e.vil) `c` | a\n# head @me www.e.vil \x1b[31m"


def kinds(text: str) -> set[str]:
    found = set()
    for token in MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(text.split("\n---\n", 1)[1]):
        found |= {token.type, *(each.type for each in token.children or [])}
    return found


def test_the_header_says_what_the_hub_asks_for(tmp_path: Path):
    mask = replace(small_mask(), metadata={"axis": "gender", "model": "owner/base"})
    mask.save_pretrained(tmp_path, license="apache-2.0", repo_id="me/gender")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "stereoclinic", "license": "apache-2.0", "base_model": "owner/base",
        "base_model_relation": "adapter", "pipeline_tag": "text-to-image", "tags": ["stereoclinic", "bias", "gender"],
    }  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    assert 'open_pipeline("owner/base")' in code and 'load_mask(pipe, "me/gender")' in code
    assert len(code.splitlines()) == 4
    compile(code, "card", "exec")
    assert_same(mask, NeuronMask.from_pretrained(tmp_path))


def test_a_path_on_this_machine_is_not_told(tmp_path: Path):
    mask = replace(small_group_mask(), metadata={"model": "/home/somebody/models/sdxl"})
    mask.save_pretrained(tmp_path, "gender.pt")
    card = ModelCard.load(tmp_path / "README.md")
    assert "somebody" not in card.content and "- model: sdxl" in card.text
    assert "base_model" not in card.data.to_dict() and "base_model_relation" not in card.data.to_dict()
    (code,) = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    compile(code, "card", "exec")
    assert "NeuronMask.from_pretrained(" in code and len(code.splitlines()) == 5


def test_metadata_of_a_stranger_stay_text(tmp_path: Path):
    names = dict.fromkeys(("axis", "model", "composite"), HOSTILE)
    metadata = {**names, "labels": [HOSTILE, "```"], "selection": {"method": HOSTILE}}
    mask = replace(small_group_mask(), metadata=metadata, groups=("``` <b>", "<img src=x>", "c"))
    mask.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "text-to-image"
    found = kinds(text.replace("`stereo bench`", ""))  # the one code of its own
    assert not found & {"html_inline", "html_block", "image", "link_open", "code_inline", "table_open"}
    assert "\x1b" not in text and text.count("\n# ") == 1 and not re.search(r"https?://|www\.", text)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"license": "MIT\nbase_model: x"}, "license 'MIT"),
        ({"base_model": "sdxl"}, "base_model 'sdxl'; expected OWNER/NAME"),
        ({"base_model": "../a/b"}, "expected OWNER/NAME"),
    ],
)
def test_what_the_hub_would_not_take_is_refused(given, says, tmp_path: Path):
    with pytest.raises(InputError, match=says) as caught:
        small_mask().save_pretrained(tmp_path, **given)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_card_of_somebody_else_stays(tmp_path: Path):
    readme = tmp_path / "README.md"
    for theirs in ("# mine", "---\nlibrary_name: diffusers\ntags:\n- other\n---\n- stereoclinic\n"):
        readme.write_text(theirs)
        small_mask().save_pretrained(tmp_path)
        assert readme.read_text() == theirs and (tmp_path / "mask.safetensors").is_file()
    readme.unlink()
    small_mask().save_pretrained(tmp_path, license="mit")
    small_mask().save_pretrained(tmp_path, license="cc0-1.0")  # its own is replaced
    assert ModelCard.load(readme).data.license == "cc0-1.0"


@pytest.mark.parametrize("theirs", [None, "# mine", "own"])
def test_a_push_keeps_the_card_of_somebody_else(theirs, tmp_path: Path, monkeypatch):
    small_mask().save_pretrained(tmp_path / "own")
    (tmp_path / "README.md").write_text((tmp_path / "own/README.md").read_text() if theirs == "own" else theirs or "")
    sent = {}

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def file_exists(self, repo, name, revision):
            return theirs is not None

        def hf_hub_download(self, repo, name, revision):
            return str(tmp_path / name)

        def upload_folder(self, folder_path, **options):
            sent.update(options, readme=(Path(folder_path) / "README.md").read_text())
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert small_mask().push_to_hub("gender", license="mit", revision="v1") == "https://hub/commit"
    assert (sent["repo_id"], sent["revision"]) == ("me/gender", "v1")
    assert 'load_mask(pipe, "me/gender")' in sent["readme"] and "license: mit" in sent["readme"]
    assert bool(sent.get("ignore_patterns")) == (theirs == "# mine")
    monkeypatch.setattr(Api, "create_repo", None)  # what is refused is refused before
    with pytest.raises(InputError, match=r"^license"):
        small_mask().push_to_hub("gender", license="M I T")
