"""Skin tone by measurement: the angle, its classes, and drawn faces of known colour under other exposures."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers import can_read, groups_seen, open_reader
from stereoclinic.evaluation.readers.ita import CLASSES, MONK, ItaReader, lab, nearest_monk, typology_angle
from stereoclinic.portraits.world import World
from stereoclinic.prompts.axes import Axis, load_axis

SKIN, TONE, GENDER = load_axis("skin"), load_axis("tone"), load_axis("gender")
FINE = Axis("fine", tuple(CLASSES), tuple(CLASSES), race=True)


def rgb(colour: str) -> Tensor:
    return torch.tensor([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255


def face(colour: str, stops: float = 0) -> Tensor:
    """(3, 96, 80): a face with hair, eyes and lips on a blue wall, in light of 2^stops times the strength."""
    picture = Image.new("RGB", (80, 96), "#7088b0")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((16, 10, 64, 80), "#302018")
    pen.ellipse((20, 18, 60, 86), f"#{colour}")
    for box, shade in (((29, 42, 35, 46), "#101010"), ((45, 42, 51, 46), "#101010"), ((32, 66, 48, 71), "#a04048")):
        pen.ellipse(box, shade)
    drawn = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    linear = torch.where(drawn <= 0.04045, drawn / 12.92, ((drawn + 0.055) / 1.055) ** 2.4) * 2**stops
    lit = torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055).clamp(0, 1)
    return (lit * 255).round() / 255


def test_lab_is_that_of_the_standard():
    for colour, expected in (("ffffff", (100, 0, 0)), ("000000", (0, 0, 0)), ("ff0000", (53.24, 80.09, 67.20))):
        torch.testing.assert_close(lab(rgb(colour)), torch.tensor(expected).double(), atol=0.02, rtol=0)


def test_the_monk_scale_goes_from_light_to_dark_and_each_tone_is_nearest_to_itself():
    angles = [float(typology_angle(lab(rgb(tone)))) for tone in MONK]
    assert angles == sorted(angles, reverse=True)
    assert [nearest_monk(lab(rgb(tone))) for tone in MONK] == list(range(1, 11))


@pytest.mark.parametrize("tone", MONK)
def test_a_drawn_face_is_read_by_its_own_colour(tone: str):
    reader = ItaReader([FINE])
    seen = reader.read(face(tone)[None])
    angle = float(typology_angle(lab(rgb(tone))))
    assert reader.remarks == [f"ITA {angle:.0f}, Monk {MONK.index(tone) + 1}"]
    reads, none = groups_seen(reader, FINE, seen)
    expected = next(name for name, bound in CLASSES.items() if angle > bound)
    assert FINE.groups[int(reads.argmax())] == expected
    assert none is not None and float(none) < 0.01
    assert float(reads.max()) > (0.99 if min(abs(angle - each) for each in CLASSES.values()) > 3 else 0.5)


def test_the_exposure_shifts_the_angle_by_as_much_as_is_said():
    """Light cannot be told from tone: the documentation gives these errors, and skin that is white shows no group."""
    reader, three = ItaReader([FINE]), ItaReader([TONE])
    angles, groups = {}, {}
    for stops in (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5):
        pictures = torch.stack([face(tone, stops) for tone in MONK])
        reader.read(pictures)
        angles[stops] = [float(each.split()[1].rstrip(",")) if "ITA" in each else None for each in reader.remarks]
        groups[stops] = three.read(pictures)["tone"].argmax(1)
    for darker, light in itertools.pairwise(sorted(angles)):
        pairs = [pair for pair in zip(angles[darker], angles[light], strict=True) if None not in pair]
        assert len(pairs) >= 8 and all(one <= other for one, other in pairs[:9])  # the tenth is nearly black
    assert [k for k, each in enumerate(angles[0.5]) if each is None] == [0, 1]  # the two lightest are white
    assert [k for k, each in enumerate(angles[-1.0]) if each is None] == [9]

    def shift(stops: float) -> tuple[int, int]:
        apart = [a - b for a, b in zip(angles[stops], angles[0.0], strict=True) if None not in (a, b)]
        return round(sum(apart) / len(apart)), round(max(map(abs, apart)))

    assert {stops: shift(stops) for stops in (-1.0, -0.5, -0.25, 0.25, 0.5)} == {
        -1.0: (-17, 35), -0.5: (-7, 17), -0.25: (-4, 9), 0.25: (4, 10), 0.5: (9, 19),
    }  # fmt: skip
    same = {stops: int((each == groups[0.0]).sum()) for stops, each in groups.items()}
    assert same == {-1.0: 7, -0.5: 8, -0.25: 9, 0.0: 10, 0.25: 10, 0.5: 8}


def test_the_drawn_people_of_the_embedded_world_are_read_right():
    """Whole portraits, with hair and background of the hue of skin."""
    world, reader = World.load(), ItaReader([SKIN])
    for skin in SKIN.groups:
        people = [(occupation, (gender, skin, age)) for occupation in ("doctor", "nurse", "farmer") for gender in
                  ("female", "male") for age in ("old", "young")]  # fmt: skip
        drawn = np.stack([world.draw(*person, index) for person in people for index in range(5)])
        reads, _ = groups_seen(reader, SKIN, reader.read(torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255))
        assert (reads.argmax(1) == SKIN.index(skin)).all()


def test_where_no_skin_is_seen_there_is_no_group():
    reader = open_reader("ita", [SKIN, TONE, GENDER])
    assert not can_read(reader, GENDER)
    seen = reader.read(torch.stack([torch.full((3, 20, 30), 0.5), rgb("2040c0")[:, None, None].expand(3, 20, 30)]))
    for axis in (SKIN, TONE):
        reads, none = groups_seen(reader, axis, seen)
        assert none is not None and none.tolist() == [1, 1]
        assert torch.allclose(reads, torch.full_like(reads, 1 / len(axis)))
    assert reader.remarks == ["no skin seen"] * 2 and "exposure" in reader.limits[0]


def test_an_axis_that_is_not_of_skin_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="measures skin tone, and axis 'gender' does not say which of very light"):
        open_reader("ita", [GENDER])
    text = 'name = "x"\nrace = true\ngroups = ["a", "b"]\n[words]\na = "a"\nb = "b"\n'
    text += '[reader.ita]\na = ["dark"]\nb = ["{}"]'
    for wrong in ("pale", "dark"):
        (tmp_path / "x.toml").write_text(text.format(wrong))
        with pytest.raises(InputError, match=rf"\[reader.ita\] '{wrong}'; give each of very light"):
            open_reader("ita", [load_axis(tmp_path / "x.toml")])
    (tmp_path / "x.toml").write_text(text.format("light"))
    with pytest.raises(InputError, match="unknown reader 'ita:x'"):
        open_reader("ita:x", [load_axis(tmp_path / "x.toml")])
