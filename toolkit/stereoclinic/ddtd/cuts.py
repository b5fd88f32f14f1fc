"""Cuts through a network: what crosses each one, and whether that adds up.

                     cut                 the arguments and results of each block are made leaves of the graph, so that
    x --> block 1 --->|--> block 2 --+   each block is passed back by itself, and so is what lies between two blocks
              |       |              |
              +-skip--|--> block 3 <-+--> f

A cut lies before each block, in the order in which they run, and before the layers after them. All that reaches the
output from there on is measured: it enters the next block, waits for a later one (a skip connection), enters at a
block behind the cut (modulation, text), or is a constant (see `conservation.Audit`). So

    image + text tokens + skips + modulation + text + bias = <f, v>

Streams depend on the latents: the tokens of the image, of the text, or both in one sequence. Text states and modulation
are constants until they meet a stream; their marks tell which they are (`operations.follow`).
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from stereoclinic.ddtd.rules.operations import mark, mark_of, tensors
from stereoclinic.errors import InputError

#: What relevance is itemised by, in the order of a table.
ITEMS = ("image", "text_tokens", "tokens", "skips", "modulation", "text", "bias")
#: The items of a U-Net, and their names there.
_OF_UNETS = {"image": "hidden", "skips": "skips", "modulation": "time", "text": "text", "bias": "bias"}
#: In the names of arguments that steer a block and are not a part of what it adds up.
_FIXED = ("mask", "rotary", "rope", "freqs")


@dataclass(frozen=True)
class Cut:
    """What crosses one cut; the shares add up to the total, <f, v>.

    Attributes:
        before: The block that the cut lies before, or the layer after the last block.
        shares: Relevance by item; items that are 0 at every cut may be left out. `image` (in a U-Net `hidden`) enters
            the block, and so do `text_tokens`; `tokens` are both, where the split is not known. `skips` wait for a
            later block. `modulation` (`time`: time, guidance, pooled text) and `text` enter at blocks behind the cut.
            `bias` is of the constants behind it, and what layers with a rule of their own absorb.
        total: The target at the output.
    """

    before: str
    shares: dict[str, float]
    total: float

    @property
    def sum(self) -> float:
        return sum(self.shares.values())

    @property
    def error(self) -> float:
        """|sum - total| / total; infinite where the sum is not finite."""
        error = abs(self.sum - self.total) / self.total
        return error if math.isfinite(error) else math.inf


@dataclass
class Run:
    """One block's run."""

    name: str
    streams: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)  # item, argument, its leaf
    entering: list[tuple[str, Tensor]] = field(default_factory=list)  # "text" or "modulation", leaf
    made: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # result, its leaf


class Runs:
    """The runs of a network's blocks in one forward pass; hooks live inside the context.

    Attributes:
        blocks: The network's blocks, by name.
        runs: The blocks that ran, in order, and the layers that ran on a stream after the first of them.
        fault: Which value is not a number; None if all is well.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.blocks, self.unet = network, blocks_of(network), _is_unet(network)
        self.runs: list[Run] = []
        self.fault: str | None = None
        self._latents: list[Tensor] = []  # leaves of the network's first argument
        self._item: dict[int, str] = {}  # id of a leaf that a block made -> its stream
        self._is_image: Tensor | None = None  # (B, L), the image's tokens in a joint sequence; None if not known
        self._image: Tensor | None = None  # the latest tokens that are the image's alone
        self._open: list[Run | None] = []
        self._over = False  # the forward pass is: what runs now is recomputed under gradient checkpointing
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._handles.append(self.network.register_forward_pre_hook(self._start, with_kwargs=True))
        for name, module in (self.blocks | _other_layers(self.network, self.blocks)).items():
            self._handles += [
                module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True),
                module.register_forward_hook(self._leave),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        # Hooks on the graph hold the mode, and runs hold the graph: neither would ever be freed.
        self.runs.clear()
        self._latents.clear()

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ask about the latents: the first argument of every denoiser."""
        bound = _signature(module).bind(*args, **kwargs)
        first = next(iter(bound.arguments))
        bound.arguments[first] = tree_map_only(Tensor, _leaf, bound.arguments[first])
        self._latents = list(tensors(bound.arguments[first]))
        return bound.args, bound.kwargs

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace what enters a block by leaves."""
        asked = any(x.requires_grad for x in tensors((args, kwargs)))
        if any(self._open) or not (name in self.blocks or (self.runs and asked)):
            if not self._over:
                self._open.append(None)
            return None
        run, bound = Run(name), _signature(module).bind(*args, **kwargs)
        for place, (parameter, value) in enumerate(bound.arguments.items()):
            states = any(mark_of(x) == "text" and x.ndim > 2 for x in tensors(value))
            replace = partial(self._replace, run, parameter, place == 0, states)
            bound.arguments[parameter] = tree_map_only(Tensor, replace, value)
        if not self._over:  # a recomputation may end within a block
            self._open.append(run)
            self.runs.append(run)
        return bound.args, bound.kwargs

    def _replace(self, run: Run, parameter: str, first: bool, states: bool, x: Tensor) -> Tensor:
        """The leaf for a tensor in a block's arguments; rotary embeddings and masks stay themselves."""
        fixed = not x.is_floating_point() or any(word in parameter for word in _FIXED)
        if not (x.requires_grad or mark_of(x)) or (fixed and not x.requires_grad):
            return x
        leaf = _leaf(x)
        if not x.requires_grad:
            item = "text" if states else "modulation"  # pooled text is a vector, and goes with time
            mark(leaf, "" if states else "modulation")
            run.entering.append((item, leaf))
        elif not self._over:
            item = self._item_of(parameter, first, x)
            run.streams.append((item, x, leaf))
        if not self._over and self.fault is None and not bool(x.detach().isfinite().all()):
            name = _OF_UNETS.get(item, item) if self.unet else item
            self.fault = f"the {name} entering `{run.name}` holds NaN or infinity"
        return leaf

    def _item_of(self, parameter: str, first: bool, x: Tensor) -> str:
        """What a stream that enters a block is: the image, text tokens, both in one sequence, or a skip connection."""
        known = self._item.get(id(x))
        if known == "text_tokens":
            return known
        if x.ndim == 3:
            if self._is_image is not None and x.shape[:2] == self._is_image.shape:
                return "tokens"
            if self._image is not None and x.shape[1] > self._image.shape[1]:
                where = _find(self._image, x.detach())
                self._is_image = self._is_image if where is None else where
                if first or where is not None:
                    return "tokens"
        if not first:
            return "skips" if x.ndim != 3 or "skip" in parameter or known == "image" else "text_tokens"
        self._image = x.detach() if x.ndim == 3 else None
        return "image"

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace what a block made by leaves."""
        if self._over:
            return None
        run = self._open.pop()
        if run is None:
            if not self.runs and isinstance(output, Tensor) and output.requires_grad and output.ndim == 3:
                self._image = output.detach()  # embedded, and perhaps about to be joined with the text
            return None

        def replace(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x
            leaf = _leaf(x)
            run.made.append((x, leaf))
            item = self._item[id(leaf)] = _closest(x, run)
            if item == "image" and x.ndim == 3:
                self._image = x.detach()
            return leaf

        return tree_map_only(Tensor, replace, output)

    def balance(self, taken: Mapping[str, float], f: Tensor, total: float) -> tuple[Cut, ...]:
        """Propagate v = f block by block, from the last, and add up each cut.

        Args:
            taken: What constants take, by item; it grows meanwhile (`conservation.Audit`).
            f: The prediction.
            total: The target, <f, f>.
        """
        self._over = True
        leaves = [*self._latents, *(leaf for run in self.runs for _, leaf in run.made)]
        waiting: dict[int, Tensor] = {}  # id of a leaf -> what came back to it
        entered = dict.fromkeys(("modulation", "text"), 0.0)
        cuts: list[Cut] = []

        def between(values: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
            """Pass back what lies between blocks."""
            for leaf, g in zip(leaves, _back(values, grads, leaves, keep=True), strict=True):
                if g is not None:
                    waiting[id(leaf)] = waiting[id(leaf)] + g if id(leaf) in waiting else g

        between([f], [f.detach()])
        for run in reversed(self.runs):
            inputs = [*(leaf for *_, leaf in run.streams), *(leaf for _, leaf in run.entering)]
            grads = _back((made for made, _ in run.made), [waiting.pop(id(leaf), None) for _, leaf in run.made], inputs)
            shares = dict.fromkeys(ITEMS, 0.0)
            for (item, _, leaf), g in zip(run.streams, grads, strict=False):
                self._credit(shares, item, leaf, g)
            refined = any(self._item[id(leaf)] == "text_tokens" for _, leaf in run.made)
            later = dict(entered)
            for (item, leaf), g in zip(run.entering, grads[len(run.streams) :], strict=True):
                share = 0.0 if g is None else float(dot(leaf, g))
                entered[item] += share
                if item == "text" and refined:  # it is a stream from here on
                    shares["text_tokens"] += share
                else:
                    later[item] += share
            busy = any(item in ("image", "tokens") for item, *_ in run.streams)
            for leaf in leaves:
                item = self._item.get(id(leaf), "image")
                self._credit(shares, "skips" if busy and item == "image" else item, leaf, waiting.get(id(leaf)))
            for item, share in (*later.items(), *taken.items()):
                shares[item] += share
            cuts.append(Cut(run.name, shares, total))
            between((x for _, x, _ in run.streams), grads[: len(run.streams)])
        return self._shown(cuts[::-1])

    def _credit(self, shares: dict[str, float], item: str, leaf: Tensor, g: Tensor | None) -> None:
        if g is None:
            return
        if item == "tokens" and self._is_image is not None and leaf.shape[:2] == self._is_image.shape:
            image = self._is_image[..., None]
            shares["image"] += float(dot(leaf, g * image))
            shares["text_tokens"] += float(dot(leaf, g * ~image))
        else:
            shares[item] += float(dot(leaf, g))

    def _shown(self, cuts: list[Cut]) -> tuple[Cut, ...]:
        """The cuts before blocks and the one after the last; the items that there are."""
        last = max(i for i, cut in enumerate(cuts) if cut.before in self.blocks)
        cuts = cuts[: last + 2]
        always = ("image", "modulation", "text", "bias")
        names = {x: x for x in ITEMS if x in always or any(cut.shares[x] for cut in cuts)}
        names = _OF_UNETS if self.unet else names
        return tuple(Cut(cut.before, {name: cut.shares[x] for x, name in names.items()}, cut.total) for cut in cuts)


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a denoiser: the members of its lists of modules, and what a U-Net has before and between them.

    Raises:
        InputError: It has no list of blocks.
    """
    blocks = {
        f"{name}.{i}": module
        for name, modules in network.named_children()
        if isinstance(modules, nn.ModuleList)
        for i, module in enumerate(modules)
        if sum(hasattr(part, "weight") for part in module.modules()) > 1  # a list of single layers holds no blocks
    }
    if not blocks:
        raise InputError(f"{type(network).__name__} has no list of blocks: expected a denoiser, such as pipeline.unet")
    if _is_unet(network):
        blocks |= {name: x for name, x in network.named_children() if name in ("conv_in", "mid_block")}
    return blocks


def _is_unet(network: nn.Module) -> bool:
    return hasattr(network, "down_blocks") and hasattr(network, "up_blocks")


def _other_layers(network: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The other modules that a network itself runs."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_children():
        inside = module.named_children() if isinstance(module, nn.ModuleList | nn.ModuleDict) else ()
        found |= {f"{name}.{key}": x for key, x in inside} or {name: module}
    return {name: module for name, module in found.items() if name not in blocks}


def _signature(module: nn.Module) -> inspect.Signature:
    return inspect.signature(getattr(module, "_orig_mod", module).forward)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def _find(image: Tensor, tokens: Tensor) -> Tensor | None:
    """Where each sample's image tokens (B, N, C) stand among its tokens (B, L, C), as (B, L); None if nowhere."""
    if image.dtype != tokens.dtype or image.shape[0] != len(tokens) or image.shape[2] != tokens.shape[2]:
        return None
    count, where = image.shape[1], torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    for wanted, sample, found in zip(image, tokens, where, strict=True):
        starts = (sample == wanted[0]).all(1).nonzero().flatten().tolist()
        start = next((i for i in starts if torch.equal(sample[i : i + count], wanted)), None)
        if start is None:
            return None
        found[start : start + count] = True
    return where


def _closest(x: Tensor, run: Run) -> str:
    """The item of what a block made: that of the stream it was added to, the closest one of its shape."""
    came = [(item, leaf) for item, _, leaf in run.streams if item != "skips"]
    came += [("text_tokens", leaf) for item, leaf in run.entering if item == "text"]
    alike = [
        (float((x.detach() - leaf.detach()).square().mean()), item) for item, leaf in came if leaf.shape == x.shape
    ]
    return min(alike)[1] if alike else next((item for item, _ in came), "image")


def _back(
    values: Iterable[Tensor], grads: Iterable[Tensor | None], inputs: list[Tensor], keep: bool = False
) -> list[Tensor | None]:
    """Vector-Jacobian products, where there is a vector."""
    pairs = [(x, g) for x, g in zip(values, grads, strict=True) if g is not None and x.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, vectors = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, retain_graph=keep))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b>, in float32 or wider; in float64 where the device has it, as thousands of terms cancel."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    return (a.detach().to(wide) * b.detach().to(wide)).sum()
