"""Bias axes as data: a name, two or more groups, and the words that ask for each group."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from stereoclinic.errors import InputError

_FOLDER = Path(__file__).with_name("axes")


@dataclass(frozen=True)
class Axis:
    """A dimension of bias. Groups are perceived presentation in a picture, not anyone's identity.

    Args:
        name: Such as "gender".
        groups: K >= 2 names, in the order of every K-sized result.
        words: What is written before the person's noun for each group, in the same order.
        reader: Which head of which reader tells the groups apart, such as {"portraits": "gender"}.
        also: Group -> further words and phrases that name it in a prompt, such as {"female": ("woman", "women")}.
        unless: Phrases that hold such a word and speak of no person, such as ("old photo",).
    """

    name: str
    groups: tuple[str, ...]
    words: tuple[str, ...]
    reader: dict[str, str] = field(default_factory=dict)
    also: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unless: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.groups) < 2:
            raise InputError(f"axis {self.name!r} has {len(self.groups)} group; an axis needs two or more")
        if len(set(self.groups)) != len(self.groups):
            raise InputError(f"axis {self.name!r} names a group twice: {', '.join(self.groups)}")
        if len(self.words) != len(self.groups) or not all(word.strip() for word in self.words):
            raise InputError(f"axis {self.name!r} needs one word or phrase for each group in [words]")
        if unknown := [group for group in self.also if group not in self.groups]:
            raise InputError(
                f"axis {self.name!r} has no group {unknown[0]!r}, named in [also]; it has {', '.join(self.groups)}"
            )
        lists = {f"[also] {group}": words for group, words in self.also.items()} | {"unless": self.unless}
        for where, phrases in lists.items():
            whole = not isinstance(phrases, str)  # of which each letter would be a word
            if not (whole and all(isinstance(phrase, str) and any(map(str.isalnum, phrase)) for phrase in phrases)):
                raise InputError(f"axis {self.name!r}: {where} holds something that is no word or phrase")

    def __len__(self) -> int:
        return len(self.groups)

    def index(self, group: str) -> int:
        """Raises InputError for a group the axis does not have."""
        if group not in self.groups:
            raise InputError(f"axis {self.name!r} has no group {group!r}; it has {', '.join(self.groups)}")
        return self.groups.index(group)


def known_axes() -> list[str]:
    """Names of the axes that ship."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_axis(name: str | Path) -> Axis:
    """Read a built-in axis by its name, or a user's own TOML file.

    Raises:
        InputError: No such axis or file, or the file is not of the form shown in axes/gender.toml.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in known_axes():
            raise InputError(f"unknown axis {str(name)!r}; there are {', '.join(known_axes())}, or give a .toml file")
        path = _FOLDER / f"{name}.toml"
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"axis file {path}: {error}") from error
    form = {"name": str, "groups": list, "words": dict, "reader": dict, "also": dict, "unless": list}
    data = {"reader": {}, "also": {}, "unless": [], **data}
    if wrong := [key for key, kind in form.items() if not isinstance(data.get(key), kind)]:
        raise InputError(f"axis file {path}: {', '.join(wrong)} missing or of another form than in axes/gender.toml")
    groups, words, reader = [str(group) for group in data["groups"]], data["words"], data["reader"]
    missing = [group for group in groups if not isinstance(words.get(group), str)]
    if missing:
        raise InputError(f"axis file {path}: no word for {', '.join(missing)} in [words]")
    if listed := [group for group, phrases in data["also"].items() if not isinstance(phrases, list)]:
        raise InputError(f"axis file {path}: {listed[0]} in [also] is no list of words")
    heads = {str(key): str(value) for key, value in reader.items()}
    also = {group: tuple(phrases) for group, phrases in data["also"].items()}
    texts, unless = tuple(words[group] for group in groups), tuple(data["unless"])
    return Axis(data["name"], tuple(groups), texts, heads, also, unless)
