"""A pipeline's own call walks the trajectory; visitors see it, compare predictions, and may change them.

    walk = Walk(model, rows, steps, guidance, visit=visit)
    def visit(call):                       at each call of the denoiser that sees the prompts
        f = call.predict()                 (B, D) for the prompts themselves
        f_g = call.compare(groups)         (K, B, D) for other prompts, at the same latents and timestep
        call.reply = f_g.mean(0)           what the pipeline is given instead
    walk.run()

Latents, scheduler, guidance and decoding stay the pipeline's: a call that is left alone gives its own pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.errors import InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.intercept import Left, Pass, Watcher, call_pipeline
from stereoclinic.pipelines.learn import Learnt, learnt_of
from stereoclinic.pipelines.memory import Portions, is_out_of_memory
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts import Row, generator, group_prompts

#: Some pictures of a call.
Part = slice | Sequence[int]
#: Tensors that are remembered by identity, so that they need not be read at every step.
REMEMBERED = 8


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
        return all(axis is None or _but(a, axis) == _but(b, axis) for a, b, axis in pairs)


def _but(leaf: Tensor, axis: int) -> tuple[int, ...]:
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


class Call:
    """One call of the denoiser in which it sees the prompts, at a step of a watched pipeline call.

    Predictions are (n, D): the denoiser's raw output, flattened, of as many pictures as were asked for; of channels
    that hold a variance beside the prediction, only those that the scheduler is given.

    Attributes:
        step: Steps done before this one.
        timestep: The scheduler's.
        count: B, the pictures in the call.
        reply: (B, D), what the pipeline is given as the prediction for the prompts; its own where this stays None.
        unguided: (B, D), the prediction without prompt, where the visitor made it on the way; saves a pass.
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
        """-1 where the pipeline steps with the negated prediction, None where with something else."""
        return self._walk.learnt.sign

    def latents(self, part: Part = slice(None)) -> Any:
        """The noisy latents of some pictures, as the denoiser sees them."""
        return self.arguments(None, part)[self._walk.learnt.latents]

    def conditional(self) -> int:
        """The block of rows that sees the prompts."""
        return self._blocks.index(True)

    def arguments(self, conditions: Conditions | None, part: Part, conditional: bool = True) -> dict[str, Any]:
        """The arguments of a pass on some pictures' conditional rows.

        Args:
            conditions: To be told in place of the call's own, one row a picture of the call; None for its own.
            part: Which pictures.
            conditional: False for the rows without prompt, which the call must hold.
        """
        block, samples = self._blocks.index(conditional), self._samples(part)
        rows = [block * self.count + i for i in samples]

        def change(path: tree.Path, leaf: Any) -> Any:
            return tree.take(leaf, self._axes[path], rows) if path in self._axes else leaf

        found = dict(tree.changed(self._given, change, self._axes))
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
            conditions: Of the other prompts, a row for each picture of the call.
            part: Which pictures.
            treated: Whether masks on the model act.
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
                f"{type(self._walk.model.pipe).__name__} tells its denoiser more or less without prompt than with one,"
                " so both do not go in one batch; use another target"
            )
        return self._together(every, part, True)

    def compare(
        self,
        every: Sequence[Conditions],
        part: Part = slice(None),
        unconditional: bool = False,
        passed: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Predictions (1 + K, n, D) or (K, n, D) that masks leave alone, in one batch where lengths agree.

        Args:
            every: K conditions.
            part: Which pictures.
            unconditional: Give the prediction without prompt too, first.
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
                "the pipeline predicts nothing without prompt at this guidance scale; give a higher --guidance, or"
                " another target"
            )
        return self.arguments(self._walk.unconditional, part)

    @property
    def has_unconditional(self) -> bool:
        """Whether the pipeline guides at this step by a prediction without prompt."""
        return self.guided or self._walk.unconditional is not None

    def own(self) -> Tensor:
        """The prediction (B, D) for the prompts, made on the way to the pipeline's own output."""
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


Visit = Callable[[Call], None]


class Walk:
    """Samples drawn, or only walked, by the pipeline's own call.

    Args:
        model: The pipeline.
        rows: B samples, each drawn from noise of its own `prompt` and `seed`.
        steps: Of the scheduler.
        guidance: Scale.
        prompts: What each picture is conditioned on; the rows' own prompts by default.
        visit: Called at each call of the denoiser that sees the prompts; with `Call.reply` it changes the prediction.
            May be set later, before `run`.
        portions: How many samples fit through the denoiser together.
        last: Leave the call after so many steps; None for all.
        stepped: Called after each step with the number of steps done.

    Attributes:
        learnt: What was learnt of the pipeline's calls.
        unconditional: Conditions without prompt, where they go through the denoiser in a call of their own.
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[Row],
        steps: int,
        guidance: float,
        prompts: Sequence[str] | None = None,
        visit: Visit | None = None,
        portions: Portions | None = None,
        last: int | None = None,
        stepped: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.model, self.rows, self.steps, self.guidance = model, list(rows), steps, guidance
        self.prompts = [row["prompt"] for row in rows] if prompts is None else list(prompts)
        self.visit, self.portions, self.last, self.stepped = visit, portions or Portions(), last, stepped
        self.count, self.learnt = len(self.rows), learnt_of(model, guidance, steps)
        self.unconditional: Conditions | None = None
        self.output: Any = None
        self._number = 0
        self._step = 0
        self._first: list[Any] = []  # what the conditional rows are told at the first step
        self._seen = 0  # steps in which the denoiser saw the prompts
        self._known: dict[tuple[int, ...], tuple[Any, tuple[bool, ...]]] = {}

    def encode(self, *prompts: Sequence[str]) -> list[Conditions]:
        """Conditions of other prompts for the same pictures: B rows for each set of B prompts."""
        flat = [prompt for each in prompts for prompt in each]
        own, none = encode(self.model, [*self.prompts, *flat], self.guidance, self.steps)
        if none is not None and self.learnt.apart:
            self.unconditional = none.take(range(self.count))
        return [own.take(range((k + 1) * self.count, (k + 2) * self.count)) for k in range(len(prompts))]

    def run(self, output: str = "latent") -> Any:
        """The pipeline's output, or None where the call was left early."""
        self._number = self._step = self._seen = 0
        self._first.clear()
        self._known.clear()
        generators = [generator(row, "noise") for row in self.rows]
        watcher = Watcher(self.model, self._called, self._stepped)
        return call_pipeline(self.model, watcher, self.prompts, generators, self.steps, self.guidance, output)

    def _stepped(self, step: int, prediction: Any) -> None:
        if self._seen != step:
            raise InputError(
                f"{type(self.model.pipe).__name__} shows its denoiser other prompts at step {step} than at the first,"
                " so the rows that see them cannot be told; this pipeline is not supported"
            )
        self.stepped(step)
        if self.last is not None and step >= self.last:
            raise Left

    def _called(self, watcher: Watcher, given: dict[str, Any]) -> Any:
        if watcher.steps != self._step:
            self._step, self._number = watcher.steps, 0
        blocks = self._blocks(given)
        self._number += 1
        self.output = None
        if any(blocks):
            self._seen = watcher.steps + 1
        if self.visit is None or not any(blocks):
            return self.whole(watcher, given, blocks)
        call = Call(self, watcher, given, blocks)
        self.visit(call)
        if call.reply is None:
            return self.whole(watcher, given, blocks) if self.output is None else self.output
        return self._replied(call, watcher, given, blocks)

    def _blocks(self, given: dict[str, Any]) -> tuple[bool, ...]:
        """Which blocks of B rows see the prompts, by what they are told: as in the first step, or as it was learnt.

        Raises:
            InputError: They are told something else than in the first step.
        """
        learnt, path = self.learnt, self.learnt.telling
        leaf, axis = tree.get(given, path), learnt.axes[path]
        count = learnt.rows(given) // self.count
        key = (count, *_identity(leaf))
        if key in self._known:
            return self._known[key][1]
        if tree.length(leaf, axis) != learnt.rows(given):
            return (False,) * count  # all rows are told the same
        own = [tree.take(leaf, axis, range(b * self.count, (b + 1) * self.count)) for b in range(count)]
        if self._step == 0:
            blocks = learnt.blocks(self._number, count)
            self._first += [each for each, conditional in zip(own, blocks, strict=True) if conditional]
        else:
            blocks = tuple(any(tree.same(each, before) for before in self._first) for each in own)
        if len(self._known) == REMEMBERED:
            self._known.clear()
        self._known[key] = leaf, blocks  # held, so that nothing else gets its identity
        return blocks

    def whole(self, watcher: Watcher, given: dict[str, Any], blocks: tuple[bool, ...]) -> Any:
        """The output of a call as the pipeline made it, parted where it does not fit in memory."""
        kept = list[Any]()

        def part(own: slice) -> Tensor:
            samples = range(self.count)[own]
            rows = [b * self.count + i for b in range(len(blocks)) for i in samples]
            conditional = tuple(each for each in blocks for _ in samples)
            what = Pass(watcher.steps, watcher.timestep, tuple(samples) * len(blocks), conditional, True, self.count)
            arguments = given
            if len(samples) < self.count:
                axes = self.learnt.axes_of(given)
                arguments = dict(
                    tree.changed(
                        given, lambda path, leaf: tree.take(leaf, axes[path], rows) if path in axes else leaf, axes
                    )
                )
            output = watcher.run(arguments, what)
            kept.append(output)
            rows_of: Tensor = tree.stacked(tree.sample_of(output)).unflatten(0, (len(blocks), -1))
            return rows_of

        if self.portions.most is None or self.portions.most >= self.count:
            try:
                part(slice(0, self.count))
                return kept[-1]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        found = torch.cat(self.portions.each(part, self.count), dim=1).flatten(0, 1)
        return tree.with_sample(kept[-1], tree.like(tree.sample_of(kept[-1]), found))

    def _replied(self, call: Call, watcher: Watcher, given: dict[str, Any], blocks: tuple[bool, ...]) -> Any:
        """The output in which the conditional rows are those that the visitor gave."""
        assert call.reply is not None
        if self.output is None:
            parts = [self._block(call, watcher, conditional) for conditional in blocks]
            flat = torch.stack([part.to(call.reply) for part in parts])
            empty = self.learnt.stub(self._number - 1, given)
            return self.learnt.put(empty, flat.flatten(0, 1))
        flat = self.learnt.flat(self.output).unflatten(0, (len(blocks), -1)).clone()
        flat[call.conditional()] = call.reply.to(flat)
        return self.learnt.put(self.output, flat.flatten(0, 1))

    def _block(self, call: Call, watcher: Watcher, conditional: bool) -> Tensor:
        """A block's rows: what the visitor gave, or else made now."""
        given = call.reply if conditional else call.unguided
        if given is not None:
            return given

        def part(own: slice) -> Tensor:
            return call.run(call.arguments(None, own, conditional=False), own, True, conditional=False)

        return torch.cat(self.portions.each(part, self.count))


def encode_groups(walk: Walk, rows: Sequence[Row], axes: Sequence[Axis]) -> list[list[Conditions]]:
    """Conditions of every group's prompts, by axis, for the samples of a walk."""
    prompts = [[group_prompts(row, axis) for row in rows] for axis in axes]
    pairs = [(own, k) for own, axis in zip(prompts, axes, strict=True) for k in range(len(axis))]
    every = walk.encode(*([each[k] for each in own] for own, k in pairs))
    return [[every.pop(0) for _ in range(len(axis))] for axis in axes]


def _identity(leaf: Any) -> tuple[int, ...]:
    """Tells one tensor, or list of tensors, from another without reading it."""
    if isinstance(leaf, Tensor):
        return (id(leaf), leaf._version)
    return tuple(number for each in leaf for number in (id(each), getattr(each, "_version", 0)))
