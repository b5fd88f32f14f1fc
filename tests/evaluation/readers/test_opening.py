"""Readers by name, several as one, and a user's own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.reader_kinds import Request
from stereoclinic.evaluation.readers import (
    KINDS,
    PortraitsReader,
    Reader,
    as_reader,
    can_read,
    fingerprint,
    group_columns,
    groups_seen,
    open_reader,
    read_rows,
)
from stereoclinic.evaluation.readers.base import KnownError
from stereoclinic.evaluation.readers.ensemble import EnsembleReader, by_reader_key
from stereoclinic.prompts.axes import Axis, load_axis

GENDER, AGE, SKIN = (load_axis(name) for name in ("gender", "age", "skin"))
OWN = """
import torch


class Bright:
    name = "bright"
    classes = {"gender": ("male", "female")}

    def read(self, images):
        light = images.mean(dim=(1, 2, 3))
        return {"gender": torch.stack([light, 1 - light], 1)}


class Nothing:
    pass


class Broken:
    def __init__(self):
        raise RuntimeError("out of order")
"""


class Fixed:
    """A reader that says what it is told to, in an order of its own."""

    def __init__(self, name: str, female: list[float], unknown: float = 0.5) -> None:
        self.name, self.classes = name, {"gender": ("male", "unknown", "female")}
        self.female, self.unknown = torch.tensor(female), unknown

    def read(self, images: Tensor) -> dict[str, Tensor]:
        rest = torch.full_like(self.female, self.unknown)
        return {"gender": torch.stack([(1 - self.female) * (1 - rest), rest, self.female * (1 - rest)], 1)}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_portraits_and_its_folder_are_the_same(portraits_folder: Path, images: Tensor):
    by_name = open_reader("portraits", [GENDER, SKIN], own=portraits_folder)
    by_folder = open_reader(str(portraits_folder), [GENDER])
    assert isinstance(by_name, PortraitsReader)
    for head, expected in by_folder.read(images).items():
        assert torch.equal(by_name.read(images)[head], expected)
        assert torch.equal(read_rows(by_name, images, [{"label": "doctor"}] * len(images))[head], expected)
    assert can_read(by_name, SKIN)
    assert by_name.limits
    assert by_name.known_errors == ()


def test_a_picture_in_larger_pixels_reads_the_same(portraits_folder: Path):
    reader = PortraitsReader(portraits_folder)
    small = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(reader.features(large), reader.features(small))
    for head, probabilities in reader.read(small).items():
        torch.testing.assert_close(reader.read(large)[head], probabilities)


def test_each_kind_opens_by_its_name(
    clip_folder: Path, classifier: Callable[..., Path], portraits_folder: Path, images
):
    hf = f"hf:{classifier(('male', 'female'))}"
    for spec in (f"clip:{clip_folder}", hf, f"ensemble:portraits,clip:{clip_folder},{hf}"):
        reader = open_reader(spec, [GENDER], own=portraits_folder)
        head, columns = group_columns(reader, GENDER)
        found = reader.read(images)[head][:, columns]
        torch.testing.assert_close(found.sum(1), torch.ones(len(images)))
        seen = reader.features(images)
        assert seen is not None
        assert len(seen) == len(images)
    assert open_reader(hf, [GENDER], classes=["male=female,female=male"]).name == hf


def test_allow_race_reaches_clip(clip_folder: Path):
    with pytest.raises(InputError, match="--allow-race"):
        open_reader(f"clip:{clip_folder}", [SKIN])
    assert can_read(open_reader(f"clip:{clip_folder}", [SKIN], allow_race=True), SKIN)
    assert not can_read(open_reader(f"clip:{clip_folder}", [GENDER, SKIN]), SKIN)


def test_code_of_the_users_own_is_run_only_when_asked_for(own: Path, images: Tensor):
    spec = f"{own}:Bright"
    own.write_text(OWN + f"\nopen({str(own.with_suffix('.ran'))!r}, 'w')\n")
    with pytest.raises(InputError, match="--allow-code"):
        open_reader(spec, [GENDER])
    assert not own.with_suffix(".ran").exists()
    reader: Reader = open_reader(spec, [GENDER], allow_code=True)
    assert own.with_suffix(".ran").exists()
    head, columns = group_columns(reader, GENDER)
    torch.testing.assert_close(reader.read(images)[head][:, columns][:, 1], images.mean(dim=(1, 2, 3)))
    assert reader.features(images) is None
    assert (reader.limits, reader.known_errors) == ((), ())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("portrait", r"unknown reader 'portrait'; choose one of portraits, clip, clip:MODEL"),
        ("hf:", "unknown reader"),
        ("clip:", "unknown reader"),
        ("", "unknown reader"),
        ("portraits", "this model brings none"),
        ("ensemble:", "unknown reader"),
        ("ensemble:,", "two or more different readers; given: none"),
        ("ensemble:{folder}", "two or more different readers"),
        ("ensemble:{folder},{folder}", "two or more different readers"),
        ("{own}:Nothing", "has no name, classes, read"),
        ("{own}:Broken", "RuntimeError: out of order"),
        ("{own}:Missing", "cannot be made"),
        ("{own}x.py:Bright", "no such file"),
        ("{tmp}", "no config.json in this folder"),
        ("{clip}", "open it by hf:"),
    ],
)
def test_what_is_no_reader_is_refused(
    spec: str, says: str, own: Path, portraits_folder: Path, clip_folder: Path, tmp_path: Path
):
    spec = spec.format(folder=portraits_folder, own=own, tmp=tmp_path, clip=clip_folder)
    with pytest.raises(InputError, match=says):
        open_reader(spec, [GENDER], allow_code=True)


#: Registers a kind of reader before the command line is built, then asks for its help.
MORE = """
from stereoclinic.evaluation.reader_kinds import KINDS
KINDS["bright:HEAD"] = "tests.evaluation.readers.test_opening:open_bright"
from stereo_cli.main import app
app(["bench", "--help"])
"""


def open_bright(request: Request) -> Reader:
    return as_reader(Fixed(request.spec, [0.5] * 6))


def test_a_new_kind_is_one_row_for_help_opening_and_the_error(monkeypatch: pytest.MonkeyPatch):
    env = {**os.environ, "COLUMNS": "100"}
    shown = subprocess.run([sys.executable, "-c", MORE], capture_output=True, text=True, timeout=60, env=env)
    assert shown.returncode == 0 and "bright:HEAD" in shown.stdout and list(KINDS)[-1] in shown.stdout
    monkeypatch.setitem(KINDS, "bright:HEAD", f"{__name__}:open_bright")
    assert open_reader("bright:gender", [GENDER]).name == "bright:gender"
    with pytest.raises(InputError, match=r"unknown reader 'bright'; .*, bright:HEAD"):
        open_reader("bright", [GENDER])


def test_an_axis_that_the_reader_lacks_is_refused_with_what_it_has(portraits_folder: Path):
    hat = Axis("hat", ("hat", "none"), ("hatted", "bare-headed"))
    with pytest.raises(InputError, match=r"axis 'hat' apart; axes it can read: gender, skin, age"):
        open_reader(str(portraits_folder), [hat])
    unnamed = Axis("gender", ("female", "male"), ("female", "male"))
    with pytest.raises(InputError, match=r"axis 'gender' apart"):  # its heads have one meaning, which a file must name
        open_reader(str(portraits_folder), [unnamed])
    third = Axis("gender", ("female", "male", "other"), ("female", "male", "androgynous"), {"portraits": "gender"})
    with pytest.raises(InputError, match=r"no class for other; 'gender' has female, male"):
        open_reader(str(portraits_folder), [third])
    with pytest.raises(InputError, match="--reader-classes is for hf:MODEL"):
        open_reader(str(portraits_folder), [GENDER], classes=["a=female"])


def test_an_ensemble_is_the_mean_and_keeps_what_each_read(images: Tensor):
    a, b = Fixed("a", [0.9, 0.6, 0.2, 0.7, 0.4, 1.0]), Fixed("b", [0.7, 0.2, 0.1, 0.9, 0.8, 0.6])
    both = EnsembleReader([a, b], [GENDER])
    found = both.read(images)
    reads, none = groups_seen(both, GENDER, found)
    torch.testing.assert_close(reads[:, 0], (a.female + b.female) / 2)
    torch.testing.assert_close(none, torch.full((6,), 0.5))
    torch.testing.assert_close(found["gender"].sum(1), torch.ones(6))
    by_reader = found[by_reader_key("gender")]  # (n, readers, K)
    torch.testing.assert_close(by_reader[:, :, 0], torch.stack([a.female, b.female], 1))
    turned = EnsembleReader([b, a], [GENDER]).read(images)
    torch.testing.assert_close(turned["gender"], found["gender"])
    torch.testing.assert_close(turned[by_reader_key("gender")], by_reader.flip(1))


def test_readers_that_say_the_same_change_nothing(images: Tensor):
    same = [Fixed(name, [0.9, 0.6, 0.2, 0.7, 0.4, 1.0]) for name in "abc"]
    found = EnsembleReader(same, [GENDER]).read(images)
    torch.testing.assert_close(found["gender"][:, 0], same[0].female / 2)
    torch.testing.assert_close(found["gender"][:, 2], torch.full((6,), 0.5))
    assert found[by_reader_key("gender")].shape == (6, 3, 2)


def test_an_ensemble_reads_what_all_know_and_takes_the_rest_from_one(portraits_folder: Path, images: Tensor):
    alone = PortraitsReader(portraits_folder)
    both = EnsembleReader([Fixed("a", [0.5] * 6), alone], [GENDER, AGE])
    found = both.read(images)
    assert set(both.classes) == {"gender", "occupation", "skin"}
    assert not can_read(both, AGE)
    assert torch.equal(found["occupation"], alone.read(images)["occupation"])
    assert torch.equal(both.features(images), alone.features(images))
    assert alone.limits and both.limits == tuple(f"portraits: {each}" for each in alone.limits)
    wrong = Fixed("b", [0.5] * 6)
    wrong.known_errors = (KnownError("gender", 0.9, "pictures", "somebody"),)
    assert EnsembleReader([wrong, alone], [GENDER]).known_errors == (*wrong.known_errors, *alone.known_errors)
    with pytest.raises(InputError, match="reader 'a' cannot tell the groups of axis 'age' apart"):
        EnsembleReader([Fixed("a", [0.5] * 6), alone], [AGE])


def test_an_ensemble_of_readers_without_features_has_none_either(images: Tensor):
    assert EnsembleReader([Fixed("a", [0.5] * 6), Fixed("b", [0.5] * 6)], [GENDER]).features(images) is None


def test_a_reader_that_sees_nobody_has_little_to_say_on_whom(images: Tensor):
    nobody, sure = Fixed("a", [0.95] * 6, unknown=0.98), Fixed("b", [0.1] * 6, unknown=0.0)
    both = EnsembleReader([nobody, sure], [GENDER])
    reads, none = groups_seen(both, GENDER, both.read(images))
    torch.testing.assert_close(none, torch.full((6,), 0.49))
    torch.testing.assert_close(reads[:, 0], torch.full((6,), (0.95 * 0.02 + 0.1) / 1.02))


def test_where_nothing_is_left_for_the_groups_reads_are_even():
    reader = Fixed("a", [0.9], unknown=1.0)
    reads, none = groups_seen(reader, GENDER, reader.read(torch.zeros(1, 3, 2, 2)))
    assert reads.tolist() == [[0.5, 0.5]]
    assert none is not None and none.tolist() == [1.0]


class Asked(Fixed):
    """Everything that a class of one's own may have."""

    by_person, limits = True, ("It is made up.",)

    def read(self, images: Tensor, persons: list[str]) -> dict[str, Tensor]:
        self.asked = persons
        return super().read(images)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_a_class_of_ones_own_has_the_defaults_of_a_reader_for_what_it_lacks(images: Tensor):
    plain, asked = as_reader(Fixed("a", [0.5] * 6)), as_reader(own := Asked("b", [0.5] * 6))
    assert (plain.limits, plain.known_errors, plain.by_person, plain.only_named) == ((), (), False, False)
    assert plain.features(images) is None and torch.equal(asked.features(images), images.flatten(1))
    people = ["doctor", "nurse"] * 3
    for reader in (plain, asked):
        seen = read_rows(reader, images, [{"label": each} for each in people])
        assert torch.equal(seen["gender"], plain.read(images)["gender"])
    assert own.asked == people and asked.limits == ("It is made up.",)
    assert as_reader(asked) is asked and fingerprint(asked) == fingerprint(own)
    with pytest.raises(InputError, match="reader dict has no name, classes, read"):
        as_reader({})
