"""CLIP as a reader: what transformers' own forward says, averaged over templates, and race only where asked for."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers import group_columns, read_rows
from stereoclinic.evaluation.readers.clip import ClipReader, phrases, texts
from stereoclinic.prompts.axes import Axis, load_axis

GENDER, AGE, SKIN = (load_axis(name) for name in ("gender", "age", "skin"))
ONE = replace(GENDER, phrases={"female": ("a woman",), "male": ("a man",)}, templates=("a photo of {group}",))


def test_one_template_is_the_models_own_forward(clip_folder: Path, images: Tensor):
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    )
    pictures = [Image.fromarray((each * 255).byte().permute(1, 2, 0).numpy()) for each in images]
    inputs = processor(
        text=["a photo of a woman", "a photo of a man"], images=pictures, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip_folder).eval()(**inputs).logits_per_image.softmax(1)
    found = ClipReader(str(clip_folder), [ONE]).read(images)["gender"]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], found[1], atol=1e-4)  # it looks at the picture


def test_several_templates_are_the_mean_direction_of_their_texts(clip_folder: Path, images: Tensor):
    several = replace(ONE, templates=("a photo of {group}", "the face of {group} at work"))
    reader = ClipReader(str(clip_folder), [several])
    seen = functional.normalize(reader.features(images), dim=1)
    logits = []
    for own in texts(several):
        tokens = reader.tokenizer(own, padding=True, return_tensors="pt")
        with torch.no_grad():
            each = functional.normalize(reader.model.get_text_features(**tokens).pooler_output, dim=1)
        logits.append(seen @ functional.normalize(each.sum(0), dim=0) * reader.model.logit_scale.exp())
    torch.testing.assert_close(reader.read(images)["gender"], torch.stack(logits, 1).softmax(1))


def test_neither_order_nor_repetition_of_templates_matters(clip_folder: Path, images: Tensor):
    first, second = "a photo of {group}", "the face of {group} at work"
    variants = [(first, second), (second, first), (first, second, first, second)]
    reads = [ClipReader(str(clip_folder), [replace(ONE, templates=each)]).read(images)["gender"] for each in variants]
    for each in reads[1:]:
        torch.testing.assert_close(each, reads[0])
    alone = ClipReader(str(clip_folder), [replace(ONE, templates=(first,))]).read(images)["gender"]
    assert not torch.allclose(alone, reads[0])


def test_columns_follow_the_axis_and_batches_do_not_matter(clip_folder: Path, images: Tensor):
    turned = Axis("gender", ("male", "female"), ("male", "female"), phrases=GENDER.phrases)
    reader = ClipReader(str(clip_folder), [GENDER, AGE])
    reads = reader.read(images)
    torch.testing.assert_close(ClipReader(str(clip_folder), [turned]).read(images)["gender"], reads["gender"].flip(1))
    for name, each in reads.items():
        torch.testing.assert_close(each.sum(1), torch.ones(len(images)))
        torch.testing.assert_close(torch.cat([reader.read(images[:2])[name], reader.read(images[2:])[name]]), each)
    assert group_columns(reader, AGE) == ("age", [0, 1])


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (33, 90), (128, 64)])
def test_pictures_of_any_size_are_read(clip_folder: Path, size: tuple[int, int]):
    reader = ClipReader(str(clip_folder), [GENDER])
    pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert reader.read(pictures)["gender"].shape == (2, 2)
    assert reader.features(pictures).shape == (2, 16)
    with pytest.raises(InputError, match=r"shape \(2, 1, .*expected \(n, 3, H, W\)"):
        reader.read(pictures[:, :1])


def test_an_axis_needs_no_words_for_clip(tmp_path: Path, clip_folder: Path, images: Tensor):
    path = tmp_path / "glasses.toml"
    path.write_text('name = "glasses"\ngroups = ["with", "without"]\n[words]\nwith = "old"\nwithout = "young"\n')
    axis = load_axis(path)
    assert phrases(axis) == [("an old person",), ("a young person",)]
    assert set(ClipReader(str(clip_folder), [axis]).read(images)) == {"glasses"}


def test_an_axis_file_may_bring_words_and_templates(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ngroups = ["a", "b"]\n[words]\na = "old"\nb = "young"\n'
        '[reader.clip]\ntemplates = ["the face of {group}", "{group}"]\na = ["a woman", "a man"]\n'
    )
    axis = load_axis(path)
    assert axis.reader == {}
    assert texts(axis) == [
        ["the face of a woman", "the face of a man", "a woman", "a man"],
        ["the face of a young person", "a young person"],
    ]


def test_phrases_that_name_the_person_are_read_row_by_row(clip_folder: Path, images: Tensor):
    asked = replace(
        GENDER, phrases={"female": ("a female {person}",), "male": ("a male {person}",)}, templates=("{group}",)
    )
    reader = ClipReader(str(clip_folder), [asked])
    assert reader.by_person
    rows = [{"label": "doctor" if k % 2 else "person at work"} for k in range(len(images))]
    found = read_rows(reader, images, rows)["gender"]
    for k, row in enumerate(rows):
        fixed = {group: (f"a {group} {row['label']}",) for group in GENDER.groups}
        alone = ClipReader(str(clip_folder), [replace(asked, phrases=fixed)])
        assert not alone.by_person
        torch.testing.assert_close(found[k : k + 1], read_rows(alone, images[k : k + 1], rows[k : k + 1])["gender"])
    assert not torch.allclose(found, reader.read(images)["gender"])


def test_race_is_refused_unless_asked_for(clip_folder: Path, images: Tensor):
    with pytest.raises(InputError, match=r"'skin' is about race.*59\.2%.*--allow-race"):
        ClipReader(str(clip_folder), [SKIN, GENDER])
    plain = ClipReader(str(clip_folder), [GENDER, SKIN])  # left out where it is not what is judged
    assert set(plain.read(images)) == {"gender"}
    assert [(each.what, each.accuracy) for each in plain.known_errors] == [("gender", 0.962)]
    assert "not asked for race" in " ".join(plain.limits)
    asked = ClipReader(str(clip_folder), [SKIN, GENDER], allow_race=True)
    assert set(asked.read(images)) == {"skin", "gender"}
    assert {each.what: each.accuracy for each in asked.known_errors} == {"race": 0.592, "gender": 0.962}
    assert all(each.source and each.data == "FairFace" and "%" in str(each) for each in asked.known_errors)
    assert "often wrong on race" in " ".join(asked.limits)


@pytest.mark.parametrize(
    ("axis", "about"),
    [
        (Axis("race", ("a", "b"), ("first", "second")), True),
        (Axis("ethnicity", ("a", "b"), ("first", "second")), True),
        (Axis("people", ("asian", "other"), ("Asian", "other")), True),
        (Axis("people", ("a", "b"), ("Middle Eastern", "Latina")), True),
        (Axis("skin_tone", ("a", "b"), ("first", "second")), True),
        (Axis("hair", ("black", "fair"), ("black-haired", "blond")), True),  # the cautious way round
        (Axis("hair", ("black", "fair"), ("black-haired", "blond"), race=False), False),
        (Axis("racer", ("embraced", "grace"), ("skint", "blackout")), False),
        (Axis("anything", ("a", "b"), ("first", "second"), race=True), True),
        (GENDER, False),
        (AGE, False),
        (SKIN, True),
    ],
)
def test_axes_of_race_are_told_by_their_file_or_their_words(axis: Axis, about: bool):
    assert axis.about_race is about


def test_models_that_are_no_clip_or_not_whole_are_refused(tmp_path: Path, clip_folder: Path, classifier):
    with pytest.raises(InputError, match="the model is a vit, no CLIP; a classifier is opened by hf:"):
        ClipReader(str(classifier(("a", "b"))), [GENDER])
    with pytest.raises(
        InputError, match=r"reader 'clip:nobody/nothing': no folder here, and https://huggingface.co/nobody"
    ):
        ClipReader("nobody/nothing", [GENDER])
    part = Path(copytree(clip_folder, tmp_path / "part"))
    weights = load_file(part / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights .*visual_projection.weight"):
        ClipReader(str(part), [GENDER])


class Trick:
    """Pickled in place of weights, it would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, clip_folder: Path):
    mark = tmp_path / "mark"
    pickled = Path(copytree(clip_folder, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save({"logit_scale": Trick(mark)}, pickled / "pytorch_model.bin")
    config = json.loads((pickled / "config.json").read_text())
    del config["dtype"]  # which is then looked up in the weights, where the library does as it is told
    (pickled / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        ClipReader(str(pickled), [GENDER])
    own = Path(copytree(clip_folder, tmp_path / "own"))
    auto = {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}
    (own / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto}))
    (own / "mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(InputError):
        ClipReader(str(own), [GENDER])
    assert not mark.exists()
    torch.load(pickled / "pytorch_model.bin", weights_only=False)  # the trick itself works
    assert mark.exists()
