"""What a denoiser is told of a prompt: encoded by the pipeline itself, whose denoiser is not run.

What a pass of the denoiser is about: its timestep, its pictures, and the rows that see a prompt.

A watched call says so itself. In a plain `pipe(...)`, the way in which the pipeline calls its denoiser was learnt when
the mask was loaded; of the call it is asked only how often the same latents are repeated in its batch.

Prompts that are too long for a pipeline to read to their end, found by what its denoiser is told of them.

A text encoder that reads so many tokens drops the rest without a word: what stands there then changes nothing.
"""

import copy
import inspect
import re
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.io.text import SPACELESS
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.intercept import PASS, Left, Pass, Watcher, call_pipeline
from stereoclinic.pipelines.learn import Learnt, LearntCall, learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import Schedule, schedule_of


@dataclass(frozen=True)
class Conditions:
    """What the denoiser is told of one prompt each for some pictures, and that other prompts would change.

    Args:
        rows: Path -> rows, one a picture.
        shared: Path -> what all rows share.
        axes: Of the rows.
    """

    rows: dict[tree.Path, Any]
    shared: dict[tree.Path, Any]
    axes: tree.Axes

    def take(self, samples: Sequence[int]) -> "Conditions":
        """Those of some pictures, in this order."""
        rows = {path: tree.take(leaf, self.axes[path], samples) for path, leaf in self.rows.items()}
        return Conditions(rows, self.shared, self.axes)

    def __len__(self) -> int:
        return next((tree.length(leaf, self.axes[path]) for path, leaf in self.rows.items()), 0)

    def differ(self, i: int, j: int) -> bool:
        """Whether two pictures' conditions differ."""
        pairs = ((leaf, self.axes[path]) for path, leaf in self.rows.items())
        return any(not tree.same(tree.take(x, axis, [i]), tree.take(x, axis, [j])) for x, axis in pairs)

    def fits(self, other: "Conditions") -> bool:
        """Whether both may go through the denoiser in one batch."""
        if self.rows.keys() != other.rows.keys() or not tree.same([*self.shared.values()], [*other.shared.values()]):
            return False
        pairs = ((leaf, other.rows[path], self.axes[path]) for path, leaf in self.rows.items())
        return all(axis is None or but(a, axis) == but(b, axis) for a, b, axis in pairs)


def but(leaf: Tensor, axis: int) -> tuple[int, ...]:
    return (*leaf.shape[:axis], *leaf.shape[axis + 1 :])


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


#: At which guidance scale a pipeline that does not guide by default is watched, too.
GUIDANCE = 5.0


class Recogniser:
    """Tells what each pass of a denoiser is about.

    Args:
        target: A pipeline, a `Model` (which holds options of the pipeline's call), or a bare denoiser, whose timesteps
            are taken for the scheduler's, and whose batches for conditional as a whole.
        guided: Whether a batch holds rows without prompt first and as many with it; None to find out.

    Raises:
        InputError: The pipeline is not supported, see `Model` and `learnt_of`.
    """

    def __init__(self, target: Any, guided: bool | None = None) -> None:
        self.guided = guided
        self._learnt: Learnt | None = None
        self._schedule: Schedule | None = None
        self._pipe: weakref.ref[Any] | None = None
        self._guided: tuple[LearntCall, ...] = ()  # of a pipeline that guides only if asked to
        #: The latest latents, the steps that the scheduler is set up for, and which call with both it was.
        self._last: tuple[Any, Any, int] | None = None
        self._learn(target)

    def _learn(self, target: Any) -> None:
        if isinstance(target, nn.Module):
            return
        model = target if isinstance(target, Model) else Model(target, prepare=False)
        self._learnt = learnt_of(model, model.defaults.guidance)
        self._schedule = schedule_of(model, model.defaults.steps, model.defaults.guidance)
        if not self._learnt.guides and model.takes_guidance and model.defaults.guidance <= 1:
            self._guided = learnt_of(model, GUIDANCE).calls
        self._pipe = weakref.ref(model.pipe)

    def now(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass | None:
        """What the pass that begins is about; None for one that is to be left alone.

        Raises:
            InputError: Nobody says at which timestep it is, or whether its rows see the prompt.
        """
        if PASS in network.__dict__:
            found: Pass | None = network.__dict__[PASS]
            return found if found is not None and found.treated else None
        given = tree.named(network, args, kwargs)
        try:
            told = tree.timestep_of(given)
        except ValueError as error:
            raise InputError(f"{error}; a mask needs one timestep for the whole batch") from None
        latents = given.get(tree.first_name(network))
        if told is None or latents is None:
            raise InputError(f"{type(network).__name__} was called without a timestep, which a mask needs")
        timestep = told if self._schedule is None else self._schedule.timestep(told)
        axis = None if self._learnt is None else self._learnt.axes[(self._learnt.latents,)]
        blocks = self._blocks(latents, axis)
        rows = tree.length(latents, axis if self._learnt is not None else 0)
        count = rows // len(blocks)
        conditional = tuple(each for each in blocks for _ in range(count))
        return Pass(0, timestep, tuple(range(count)) * len(blocks), conditional, True, count)

    def _pipeline(self) -> Any:
        return None if self._pipe is None else self._pipe()

    def _blocks(self, latents: Any, axis: int | None) -> tuple[bool, ...]:
        """Which blocks of rows see the prompts."""
        if self.guided is not None or self._learnt is None:
            if not self.guided:
                return (True,)
            rows = len(latents)
            if rows % 2:
                raise InputError(
                    f"a guided batch of {rows} has no two halves; pass guided=False if there is no guidance"
                )
            return (False, True)
        for blocks in self._calls():
            if len(blocks) > 1 and _repeats(latents, axis, len(blocks)):
                return blocks
        return (self._alone(latents),)

    def _calls(self) -> list[tuple[bool, ...]]:
        """The blocks of a step's calls, without those that see no prompt where the pipeline says it does not guide.

        Without its word, pictures that are drawn from the same noise would be taken for the halves of a guided batch.
        """
        assert self._learnt is not None
        found = [call.blocks for call in self._guided or self._learnt.calls]
        if getattr(self._pipeline(), "do_classifier_free_guidance", None) is False:
            return [tuple(each for each in blocks if each) for blocks in found if any(blocks)]
        return found

    def _alone(self, latents: Any) -> bool:
        """Whether a call of one block sees the prompts: by its place among those with the same latents."""
        number, steps = 0, getattr(getattr(self._pipeline(), "scheduler", None), "timesteps", None)
        if self._last is not None and self._last[1] is steps and tree.same(self._last[0], latents):
            number = self._last[2] + 1
        kept = latents.clone() if isinstance(latents, Tensor) else [each.clone() for each in latents]
        self._last = kept, steps, number
        calls = self._calls()
        return calls[number][0] if number < len(calls) and len(calls[number]) == 1 else number == 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        twin._last = None
        copied = memo.get(id(self._pipeline()))
        if copied is not None:  # with its pipeline
            twin._pipe = weakref.ref(copied)
        return twin


def _repeats(latents: Any, axis: int | None, times: int) -> bool:
    """Whether a batch holds the same rows so many times, one set after the other."""
    rows = tree.length(latents, axis)
    if rows % times:
        return False
    count = rows // times
    parts = [tree.take(latents, axis, range(i * count, (i + 1) * count)) for i in range(times)]
    return all(tree.same(parts[0], part) for part in parts[1:])


def network_of(target: Any) -> nn.Module:
    """The denoiser of a model or a pipeline, or the denoiser itself, as it was before `torch.compile` wrapped it.

    Raises:
        InputError: There is none.
    """
    return tree.inner(outer_network(target))


def outer_network(target: Any) -> nn.Module:
    """As `network_of`, but as it is in the pipeline.

    Raises:
        InputError: There is none.
    """
    if isinstance(target, nn.Module):
        return target
    if isinstance(target, Model):
        return target.network
    found = getattr(target, "transformer", None)
    found = found if found is not None else getattr(target, "unet", None)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"cannot damp a {type(target).__name__}; expected a diffusers pipeline with a U-Net or a transformer, or"
            " the denoiser itself"
        )
    return found


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
