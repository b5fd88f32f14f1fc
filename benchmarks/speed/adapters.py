"""Implementations of relevance propagation, each set up on a UNet.

A pass gives the relevance of <f, f held constant>, with f the prediction, at the latents, the text states and the
sinusoids of the timestep. A set-up is a context manager that leaves the UNet unchanged. To add an implementation, write
a set-up and give it a row in `PEERS`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from problems import Problem
from torch import Tensor, nn

from stereoclinic.ddtd.propagate import propagate

Leaves = tuple[Tensor, Tensor, Tensor]  # latents (B, C, h, w), text states (B, L, D), sinusoids (B, E)
# One pass: the three relevances, and the prediction.
Pass = Callable[[], tuple[Leaves, Tensor]]
Setup = Callable[[Problem], AbstractContextManager[Pass]]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


@contextmanager
def sinusoids(network: nn.Module, wrap: Callable[[Tensor], Tensor] = leaf) -> Iterator[list[Tensor]]:
    """Make the timestep's sinusoids an input with relevance; they are in the list after a pass."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept[:] = [wrap(output.to(network.dtype))]
        return kept[0]

    handle = network.time_proj.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def times_gradient(problem: Problem, kept: list[Tensor]) -> tuple[Leaves, Tensor]:
    """Input times gradient, under the rules that are installed."""
    latents, states = leaf(problem.latents), leaf(problem.states)
    prediction = problem.predict(latents, states)
    leaves = (latents, states, kept[0])
    grads = torch.autograd.grad(prediction, leaves, prediction.detach(), allow_unused=True)
    relevance = tuple(torch.zeros_like(x) if g is None else x.detach() * g for x, g in zip(leaves, grads, strict=True))
    return relevance, prediction.detach()


@contextmanager
def plain(problem: Problem) -> Iterator[Pass]:
    with sinusoids(problem.network) as kept:
        yield lambda: times_gradient(problem, kept)


@contextmanager
def ours(problem: Problem, composite: str) -> Iterator[Pass]:
    with sinusoids(problem.network) as kept:

        def run() -> tuple[Leaves, Tensor]:
            with propagate(composite, model=problem.network):
                return times_gradient(problem, kept)

        yield run


@contextmanager
def zennit(problem: Problem, rule: str) -> Iterator[Pass]:
    """zennit's hooks turn the gradient itself into relevance. Norms are passed, as zennit does for BatchNorm. Functions
    (residual sums, gated products, attention) are invisible to hooks and keep their gradient."""
    without_torchvision()
    from zennit.composites import LayerMapComposite, layer_map_base
    from zennit.rules import Epsilon, Gamma, Pass, ZPlus
    from zennit.types import Convolution

    class PassNorm(Pass):
        def backward(self, module: nn.Module, grad_input: Any, grad_output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return grad_output[:1]  # torch's norms also return mean and rstd

    convolution = {"epsilon": Epsilon, "gamma": Gamma, "z+": ZPlus}[rule]()
    norms = ((nn.GroupNorm, nn.LayerNorm), PassNorm())
    composite = LayerMapComposite([*layer_map_base(), norms, (Convolution, convolution), (nn.Linear, Epsilon())])
    composite.register(problem.network)

    def run() -> tuple[Leaves, Tensor]:
        latents, states = leaf(problem.latents), leaf(problem.states)
        prediction = problem.predict(latents, states)
        leaves = (latents, states, kept[0])
        relevance = torch.autograd.grad(prediction, leaves, prediction.detach().square(), allow_unused=True)
        return tuple(
            torch.zeros_like(x) if r is None else r for x, r in zip(leaves, relevance, strict=True)
        ), prediction

    try:
        with sinusoids(problem.network) as kept:
            yield run
    finally:
        composite.remove()


class Scalar(nn.Module):
    """A UNet as the function that captum expects: positional inputs, one number per sample."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.network, self.problem = problem.network, problem
        self.prediction = torch.empty(0)

    def forward(self, latents: Tensor, states: Tensor, times: Tensor) -> Tensor:
        with sinusoids(self.network, lambda _: times):
            self.prediction = self.problem.predict(latents, states)
        return (self.prediction * self.prediction.detach()).flatten(1).sum(1)


@contextmanager
def captum(problem: Problem) -> Iterator[Pass]:
    """captum needs a rule for every layer that it does not know; those get its epsilon rule, or identity for SiLU."""
    from captum.attr import LRP
    from captum.attr._core.lrp import SUPPORTED_LAYERS_WITH_RULES
    from captum.attr._utils.lrp_rules import EpsilonRule, IdentityRule

    model = Scalar(problem)
    for module in model.modules():
        if not list(module.children()) and type(module) not in SUPPORTED_LAYERS_WITH_RULES:
            module.rule = IdentityRule() if isinstance(module, nn.SiLU | nn.Dropout) else EpsilonRule()
    times = problem.network.time_proj(problem.given["timestep"]).to(problem.network.dtype)
    yield lambda: (LRP(model).attribute((problem.latents, problem.states, times)), model.prediction)


@contextmanager
def lxt(problem: Problem, attention: str) -> Iterator[Pass]:
    """LXT's rules on the modules of diffusers that they fit. GroupNorm has no rule there and keeps its gradient."""
    without_torchvision()
    # Its table of language models does not import under every version of transformers, and is not used here.
    sys.modules.setdefault("lxt.efficient.models", Anything("lxt.efficient.models"))
    from lxt.efficient.patches import layer_norm_forward, non_linear_forward, patch_method
    from lxt.efficient.rules import divide_gradient, identity_rule_implicit, stop_gradient

    def gelu(module: GEGLU, gate: Tensor) -> Tensor:
        return identity_rule_implicit(module.original_gelu, gate)

    scores = {"attnlrp": partial(divide_gradient, factor=4), "cp": stop_gradient}[attention]
    values = {"attnlrp": partial(divide_gradient, factor=2), "cp": unchanged}[attention]
    originals = [(nn.LayerNorm, "forward"), (nn.SiLU, "forward"), (GEGLU, "gelu")]
    before = [(kind, name, getattr(kind, name)) for kind, name in originals]
    patch_method(layer_norm_forward, nn.LayerNorm)
    patch_method(non_linear_forward, nn.SiLU, keep_original=True)
    patch_method(gelu, GEGLU, "gelu", keep_original=True)
    handles = []
    for module in problem.network.modules():
        if isinstance(module, Attention):
            handles += [each.register_forward_hook(on_output(scores)) for each in (module.to_q, module.to_k)]
            handles.append(module.to_v.register_forward_hook(on_output(values)))
        elif isinstance(module, GEGLU):
            handles.append(module.register_forward_hook(on_output(partial(divide_gradient, factor=2))))
    try:
        with sinusoids(problem.network) as kept:
            yield lambda: times_gradient(problem, kept)
    finally:
        for handle in handles:
            handle.remove()
        for kind, name, original in before:
            setattr(kind, name, original)


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


def on_output(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    return lambda module, args, output: function(output)


@contextmanager
def autolrp(problem: Problem, preset: str) -> Iterator[Pass]:
    import autolrp as library

    extra = {
        "epsilon, cp": library.CPLRP,
        "epsilon, attnlrp": library.ATTNLRP,
        "z+, cp": library.CPLRP | {"ConvolutionBackward": "zplus"},
        "gamma, cp": library.CPLRP | {"ConvolutionBackward": ("gamma", {"gamma": 0.25})},
    }[preset]
    config = library.LRPConfig(rule=library.BASE | extra)
    with sinusoids(problem.network, library.tensor) as kept:

        def run() -> tuple[Leaves, Tensor]:
            latents, states = library.tensor(problem.latents), library.tensor(problem.states)
            prediction = problem.predict(latents, states)
            constant = prediction.detach().as_subclass(Tensor)
            (prediction * constant).sum().lrp(config=config)
            # The library gives shares of the target.
            total, leaves = constant.square().sum(), (latents, states, kept[0])
            return tuple(torch.zeros_like(x) if x.relevance is None else x.relevance * total for x in leaves), constant

        yield run


class Anything(ModuleType):
    """A module in which every name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def without_torchvision() -> None:
    """zennit and LXT import torchvision for their own models; it is not needed here."""
    if "torchvision" not in sys.modules and find_spec("torchvision") is None:
        for name in ("", ".models", ".models.resnet", ".models.vgg", ".models.vision_transformer"):
            sys.modules[f"torchvision{name}"] = Anything(f"torchvision{name}")


#: Row -> (distribution, how a pass is set up).
PEERS: dict[str, tuple[str, Setup]] = {
    "ours epsilon-cp": ("stereoclinic", partial(ours, composite="epsilon-cp")),
    "ours epsilon-attnlrp": ("stereoclinic", partial(ours, composite="epsilon-attnlrp")),
    "ours gamma-cp": ("stereoclinic", partial(ours, composite="gamma-cp")),
    "ours zplus-cp": ("stereoclinic", partial(ours, composite="zplus-cp")),
    "zennit epsilon": ("zennit", partial(zennit, rule="epsilon")),
    "zennit gamma": ("zennit", partial(zennit, rule="gamma")),
    "zennit z+": ("zennit", partial(zennit, rule="z+")),
    "captum": ("captum", captum),
    "lxt epsilon, cp": ("lxt", partial(lxt, attention="cp")),
    "lxt epsilon, attnlrp": ("lxt", partial(lxt, attention="attnlrp")),
    "autolrp epsilon, cp": ("autolrp", partial(autolrp, preset="epsilon, cp")),
    "autolrp epsilon, attnlrp": ("autolrp", partial(autolrp, preset="epsilon, attnlrp")),
    "autolrp gamma, cp": ("autolrp", partial(autolrp, preset="gamma, cp")),
    "autolrp z+, cp": ("autolrp", partial(autolrp, preset="z+, cp")),
}
