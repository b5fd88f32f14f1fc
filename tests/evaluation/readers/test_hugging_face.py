"""Image classifiers as readers: their classes become groups, several may add up, and nothing is guessed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTForImageClassification, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers import can_read, group_columns, groups_seen
from stereoclinic.evaluation.readers.hugging_face import REST, HuggingFaceReader, columns_of, parse_classes
from stereoclinic.prompts.axes import Axis, load_axis

GENDER, AGE, SKIN = (load_axis(name) for name in ("gender", "age", "skin"))
FAIRFACE_AGES = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
Make = Callable[..., Path]


def by_hand(folder: Path, images: Tensor) -> Tensor:
    """(n, classes): transformers' own processor and forward."""
    pictures = [Image.fromarray((each * 255).byte().permute(1, 2, 0).numpy()) for each in images]
    values = ViTImageProcessorPil.from_pretrained(folder)(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return ViTForImageClassification.from_pretrained(folder).eval()(pixel_values=values).logits.softmax(1)


def test_bins_of_age_add_up_to_groups(classifier: Make, images: Tensor):
    folder = classifier(FAIRFACE_AGES)
    reader = HuggingFaceReader(str(folder), [AGE, GENDER])
    each = by_hand(folder, images)
    young, between, old = each[:, :4].sum(1), each[:, 4:6].sum(1), each[:, 6:].sum(1)
    found = reader.read(images)
    assert set(found) == {"age"}  # gender is not among its classes
    assert not can_read(reader, GENDER)
    assert reader.classes == {"age": ("old", "young", REST)}
    torch.testing.assert_close(found["age"], torch.stack([old, young, between], 1), atol=1e-6, rtol=1e-5)
    assert "30-39, 40-49" in " ".join(reader.limits)


@pytest.mark.parametrize("labels", [("Male", "Female"), ("man", "woman"), ("FEMALE", "MALE"), ("m", "f")])
def test_classes_are_found_whatever_their_case(classifier: Make, labels: tuple[str, ...], images: Tensor):
    folder = classifier(labels)
    reader = HuggingFaceReader(str(folder), [GENDER])
    head, columns = group_columns(reader, GENDER)
    male = [label.casefold()[0] == "m" for label in labels].index(True)
    torch.testing.assert_close(reader.read(images)[head][:, columns], by_hand(folder, images)[:, [1 - male, male]])


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (33, 90)])
def test_pictures_of_any_size_are_read(classifier: Make, size: tuple[int, int]):
    reader = HuggingFaceReader(str(classifier(("male", "female"))), [GENDER])
    pictures = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    found = reader.read(pictures)["gender"]
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    seen = reader.features(pictures)
    assert seen is not None
    assert seen.shape == (3, 32)


def test_a_picture_of_no_group_can_still_be_divided_by_its_groups(classifier: Make, images: Tensor):
    reader = HuggingFaceReader(str(classifier(("male", "female", "none"))), [GENDER])
    reader.model.classifier.bias.data = torch.tensor([0.0, 0.0, 1e4])
    shown = reader.read(images)["gender"][:, :2]
    assert torch.isfinite(shown / shown.sum(1, keepdim=True)).all()


def test_how_surely_no_group_was_seen_is_told_where_a_class_shows_none(classifier: Make, images: Tensor):
    folder = classifier(("male", "female", "no face", "a crowd"))
    reader, each = HuggingFaceReader(str(folder), [GENDER]), by_hand(folder, images)
    reads, none = groups_seen(reader, GENDER, reader.read(images))
    assert none is not None
    torch.testing.assert_close(none, each[:, 2:].sum(1))
    torch.testing.assert_close(reads * (1 - none)[:, None], each[:, [1, 0]])
    torch.testing.assert_close(reads.sum(1), torch.ones(len(images)))
    whole = HuggingFaceReader(str(classifier(("male", "female"))), [GENDER])
    assert whole.classes == {"gender": GENDER.groups}
    assert groups_seen(whole, GENDER, whole.read(images))[1] is None


def test_the_user_says_which_classes_show_which_group(classifier: Make, images: Tensor, tmp_path: Path):
    folder = classifier(("LABEL_0", "LABEL_1", "LABEL_2"))
    with pytest.raises(
        InputError, match=r"no classes for each of female, male; it has LABEL_0.*--reader-classes CLASS=GROUP"
    ):
        HuggingFaceReader(str(folder), [GENDER])
    each = by_hand(folder, images)
    (tmp_path / "map.toml").write_text('female = ["LABEL_2"]\nmale = ["LABEL_0", "LABEL_1"]\n')
    (tmp_path / "map.json").write_text(json.dumps({"female": ["LABEL_2"], "male": ["LABEL_0", "LABEL_1"]}))
    for given in (
        ["LABEL_2=female,LABEL_0=male,label_1=male"],
        ["LABEL_2=female", "LABEL 0=male , LABEL_1=male"],
        [str(tmp_path / "map.toml")],
        [str(tmp_path / "map.json")],
    ):
        found = HuggingFaceReader(str(folder), [GENDER], parse_classes(given)).read(images)["gender"]
        torch.testing.assert_close(found[:, 0], each[:, 2])
        torch.testing.assert_close(found[:, 1], each[:, :2].sum(1))


def test_given_classes_replace_those_that_names_suggest(classifier: Make):
    labels = ("male", "female", "masculine", "feminine")
    given = [("masculine", "male"), ("feminine", "female")]
    assert columns_of(GENDER, labels, []) == [[1], [0]]
    assert columns_of(GENDER, labels, given) == [[3], [2]]
    assert columns_of(SKIN, labels, given) is None
    assert columns_of(Axis("x", ("a=b", "c"), ("d", "e")), ("a=b", "E"), []) == [[0], [1]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("Woman", "expected CLASS=GROUP"),
        ("=female", "expected CLASS=GROUP"),
        ("girl=female,male=male", "no class 'girl'; it has male, female"),
        ("female=woman", "no group 'woman'; axis 'gender' has female, male"),
        ("female=female,female=male", "'female' is given for both female and male"),
        ("female=female", "no classes for each of female, male"),
        ("missing.toml", "cannot be read"),
    ],
)
def test_classes_that_do_not_fit_are_refused(classifier: Make, given: str, says: str):
    with pytest.raises(InputError, match=says):
        HuggingFaceReader(str(classifier(("male", "female"))), [GENDER], parse_classes([given]))


def test_a_map_of_another_form_is_refused(tmp_path: Path):
    path = tmp_path / "map.toml"
    path.write_text('female = "Woman"\n')
    with pytest.raises(InputError, match=r"expected a list of classes for each group"):
        parse_classes([str(path)])
    assert parse_classes(["a=b=female"]) == [("a=b", "female")]


def test_models_that_name_no_single_class_are_refused(classifier: Make, tmp_path: Path, clip_folder: Path):
    several = classifier(("male", "female"), problem_type="multi_label_classification")
    with pytest.raises(InputError, match="several labels per image"):
        HuggingFaceReader(str(several), [GENDER])
    whole = classifier(("male", "female"))
    trunk = ViTModel.from_pretrained(whole)
    trunk.config.id2label = {0: "male", 1: "female"}
    trunk.save_pretrained(tmp_path / "trunk")  # its head would be drawn at random
    with pytest.raises(InputError, match=r"lacks weights .*classifier"):
        HuggingFaceReader(str(tmp_path / "trunk"), [GENDER])
    with pytest.raises(InputError, match="no folder here"):
        HuggingFaceReader("nobody/nothing", [GENDER])
    with pytest.raises(InputError):
        HuggingFaceReader(str(clip_folder), [GENDER])
