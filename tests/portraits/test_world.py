"""The planted world: what is drawn follows the table, and each axis and occupation has a cue of its own."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.errors import InputError
from stereoclinic.portraits.data import Captions
from stereoclinic.portraits.drawing import SIZE
from stereoclinic.portraits.world import AXES, DEFAULT_WORLD, World, planted_joint
from stereoclinic.prompts.occupations import planted_shares
from stereoclinic.statistics.amplification import reference_shares

WORLD = World.load()
CELLS = list(itertools.product(*AXES.values()))


def test_the_shipped_world_has_twelve_occupations_and_three_axes() -> None:
    assert len(WORLD.names) == len(set(WORLD.names)) >= 12
    assert list(AXES) == ["gender", "skin", "age"]


@given(
    st.lists(st.floats(0.03, 0.97), min_size=3, max_size=3),
    st.floats(0.2, 5),
    st.floats(0.2, 5),
)
def test_a_planted_table_has_its_margins_and_odds_ratios(margins: list[float], first: float, second: float) -> None:
    joint = planted_joint(margins, {"gender*age": first, "skin*age": second})
    assert joint.sum() == pytest.approx(1)
    for axis, margin in enumerate(margins):
        others = tuple(i for i in range(3) if i != axis)
        assert joint.sum(axis=others)[0] == pytest.approx(margin, abs=1e-6)
    for skin in range(2):  # the odds ratio of gender and age given skin
        cell = joint[:, skin]
        assert cell[0, 0] * cell[1, 1] / (cell[0, 1] * cell[1, 0]) == pytest.approx(first, rel=1e-5)


def test_drawings_are_functions_of_the_index() -> None:
    first = WORLD.draw("nurse", ("female", "dark", "old"), 5)
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, WORLD.draw("nurse", ("female", "dark", "old"), 5))
    assert not np.array_equal(first, WORLD.draw("nurse", ("female", "dark", "old"), 6))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("occupation", WORLD.names)
def test_no_occupation_hides_the_cue_of_an_axis(occupation: str, axis: int) -> None:
    """With all else equal, changing one axis changes at least a hundred pixels plainly, whatever is worn."""
    for cell in CELLS:
        if cell[axis] == list(AXES.values())[axis][0]:
            other = tuple(list(AXES.values())[i][1] if i == axis else group for i, group in enumerate(cell))
            means = [
                np.mean([WORLD.draw(occupation, each, i).astype(float) for i in range(6)], axis=0)
                for each in (cell, other)
            ]
            changed = (np.abs(means[0] - means[1]).max(axis=2) > 20).sum()
            assert changed > 100, f"{occupation}: {cell} and {other} differ in {changed} pixels"


def test_the_occupation_is_told_without_the_person() -> None:
    """The nearest mean of the picture's border strip names the occupation, and it does not move with the axes."""

    def strip(picture: np.ndarray) -> np.ndarray:
        border = np.concatenate([picture[:, :10], picture[:, -10:]], axis=1).reshape(-1, 3)
        return np.concatenate([border, picture[-8:].reshape(-1, 3)]).astype(float).ravel()

    means = {
        name: np.mean([strip(WORLD.draw(name, cell, i)) for cell in CELLS for i in range(2)], axis=0)
        for name in WORLD.names
    }
    for name, cell in itertools.product(WORLD.names, CELLS):
        seen = strip(WORLD.draw(name, cell, 77))
        nearest = min(means, key=lambda other: np.abs(means[other] - seen).mean())
        assert nearest == name, f"{name} {cell} looks like {nearest}"


def test_captions_name_groups_in_reading_order() -> None:
    groups = {"gender": "female", "skin": "dark", "age": "old"}
    assert WORLD.caption("a photo of {a} {person}", "doctor", groups) == "a photo of an old dark-skinned female doctor"
    assert WORLD.caption("a photo of {a} {person}", "executive") == "a photo of an executive"


def test_a_picture_never_contradicts_its_caption_and_neutral_captions_keep_the_planted_shares() -> None:
    captions = Captions(WORLD)
    chosen, cells, named = captions.sample(np.random.default_rng(3), 20_000)
    female: dict[str, list[bool]] = {name: [] for name in WORLD.names}
    for caption, cell, names in zip(chosen, cells, named, strict=True):
        occupation, groups = WORLD.cells[cell]
        held = dict(zip(AXES, groups, strict=True))
        assert all(held[axis] == group for axis, group in names.items())
        text = captions.texts[caption]
        assert not text or text.endswith(occupation)
        if text and not names:
            female[occupation].append(held["gender"] == "female")
    for name, drawn in female.items():
        planted = WORLD.occupation(name).share("gender")
        error = 4 * (planted * (1 - planted) / len(drawn)) ** 0.5
        assert np.mean(drawn) == pytest.approx(planted, abs=error)


@pytest.mark.parametrize("axis", list(AXES))
def test_the_planted_table_is_a_reference_for_amplification(axis: str) -> None:
    table = planted_shares(axis)
    shares = reference_shares(table, WORLD.names, AXES[axis])
    assert shares[:, 0].tolist() == pytest.approx([each.share(axis) for each in WORLD.occupations])
    with pytest.raises(InputError, match="no axis 'height'"):
        planted_shares("height")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('pattern = "chalkboard"', 'pattern = "lava"'), "no background 'lava'"),
        (('prop = "wrench"', 'prop = "sword"'), "no prop 'sword'"),
        (("female = 0.25", "female = 1.0"), "between 0 and 1"),
        (('name = "portraits"', "name = "), "world file"),
    ],
)
def test_a_wrong_world_file_is_refused_with_the_reason(tmp_path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "world.toml"
    path.write_text(DEFAULT_WORLD.read_text().replace(*change))
    with pytest.raises(InputError, match=message):
        World.load(path)
