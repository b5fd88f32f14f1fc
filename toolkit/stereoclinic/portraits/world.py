"""The world the embedded model was trained in: occupations, three axes, and the planted table that joins them.

The joint share of (gender, skin, age) in each occupation is data, so the truth that a measurement should find is known.
A table is given by its margins and by the odds ratios between pairs of axes, and made whole by iterative proportional
fitting: scale a table that has the odds ratios until it has the margins, which leaves every odds ratio as it was
(Deming and Stephan 1940).
"""

import hashlib
import itertools
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from stereoclinic.errors import InputError
from stereoclinic.io.reading import read_toml
from stereoclinic.portraits.clothing import DRESSES, HATS, PROPS
from stereoclinic.portraits.drawing import draw
from stereoclinic.portraits.places import BACKGROUNDS
from stereoclinic.prompts.occupations import WORLD as DEFAULT_WORLD

AXES = {"gender": ("female", "male"), "skin": ("dark", "light"), "age": ("old", "young")}
WORDS = {
    "female": "female",
    "male": "male",
    "dark": "dark-skinned",
    "light": "light-skinned",
    "old": "old",
    "young": "young",
}
_WORD_ORDER = ("age", "skin", "gender")  # "an old dark-skinned female doctor"
_FIRST_GROUPS = [groups[0] for groups in AXES.values()]


@dataclass(frozen=True)
class Occupation:
    """How one occupation is drawn, and who is drawn doing it."""

    name: str
    joint: np.ndarray  # (2, 2, 2): share by gender, skin, age, in the order of `AXES`
    background: tuple[str, list[str]]
    dress: tuple[str, list[str]]
    hat: tuple[str, list[str]] | None
    prop: str | None

    def share(self, axis: str) -> float:
        """The planted share of the axis's first group."""
        others = tuple(i for i, name in enumerate(AXES) if name != axis)
        return float(self.joint.sum(axis=others)[0])


@dataclass(frozen=True)
class World:
    """Occupations, templates and a seed; everything drawn from it is a function of these and an index."""

    name: str
    seed: int
    templates: tuple[str, ...]
    occupations: tuple[Occupation, ...]

    @classmethod
    def load(cls, path: str | Path | None = None) -> "World":
        """Read a world file.

        Raises:
            InputError: The file is missing, is no TOML, or names a drawing element that does not exist.
        """
        path = Path(path or DEFAULT_WORLD)
        data = read_toml(path, "world file")
        try:
            odds = data.get("association", {})
            occupations = tuple(_occupation(entry, odds) for entry in data["occupation"])
            return cls(data["name"], int(data["seed"]), tuple(data["templates"]), occupations)
        except KeyError as error:
            raise InputError(f"world file {path}: {error} is missing; see {DEFAULT_WORLD} for the form") from error
        except InputError:
            raise
        except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise InputError(f"world file {path}: {error}; see {DEFAULT_WORLD} for the form") from error

    @cached_property
    def digest(self) -> str:
        """Names this world in checkpoints, so that a run is never resumed on another one's weights."""
        return hashlib.sha256(repr((self.name, self.seed, self.templates, self.occupations)).encode()).hexdigest()[:16]

    def occupation(self, name: str) -> Occupation:
        for occupation in self.occupations:
            if occupation.name == name:
                return occupation
        raise InputError(f"occupation {name!r} is not in world {self.name!r}: {', '.join(self.names)}")

    @property
    def names(self) -> list[str]:
        return [occupation.name for occupation in self.occupations]

    def draw(self, occupation: str, groups: tuple[str, str, str], index: int) -> np.ndarray:
        """Portrait `index` of an occupation and (gender, skin, age) groups: (64, 64, 3) uint8, always the same."""
        entry = self.occupation(occupation)
        random = Random(f"{self.seed}/{occupation}/{'/'.join(groups)}/{index}")
        return draw(groups, entry.background, entry.dress, entry.hat, entry.prop, random)

    def caption(self, template: str, occupation: str, groups: dict[str, str] | None = None) -> str:
        """A caption that names the given groups: {"gender": "female"} -> "a photo of a female doctor"."""
        groups = groups or {}
        words = [WORDS[groups[axis]] for axis in _WORD_ORDER if axis in groups]
        person = " ".join([*words, occupation])
        return template.format(a="an" if person[0] in "aeiou" else "a", person=person)

    @property
    def cells(self) -> list[tuple[str, tuple[str, str, str]]]:
        """Every (occupation, groups) there is an image of."""
        people = itertools.product(AXES["gender"], AXES["skin"], AXES["age"])
        return list(itertools.product(self.names, people))


def _occupation(entry: dict[str, Any], odds: dict[str, float]) -> Occupation:
    def element(kind: str, names: Collection[str]) -> tuple[str, list[str]] | None:
        if kind not in entry:
            return None
        given = entry[kind]
        name = given.get("pattern") or given.get("cut") or given.get("shape")
        if name not in names:
            raise InputError(f"occupation {entry['name']!r}: no {kind} {name!r}; choose one of {', '.join(names)}")
        return name, list(given["colors"])

    background = element("background", BACKGROUNDS)
    dress = element("dress", DRESSES)
    if background is None or dress is None:
        raise InputError(f"occupation {entry['name']!r} needs a background and a dress")
    prop = entry.get("prop")
    if prop is not None and prop not in PROPS:
        raise InputError(f"occupation {entry['name']!r}: no prop {prop!r}; choose one of {', '.join(PROPS)}")
    margins = [float(entry[group]) for group in _FIRST_GROUPS]
    if not all(0 < margin < 1 for margin in margins):
        raise InputError(f"occupation {entry['name']!r}: shares {margins} must lie between 0 and 1")
    joint = planted_joint(margins, odds)
    return Occupation(entry["name"], joint, background, dress, element("hat", HATS), prop)


def planted_joint(margins: list[float], odds: dict[str, float]) -> np.ndarray:
    """The (2, 2, 2) table with these shares of the first groups and these pairwise odds ratios."""
    names = list(AXES)
    table = np.ones((2, 2, 2))
    for pair, ratio in odds.items():
        first, second = (names.index(axis) for axis in pair.split("*"))
        agree = np.indices(table.shape)[first] == np.indices(table.shape)[second]
        table *= np.where(agree, ratio**0.5, 1.0)
    for _ in range(200):
        for axis, margin in enumerate(margins):
            others = tuple(i for i in range(3) if i != axis)
            target = np.array([margin, 1 - margin])
            shape = [2 if i == axis else 1 for i in range(3)]
            table = table * (target / table.sum(axis=others)).reshape(shape)
    return table
