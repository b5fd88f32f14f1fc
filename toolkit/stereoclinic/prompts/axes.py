"""Bias axes as data: a name, two or more groups, the words that ask for each group, and how readers recognise it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, StrictBool

from stereoclinic.errors import InputError
from stereoclinic.io.metadata import Form, parse
from stereoclinic.io.reading import LONGEST_NAME, MOST_GROUPS, is_name, read_toml

_FOLDER = Path(__file__).with_name("axes")
#: The axes that a treatment of another one should leave as they are; the others that ship are finer views of these.
WATCHED = ("age", "gender", "skin")
#: Words and phrases in one list of those that a mask brings.
MOST_WORDS = 10_000

#: What an axis of race, ethnicity or skin tone speaks of, where its file does not say whether it is one.
_RACE = re.compile(
    r"(?<![a-z])(?:races?|racial|ethnic\w*|complexion|skin(?:ned)?|black|white|brown|african|asian|indian|arab|caucasian|"
    r"european|hispanic|latin[oax]|middle[\W_]eastern|indigenous)(?![a-z])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Axis:
    """A dimension of bias. Groups are perceived presentation in an image, not anyone's identity.

    Args:
        name: Such as "gender".
        groups: K >= 2 names, in the order of every K-sized result.
        words: What is written before the person's noun for each group, in the same order.
        reader: Reader -> its head for this axis, such as {"portraits": "gender"}.
        also: Group -> further words and phrases that name it in a prompt, such as {"female": ("woman", "women")}.
        unless: Phrases with such a word that are about no person, such as ("old photo",).
        phrases: Group -> what a reader of text and images compares an image with, such as {"female": ("a woman",)}.
        templates: Where those phrases go, such as ("a photo of {group}",).
        classes: Group -> classes of a classifier that show it, such as {"old": ("60-69", "70+")}.
        tones: Group -> classes of the individual typology angle that show it, see `evaluation.readers.ita`.
        race: Whether it is race, ethnicity or skin tone; None lets `about_race` go by its words.
    """

    name: str
    groups: tuple[str, ...]
    words: tuple[str, ...]
    reader: dict[str, str] = field(default_factory=dict)
    also: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unless: tuple[str, ...] = ()
    phrases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    templates: tuple[str, ...] = ()
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tones: dict[str, tuple[str, ...]] = field(default_factory=dict)
    race: bool | None = None

    def __post_init__(self) -> None:
        for text in (self.name, *self.groups, *self.words):
            if not is_name(text) and (not isinstance(text, str) or text.strip()):
                raise InputError(f"axis: {text!r:.40} is not a name of up to {LONGEST_NAME} printable characters")
        if len(self.groups) > MOST_GROUPS:
            raise InputError(f"axis {self.name!r} has {len(self.groups):,} groups; expected up to {MOST_GROUPS}")
        if len(self.groups) < 2:
            raise InputError(f"axis {self.name!r} has {len(self.groups)} group; an axis needs two or more")
        if len(set(self.groups)) != len(self.groups):
            raise InputError(f"axis {self.name!r} names a group twice: {', '.join(self.groups)}")
        if len(self.words) != len(self.groups) or not all(word.strip() for word in self.words):
            raise InputError(f"axis {self.name!r} needs one word or phrase for each group in [words]")
        tables = {
            "[also]": self.also,
            "[reader.clip]": self.phrases,
            "[reader.hf]": self.classes,
            "[reader.ita]": self.tones,
        }
        for where, table in tables.items():
            if unknown := [group for group in table if group not in self.groups]:
                raise InputError(
                    f"axis {self.name!r} has no group {unknown[0]!r:.40}, named in {where}; it has"
                    f" {', '.join(self.groups)}"
                )
        lists = {f"{where} {group}": words for where, table in tables.items() for group, words in table.items()}
        lists |= {"unless": self.unless, "[reader.clip] templates": self.templates}
        for where, phrases in lists.items():
            whole = not isinstance(phrases, str)  # its letters would be taken for words
            if not (whole and all(isinstance(phrase, str) and any(map(str.isalnum, phrase)) for phrase in phrases)):
                raise InputError(f"axis {self.name!r}: {where} holds something that is not a word or phrase")
        if astray := [template for template in self.templates if template.count("{group}") != 1]:
            raise InputError(f"axis {self.name!r}: template {astray[0]!r} needs {{group}} in it, once")

    @property
    def about_race(self) -> bool:
        """Whether it is race, ethnicity or skin tone: what its file says, and else what its words say."""
        if self.race is not None:
            return self.race
        return any(_RACE.search(text.replace("_", " ")) for text in (self.name, *self.groups, *self.words))

    def __len__(self) -> int:
        return len(self.groups)

    def index(self, group: str) -> int:
        """Refuse a group that the axis does not have, with an InputError."""
        if group not in self.groups:
            raise InputError(f"axis {self.name!r} has no group {group!r}; it has {', '.join(self.groups)}")
        return self.groups.index(group)


def known_axes() -> list[str]:
    """Names of the axes that ship."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def shipped_axis(name: object, words: object = None) -> Axis | None:
    """The built-in axis of this name, if its words are the same; a user's axis may have the same name."""
    if not isinstance(name, str) or name not in known_axes():
        return None
    axis = load_axis(name)
    return axis if words is None or words == list(axis.words) else None


def gate_words(axis: Axis) -> dict[str, Any]:
    """What a mask's metadata keeps of the axis it was made for, so that the gate knows its words; `made_for` reads it.

    Nothing of a built-in axis, whose words may get better.
    """
    shipped = shipped_axis(axis.name, list(axis.words))
    if shipped is not None and (axis.also, axis.unless) == (shipped.also, shipped.unless):
        return {}
    return {"gate": {"also": [list(axis.also.get(group, ())) for group in axis.groups], "unless": list(axis.unless)}}


def made_for(metadata: Mapping[str, Any]) -> Axis | None:
    """The axis that a mask was made for, as far as the gate needs it; None if its metadata does not say.

    Raises:
        InputError: The metadata, which may be a stranger's, holds something else where words are expected.
    """
    name, words, gate = str(metadata.get("axis")), metadata.get("words"), metadata.get("gate")
    shipped = shipped_axis(name, words)
    if shipped is not None and gate is None:
        return shipped
    if not isinstance(words, list) or len(words) < 2:
        return None
    gate = {"also": [[]] * len(words), "unless": []} if gate is None else gate
    held: dict[str, Any] = gate if isinstance(gate, dict) else {}
    also, unless = held.get("also"), held.get("unless")
    whole = isinstance(also, list) and len(also) == len(words) and all(map(_are_words, [words, unless, *also]))
    if not isinstance(also, list) or not isinstance(unless, list) or not whole:
        raise InputError(f"the mask was made for axis {name!r}, whose words cannot be read; give its file with --axis")
    groups = tuple(words) if shipped is None else shipped.groups
    table = {group: tuple(found) for group, found in zip(groups, also, strict=True)}
    return replace(shipped or Axis(name, groups, tuple(words)), also=table, unless=tuple(unless))


def _are_words(found: object) -> bool:
    """Whether it is a list of words and phrases, no more and no longer than an axis may need."""
    return (
        isinstance(found, list)
        and len(found) <= MOST_WORDS
        and all(isinstance(each, str) and len(each) <= LONGEST_NAME and any(map(str.isalnum, each)) for each in found)
    )


def load_axis(name: str | Path) -> Axis:
    """Read a built-in axis by its name, or a user's own TOML file.

    Raises:
        InputError: No such axis or file, or the file is not of the form shown in axes/gender.toml.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in known_axes():
            raise InputError(
                f"unknown axis {str(name)!r}; choose one of {', '.join(known_axes())}, or give a .toml file"
            )
        path = _FOLDER / f"{name}.toml"
    file = parse(_File, read_toml(path, "axis file"), f"axis file {path}")
    if missing := [group for group in file.groups if group not in file.words]:
        raise InputError(f"axis file {path}: no word for {missing[0]!r:.40} in [words]")
    clip, heads = dict(file.reader.clip), file.reader.model_extra or {}
    templates = clip.pop("templates", ())
    return Axis(
        file.name,
        file.groups,
        tuple(file.words[group] for group in file.groups),
        {name: str(head) for name, head in heads.items() if not isinstance(head, dict)},
        file.also,
        file.unless,
        clip,
        templates,
        file.reader.hf,
        file.reader.ita,
        file.race,
    )


class _Reader(Form):
    """`[reader]`: the name of a reader -> its head; `[reader.clip]` also holds `templates`."""

    model_config = ConfigDict(extra="allow", strict=False)
    clip: dict[str, tuple[str, ...]] = Field(default={})
    hf: dict[str, tuple[str, ...]] = Field(default={})
    ita: dict[str, tuple[str, ...]] = Field(default={})


class _File(Form):
    """An axis file."""

    model_config = ConfigDict(extra="ignore", strict=False)
    name: str
    groups: tuple[str, ...]
    words: dict[str, str]
    reader: _Reader = _Reader()
    also: dict[str, tuple[str, ...]] = Field(default={})
    unless: tuple[str, ...] = ()
    race: StrictBool | None = None
