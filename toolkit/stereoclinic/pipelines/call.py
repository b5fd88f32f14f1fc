"""One call of a watched denoiser: predictions for its own prompts and for others, at the same latents and timestep."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.conditions import Conditions
from stereoclinic.pipelines.intercept import Pass, Watcher
from stereoclinic.pipelines.learn import Learnt

if TYPE_CHECKING:
    from stereoclinic.pipelines.watch import Walk

#: Some pictures of a call.
Part = slice | Sequence[int]


class Call:
    """One call of the denoiser in which it sees the prompts, at a step of a watched pipeline call.

    Predictions are (n, D): the denoiser's raw output for n images, flattened, without channels that the scheduler is
    not given, such as a variance.

    Attributes:
        step: Steps done before this one.
        timestep: The scheduler's.
        count: B, the images in the call.
        reply: (B, D), set by the visitor to change the prediction for the prompts; None keeps the pipeline's own.
        unguided: (B, D), set by the visitor if it made the prediction without prompt; saves a pass.
    """

    def __init__(self, walk: "Walk", watcher: Watcher, given: dict[str, Any], blocks: tuple[bool, ...]) -> None:
        self._walk, self._watcher, self._given, self._blocks = walk, watcher, given, blocks
        self._axes = walk.learnt.axes_of(given)
        self.step, self.timestep, self.count = watcher.steps, watcher.timestep, walk.count
        self.reply: Tensor | None = None
        self.unguided: Tensor | None = None

    def _samples(self, part: Part) -> Sequence[int]:
        return range(self.count)[part] if isinstance(part, slice) else part

    @property
    def guided(self) -> bool:
        """Whether the same call holds the rows without prompt."""
        return not all(self._blocks)

    @property
    def sign(self) -> int | None:
        """1 if the pipeline steps with the prediction, -1 if with the negated one, None if with something else."""
        return self._walk.learnt.sign

    def latents(self, part: Part = slice(None)) -> Any:
        """The noisy latents of some images, as the denoiser gets them."""
        return self.arguments(None, part)[self._walk.learnt.latents]

    def conditional(self) -> int:
        """The block of rows that sees the prompts."""
        return self._blocks.index(True)

    def arguments(self, conditions: Conditions | None, part: Part, conditional: bool = True) -> dict[str, Any]:
        """The arguments of a pass on some pictures' conditional rows.

        Args:
            conditions: Used instead of the call's own, one row for each image of the call.
            part: Which images.
            conditional: False for the rows without prompt, which the call must hold.
        """
        block, samples = self._blocks.index(conditional), self._samples(part)
        found = tree.of_rows(self._given, self._axes, [block * self.count + i for i in samples])
        if conditions is not None:
            for path, leaf in conditions.shared.items():
                tree.put(found, path, leaf)
            for path, leaf in conditions.rows.items():
                tree.put(found, path, tree.take(leaf, conditions.axes[path], samples))
        return found

    def run(self, arguments: dict[str, Any], part: Part, treated: bool, conditional: bool = True) -> Tensor:
        """The prediction (n, D) of a pass."""
        samples = tuple(self._samples(part))
        what = Pass(self.step, self.timestep, samples, (conditional,) * len(samples), treated, self.count)
        return self._walk.learnt.flat(self._watcher.run(arguments, what))

    def predict(self, conditions: Conditions | None = None, part: Part = slice(None), treated: bool = True) -> Tensor:
        """The prediction (n, D) for the prompts themselves, or for others at the same latents.

        Args:
            conditions: Of the other prompts, one row for each image of the call.
            part: Which images.
            treated: Whether masks act.
        """
        return self.run(self.arguments(conditions, part), part, treated)

    def both(self, part: Part = slice(None)) -> Tensor:
        """The predictions (2 n, D) without prompt and for the prompts, in one pass.

        Raises:
            InputError: The pipeline runs without guidance, or the two cannot go in one batch.
        """
        every = [self.without_prompt(part), self.arguments(None, part)]
        if not _joinable(self._walk.learnt, *every):
            raise InputError(
                f"{type(self._walk.model.pipe).__name__} gives its denoiser other arguments without prompt than with"
                " one, so both do not fit in one batch; use another target"
            )
        return self._together(every, part, True)

    def compare(
        self,
        every: Sequence[Conditions],
        part: Part = slice(None),
        unconditional: bool = False,
        passed: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Predictions (1 + K, n, D) or (K, n, D) without masks, in one batch where lengths agree.

        Args:
            every: K conditions.
            part: Which images.
            unconditional: Return the prediction without prompt too, first.
            passed: Called after each pass.
        """
        asked = [self.arguments(each, part) for each in every]
        if unconditional:
            asked.insert(0, self.without_prompt(part))
        if all(_joinable(self._walk.learnt, asked[0], each) for each in asked[1:]):
            found = self._together(asked, part, False)
            passed()
            by_prompt: Tensor = found.unflatten(0, (len(asked), -1))
            return by_prompt
        apart = []
        for each in asked:
            apart.append(self.run(each, part, treated=False))
            passed()
        return torch.stack(apart)

    def _together(self, every: Sequence[dict[str, Any]], part: Part, treated: bool) -> Tensor:
        learnt, axes = self._walk.learnt, self._walk.learnt.axes_of(every[0])

        def change(path: tree.Path, leaf: Any) -> Any:
            return tree.joined([tree.get(each, path) for each in every], axes[path]) if path in axes else leaf

        rows = tuple(self._samples(part)) * len(every)
        what = Pass(self.step, self.timestep, rows, (True,) * len(rows), treated, self.count)
        return learnt.flat(self._watcher.run(dict(tree.changed(every[0], change, axes)), what))

    def without_prompt(self, part: Part = slice(None)) -> dict[str, Any]:
        """The arguments of a pass without prompt.

        Raises:
            InputError: The pipeline runs without guidance, so there is no such thing.
        """
        if self.guided:
            return self.arguments(None, part, conditional=False)
        if self._walk.unconditional is None:
            raise InputError(
                "the pipeline makes no prediction without prompt at this guidance scale; give a higher --guidance, or"
                " another target"
            )
        return self.arguments(self._walk.unconditional, part)

    @property
    def has_unconditional(self) -> bool:
        """Whether the pipeline guides at this step by a prediction without prompt."""
        return self.guided or self._walk.unconditional is not None

    def own(self) -> Tensor:
        """The prediction (B, D) for the prompts in the pipeline's own output."""
        if self._walk.output is None:
            self._walk.output = self._walk.whole(self._watcher, self._given, self._blocks)
        rows: Tensor = self._walk.learnt.flat(self._walk.output).unflatten(0, (len(self._blocks), -1))
        return rows[self.conditional()]


def _joinable(learnt: Learnt, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the rows of two calls' arguments can go in one."""
    axes = learnt.axes_of(a)
    if axes != learnt.axes_of(b):
        return False
    others = dict(tree.leaves(b, axes))
    for path, leaf in tree.leaves(a, axes):
        other: Any = others.get(path)
        axis = axes.get(path)
        if path not in axes:
            if leaf is not other and not tree.same(leaf, other):
                return False
        elif axis is not None and (_but(leaf, axis) != _but(other, axis) or leaf.dtype != other.dtype):
            return False
    return True


def _but(leaf: Tensor, axis: int) -> tuple[int, ...]:
    """The shape without one dimension."""
    return (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
