"""The pipeline's own call walks the trajectory; a visitor sees each step, compares predictions and may change them.

    walk = Walk(model, rows, steps, guidance, visit=visit)
    def visit(call):                       at each call of the denoiser that sees the prompts
        f = call.predict()                 (B, D) for the prompts themselves
        f_g = call.compare(groups)         (K, B, D) for other prompts, at the same latents and timestep
        call.reply = f_g.mean(0)           the pipeline gets this instead
    walk.run()

Latents, scheduler, guidance and decoding stay the pipeline's. Without a reply the images are the pipeline's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.conditions import Conditions, encode
from stereoclinic.pipelines.intercept import Left, Pass, Watcher, call_pipeline
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.memory import AdaptiveBatch, is_out_of_memory
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, generator, group_prompts

#: Tensors that are remembered by identity, so that they are not compared at every step.
REMEMBERED = 8

Visit = Callable[[Call], None]


class Walk:
    """Samples drawn, or only walked, by the pipeline's own call.

    Args:
        model: The pipeline.
        rows: B samples, each drawn from noise of its own `prompt` and `seed`.
        steps: Of the scheduler.
        guidance: Scale.
        prompts: What each image is conditioned on; the rows' own prompts by default.
        visit: Called at each call of the denoiser that sees the prompts; with `Call.reply` it changes the prediction.
            May be set later, before `run`.
        portions: How many samples fit through the denoiser together.
        last: Leave the call after this many steps; None for all.
        stepped: Called after each step with the number of steps done.

    Attributes:
        learnt: What was learnt about the pipeline's calls.
        unconditional: Conditions without prompt, where they have a call of the denoiser to themselves.
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[Row],
        steps: int,
        guidance: float,
        prompts: Sequence[str] | None = None,
        visit: Visit | None = None,
        portions: AdaptiveBatch | None = None,
        last: int | None = None,
        stepped: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.model, self.rows, self.steps, self.guidance = model, list(rows), steps, guidance
        self.prompts = [row["prompt"] for row in rows] if prompts is None else list(prompts)
        self.visit, self.portions, self.last, self.stepped = visit, portions or AdaptiveBatch(), last, stepped
        self.count, self.learnt = len(self.rows), learnt_of(model, guidance, steps)
        self.unconditional: Conditions | None = None
        self.output: Any = None
        self._number = 0
        self._step = 0
        self._first: list[Any] = []  # conditions of the conditional rows at the first step
        self._seen = 0  # steps in which the denoiser saw the prompts
        self._known: dict[tuple[int, ...], tuple[Any, tuple[bool, ...]]] = {}

    def encode(self, *prompts: Sequence[str]) -> list[Conditions]:
        """Conditions of other prompts for the same images: B rows for each set of B prompts."""
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
                " so the rows that see them are unknown; this pipeline is not supported"
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
        """Which blocks of B rows see the prompts: at the first step as learnt, later by their conditions."""
        learnt, path = self.learnt, self.learnt.telling
        leaf, axis = tree.get(given, path), learnt.axes[path]
        count = learnt.rows(given) // self.count
        key = (count, *_identity(leaf))
        if key in self._known:
            return self._known[key][1]
        if tree.length(leaf, axis) != learnt.rows(given):
            return (False,) * count  # all rows share one condition
        own = [tree.take(leaf, axis, range(b * self.count, (b + 1) * self.count)) for b in range(count)]
        if self._step == 0:
            blocks = learnt.blocks(self._number, count)
            self._first += [each for each, conditional in zip(own, blocks, strict=True) if conditional]
        else:
            blocks = tuple(any(tree.same(each, before) for before in self._first) for each in own)
        if len(self._known) == REMEMBERED:
            self._known.clear()
        self._known[key] = leaf, blocks  # holds the leaf, so that nothing else gets its identity
        return blocks

    def whole(self, watcher: Watcher, given: dict[str, Any], blocks: tuple[bool, ...]) -> Any:
        """The output of a call as the pipeline made it, in parts where it does not fit in memory."""
        kept = list[Any]()

        def part(own: slice) -> Tensor:
            samples = range(self.count)[own]
            rows = [b * self.count + i for b in range(len(blocks)) for i in samples]
            conditional = tuple(each for each in blocks for _ in samples)
            what = Pass(watcher.steps, watcher.timestep, tuple(samples) * len(blocks), conditional, True, self.count)
            some = len(samples) < self.count
            output = watcher.run(tree.of_rows(given, self.learnt.axes_of(given), rows) if some else given, what)
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
        """The output with the visitor's reply in its conditional rows."""
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
    prompts = ([group_prompts(row, axis)[k] for row in rows] for axis in axes for k in range(len(axis)))
    every = iter(walk.encode(*prompts))
    return [[next(every) for _ in axis.groups] for axis in axes]


def _identity(leaf: Any) -> tuple[int, ...]:
    """Identifies a tensor, or a list of tensors, without reading it."""
    if isinstance(leaf, Tensor):
        return (id(leaf), leaf._version)
    return tuple(number for each in leaf for number in (id(each), getattr(each, "_version", 0)))
