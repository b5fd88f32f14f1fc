"""Prompts: who is asked for, neutrally and by group.

A prompt is a pattern with one place for a person: "a photo of {person}" and "doctor" make the neutral prompt "a photo
of a doctor" and the group prompt "a photo of a female doctor". Sets are `datasets.Dataset`s with columns `COLUMNS`.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.errors import InputError
from stereoclinic.occupations import PORTRAITS, WINOBIAS, WINOBIAS_TRAIN
from stereoclinic.reading import parquet_rows

COLUMNS = ("label", "pattern", "article", "person")
PLAIN, SUCCESSFUL = "a photo of a {group} {occupation}", "a photo of a successful {group} {occupation}"

#: Name -> occupations, and the template that they are put into.
BUILT_IN = {
    "portraits": PORTRAITS,
    "winobias": WINOBIAS,
    "winobias-successful": WINOBIAS,
    "winobias-train": WINOBIAS_TRAIN,
}
TEMPLATES = dict.fromkeys(BUILT_IN, PLAIN) | {"winobias-successful": SUCCESSFUL}

#: Characters of a prompt; text encoders read some three hundred.
LONGEST = 5000

_FORMATS = {".txt": "text", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_prompts(source: str | Path, limit: int | None = None) -> Dataset:
    """A built-in set, a .txt/.csv/.jsonl/.parquet file, or a hub data set by its id (its split "train", streamed).

    A table needs a column `prompt`; `occupation` (the person's noun, also the label results are grouped by) is used
    where it is there. Without it the person is what follows "of a", "of an" or "of the", or the prompt's {group}.

    Raises:
        InputError: Nothing there, empty, no `prompt` column, or a prompt in which no person can be found.
    """
    if str(source) in BUILT_IN:
        return occupation_prompts(BUILT_IN[str(source)][:limit], [TEMPLATES[str(source)]])
    else:
        rows = []
        for number, entry in enumerate(_open(source), start=1):
            prompt, occupation = entry["prompt"], entry.get("occupation")
            if not isinstance(prompt, str) or not isinstance(occupation, str | None):
                wrong = prompt if not isinstance(prompt, str) else occupation
                raise InputError(f"{source}: prompt {number} has {wrong!r} where text is expected")
            if len(prompt) > LONGEST or len(occupation or "") > LONGEST:
                raise InputError(f"{source}: prompt {number} has more than {LONGEST} characters; give one prompt a row")
            if prompt.strip():
                rows.append(_row(prompt.strip(), (occupation or "").strip()))
            if len(rows) == limit:  # the rest of a data set on the hub need not be fetched
                break
    if not rows:
        raise InputError(f"{source}: no prompts in it")
    # The same prompt twice would be the same noise and picture twice, counted as if it were more evidence.
    return Dataset.from_list(list({write(row): row for row in rows}.values()))


def occupation_prompts(names: Sequence[str], templates: Sequence[str] = (PLAIN,)) -> Dataset:
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
    return Dataset.from_list(
        [_row(template.replace("{occupation}", name), name) for name in names for template in templates]
    )


def _open(source: str | Path) -> Iterator[dict]:
    """The rows of a file or a hub data set, one by one."""
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{path} is a folder; --prompts takes a file ({', '.join(_FORMATS)}) or a set's name")
    is_file = path.exists() or path.suffix in _FORMATS
    if is_file:
        if path.suffix not in _FORMATS:
            raise InputError(f"{path}: unknown ending {path.suffix!r}; prompts are read from {', '.join(_FORMATS)}")
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
    try:
        if is_file:
            table: Any  # of rows
            if path.suffix == ".parquet":
                table = parquet_rows(path)
            else:
                table = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
            table = table.rename_column("text", "prompt") if path.suffix == ".txt" else table
        else:
            table = load_dataset(str(source), split="train", streaming=True)
        for entry in table:
            if "prompt" not in entry:
                raise InputError(f"{source}: no column `prompt`; it has {', '.join(map(str, entry))}")
            yield entry
    except InputError:
        raise
    except Exception as error:  # each format's reader has errors of its own, and meets them row by row
        if is_file:
            raise InputError(f"{path}: cannot be read as {path.suffix[1:]}: {_first_line(error)}") from error
        raise InputError(
            f"prompts {str(source)!r}: no built-in set ({', '.join(BUILT_IN)}), no file, and no data set that can be"
            f" reached ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _row(prompt: str, occupation: str = "") -> dict:
    """Part a prompt into what surrounds the person, the article, and the person's noun."""
    if "{group}" in prompt:
        before, after = prompt.split("{group}", 1)
        match = re.search(r"\b(an?|the) $", before, re.IGNORECASE)
        person = after.strip()
        # The article was written for some group's word; the neutral prompt needs the noun's own.
        article = _agreeing(match[1], person) if match else ""
        return _checked(prompt, before[: match.start()] if match else before, article, person, "", occupation)
    if occupation:
        match = re.search(rf"(?:\b(an?|the) )?\b({re.escape(occupation)})\b", prompt, re.IGNORECASE)
        if match is None:
            raise InputError(f"prompt {prompt!r} does not name its occupation {occupation!r}")
        before, after = prompt[: match.start()], prompt[match.end() :]
        return _checked(prompt, before, match[1] or "", match[2], after, occupation)
    match = re.search(r"\bof (?:(an?|the) )?(.+)$", prompt, re.IGNORECASE)
    if match is None:
        raise InputError(
            f"prompt {prompt!r}: no person found in it; write 'a photo of a ...', mark the place of the group's word"
            " with {group}, or add a column `occupation`"
        )
    before = prompt[: match.start(1) if match[1] else match.start(2)]
    return _checked(prompt, before, match[1] or "", match[2], "", "")


def _checked(prompt: str, before: str, article: str, person: str, after: str, label: str) -> dict:
    if not person:
        raise InputError(f"prompt {prompt!r}: nothing follows the group's place")
    before, after = (text.replace("{", "{{").replace("}", "}}") for text in (before, after))
    return {"label": label or person, "pattern": f"{before}{{person}}{after}", "article": article, "person": person}


# Vowels that sound like consonants (a unicorn, a European), and silent consonants (an honest, an hour).
_VOWEL = re.compile(
    r"(?!eu|ewe|one\b|once\b|uni(?!n|m)|us[aeu]|ut[eio]|ub[i]|uk|ur[aeiou])[aeiou]|hono|hones|hour|heir", re.IGNORECASE
)


def _agreeing(article: str, following: str) -> str:
    """ "a" or "an" as the next word asks, in the case it was written in; "the" and no article stay."""
    if article.lower() not in ("a", "an"):
        return article
    return article[0] + ("n" if _VOWEL.match(following) else "")


def write(row: dict, word: str = "") -> str:
    """The neutral prompt of a row, as it was written, or with a group's word before the person."""
    article = _agreeing(row["article"], word) if word else row["article"]
    return row["pattern"].format(person=" ".join(filter(None, (article, word, row["person"]))))


def group_prompts(row: dict, axis: Axis) -> list[str]:
    """One prompt for each group of the axis, in its order."""
    return [write(row, word) for word in axis.words]


def with_seeds(prompts: Dataset, first: int, count: int) -> Dataset:
    """Every prompt with seeds first, first + 1, ...: the samples of a run, with columns `prompt` and `seed` added."""
    rows = [{**row, "prompt": write(row), "seed": seed} for seed in range(first, first + count) for row in prompts]
    return Dataset.from_list(rows)


def generator(row: dict, purpose: str) -> torch.Generator:
    """A stream of random numbers that depends on the sample's prompt and seed alone; each purpose has its own."""
    key = f"{purpose}\0{row['prompt']}\0{row['seed']}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)


def noise(row: dict, shape: tuple[int, ...], purpose: str = "noise") -> Tensor:
    """Standard normal noise that depends on the sample's prompt and seed alone, not on batch, order or device."""
    # Lightning changes the default dtype in a run of another precision; the draw must stay the same.
    return torch.randn(shape, generator=generator(row, purpose), dtype=torch.float32)


def digest(prompts: Dataset) -> str:
    """Names a set of prompts in files made from it."""
    text = "\n".join(write(row) for row in prompts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
