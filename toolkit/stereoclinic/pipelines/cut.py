"""Prompts that are too long for a pipeline to read to their end, found by what its denoiser is told of them.

A text encoder that reads so many tokens drops the rest without a word: what stands there then changes nothing.
"""

import inspect
import re
from bisect import bisect_left
from collections.abc import Sequence

from stereoclinic.pipelines.conditions import encode
from stereoclinic.pipelines.model import Model
from stereoclinic.words import SPACELESS

#: Tokens that the shortest text encoders read, and how many pipelines put round a prompt at most.
SHORTEST, ADDED = 77, 8
#: Prompts that are encoded together.
TOGETHER = 32

#: A word; in scripts that write no spaces, a character.
_WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")


def cut_prompts(model: Model, prompts: Sequence[str], guidance: float, steps: int | None = None) -> list[str]:
    """Those of the prompts whose last word the pipeline does not read. What is short costs nothing.

    Raises:
        InputError: The pipeline refuses them.
    """
    most, found = _surely_read(model), list[str]()
    long = [each for each in dict.fromkeys(prompts) if len(each.encode(errors="replace")) > most]
    long = [each for each in long if len(_ends(each)) > 1]
    for start in range(0, len(long), TOGETHER):
        some = long[start : start + TOGETHER]
        shorter = [each[: _ends(each)[-2]] for each in some]
        told, _ = encode(model, [*some, *shorter], guidance, steps)
        found += [each for i, each in enumerate(some) if not told.differ(i, len(some) + i)]
    return found


def first_unread(model: Model, prompt: str, guidance: float, steps: int | None = None) -> tuple[int, str]:
    """The number of the first word of a cut prompt that the pipeline does not read, counted from 1, and that word."""
    ends = _ends(prompt)

    def suffices(words: int) -> bool:
        told, _ = encode(model, [prompt, prompt[: ends[words - 1]]], guidance, steps)
        return not told.differ(0, 1)

    read = bisect_left(range(1, len(ends)), True, key=suffices) + 1
    return read + 1, prompt[ends[read - 1] : ends[read]].strip()


def _ends(prompt: str) -> list[int]:
    return [word.end() for word in _WORD.finditer(prompt)]


def _surely_read(model: Model) -> int:
    """Bytes of a prompt that are surely read: no token stands for less than one."""
    parts = [getattr(part, "tokenizer", part) for part in model.pipe.components.values()]
    parameter = inspect.signature(type(model.pipe).__call__).parameters.get("max_sequence_length")
    lengths = [getattr(part, "model_max_length", None) for part in parts]
    lengths.append(model.call.get("max_sequence_length", parameter.default if parameter else None))
    return min([SHORTEST, *(length for length in lengths if isinstance(length, int))]) - ADDED
