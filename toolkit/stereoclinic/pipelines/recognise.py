"""What a pass of the denoiser computes: its timestep, its images, and the rows that see a prompt.

A watched call says so itself. In a plain `pipe(...)`, the way in which the pipeline calls its denoiser was learnt when
the mask was loaded; the only question to the call is how often the same latents are repeated in its batch.
"""

import copy
import weakref
from typing import Any, Self

from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.intercept import PASS, Pass
from stereoclinic.pipelines.learn import Learnt, LearntCall, learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import Schedule, schedule_of

#: Guidance scale at which a pipeline that does not guide by default is learnt as well.
GUIDANCE = 5.0


class Recogniser:
    """Recognises what each pass of a denoiser is about.

    Args:
        target: A pipeline, a `Model` (with options of the pipeline's call), or a bare denoiser. A bare denoiser's
            timesteps count as the scheduler's, and all rows of its batches as conditional.
        guided: Whether the first half of each batch has no prompt; None to find out.

    Raises:
        InputError: The pipeline is not supported, see `Model` and `learnt_of`.
    """

    def __init__(self, target: Any, guided: bool | None = None) -> None:
        self.guided = guided
        self._learnt: Learnt | None = None
        self._schedule: Schedule | None = None
        self._pipe: weakref.ref[Any] | None = None
        self._guided: tuple[LearntCall, ...] = ()  # of a pipeline that does not guide by default
        #: The latest latents, the scheduler's timesteps then, and the number of calls before with both.
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
        """What the pass that begins is about; None where masks should not act.

        Raises:
            InputError: Its timestep is unknown, or whether its rows see the prompt.
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

        Otherwise images drawn from the same noise would be taken for the two halves of a guided batch.
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
    """Whether a batch is the same set of rows, repeated."""
    rows = tree.length(latents, axis)
    if rows % times:
        return False
    count = rows // times
    parts = [tree.take(latents, axis, range(i * count, (i + 1) * count)) for i in range(times)]
    return all(tree.same(parts[0], part) for part in parts[1:])
