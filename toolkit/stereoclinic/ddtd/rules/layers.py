"""Relevance rules for linear layers and convolutions: epsilon, gamma, z+ and w^2.

Each is a modified backward pass, `R = a * g`, as in `functions.py`. For z = w x + b, one extra forward pass

    q = layer(|x|, |w|, |b|)                    every term of z, made positive

gives the sums over the terms of either sign: `(z + q) / 2` is the sum of the positive terms (P + b+), `(z - q) / 2` of
the negative ones (N + b-). A term v_i = w_i x_i is positive where `v_i + |v_i| > 0`, so a sum over the positive terms
of what comes back is one product with w plus one with |w|, the latter signed by x: one extra vector-Jacobian product.
`w's` is that product, the layer's transpose.

Kept for backward: one ratio for each output, and where signs matter one byte for each input, in place of the input
that torch keeps for a convolution.

References:
    Bach et al. 2015, On pixel-wise explanations by layer-wise relevance propagation, eq. 58 (epsilon).
    Montavon et al. 2017, Explaining nonlinear classification decisions with deep Taylor decomposition,
        eq. 13 (w^2) and 15 (z+).
    Montavon et al. 2019, Layer-wise relevance propagation: an overview, section 10.2 (epsilon, gamma).
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stereoclinic.ddtd.rules.functions import Passed, Rule, RuleFunction, TorchFunction, native, wide
from stereoclinic.errors import InputError, UncoveredOperation

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


class _Layer:
    """A linear layer or convolution as it was called: run again on other tensors, or transposed."""

    def __init__(
        self,
        function: TorchFunction,
        x: Tensor,
        weight: Tensor,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> None:
        self.function = function
        self.called: tuple[Tensor, Tensor | None] | None = None  # weight and bias, where the rule reads others
        self.dims = _CONVOLUTIONS.get(function.__name__, 0)  # 0: a linear layer
        self.shape, self.strides = x.shape, x.stride()
        self.batched = x.ndim > 1 if not self.dims else x.ndim == self.dims + 2
        self.settings: tuple[Any, ...] = ()
        if not self.dims:
            return
        self.settings = (stride, padding, dilation, groups)
        dilations = self._each(dilation)
        if isinstance(padding, str):  # "same" pads one more after than before where the sum is odd
            kernel = weight.shape[2:]
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
            self.pads = [(n // 2, n - n // 2) for n in total]
        else:
            self.pads = [(n, n) for n in self._each(padding)]
        self.uneven = any(n != m for n, m in self.pads)
        none = [0] * self.dims
        before = none if self.uneven else [n for n, _ in self.pads]
        self.transposition = (self._each(stride), before, dilations, False, none, groups, (True, False, False))

    def _each(self, value: int | tuple[int, ...]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * self.dims if len(values) == 1 else values

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.function(x, weight, bias, *self.settings)

    def output(self, x: Tensor, z: Tensor) -> Tensor:
        """What the model gets to see, bit for bit; z is what the rule read."""
        return z if self.called is None else self(x, *self.called)

    def transpose(self, weight: Tensor, s: Tensor, like: Tensor | None = None) -> Tensor:
        """w's: the layer's transpose applied to s, in the shape of the input.

        `like` may be any tensor of the input's shape and layout and of s's type; its values are not read.
        """
        weight = weight.to(s.dtype)
        if not self.dims:
            with _without_autocast(s):
                return s @ weight
        if like is None:
            like = torch.empty_strided(self.shape, self.strides, dtype=s.dtype, device=s.device)
        if not self.batched:
            like, s = like[None], s[None]
        if self.uneven:
            like = functional.pad(like, [n for pair in reversed(self.pads) for n in pair])
        back: Tensor = torch.ops.aten.convolution_backward(s, like, weight, None, *self.transposition)[0]
        if self.uneven:
            for dim, (start, _) in enumerate(self.pads, start=-self.dims):
                back = back.narrow(dim, start, self.shape[dim])
        return back if self.batched else back[0]


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Backward may be called under autocast, which would halve the precision of a transposed linear layer."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _epsilon(layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Passed:
    def back(g: Tensor, weight: Tensor, ratio: Tensor) -> Tensor:
        return layer.transpose(weight, ratio * g)

    z = layer(x, weight, bias)
    size = z.abs().to(wide(z.dtype))
    dims = tuple(range(1 if layer.batched else 0, z.ndim))
    rms = torch.linalg.vector_norm(size, dim=dims, keepdim=True) / math.sqrt(math.prod(z.shape[d] for d in dims))
    ratio = size.div((size + epsilon * rms).clamp_(min=_tiny(size)))
    return layer.output(x, z), (weight, ratio.to(z.dtype)), back


def _gamma(layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float) -> Passed:
    # |z| + gamma * (P + b+) where z > 0, |z| + gamma * |N + b-| where z < 0, the terms of z's own sign, is
    # (1 + gamma/2) * (|z| + share * q); what comes back has (1 + gamma/2) in it too, so neither is multiplied out.
    share = gamma / (2 + gamma)

    def back(g: Tensor, weight: Tensor, sign: Tensor, ratio: Tensor) -> Tensor:
        s, d = ratio.abs() * g, ratio * g
        signs = sign.to(s.dtype)
        passed = layer.transpose(weight, s, signs)
        return passed.addcmul_(signs, layer.transpose(weight.abs(), d, signs), value=share)

    z = layer(x, weight, bias)
    q = _q(layer, x, weight, bias, z.dtype)
    size = z.abs().to(q.dtype).add_(q, alpha=share).clamp_(min=_tiny(q))
    ratio = torch.div(z, size, out=q).to(z.dtype)
    return layer.output(x, z), (weight, x.sign().to(torch.int8), ratio), back


def _z_plus(layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Passed:
    def back(g: Tensor, weight: Tensor, side: Tensor, ratio: Tensor) -> Tensor:
        s = ratio * g
        side = side.to(s.dtype).mul_(0.5)
        # (w's + sign(x) * |w|'s) / 2 by parts, which loses no digits where the two cancel.
        above = layer.transpose(weight.clamp(min=0), s, side)
        below = layer.transpose(weight.clamp(max=0), s, side)
        return below.lerp_(above, side)

    z = layer(x, weight, bias)
    q = _q(layer, x, weight, bias, z.dtype)
    positive = torch.lerp(z.to(q.dtype), q, 0.5)  # P + b+ = (z + q) / 2
    # Where it is no more than the rounding of q there is no positive term to give to; this is 0 / 0 too. (This
    # operator keeps its first argument where the second is above 0; masked_fill and where take 20 times as long.)
    over = torch.sub(positive, q, alpha=_rounding(z.dtype))
    ratio = torch.ops.aten.threshold_backward(z.div(positive), over, 0)
    side = x.sign().add_(1).to(torch.int8)  # 0, 1, 2
    return layer.output(x, z), (weight, side, ratio.to(z.dtype)), back


def _w_squared(layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Passed:
    def back(g: Tensor, weight: Tensor, x: Tensor, ratio: Tensor) -> Tensor:
        relevance = layer.transpose(weight.to(ratio.dtype).square(), ratio * g)
        most = torch.finfo(x.dtype).max
        return relevance.div_(x).masked_fill_(x == 0, 0).clamp_(-most, most)

    z = layer(x, weight, bias)
    with _without_autocast(x):
        ones = torch.ones((1, *x.shape[1:]) if layer.batched else x.shape, dtype=wide(z.dtype), device=x.device)
        total = layer(ones, weight.to(ones.dtype).square())  # of one sample: the padding takes no share
    ratio = z.div(total).masked_fill_(total == 0, 0)
    return layer.output(x, z), (weight, x, ratio), back


def _q(layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """q in the wide type of z's dtype. Where terms cancel, q is far above z, and float16 ends at 65504: use 1/32."""
    x, bias = x.abs(), None if bias is None else bias.abs()
    if dtype != torch.float16:
        return layer(x, weight.abs(), bias).to(wide(dtype))
    return layer(x.div_(32), weight.abs(), None if bias is None else bias.div_(32)).to(wide(dtype)).mul_(32)


def _tiny(x: Tensor) -> float:
    """Makes 0 / 0 a 0: below it, numbers of x's type have no full precision."""
    return torch.finfo(x.dtype).tiny


def _rounding(dtype: torch.dtype) -> float:
    """Share of q that its sum with z may be off by when both were rounded to dtype and summed in the wide type."""
    return max(torch.finfo(dtype).eps, 8 * torch.finfo(wide(dtype)).eps)


@dataclass(frozen=True)
class LayerRule:
    """A rule for linear layers and convolutions with its parameters; called as every rule is."""

    name: str  # in composite files
    function: Callable[..., Passed]  # of the layer's call, input, weight, bias and parameters
    parameters: Mapping[str, float]  # by name, in the order that the function takes them

    def __call__(
        self,
        function: TorchFunction,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        called: tuple[Tensor, Tensor | None] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Call the function under the rule.

        Args:
            function: The function that the model called.
            input: Its input.
            weight: The weight that the rule reads.
            bias: The bias that the rule reads.
            *args: Its other arguments.
            called: Weight and bias of the model's call, where they differ from those that the rule reads.
            **kwargs: As args.

        Raises:
            UncoveredOperation: A transposed convolution, or a bias that relevance could flow to.
        """
        name = function.__name__
        if name != "linear" and name not in _CONVOLUTIONS:
            raise UncoveredOperation(
                f"`{name}` has no relevance rule `{self.name}`, only linear layers and convolutions do; give it the "
                "rule `native` in the composite's layers"
            )
        if bias is not None and bias.requires_grad and not isinstance(bias, nn.Parameter):
            raise UncoveredOperation(
                f"`{name}` with a bias computed from something that requires grad has no relevance rule "
                f"`{self.name}`; give it the rule `native` in the composite's layers"
            )
        layer = _Layer(function, input, weight, *args, **kwargs)
        layer.called = called
        return RuleFunction.apply(lambda *x: self.function(layer, *x, *self.parameters.values()), input, weight, bias)


def epsilon(epsilon: float) -> Rule:
    """`s = z g / (z + epsilon * sign(z) * rms(z))`, `g_in = w's`; rms over each sample's own output.

    Epsilon is a share of the root mean square, so that it means the same at every layer and timestep (Montavon
    2019). What the denominator adds is absorbed, and so is the bias's share: relevance shrinks, and noise first.

    Raises:
        InputError: epsilon is negative or not finite.
    """
    _check("epsilon", epsilon)
    return LayerRule("epsilon", _epsilon, {"epsilon": float(epsilon)}) if epsilon else native


def gamma(gamma: float) -> Rule:
    """The terms of z's own sign weigh 1 + gamma: `x_i w_i (1 + gamma)` if it has z's sign, else `x_i w_i`.

        r    = z / (z + gamma * (P + b+)) if z > 0, else z / (z + gamma * (N + b-))
        s    = r g,   d = s * sign(z)
        g_in = (1 + gamma/2) * w's + (gamma/2) * sign(x) * |w|'d

    Shares of inputs and bias add up to z g; the bias keeps its own. gamma -> 0 is the native rule; gamma -> infinity
    shares among the terms of z's sign alone, which is z+ where z > 0 (Montavon 2019, for inputs of either sign).

    Raises:
        InputError: gamma is negative or not finite.
    """
    _check("gamma", gamma)
    return LayerRule("gamma", _gamma, {"gamma": float(gamma)}) if gamma else native


#: Deep Taylor's rule for inputs of either sign, `s = z g / (P + b+)`, `g_in = (w's + sign(x) * |w|'s) / 2`:
#: relevance z g is shared among the positive terms, so none of it changes sign on the way. Only a positive bias
#: takes a share; an output without one positive term (then z <= 0) has no term to give to, and its relevance is lost.
z_plus: Rule = LayerRule("z_plus", _z_plus, {})

#: `R_i = sum_k w_ik^2 / sum_j w_jk^2 * z_k g_k`, for the first layer: every relevance is passed on, none to the
#: bias and none to padding. It depends on the weights alone, so it does not vanish with the activation, and g = R / x
#: is the one division by an activation here. That is fine for what it is meant for: latents are continuous, no value
#: is exactly 0, and x * g gives R back however small x is. An exact zero (the mask channel of an inpainting
#: model) passes nothing.
w_squared: Rule = LayerRule("w_squared", _w_squared, {})


def _check(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{name} {value}: expected a number of 0 or more")
