"""The one set of hooks on sites: all code that watches or changes a layer's input uses these."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stereoclinic.errors import InputError
from stereoclinic.pipelines.intercept import pass_of
from stereoclinic.pipelines.sites import Site, calls_of

#: Name of the network's attribute that holds layer -> "second" (tokens come before rows) or "folded" (rows and some
#: positions in one dimension), for layers whose input does not begin with rows. Set by `learn`.
LAYOUTS = "_stereoclinic_layouts"

#: (layer's path, its input) -> what goes on, or None to leave it.
Act = Callable[[str, Tensor], Tensor | None]


@contextmanager
def with_gradients(network: nn.Module) -> Iterator[None]:
    """Put modules with a method under torch.no_grad, such as routed experts, in training mode: gradients pass then."""
    kinds = {type(module) for module in network.modules()}
    stopped = {
        kind for kind in kinds if any(getattr(each, "__code__", None) is _NO_GRAD for each in vars(kind).values())
    }
    found = [module for module in network.modules() if type(module) in stopped and not module.training]
    for module in found:
        module.training = True  # of this module alone, so that no dropout within it wakes up
    try:
        yield
    finally:
        for module in found:
            module.training = False


#: The code of every function that a context manager of torch decorates.
_NO_GRAD = torch.no_grad()(lambda: None).__code__


class Hooks:
    """Hands each layer's input to `act` within a `with` block, or between `attach` and `detach`.

    Args:
        network: The denoiser.
        layers: Module paths.
        act: Sees the input, and may give another.

    Raises:
        InputError: On entering, a path is not in the network.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], act: Act) -> None:
        self.network, self.layers, self.act = network, list(dict.fromkeys(layers)), act
        self.rows: int | None = None  # of a pass that is not watched
        self._handle: RemovableHandle | None = None
        self._places: dict[str, tuple[nn.Module, str, nn.Module, RemovableHandle]] = {}

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, *failure: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks on."""
        self._handle = self.network.register_forward_pre_hook(self.begin, with_kwargs=True)
        for name in self.layers:
            parent, _, leaf = name.rpartition(".")
            try:
                self._hook(name, self.network.get_submodule(parent), leaf)
            except (AttributeError, KeyError):
                self.detach()
                raise InputError(
                    f"site {name!r} is not in this {type(self.network).__name__}; find_sites(network) lists those that"
                    " are"
                ) from None

    def detach(self) -> None:
        """Take them off again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        while self._places:
            self._places.popitem()[1][-1].remove()

    @property
    def attached(self) -> bool:
        """Whether the hooks are on."""
        return self._handle is not None

    def begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each pass of the whole network, with its arguments."""

    def follow(self) -> None:
        """Move hooks to where the layers are now: peft puts a wrapper in a layer's place, and takes it away again."""
        for name, (parent, leaf, layer, handle) in list(self._places.items()):
            if parent._modules.get(leaf) is not layer:
                handle.remove()
                self._hook(name, parent, leaf)

    @property
    def rows_of_pass(self) -> int | None:
        """Rows of the pass under way; None where nobody says."""
        now = pass_of(self.network)
        return self.rows if now is None else len(now.samples)

    def _hook(self, name: str, parent: nn.Module, leaf: str) -> None:
        layer = parent._modules[leaf]
        assert layer is not None
        self._places[name] = (parent, leaf, layer, layer.register_forward_pre_hook(partial(self._see, name)))

    def _see(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        layout = self.network.__dict__.get(LAYOUTS, {}).get(name)
        if layout is None:
            new = self.act(name, x)
            return None if new is None else (new, *args[1:])
        if layout == "second":
            new = self.act(name, x.transpose(0, 1))
            return None if new is None else (new.transpose(0, 1), *args[1:])
        rows = self.rows_of_pass
        if not rows or len(x) % rows:
            return None  # a pass that is about nothing
        new = self.act(name, x.unflatten(0, (rows, -1)))
        return None if new is None else (new.flatten(0, 1), *args[1:])


class Inputs:
    """Inputs of layers in a pass: by path, and as `path#2`, ... where one pass runs a layer again.

    A layer that gets some rows at a time, as in chunked feed-forward, counts as run once for all of them.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def clear(self) -> None:
        """Forget them."""
        self._parts.clear()

    def add(self, layer: str, x: Tensor, rows: int | None) -> None:
        """Keep a layer's next input; `rows` are those of the whole pass, None where they are not known.

        During backward nothing is kept: that is a checkpoint's recomputation, whose tensors are not in the graph.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        runs = calls_of(self._parts, layer)
        if runs and rows and sum(map(len, self._parts[runs[-1]])) + len(x) <= rows:
            self._parts[runs[-1]].append(x)
        else:
            self._parts[f"{layer}#{len(runs) + 1}" if runs else layer] = [x]

    def whole(self) -> dict[str, Tensor]:
        """Each run's input, of all rows, in the order the layers ran."""
        return {key: _joined(parts) for key, parts in self._parts.items()}

    def grads(self, output: Tensor, cotangent: Tensor, retain: bool) -> dict[str, Tensor | None]:
        """Key -> the vector-Jacobian product of the output at that input; None where nothing arrives."""
        every = [part for parts in self._parts.values() for part in parts]
        found = iter(torch.autograd.grad(output, every, cotangent, retain_graph=retain, allow_unused=True))
        grads = dict[str, Tensor | None]()
        for key, parts in self._parts.items():
            own = [next(found) for _ in parts]
            some = any(each is not None for each in own)
            pairs = zip(own, parts, strict=True)
            grads[key] = _joined([torch.zeros_like(x) if g is None else g for g, x in pairs]) if some else None
        return grads


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Watch(Hooks):
    """Keeps the inputs of the sites' layers in the latest pass.

    An input that does not require grad is replaced by a leaf that does, so that relevance can be computed at it. Under
    `torch.no_grad` inputs are kept unchanged.
    """

    def __init__(self, network: nn.Module, sites: Sequence[Site]) -> None:
        self._inputs = Inputs()
        super().__init__(network, [site.layer for site in sites], self._keep)

    @property
    def activations(self) -> dict[str, Tensor]:
        """Layer -> its input, (B, ..., C) or (B, C, h, w), in the order they ran; `layer#2` where it ran again."""
        return self._inputs.whole()

    def begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs.clear()

    def _keep(self, name: str, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        self._inputs.add(name, x, self.rows_of_pass)
        return x

    def grads(self, output: Tensor, cotangent: Tensor, retain: bool) -> Mapping[str, Tensor | None]:
        """Layer -> the vector-Jacobian product of the output at its input; None where nothing arrives."""
        return self._inputs.grads(output, cotangent, retain)
