"""Prompts: who is asked for, neutrally and by group.

A prompt is a pattern with one place for a person: "a photo of {person}" and "doctor" make the neutral prompt "a photo of a
doctor" and the group prompt "a photo of a female doctor". Sets are `datasets.Dataset`s with the columns of `COLUMNS`.
"""

import hashlib
import re
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.errors import InputError

COLUMNS = ("label", "pattern", "article", "person")

PORTRAITS = (
    "doctor nurse teacher librarian receptionist chef farmer firefighter mechanic pilot judge executive".split()
)
# The occupations of WinoBias (Zhao et al. 2018), those that pair evenly by labour statistics: 36 as used for images.
WINOBIAS = (
    "attendant cashier teacher nurse assistant secretary auditor cleaner receptionist clerk counselor designer "
    "hairdresser writer housekeeper baker accountant editor librarian sewer driver supervisor janitor cook mover "
    "laborer builder chief developer carpenter manager lawyer farmer salesperson physician guard"
).split()
BUILT_IN = {"portraits": PORTRAITS, "winobias": WINOBIAS}

_FORMATS = {".txt": "text", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_prompts(source: str | Path, limit: int | None = None) -> Dataset:
    """A built-in set, a .txt/.csv/.jsonl/.parquet file, or a hub data set.

    A table needs a column `prompt`; `occupation` (the person's noun, also the label results are grouped by) is used
    where it is there. Without it the person is what follows "of a" or "of an", or stands where the prompt says {group}.

    Raises:
        InputError: Nothing there, empty, no `prompt` column, or a prompt in which no person can be found.
    """
    if str(source) in BUILT_IN:
        rows = [_row(f"a photo of a {name}", name) for name in BUILT_IN[str(source)]]
    else:
        table = _open(source)
        rows = []
        for number, entry in enumerate(table, start=1):
            prompt = entry["prompt"]
            if not isinstance(prompt, str):
                raise InputError(f"{source}: prompt {number} is {prompt!r}, not text")
            if prompt.strip():
                rows.append(_row(prompt.strip(), entry.get("occupation")))
    rows = rows[:limit]
    if not rows:
        raise InputError(f"{source}: no prompts in it")
    return Dataset.from_list(rows)


def _open(source: str | Path):
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{path} is a folder; --prompts takes a file ({', '.join(_FORMATS)}) or a set's name")
    if path.exists() or path.suffix in _FORMATS:
        if path.suffix not in _FORMATS:
            raise InputError(f"{path}: unknown ending {path.suffix!r}; prompts are read from {', '.join(_FORMATS)}")
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        try:
            table = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
            table = table.rename_column("text", "prompt") if path.suffix == ".txt" else table
            first = next(iter(table), None)
        except Exception as error:  # each format's reader has errors of its own
            raise InputError(f"{path}: cannot be read as {path.suffix[1:]}: {_first_line(error)}") from error
    else:
        try:
            table = load_dataset(str(source), split="train", streaming=True)
            first = next(iter(table), None)
        except Exception as error:
            known = ", ".join(BUILT_IN)
            raise InputError(
                f"prompts {str(source)!r}: no built-in set ({known}), no file, and no data set that can be reached"
                f" ({_first_line(error)})"
            ) from error
    if first is None:
        raise InputError(f"{source}: no prompts in it")
    if "prompt" not in first:
        raise InputError(f"{source}: no column `prompt`; it has {', '.join(map(str, first))}")
    return table


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _row(prompt: str, occupation: str | None) -> dict:
    if "{group}" in prompt:
        before, after = prompt.split("{group}", 1)
        match = re.search(r"\b(an?) $", before)
        person = after.strip()
        pattern = f"{before[: match.start()] if match else before}{{person}}"
        return _checked(prompt, pattern, match is not None, person, occupation)
    if occupation:
        match = re.search(rf"(?:\b(an?) )?\b{re.escape(occupation)}\b", prompt, re.IGNORECASE)
        if match is None:
            raise InputError(f"prompt {prompt!r} does not name its occupation {occupation!r}")
        pattern = f"{prompt[: match.start()]}{{person}}{prompt[match.end() :]}"
        return _checked(prompt, pattern, match.group(1) is not None, occupation, occupation)
    match = re.search(r"\bof (?:(an?) )?(.+)$", prompt)
    if match is None:
        raise InputError(
            f"prompt {prompt!r}: no person found in it; write 'a photo of a ...', mark the place of the group's word"
            " with {group}, or add a column `occupation`"
        )
    before = prompt[: match.start(1) if match.group(1) else match.start(2)]
    return _checked(prompt, f"{before}{{person}}", match.group(1) is not None, match.group(2), None)


def _checked(prompt: str, pattern: str, article: bool, person: str, label: str | None) -> dict:
    if not person:
        raise InputError(f"prompt {prompt!r}: nothing follows the group's place")
    literal = pattern.replace("{person}", "\0").replace("{", "{{").replace("}", "}}").replace("\0", "{person}")
    return {"label": label or person, "pattern": literal, "article": article, "person": person}


def write(row: dict, word: str = "") -> str:
    """The neutral prompt of a row, or with a group's word before the person."""
    words = f"{word} {row['person']}".strip()
    article = ("an " if words[0].lower() in "aeiou" else "a ") if row["article"] else ""
    return row["pattern"].format(person=article + words)


def group_prompts(row: dict, axis: Axis) -> list[str]:
    """One prompt for each group of the axis, in its order."""
    return [write(row, word) for word in axis.words]


def with_seeds(prompts: Dataset, first: int, count: int) -> Dataset:
    """Every prompt with seeds first, first + 1, ...: the samples of a run, with columns `prompt` and `seed` added."""
    rows = [
        {**row, "prompt": write(row), "seed": seed} for seed in range(first, first + count) for row in prompts
    ]
    return Dataset.from_list(rows)


def noise(row: dict, shape: tuple[int, ...], purpose: str = "noise") -> Tensor:
    """Standard normal noise that depends on the sample's prompt and seed alone, not on batch, order or device."""
    key = f"{purpose}\0{row['prompt']}\0{row['seed']}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)


def digest(prompts: Dataset) -> str:
    """Names a set of prompts in files made from it."""
    text = "\n".join(write(row) for row in prompts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
