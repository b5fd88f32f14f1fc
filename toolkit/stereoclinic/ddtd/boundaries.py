"""The blocks of a network as they run: what enters each and what each makes, as leaves of the graph.

                     cut                 a leaf for each argument and result, so that one block, and what lies
    x --> block 1 --->|--> block 2 --+   between two, is passed back by itself; which stream a leaf belongs to
              |       |              |   is learnt on the way, from where it came and what it holds
              +-skip--|--> block 3 <-+--> f

A stream is what depends on the latents: the image's tokens, the text's, both in one sequence, a skip connection. Text
states and modulation are constants until they meet it; they are known by their marks (`operations.follow`).
"""

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from stereoclinic.ddtd.rules.operations import mark, mark_of, tensors
from stereoclinic.errors import InputError

#: In the names of arguments that steer a block and are no part of what it adds up, though text may decide on them.
_FIXED = ("mask", "rotary", "rope", "freqs")
_WORDS = {"image": "hidden state", "tokens": "hidden state", "text_tokens": "text", "skips": "skip connection"}


@dataclass
class Run:
    """One block's run."""

    name: str
    streams: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)  # item, what came, its leaf
    entering: list[tuple[str, Tensor]] = field(default_factory=list)  # "text" or "modulation", leaf
    made: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # result, its leaf


class Runs:
    """The runs of a network's blocks in one forward pass; hooks live inside the context.

    Attributes:
        blocks: the network's blocks, by name.
        unet: whether it is a U-Net.
        runs: the blocks that ran, in order, and the layers that ran on a stream after the first of them.
        latents: the leaves of the network's first argument.
        item: id of a leaf that a block made -> the stream it belongs to.
        is_image: (B, L), which tokens of a sequence that holds the text's too are the image's; None if not known.
        fault: which value is not a number; None if all is well.

    Args:
        network: a denoiser's network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.blocks, self.unet = network, blocks_of(network), _is_unet(network)
        self.runs: list[Run] = []
        self.latents: list[Tensor] = []
        self.item: dict[int, str] = {}
        self.is_image: Tensor | None = None
        self.fault: str | None = None
        self._image: Tensor | None = None  # the latest tokens that are the image's alone
        self._open: list[Run | None] = []
        self._passed = False  # the forward pass is over: what runs now is recomputed under gradient checkpointing
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Runs":
        self._handles.append(self.network.register_forward_pre_hook(self._start, with_kwargs=True))
        for name, module in (self.blocks | _layers_of(self.network, self.blocks)).items():
            self._handles += [
                module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True),
                module.register_forward_hook(partial(self._leave, name)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        # Hooks on the graph hold the mode, and runs hold the graph: neither would ever be freed.
        self.runs.clear()
        self.latents.clear()

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ask about the latents: the first argument of every denoiser."""
        bound = _signature(module).bind(*args, **kwargs)
        first = next(iter(bound.arguments))
        bound.arguments[first] = tree_map_only(Tensor, _leaf, bound.arguments[first])
        self.latents = list(tensors(bound.arguments[first]))
        return bound.args, bound.kwargs

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace what enters a block by leaves."""
        asked = any(x.requires_grad for x in tensors((args, kwargs)))
        if any(self._open) or not (name in self.blocks or (self.runs and asked)):
            if not self._passed:
                self._open.append(None)
            return None
        run, bound = Run(name), _signature(module).bind(*args, **kwargs)
        for place, (parameter, value) in enumerate(bound.arguments.items()):
            states = any(mark_of(x) == "text" and x.ndim > 2 for x in tensors(value))
            replace = partial(self._replace, run, parameter, place == 0, states)
            bound.arguments[parameter] = tree_map_only(Tensor, replace, value)
        if not self._passed:  # a recomputation may end within a block
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
            mark(leaf, "modulation" if item == "modulation" else "")
            run.entering.append((item, leaf))
        elif not self._passed:
            item = self._item_of(parameter, first, x)
            run.streams.append((item, x, leaf))
        if self._passed:
            return leaf
        if self.fault is None and not bool(x.detach().isfinite().all()):
            word = "time" if item == "modulation" and self.unet else _WORDS.get(item, item)
            self.fault = f"the {word} entering `{run.name}` holds NaN or infinity"
        return leaf

    def _item_of(self, parameter: str, first: bool, x: Tensor) -> str:
        """What a stream that enters a block is: the image, text tokens, both in one sequence, or a skip connection."""
        known = self.item.get(id(x))
        if known == "text_tokens":
            return known
        if x.ndim == 3:
            if self.is_image is not None and x.shape[:2] == self.is_image.shape:
                return "tokens"
            if self._image is not None and x.shape[1] > self._image.shape[1]:
                where = _find(self._image, x.detach())
                self.is_image = self.is_image if where is None else where
                if first or where is not None:
                    return "tokens"
        if not first:
            return "skips" if x.ndim != 3 or "skip" in parameter or known == "image" else "text_tokens"
        self._image = x.detach() if x.ndim == 3 else None
        return "image"

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace what a block made by leaves."""
        if self._passed:
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
            item = self.item[id(leaf)] = _closest(x, run)
            if item == "image" and x.ndim == 3:
                self._image = x.detach()
            return leaf

        return tree_map_only(Tensor, replace, output)

    def end(self) -> None:
        """The forward pass is over."""
        self._passed = True


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a denoiser: what its lists of modules hold, and what a U-Net has before and between them.

    Raises:
        InputError: it has no list of blocks.
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


def _layers_of(network: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
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
    for own, sample, mine in zip(image, tokens, where, strict=True):
        starts = (sample == own[0]).all(1).nonzero().flatten().tolist()
        start = next((i for i in starts if torch.equal(sample[i : i + count], own)), None)
        if start is None:
            return None
        mine[start : start + count] = True
    return where


def _closest(x: Tensor, run: Run) -> str:
    """The item of what a block made: that of the stream it was added to, the closest one of its shape."""
    came = [(item, leaf) for item, _, leaf in run.streams if item != "skips"]
    came += [("text_tokens", leaf) for item, leaf in run.entering if item == "text"]
    alike = [
        (float((x.detach() - leaf.detach()).square().mean()), item) for item, leaf in came if leaf.shape == x.shape
    ]
    return min(alike)[1] if alike else next((item for item, _ in came), "image")
