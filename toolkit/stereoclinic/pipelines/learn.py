"""What is learnt about a pipeline by comparing four of its calls, each stopped at the first step.

[p0]                the denoiser runs: the number of its calls a step, and its outputs
[p0, p0]            what is twice as long holds a row for each image
[p0, p1]            what differs depends on the prompt: the conditions. Rows that differ see the prompt
[p0, p1, p0, p1]    what only prompts of several lengths bring, such as a mask of their padding
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError, first_line
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.hooks import LAYOUTS
from stereoclinic.pipelines.intercept import Left, Watcher, announced, call_pipeline
from stereoclinic.pipelines.model import Model, check_scheduler
from stereoclinic.pipelines.sites import channels_of

#: Two prompts of different lengths and meanings.
PROMPTS = ("a photo of a doctor", "a photo of an old female doctor")


@dataclass(frozen=True)
class LearntCall:
    """One of the denoiser's calls in a step: which blocks of rows see the prompts, and its output."""

    blocks: tuple[bool, ...]
    output: Any


@dataclass(frozen=True)
class Learnt:
    """How a pipeline calls its denoiser.

    Attributes:
        axes: The dimension of rows in each argument that holds rows.
        conditions: Paths of the arguments that depend on the prompt.
        telling: The largest of them that has rows; it shows which rows see the prompt.
        latents: Name of the argument that holds the noisy latents.
        calls: Of a step, in order.
        used: The channels, or tokens (dimension 1), of an output that are the prediction.
        sign: 1 if the pipeline steps with the output, -1 if with the negated output, None if with neither.
    """

    axes: dict[tree.Path, int | None]
    conditions: frozenset[tree.Path]
    telling: tree.Path
    latents: str
    calls: tuple[LearntCall, ...]
    used: slice
    sign: int | None

    def rows(self, arguments: dict[str, Any]) -> int:
        """Rows in a call."""
        return tree.length(arguments[self.latents], self.axes[(self.latents,)])

    def axes_of(self, arguments: dict[str, Any]) -> dict[tree.Path, int | None]:
        """The dimensions of rows in one call, where an argument may be shared by all rows.

        Raises:
            InputError: A condition packs what belongs to several images.
        """
        rows, found = self.rows(arguments), dict[tree.Path, int | None]()
        for path, leaf in tree.leaves(arguments, self.axes):
            if path in self.axes and isinstance(leaf, Tensor | list | tuple):
                length = tree.length(leaf, self.axes[path])
                if length == rows:
                    found[path] = self.axes[path]
                elif length > 1 and path in self.conditions:
                    raise InputError(
                        f"{'.'.join(map(str, path))} packs what belongs to several images, so the rows of one image"
                        " are unknown; this pipeline is not supported"
                    )
        return found

    def blocks(self, number: int, count: int) -> tuple[bool, ...]:
        """Which of `count` blocks see the prompts in a step's call of this number; none in a call that is not known."""
        if number < len(self.calls) and len(self.calls[number].blocks) == count:
            return self.calls[number].blocks
        if number == 0:
            return (True,) if count == 1 else (*(False,) * (count - 1), True)
        return (False,) * count

    @property
    def guides(self) -> bool:
        """Whether the pipeline predicts without prompt as well."""
        return any(not all(call.blocks) for call in self.calls)

    @property
    def apart(self) -> bool:
        """Whether the rows without prompt go through the denoiser in a call of their own."""
        return any(not any(call.blocks) for call in self.calls)

    def flat(self, output: Any) -> Tensor:
        """The prediction in an output, (rows, D)."""
        sample = tree.stacked(tree.sample_of(output))
        return sample[:, self.used].flatten(1)

    def put(self, output: Any, flat: Tensor) -> Any:
        """An output with another prediction (rows, D) in it."""
        sample = tree.sample_of(output)
        whole = tree.stacked(sample).clone()
        whole[:, self.used] = flat.view(whole[:, self.used].shape).to(whole)
        return tree.with_sample(output, tree.like(sample, whole))

    def stub(self, number: int, arguments: dict[str, Any]) -> Any:
        """An output of zeros for a call, in place of running the denoiser."""
        return _zeros(self.calls[min(number, len(self.calls) - 1)].output, self.rows(arguments))


def _zeros(output: Any, rows: int) -> Any:
    sample = tree.sample_of(output)
    first = tree.stacked(sample)[:1]
    return tree.with_sample(output, tree.like(sample, torch.zeros_like(first).repeat(rows, *[1] * (first.ndim - 1))))


_KNOWN: "weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]]" = weakref.WeakKeyDictionary()


def remembered(model: Model, *key: Any) -> tuple[dict[tuple[Any, ...], Any], tuple[Any, ...]]:
    """What is known about a pipeline, and the key of a question: another scheduler or denoiser is another pipeline."""
    scheduler = model.pipe.scheduler
    adapter = type(getattr(inner(model.network), "encoder_hid_proj", None)).__name__  # of an IP-Adapter
    options = (sorted(model.call.items(), key=str), type(scheduler).__name__, dict(scheduler.config))
    whole = (*key, *options, id(model.network), str(model.device), str(model.dtype), adapter)
    return _KNOWN.setdefault(model.pipe, {}), (repr(whole),)


def learnt_of(model: Model, guidance: float, steps: int | None = None) -> Learnt:
    """What is learnt about a pipeline at a guidance scale; its calls are made once.

    Args:
        model: The pipeline.
        guidance: Scale.
        steps: Of the scheduler; the model's default if None.

    Raises:
        InputError: The pipeline refuses its options, its denoiser keeps a state between calls, no argument depends on
            the prompt, or the rows of an image are unknown.
    """
    known, key = remembered(model, "learnt", guidance)
    if key not in known:
        known[key] = _learn(model, guidance, steps or model.defaults.steps)
    found: Learnt = known[key]
    return found


@torch.no_grad()
def _learn(model: Model, guidance: float, steps: int) -> Learnt:
    check_scheduler(model.pipe.scheduler, model.name)
    outputs: list[Any] = []
    predictions: list[Tensor] = []
    one, two, other, four = (
        _record(model, prompts, guidance, steps, outputs, predictions)
        for prompts in (PROMPTS[:1], PROMPTS[:1] * 2, PROMPTS, PROMPTS * 2)
    )
    if not len(one) == len(two) == len(other) == len(four):
        kind = type(model.pipe).__name__
        raise InputError(f"model {model.name!r}: {kind} calls its denoiser more or less often as prompts change")
    latents = tree.first_name(model.network)
    pairs = [*zip(other, four, strict=True), *zip(one, two, strict=True)]
    axes = {path: axis for a, b in pairs for path, axis in tree.row_axes(a, b).items()}
    if (latents,) not in axes:
        raise InputError(f"model {model.name!r}: {latents}, the first argument of its denoiser, holds no row per image")
    conditions = frozenset(
        path
        for a, b in zip(two, other, strict=True)
        for path, leaf in tree.leaves(b, axes)
        if path != (latents,) and path[0] not in tree.TIMESTEP and not tree.same(leaf, _leaf(a, path))
    )
    telling, largest, calls = None, 0, []
    for arguments, output in zip(other, outputs, strict=True):
        rows = tree.length(arguments[latents], axes[(latents,)])
        blocks, sizes = _conditional_blocks(arguments, axes, conditions, rows)
        calls.append(LearntCall(blocks, output))
        for path, size in sizes.items():
            if size > largest:
                telling, largest = path, size
    if telling is None:
        raise InputError(
            f"model {model.name!r}: no argument of its denoiser depends on the prompt ({PROMPTS[0]!r} or"
            f" {PROMPTS[1]!r}); check its text encoder and tokenizer"
        )
    learnt = Learnt(axes, conditions, telling, latents, tuple(calls), *_used(calls, predictions[0]))
    number = next(i for i, call in enumerate(calls) if any(call.blocks))
    _check_function(model, learnt, calls[number], one[number])
    return learnt


def _record(
    model: Model, prompts: Sequence[str], guidance: float, steps: int, outputs: list[Any], predictions: list[Tensor]
) -> list[dict[str, Any]]:
    """The arguments of the denoiser's calls in the first step.

    The denoiser runs for a single prompt, and its outputs are added to `outputs`; for more prompts it gives zeros. What
    the scheduler is given is added to `predictions`.
    """
    seen: list[dict[str, Any]] = []

    def called(watcher: Watcher, arguments: dict[str, Any]) -> Any:
        seen.append(arguments)
        if len(prompts) > 1:
            output = outputs[min(len(seen), len(outputs)) - 1]
            return _zeros(output, len(prompts) * len(tree.stacked(tree.sample_of(output))))
        try:
            outputs.append(watcher.run(arguments))
        except Exception as error:
            if any(each._forward_hooks or each._forward_pre_hooks for each in model.network.modules()):
                raise  # from a hook, which is not the model's fault
            raise InputError(f"model {model.name!r}: its denoiser cannot run: {first_line(error)}") from error
        return outputs[-1]

    def stepped(step: int, prediction: Tensor) -> None:
        predictions.append(prediction)
        raise Left

    before = len(predictions)
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    call_pipeline(model, Watcher(model, called, stepped), prompts, generators, steps, guidance, learning=True)
    if len(predictions) == before:
        raise InputError(f"model {model.name!r}: {type(model.pipe).__name__} never asked its scheduler for a step")
    return seen


def _conditional_blocks(
    arguments: dict[str, Any], axes: tree.Axes, conditions: frozenset[tree.Path], rows: int
) -> tuple[tuple[bool, ...], dict[tree.Path, int]]:
    """Which blocks of two rows see two different prompts, and the size of each condition that shows it."""
    blocks, sizes = [False] * (rows // 2), dict[tree.Path, int]()
    for path in sorted(conditions & axes.keys(), key=str):
        leaf, axis = _leaf(arguments, path), axes[path]
        if leaf is None or tree.length(leaf, axis) != rows:
            continue
        for block in range(len(blocks)):
            if not tree.same(*(tree.take(leaf, axis, [2 * block + i]) for i in range(2))):
                blocks[block] = True
                sizes[path] = _size(leaf)
    return tuple(blocks), sizes


def _size(leaf: Any) -> int:
    return sum(map(_size, leaf)) if isinstance(leaf, list | tuple) else leaf.numel() if isinstance(leaf, Tensor) else 1


def _leaf(arguments: dict[str, Any], path: tree.Path) -> Any:
    """The leaf at a path; None where a call has none."""
    try:
        return tree.get(arguments, path)
    except (KeyError, IndexError, TypeError):
        return None


def _check_function(model: Model, learnt: Learnt, call: LearntCall, arguments: dict[str, Any]) -> None:
    """Call the denoiser on the row that sees the prompt alone, and on it twice; learn how rows run in its layers.

    Raises:
        InputError: Its predictions change: it keeps a state between calls, or treats a row by its place in the batch.
    """
    row, axes = call.blocks.index(True), learnt.axes_of(arguments)
    network, shapes, found = inner(model.network), list[dict[str, torch.Size]](), list[Tensor]()
    for rows in ([row], [row, row]):
        given = tree.of_rows(arguments, axes, rows)
        seen = dict[str, torch.Size]()
        shapes.append(seen)
        handles = [
            layer.register_forward_pre_hook(partial(_note, seen, name))
            for name, layer in network.named_modules()
            if channels_of(layer)
        ]
        try:
            with announced(network, None):
                found += learnt.flat(network(**given)).float().unbind(0)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise InputError(
                f"model {model.name!r}: its denoiser cannot run on the rows that see the prompt alone"
                f" ({first_line(error)}), so predictions cannot be compared; this pipeline is not supported"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    before = learnt.flat(call.output)[row].float()
    scale = float(before.abs().max())
    if any(float((each - before).abs().max()) > 0.02 * scale for each in found if each.isfinite().all()):
        raise InputError(
            f"model {model.name!r}: its denoiser gives another prediction when it is called again with the same"
            " arguments (it keeps a state between calls, drops out, or treats rows by their place in the batch), so"
            " predictions cannot be compared"
        )
    one, two = shapes
    layouts = {name: layout for name, shape in one.items() if (layout := _layout(shape, two.get(name, shape)))}
    network.__dict__[LAYOUTS] = layouts


def _note(seen: dict[str, torch.Size], name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
    if args:
        seen[name] = args[0].shape


def _layout(one: torch.Size, two: torch.Size) -> str | None:
    """How rows run in a layer's input, from its shapes for one row and two; None where they come first, one each."""
    if len(one) != len(two):
        return None
    longer = [d for d, (n, m) in enumerate(zip(one, two, strict=True)) if m == 2 * n]
    if longer == [1]:
        return "second"
    return "folded" if longer == [0] and one[0] != 1 else None


def _used(calls: Sequence[LearntCall], prediction: Any) -> tuple[slice, int | None]:
    """Which part of an output the scheduler is given, and with which sign."""
    call = next(call for call in calls if any(call.blocks))
    sample = tree.stacked(tree.sample_of(call.output))[call.blocks.index(True)].float()
    used = slice(None)
    if not isinstance(prediction, Tensor):
        return used, None
    given = prediction[0].float()
    if sample.ndim == given.ndim and sample.shape[1:] == given.shape[1:]:
        if len(sample) == 2 * len(given) and sample.ndim > 2:  # and a variance
            used = slice(0, len(given))
        elif len(sample) > len(given) and sample.ndim == 2:  # tokens of the text before those of the picture
            used = slice(-len(given), None)
    sample = sample[used]
    if sample.numel() != given.numel():
        return used, None
    alike = float(torch.nn.functional.cosine_similarity(sample.flatten(), given.flatten(), dim=0))
    return used, None if abs(alike) < 0.5 else int(alike > 0) or -1
