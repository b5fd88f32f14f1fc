"""What the denoiser is given of a prompt: encoded by the pipeline itself, whose denoiser is not run.

A text encoder of limited length silently drops the end of a long prompt. Such prompts are found by comparison:
what stands there changes nothing.
"""

import inspect
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stereoclinic.errors import InputError
from stereoclinic.io.text import SPACELESS
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.intercept import Left, Watcher, call_pipeline
from stereoclinic.pipelines.learn import Learnt, learnt_of
from stereoclinic.pipelines.model import Model


@dataclass(frozen=True)
class Conditions:
    """The denoiser's arguments that depend on the prompt, for one prompt per image.

    Args:
        rows: Path -> rows, one per image.
        shared: Path -> what all rows share.
        axes: Of the rows.
    """

    rows: dict[tree.Path, Any]
    shared: dict[tree.Path, Any]
    axes: tree.Axes

    def take(self, samples: Sequence[int]) -> "Conditions":
        """The conditions of some images, in this order."""
        rows = {path: tree.take(leaf, self.axes[path], samples) for path, leaf in self.rows.items()}
        return Conditions(rows, self.shared, self.axes)

    def differ(self, i: int, j: int) -> bool:
        """Whether two pictures' conditions differ."""
        pairs = ((leaf, self.axes[path]) for path, leaf in self.rows.items())
        return any(not tree.same(tree.take(x, axis, [i]), tree.take(x, axis, [j])) for x, axis in pairs)


@torch.no_grad()
def encode(
    model: Model, prompts: Sequence[str], guidance: float, steps: int | None = None
) -> tuple[Conditions, Conditions | None]:
    """The conditions of prompts, one row each, and the unconditional ones that go with them, if there are any.

    The pipeline encodes them itself; its denoiser is not run.

    Raises:
        InputError: The pipeline refuses them.
    """
    learnt, seen = learnt_of(model, guidance, steps), list[dict[str, Any]]()
    unique = list(dict.fromkeys(prompts))
    if len(unique) == 1:
        unique *= 2  # some pipelines treat a single prompt differently

    def called(watcher: Watcher, arguments: dict[str, Any]) -> Any:
        seen.append(arguments)
        return learnt.stub(len(seen) - 1, arguments)

    def stepped(step: int, prediction: Any) -> None:
        raise Left

    generators = [torch.Generator().manual_seed(0) for _ in unique]
    call_pipeline(model, Watcher(model, called, stepped), unique, generators, steps or model.defaults.steps, guidance)
    numbers = [unique.index(prompt) for prompt in prompts]
    own: Conditions | None = None
    none: Conditions | None = None
    for number, given in enumerate(seen):
        for block, conditional in enumerate(learnt.blocks(number, learnt.rows(given) // len(unique))):
            found = _conditions(learnt, given, [block * len(unique) + i for i in numbers])
            if conditional and own is None:
                own = found
            elif not conditional and none is None:
                none = found
    if own is None:
        raise InputError(f"{type(model.pipe).__name__} did not show its denoiser the prompts")
    return own, none


def _conditions(learnt: Learnt, given: dict[str, Any], rows: Sequence[int]) -> Conditions:
    found, shared, axes = dict[tree.Path, Any](), dict[tree.Path, Any](), learnt.axes_of(given)
    for path, leaf in tree.leaves(given, learnt.axes):
        if path in learnt.conditions:
            if path in axes:
                found[path] = tree.take(leaf, axes[path], rows)
            else:
                shared[path] = leaf
    return Conditions(found, shared, axes)


#: Tokens that the shortest text encoders read, and the most that pipelines add to a prompt.
SHORTEST, ADDED = 77, 8
#: Prompts that are encoded together.
TOGETHER = 32

#: A word; in scripts that write no spaces, a character.
_WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")


def cut_prompts(model: Model, prompts: Sequence[str], guidance: float, steps: int | None = None) -> list[str]:
    """The prompts whose last word the pipeline does not read. Short prompts cost nothing.

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
    """Bytes of a prompt that are surely read: a token stands for at least one."""
    parts = [getattr(part, "tokenizer", part) for part in model.pipe.components.values()]
    parameter = inspect.signature(type(model.pipe).__call__).parameters.get("max_sequence_length")
    lengths = [getattr(part, "model_max_length", None) for part in parts]
    lengths.append(model.call.get("max_sequence_length", parameter.default if parameter else None))
    return min([SHORTEST, *(length for length in lengths if isinstance(length, int))]) - ADDED
