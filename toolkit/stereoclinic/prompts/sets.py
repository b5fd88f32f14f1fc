"""Prompt sets: read from a file, the hub or the built-in lists, and written neutrally or with the word of a group.

A prompt is a pattern with one place for a person: "a photo of {person}" and "doctor" make the neutral prompt "a photo
of a doctor" and the group prompt "a photo of a female doctor". Sets are `datasets.Dataset`s with columns `COLUMNS`.
"""

import hashlib
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from stereoclinic.errors import InputError, first_line
from stereoclinic.io.reading import ODD
from stereoclinic.io.rows import READERS, table
from stereoclinic.io.text import folded, whole_word
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.occupations import BUILT_IN, BUILT_IN_PLAIN, PLAIN, TEMPLATES

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second to import, and many need a row's text only

COLUMNS = ("label", "pattern", "article", "person")

#: A row of a table: an entry as it was read, a prompt with `COLUMNS`, or a sample (see `Samples`).
Row = dict[str, Any]

#: Characters of a prompt; text encoders read some three hundred.
LONGEST = 5000

#: "face of a doctor": two nouns, of which either may be the person. Not "doctor in front of a house", nor "chief of
#: police" but for what is a part, a picture or a number of people.
_TWO = re.compile(
    r"(?P<first>(?:[^\W_]+(?:['\u2019-][^\W_]+)*\s+){0,6}?(?P<noun>[\w-]+))\s+of\s+"
    r"(?P<second>(?P<which>(?:an?|the|one|two|this|that|these|those|some|my|your|his|her|its|our|their)\s)?.+)",
    re.IGNORECASE | re.DOTALL,
)
_LINKS = re.compile(
    r"\b(?:in|on|at|with|by|from|to|for|near|under|over|behind|beside|inside|outside|and|or|as|who|whose|that)\s|\s\w+ing\s",
    re.IGNORECASE,
)
_NOBODY = re.compile(
    r"(?:face|hand|eye|back|body|bodies|profile|silhouette|figure|portrait|photo|photograph|picture|image|painting|drawing"
    r"|sketch|close-?up|group|team|crowd|pair|couple|row)s?",
    re.IGNORECASE,
)


def load_prompts(source: str | Path, limit: int | None = None) -> "Dataset":
    """A built-in set, a .txt/.csv/.json/.jsonl/.parquet file, or a hub data set by its id (split "train", streamed).

    A table needs a column `prompt`. A column `occupation` gives the person's noun, which is also the label that results
    are grouped by. Without it the person follows "of a", "of an", "of the" or {group} in the prompt. A table of
    occupations alone stands for "a photo of a ..." of each.

    Raises:
        InputError: The source is missing or empty, has neither column, or a prompt names no person, or perhaps two.
    """
    if str(source) in BUILT_IN:
        return occupation_prompts(BUILT_IN[str(source)][:limit], [TEMPLATES[str(source)]])
    return _loaded(source, limit, _row, ", ".join(BUILT_IN))


def load_plain_prompts(source: str | Path, limit: int | None = None) -> "Dataset":
    """Prompts without a person, used unchanged: they have no group prompts, and each is its own label.

    Args:
        source: One of `BUILT_IN_PLAIN`, or what `load_prompts` takes; a column `occupation` is not looked at.
        limit: Use only the first N.

    Raises:
        InputError: Nothing there, empty, or no `prompt` column.
    """
    if str(source) in BUILT_IN_PLAIN:
        return table(_plain_row(prompt) for prompt in BUILT_IN_PLAIN[str(source)][:limit])
    return _loaded(source, limit, lambda prompt, _: _plain_row(prompt), ", ".join(BUILT_IN_PLAIN))


def _loaded(source: str | Path, limit: int | None, parse: Callable[[str, str], Row], sets: str) -> "Dataset":
    """The rows that `parse` makes of each prompt and occupation of a file or a hub data set."""
    rows: dict[str, Row] = {}  # each prompt once: twice would be the same pictures, counted as more evidence
    for row in islice(read_prompts(source, _in_turn, parse, sets), limit):
        rows.setdefault(write(row), {name: row[name] for name in COLUMNS})
    if not rows:
        raise InputError(f"{source}: no prompts in it")
    return table(rows.values())


def occupation_prompts(names: Sequence[str], templates: Sequence[str] = (PLAIN,)) -> "Dataset":
    """The neutral prompts of each occupation in turn, by default one: "a photo of a doctor".

    Args:
        names: Occupations.
        templates: With {occupation}, and {group} where a group's word goes: "a {group} {occupation} laughing".

    Raises:
        InputError: A template lacks one of the two.
    """
    for template in templates:
        if template.count("{group} {occupation}") != 1:
            raise InputError(f"template {template!r} needs '{{group}} {{occupation}}' in it, once")
    return table(_row(template.replace("{occupation}", name), name) for name in names for template in templates)


def _in_turn(parts: Sequence[Iterable[Row]]) -> Iterator[tuple[int, str, Row]]:
    for number, entry in enumerate(chain.from_iterable(parts), start=1):
        yield number, f"prompt {number}", entry


def read_prompts(
    source: str | Path,
    numbered: Callable[[Sequence[Iterable[Row]]], Iterable[tuple[int, str, Row]]],
    parse: Callable[[str, str], Row] | None = None,
    sets: str = ", ".join(BUILT_IN),
) -> Iterator[Row]:
    """The rows of a file or a hub data set, one by one as they are needed; blank ones are passed over.

    Args:
        source: As in `load_prompts`, but for the built-in sets.
        numbered: Picks entries from the table's parts (files, row groups of Parquet): number, name in errors, and
            entry. A row has its entry's number as `number`.
        parse: Makes a row of a prompt and its occupation; by default it finds the person.
        sets: Names of the built-in sets, for errors.

    Raises:
        InputError: See `load_prompts`.
    """
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{path} is a folder; --prompts takes a file ({', '.join(READERS)}) or a set's name")
    is_file = path.exists() or path.suffix in READERS
    if is_file:
        if path.suffix not in READERS:
            raise InputError(f"{path}: unknown ending {path.suffix!r}; prompts are read from {', '.join(READERS)}")
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
    try:
        if is_file:
            parts: Sequence[Iterable[Row]] = READERS[path.suffix](path)
        else:
            from datasets import load_dataset

            table = load_dataset(str(source), split="train", streaming=True).reshard()
            parts = [table.shard(table.num_shards, part) for part in range(table.num_shards)]
        person, listed = parse in (None, _row), False
        for place, (number, called, entry) in enumerate(numbered(parts)):
            where = f"{source}: {called}"
            prompt = _text(where, entry.get("prompt"))
            occupation = _text(where, entry.get("occupation")) if person else ""
            if place == 0:
                listed = person and "prompt" not in entry and "occupation" in entry
            if "prompt" not in entry and not listed:
                names = ", ".join(" ".join(str(name).split()) for name in entry)[:200]
                raise InputError(f"{where}: no column `prompt`; it has {names.encode(errors='replace').decode()}")
            if occupation and listed and "prompt" not in entry:
                prompt = PLAIN.replace("{occupation}", " ".join(occupation.split()))
            if prompt:
                yield {**(parse or _row)(prompt, occupation), "number": number}
            elif occupation:
                raise InputError(f"{where} has the occupation {occupation!r} and no prompt")
    except InputError:
        raise
    except Exception as error:  # each format's reader has errors of its own, and meets them row by row
        if is_file:
            raise InputError(f"{path}: cannot be read as {path.suffix[1:]}: {first_line(error)}") from error
        raise InputError(
            f"prompts {str(source)!r}: no built-in set ({sets}), no file, and no data set that can be"
            f" reached ({first_line(error)})"
        ) from error


def _text(where: str, value: Any) -> str:
    """The text in one column of a row; empty where it is blank."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where} has {reprlib.repr(value)} where text is expected")
    if len(value) > LONGEST:
        raise InputError(f"{where} has more than {LONGEST} characters; give one prompt a row")
    if found := ODD.search(value):
        raise InputError(f"{where} holds the control character {found[0]!r}; take it out")
    return value.strip()


def _row(prompt: str, occupation: str = "") -> Row:
    """Split a prompt into the pattern around the person, the article, and the person's noun."""
    if prompt.count("{group}") > 1:
        raise InputError(f"prompt {prompt!r} has {{group}} more than once; only one person's group can be named")
    if "{group}" in prompt:
        before, after = prompt.split("{group}", 1)
        before, article = _article(before)
        # The article agrees with some group's word; the neutral prompt needs one for the noun.
        return _checked(prompt, before, _agreeing(article, after.strip()), after.strip(), "", occupation)
    if occupation:
        text, places = folded(prompt)
        found = whole_word(occupation, text)
        if found is None:
            raise InputError(f"prompt {prompt!r} does not name its occupation {occupation!r}")
        start, end = (places[at] for at in found)
        before, article = _article(prompt[:start])
        return _checked(prompt, before, article, prompt[start:end], prompt[end:], occupation)
    match = re.search(r"\bof (?:(?:an?|the) )?(.+)$", prompt, re.IGNORECASE | re.DOTALL)
    if match is None:
        raise InputError(
            f"prompt {prompt!r}: no person found in it; write 'a photo of a ...', mark the place of the group's word"
            " with {group}, or add a column `occupation`"
        )
    two = _TWO.match(match[1])
    if two and not _LINKS.search(two["first"]) and (two["which"] or _NOBODY.fullmatch(two["noun"])):
        raise InputError(
            f"prompt {prompt!r}: is the person {two['first']!r} or {two['second']!r}? Mark the place of the group's"
            " word with {group}, or add a column `occupation`"
        )
    before, article = _article(prompt[: match.start(1)])
    return _checked(prompt, before, article, match[1], "", "")


def _article(before: str) -> tuple[str, str]:
    """The text before the person, and the article between them."""
    match = re.search(r"\b(an?|the) $", before, re.IGNORECASE)
    return (before[: match.start()], match[1]) if match else (before, "")


def _plain_row(prompt: str) -> Row:
    return {"label": " ".join(prompt.split()), "pattern": _escaped(prompt), "article": "", "person": ""}


def _checked(prompt: str, before: str, article: str, person: str, after: str, label: str) -> Row:
    if not person:
        raise InputError(f"prompt {prompt!r}: nothing follows the group's place")
    pattern = f"{_escaped(before)}{{person}}{_escaped(after)}"
    return {"label": " ".join((label or person).split()), "pattern": pattern, "article": article, "person": person}


def _escaped(text: str) -> str:
    """Text that `str.format` gives back as it is."""
    return text.replace("{", "{{").replace("}", "}}")


# Vowels that sound like consonants (a unicorn, a European), and silent consonants (an honest, an hour).
_VOWEL = re.compile(
    r"(?!eu|ewe|one\b|once\b|uni(?!n|m)|us[aeu]|ut[eio]|ub[i]|uk|ur[aeiou])[aeiou]|hono|hones|hour|heir", re.IGNORECASE
)


def _agreeing(article: str, following: str) -> str:
    """ "a" or "an" as the next word asks, in the case it was written in; "the" and no article stay."""
    if article.lower() not in ("a", "an"):
        return article
    return article[0] + ("n" if _VOWEL.match(following) else "")


def write(row: Row, word: str = "") -> str:
    """The neutral prompt of a row, as it was written, or with a group's word before the person.

    Examples:
        >>> row = load_prompts("portraits", limit=1)[0]
        >>> write(row), write(row, "older")
        ('a photo of a doctor', 'a photo of an older doctor')
    """
    article = _agreeing(row["article"], word) if word else row["article"]
    pattern: str = row["pattern"]
    return pattern.format(person=" ".join(filter(None, (article, word, row["person"]))))


def group_prompts(row: Row, axis: Axis) -> list[str]:
    """One prompt for each group of the axis, in its order."""
    return [write(row, word) for word in axis.words]


class Samples(Sequence[Row]):
    """Every prompt with every seed, made on demand: all prompts with the first seed, then with the next.

    Rows have the prompts' columns and `prompt` (the neutral one), `seed` and `number` (the row's place).

    Args:
        prompts: Neutral prompts.
        seeds: Of each of them.
        numbers: Only the rows of these numbers.
    """

    def __init__(self, prompts: "Dataset", seeds: range, numbers: Sequence[int] | None = None) -> None:
        self.prompts, self.seeds = prompts, seeds
        self.numbers = range(len(prompts) * len(seeds)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        number = self.numbers[index]
        seed, row = divmod(number, len(self.prompts))
        return with_seed(self.prompts[row], self.seeds[seed], number)

    @property
    def labels(self) -> list[str]:
        """Each label once, in the order of the prompts."""
        return list(dict.fromkeys(self.prompts["label"]))

    def without(self, done: Iterable[int]) -> "Samples":
        """The same but for the rows of these numbers."""
        gone = set(done)
        return Samples(self.prompts, self.seeds, [number for number in self.numbers if number not in gone])

    def about(self) -> dict[str, Any]:
        """As kept in files: digest of the prompts, number of samples, first and last seed."""
        return {"prompts": digest(self.prompts), "samples": len(self), "seeds": [self.seeds[0], self.seeds[-1]]}


def with_seed(row: Row, seed: int, number: int) -> Row:
    """A prompt's row as a sample."""
    return {**row, "prompt": write(row), "seed": seed, "number": number}


def with_seeds(prompts: "Dataset", first: int, count: int) -> Samples:
    """Every prompt with seeds first, first + 1, ...: the samples of a run."""
    return Samples(prompts, range(first, first + count))


def generator(row: Row, purpose: str) -> torch.Generator:
    """A random generator that depends on the sample's prompt and seed alone; each purpose has its own."""
    key = f"{purpose}\0{row['prompt']}\0{row['seed']}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)


def noise(row: Row, shape: tuple[int, ...], purpose: str = "noise") -> Tensor:
    """Standard normal noise that depends on the sample's prompt and seed alone, not on batch, order or device."""
    # The dtype is given: Lightning changes the default in a run of another precision.
    return torch.randn(shape, generator=generator(row, purpose), dtype=torch.float32)


def digest(prompts: "Dataset") -> str:
    """A short digest of a prompt set, with the places of the groups' words."""
    text = "\n".join("\t".join((row["pattern"], row["article"], row["person"])) for row in prompts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
