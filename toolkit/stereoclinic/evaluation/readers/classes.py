"""Which classes of an image classifier show which group of an axis; several may show one, such as bins of age."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from stereoclinic.axes import Axis
from stereoclinic.errors import InputError
from stereoclinic.reading import read_json, read_toml

Pairs = list[tuple[str, str]]  # class, group


def parse_classes(given: Iterable[str]) -> Pairs:
    """What `--reader-classes` says: CLASS=GROUP,CLASS=GROUP, or a .toml or .json file with group = [classes].

    Raises:
        InputError: Another form, or no such file.
    """
    pairs: Pairs = []
    for text in given:
        if Path(text).suffix in (".toml", ".json"):
            pairs += _from_file(Path(text))
            continue
        for part in text.split(","):
            label, _, group = part.rpartition("=")  # a class may hold the sign itself
            if not label.strip() or not group.strip():
                raise InputError(
                    f"--reader-classes {text!r}: expected CLASS=GROUP, such as Woman=female,Man=male, or a .toml file"
                    " with group = [classes]"
                )
            pairs.append((label.strip(), group.strip()))
    return pairs


def _from_file(path: Path) -> Pairs:
    table = (read_toml if path.suffix == ".toml" else read_json)(path, "--reader-classes")
    if not isinstance(table, dict) or not all(isinstance(labels, list) for labels in table.values()):
        raise InputError(f"--reader-classes {path}: expected a list of classes for each group, group = [classes]")
    return [(str(label), str(group)) for group, labels in table.items() for label in labels]


def columns_of(axis: Axis, labels: Sequence[str], given: Pairs) -> list[list[int]] | None:
    """The columns of a classifier that show each group of the axis, in its order; None if it cannot tell them apart.

    Args:
        axis: Its groups; without a given class for one, `[reader.hf]` of its file, names and words are looked for.
        labels: The classifier's classes.
        given: Class and group, as from `parse_classes`; groups of other axes are passed over.

    Raises:
        InputError: A given class is not the classifier's, or is given for two groups of the axis.
    """
    own = [(label, group) for label, group in given if group in axis.groups]
    if not own:
        own = [(label, group) for group, word in zip(axis.groups, axis.words, strict=True) for label in (group, word)]
        own += [(label, group) for group in axis.groups for label in axis.classes.get(group, ())]
    place = {_plain(label): column for column, label in enumerate(labels)}
    found: dict[int, str] = {}
    for label, group in own:
        column = place.get(_plain(label))
        if column is None:
            if (label, group) in given:
                shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
                raise InputError(f"--reader-classes: the reader has no class {label!r}; it has {shown}")
            continue
        if found.setdefault(column, group) != group:
            raise InputError(f"--reader-classes: class {label!r} is given for both {found[column]} and {group}")
    columns = [[column for column, group in found.items() if group == each] for each in axis.groups]
    return columns if all(columns) else None


def _plain(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").split())
