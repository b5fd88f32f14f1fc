"""Cuts through a UNet: what crosses each, what enters behind it, and whether that adds up.

A cut lies before each top-level block, in the order that data meets them. Everything that reaches the output from
there on passes the hidden state at the cut, a skip connection made before it, or enters at a block behind it: the
time embedding, the text, and the biases. So

    R(hidden at the cut) + R(skips across it) + sum over blocks behind it of R(time) + R(text) + R(biases) = <f, v>

                     cut                 each tensor is aliased where it enters a block, so that
    x --> block 1 --->|--> block 2 --+   the gradient of an alias counts the paths through that
              |       |              |   block alone
              +-skip--|--> block 3 <-+--> f

For a layer y = W x + b the bias share is <b, g_y>. Under a composite that gives layers rules of their own (epsilon,
gamma, z+) it is all that a layer absorbs, <y, g_y> - <x, g_x>: by gamma what its bias takes, by z+ and epsilon also
what finds no taker. The balance then tests everything but those layers.

References:
    Bach et al. 2015, On pixel-wise explanations by layer-wise relevance propagation, eq. 2: conservation.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stereoclinic.ddtd.adapters import find_adapted
from stereoclinic.errors import InputError


@dataclass(frozen=True)
class Cut:
    """What crosses one cut, in units of the target: hidden + skips + time + text + bias = total.

    Attributes:
        before: the block that the cut lies before.
        hidden: relevance of the hidden state that enters the block.
        skips: of the skip connections made before the cut and used behind it.
        time: of the time embedding (with SDXL's added conditions) where it enters behind the cut.
        text: of the text states where they enter behind the cut.
        bias: of the biases of all layers behind the cut, and what layers with a rule of their own absorb.
        total: the target at the output.
    """

    before: str
    hidden: float
    skips: float
    time: float
    text: float
    bias: float
    total: float

    @property
    def sum(self) -> float:
        return self.hidden + self.skips + self.time + self.text + self.bias

    @property
    def error(self) -> float:
        """|sum - total| / total; infinite where the sum is not finite."""
        error = abs(self.sum - self.total) / self.total
        return error if math.isfinite(error) else math.inf


@dataclass
class Ledger:
    """Aliases of what enters each block, and the bias shares, of one forward pass; hooks live inside the context."""

    unet: nn.Module
    ruled: bool  # the composite gives linear layers or convolutions a rule of their own
    hidden: dict[str, Tensor] = field(default_factory=dict)
    entering: list[tuple[str, str, Tensor]] = field(default_factory=list)  # (block, "time" or "text", alias)
    skips: list[tuple[int, int, Tensor]] = field(default_factory=list)  # (made by block, used by block, alias)
    bias: dict[str, float] = field(default_factory=dict)
    fault: str | None = None
    made: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # id of a tensor -> (block that made it, itself)
    handles: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = blocks_of(self.unet)
        self.order = {name: i for i, name in enumerate(self.blocks)}

    def __enter__(self) -> "Ledger":
        adapted = {layer for layer, _ in find_adapted(self.unet)}  # one layer each, whatever it has inside
        inside = {part for layer in adapted for part in layer.modules()} - adapted
        for name, modules in self.blocks.items():
            self.handles += [
                modules[0].register_forward_pre_hook(partial(self._alias, name), with_kwargs=True),
                modules[0].register_forward_hook(partial(self._remember, name)),
            ]
            for module in (inner for outer in modules for inner in outer.modules()):
                if self.ruled and module in inside:
                    continue
                if self.ruled and (module in adapted or isinstance(module, nn.Linear | nn.modules.conv._ConvNd)):
                    self.handles.append(module.register_forward_pre_hook(partial(self._watch_input, name)))
                    self.handles.append(module.register_forward_hook(partial(self._watch_output, name)))
                # Not `module.bias`: an adapter's wrapper shows the bias of the layer inside it.
                elif module._parameters.get("bias") is not None:
                    self.handles.append(module.register_forward_hook(partial(self._watch_bias, name)))
        return self

    def __exit__(self, *_: object) -> None:
        while self.handles:
            self.handles.pop().remove()
        # Hooks on the graph hold this object: if it held on to the graph, neither would ever be freed.
        for held in (self.hidden, self.entering, self.skips, self.made):
            held.clear()

    def _alias(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace what enters a block by aliases; time and text need no graph behind them."""
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        given = bound.arguments
        first = next(iter(given))
        given[first] = self.hidden[name] = self._through(given[first], f"the hidden state entering `{name}`")
        for argument, kind in (("temb", "time"), ("encoder_hidden_states", "text")):
            if given.get(argument) is not None:
                given[argument] = self._entering(name, kind, given[argument])
        if "res_hidden_states_tuple" in given:
            aliases = []
            for skip in given["res_hidden_states_tuple"]:
                if id(skip) not in self.made:
                    raise InputError(f"a skip connection of `{name}` is made by no block of this UNet")
                alias = self._through(skip, f"a skip connection entering `{name}`")
                self.skips.append((self.made[id(skip)][0], self.order[name], alias))
                aliases.append(alias)
            given["res_hidden_states_tuple"] = tuple(aliases)
        return bound.args, bound.kwargs

    def _through(self, x: Tensor, what: str) -> Tensor:
        if self.fault is None and not bool(x.detach().isfinite().all()):
            self.fault = f"{what} holds NaN or infinity"
        return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

    def _entering(self, name: str, kind: str, x: Any) -> Any:
        if isinstance(x, list | tuple):  # text beside an image prompt's states
            return type(x)(self._entering(name, kind, each) for each in x)
        alias = self._through(x.detach(), f"the {kind} entering `{name}`")
        self.entering.append((name, kind, alias))
        return alias

    def _remember(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for x in _tensors(output):
            # Kept alive, so that no other tensor is given its id.
            self.made.setdefault(id(x), (self.order[name], x))

    def _watch_bias(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (isinstance(output, Tensor) and output.requires_grad):
            return
        bias = cast(nn.Parameter, module._parameters["bias"])
        channels = 1 if isinstance(module, nn.GroupNorm | nn.modules.conv._ConvNd) else -1

        def add(g: Tensor) -> None:
            wide = torch.promote_types(g.dtype, torch.float32)
            self._absorb(name, dot(bias, g.movedim(channels, -1).to(wide).sum_to_size(bias.shape)))

        output.register_hook(add)

    def _watch_input(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        if not x.requires_grad:
            return None
        values, alias = x.detach(), x.view_as(x)
        alias.register_hook(lambda g: self._absorb(name, -dot(values, g)))
        return (alias, *args[1:])

    def _watch_output(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            values = output.detach()
            output.register_hook(lambda g: self._absorb(name, dot(values, g)))

    def _absorb(self, name: str, share: Tensor) -> None:
        self.bias[name] = self.bias.get(name, 0.0) + float(share)

    def balance(self, f: Tensor, total: float) -> tuple[Cut, ...]:
        """Propagate v = f, and add up each cut."""
        aliases = [*self.hidden.values(), *(skip for *_, skip in self.skips), *(x for *_, x in self.entering)]
        grads = torch.autograd.grad(f, aliases, f.detach(), allow_unused=True)
        relevance = [0.0 if g is None else float(dot(x, g)) for x, g in zip(aliases, grads, strict=True)]
        hidden = dict(zip(self.hidden, relevance, strict=False))
        skips = relevance[len(hidden) : len(hidden) + len(self.skips)]
        entered = list(zip(self.entering, relevance[len(hidden) + len(skips) :], strict=True))
        cuts = []
        for name, i in self.order.items():
            behind = {"time": 0.0, "text": 0.0}
            for (at, kind, _), r in entered:
                behind[kind] += r if self.order[at] >= i else 0.0
            cuts.append(
                Cut(
                    before=name,
                    hidden=hidden[name],
                    skips=sum(r for (made, used, _), r in zip(self.skips, skips, strict=True) if made < i <= used),
                    **behind,
                    bias=sum(share for at, share in self.bias.items() if self.order[at] >= i),
                    total=total,
                )
            )
        return tuple(cuts)


def blocks_of(unet: Any) -> dict[str, list[nn.Module]]:
    """The top-level blocks in the order that data meets them, the last with the layers after it.

    Raises:
        InputError: this is no UNet of diffusers.
    """
    if not all(hasattr(unet, name) for name in ("conv_in", "down_blocks", "up_blocks", "conv_out")):
        raise InputError(f"{type(unet).__name__} is no UNet2DConditionModel; pass a denoiser, or pipeline.unet")
    blocks: dict[str, list[nn.Module]] = {"conv_in": [unet.conv_in]}
    blocks |= {f"down_blocks.{i}": [block] for i, block in enumerate(unet.down_blocks)}
    if getattr(unet, "mid_block", None) is not None:
        blocks["mid_block"] = [unet.mid_block]
    blocks |= {f"up_blocks.{i}": [block] for i, block in enumerate(unet.up_blocks)}
    normed = getattr(unet, "conv_norm_out", None)
    return blocks | (
        {"conv_norm_out": [normed, unet.conv_out]} if normed is not None else {"conv_out": [unet.conv_out]}
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for each in values:
            yield from _tensors(each)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b>, in float32 or wider; in float64 where the device has it, as thousands of terms cancel."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    return (a.detach().to(wide) * b.detach().to(wide)).sum()
