"""Rules for linear layers and convolutions against sums over the terms of each output, written out as loops."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules.composites import Composite
from stereoclinic.ddtd.rules.functions import Rule, native
from stereoclinic.ddtd.rules.layers import LayerRule, epsilon, gamma, w_squared, z_plus
from stereoclinic.errors import InputError, UncoveredOperation

DOUBLE = torch.float64
RULES = {"epsilon": epsilon(0.1), "gamma": gamma(0.25), "z_plus": z_plus, "w_squared": w_squared}
seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """A layer, its sizes, and how it is called."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    call: Callable[..., Tensor] = functional.linear
    stride: int = 1
    pads: tuple[tuple[int, int], ...] = ()  # of each spatial dimension, before and after
    dilation: int = 1
    groups: int = 1
    settings: dict | None = None

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.call(x, weight, bias, **(self.settings or {}))


CASES = {
    "linear": Case((2, 5), (3, 5)),
    "linear on tokens": Case((2, 3, 4), (5, 4)),
    "linear on one vector": Case((4,), (3, 4)),
    "conv1d": Case((2, 3, 6), (4, 3, 3), functional.conv1d, pads=((1, 1),), settings={"padding": 1}),
    "conv2d": Case((2, 2, 4, 3), (3, 2, 3, 3), functional.conv2d, pads=((1, 1), (1, 1)), settings={"padding": 1}),
    "conv2d of 1": Case((2, 3, 2, 2), (2, 3, 1, 1), functional.conv2d, pads=((0, 0), (0, 0))),
    "conv2d, strided": Case(
        (2, 2, 6, 5), (3, 2, 3, 3), functional.conv2d, 2, ((1, 1), (0, 0)), settings={"stride": 2, "padding": (1, 0)}
    ),
    "conv2d, grouped and dilated": Case(
        (2, 4, 5, 5),
        (4, 2, 2, 2),
        functional.conv2d,
        1,
        ((2, 2), (2, 2)),
        2,
        2,
        {"padding": 2, "dilation": 2, "groups": 2},
    ),
    "conv2d, same": Case(
        (2, 2, 4, 4), (2, 2, 2, 3), functional.conv2d, pads=((0, 1), (1, 1)), settings={"padding": "same"}
    ),
    "conv2d, valid": Case(
        (2, 2, 4, 4), (2, 2, 2, 3), functional.conv2d, pads=((0, 0),) * 2, settings={"padding": "valid"}
    ),
    "conv2d of one picture": Case((2, 4, 3), (3, 2, 2, 2), functional.conv2d, pads=((0, 0), (0, 0))),
    "conv3d": Case((1, 2, 3, 3, 2), (2, 2, 2, 2, 2), functional.conv3d, pads=((0, 0),) * 3),
}


def matrix(case: Case, weight: Tensor) -> Tensor:
    """(outputs, inputs) of one sample, entry by entry from the definition of the layer."""
    if case.call is functional.linear:
        tokens = case.x[1] if len(case.x) == 3 else 1
        return torch.block_diag(*[weight] * tokens)
    dims = len(case.weight) - 2
    channels, sizes = case.x[-dims - 1], case.x[-dims:]
    outputs, kernel = case.weight[0], case.weight[2:]
    out_sizes = [
        (n + sum(pad) - case.dilation * (k - 1) - 1) // case.stride + 1
        for n, pad, k in zip(sizes, case.pads, kernel, strict=True)
    ]
    found = torch.zeros(outputs, *out_sizes, channels, *sizes, dtype=DOUBLE)
    for o, position in itertools.product(range(outputs), itertools.product(*map(range, out_sizes))):
        group = o // (outputs // case.groups)
        for i, tap in itertools.product(range(case.weight[1]), itertools.product(*map(range, kernel))):
            at = [
                p * case.stride + t * case.dilation - pad[0] for p, t, pad in zip(position, tap, case.pads, strict=True)
            ]
            if all(0 <= a < n for a, n in zip(at, sizes, strict=True)):
                found[(o, *position, group * case.weight[1] + i, *at)] += weight[(o, i, *tap)]
    return found.flatten(0, dims).flatten(1)


def by_terms(name: str, terms: Tensor, bias: Tensor, z: Tensor, relevance: Tensor, weight: Tensor) -> Tensor:
    """Relevance (inputs,) of one sample: each output's relevance z g, shared term by term.

    Args:
        terms: (outputs, inputs), w_ki x_i.
        bias: (outputs,).
        z: (outputs,), their sum.
        relevance: (outputs,), z g.
        weight: (outputs, inputs).
    """
    shared = torch.zeros(terms.shape[1], dtype=DOUBLE)
    size = z.square().mean().sqrt()
    for k in range(len(z)):
        if name == "epsilon":
            share = terms[k] / (z[k] + 0.1 * z[k].sign() * size)
        elif name == "gamma":
            own = terms[k] * z[k] > 0
            favoured = terms[k] * torch.where(own, 1.25, 1.0)
            share = favoured / (favoured.sum() + bias[k] * (1.25 if bias[k] * z[k] > 0 else 1.0))
        elif name == "z_plus":
            positive = terms[k].clamp(min=0)
            total = positive.sum() + bias[k].clamp(min=0)
            share = positive / total if total > 0 else positive
        else:
            share = weight[k] ** 2 / (weight[k] ** 2).sum()
        shared += share * relevance[k]
    return shared


def backward_of(rule: Rule, run: Callable[..., Tensor], x: Tensor, g: Tensor) -> Tensor:
    """What the rule passes back; the output must be bit-identical to the plain one."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with propagate(Composite("mine", {"linear": rule, "convolution": rule})):
        out = run(leaf)
    assert torch.equal(out, run(x))
    return torch.autograd.grad(out, leaf, g)[0]


def cast(case: Case, seed: int, with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """x, weight, bias, z, g."""
    x, weight = draw(seed, *case.x), draw(seed + 1, *case.weight)
    bias = draw(seed + 2, case.weight[0]) if with_bias else None
    z = case.run(x, weight, bias)
    return x, weight, bias, z, draw(seed + 3, *z.shape)


def samples(case: Case, value: Tensor) -> Tensor:
    """(samples, everything else); what a layer was given without a batch is one sample."""
    alone = len(case.x) == (1 if case.call is functional.linear else len(case.weight) - 1)
    return value.flatten()[None] if alone else value.flatten(1)


def bias_of(case: Case, bias: Tensor | None, z: Tensor) -> Tensor:
    """(outputs of one sample,)."""
    if bias is None:
        return torch.zeros_like(samples(case, z)[0])
    spatial = 0 if case.call is functional.linear else len(case.weight) - 2
    return samples(case, bias.view(-1, *[1] * spatial).expand_as(z))[0]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_equals_its_shares_term_by_term(name: str, case: str, with_bias: bool) -> None:
    it = CASES[case]
    x, weight, bias, z, g = cast(it, 0, with_bias)
    got = backward_of(RULES[name], lambda v: it.run(v, weight, bias), x, g)
    assert got.shape == x.shape and got.dtype == DOUBLE
    full = matrix(it, weight)
    each_bias = bias_of(it, bias, z)
    for x_i, z_i, g_i, got_i in zip(*(samples(it, v) for v in (x, z, g, got)), strict=True):
        torch.testing.assert_close(full @ x_i + each_bias, z_i)  # the matrix is the layer
        expected = by_terms(name, full * x_i, each_bias, z_i, z_i * g_i, full)
        torch.testing.assert_close(x_i * got_i, expected, rtol=1e-10, atol=1e-10)


@given(seed=seeds, with_bias=st.booleans())
@settings(max_examples=5, deadline=None)
def test_what_each_rule_conserves(seed: int, with_bias: bool) -> None:
    """Up to the bias's share: epsilon also keeps its own, z_plus loses outputs without a positive term."""
    case = CASES["conv2d"]
    x, weight, bias, z, g = cast(case, seed, with_bias)
    full, each_bias = matrix(case, weight), bias_of(case, bias, z)
    arrived = {name: samples(case, x * backward_of(rule, lambda v: case.run(v, weight, bias), x, g)).sum(1)
               for name, rule in RULES.items()}  # fmt: skip
    for i, (x_i, z_i, g_i) in enumerate(zip(*(samples(case, v) for v in (x, z, g)), strict=True)):
        terms, relevance = full * x_i, z_i * g_i
        positive, kept = terms.clamp(min=0).sum(1), each_bias.clamp(min=0)
        size = z_i.square().mean().sqrt()
        own_sign = torch.where(each_bias * z_i > 0, 1.25, 1.0) * each_bias
        weighed = (terms * torch.where(terms * z_i[:, None] > 0, 1.25, 1.0)).sum(1)
        expected = {
            "epsilon": relevance * (z_i - each_bias) / (z_i + 0.1 * z_i.sign() * size),
            "gamma": relevance * weighed / (weighed + own_sign),
            "z_plus": torch.where(positive + kept > 0, relevance * positive / (positive + kept), 0),
            "w_squared": relevance,
        }
        for name, parts in expected.items():
            torch.testing.assert_close(arrived[name][i], parts.sum(), rtol=1e-9, atol=1e-9)
        if not with_bias:
            torch.testing.assert_close(arrived["gamma"][i], relevance.sum(), rtol=1e-9, atol=1e-9)


def test_z_plus_never_changes_the_sign_of_relevance() -> None:
    case = CASES["conv2d"]
    x, weight, bias, z, g = cast(case, 3, True)
    favourable = g.abs() * z.sign()  # z g > 0 everywhere
    got = backward_of(z_plus, lambda v: case.run(v, weight, bias), x, favourable)
    assert (x * got >= -1e-12).all()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_linear_in_what_comes_back(name: str) -> None:
    case = CASES["conv2d, strided"]
    x, weight, bias, z, g = cast(case, 5, True)
    other = draw(11, *z.shape)

    def run(v: Tensor) -> Tensor:
        return case.run(v, weight, bias)

    first, second = (backward_of(RULES[name], run, x, each) for each in (g, other))
    torch.testing.assert_close(backward_of(RULES[name], run, x, 2 * g - 3 * other), 2 * first - 3 * second)


@pytest.mark.parametrize("case", ["linear on tokens", "conv2d"])
def test_the_limits_of_gamma_and_epsilon(case: str) -> None:
    it = CASES[case]
    x, weight, bias, z, g = cast(it, 7, True)

    def relevance(rule: Rule, g: Tensor) -> Tensor:
        return backward_of(rule, lambda v: it.run(v, weight, bias), x, g)

    assert gamma(0) is native and epsilon(0) is native
    plain = relevance(native, g)
    torch.testing.assert_close(relevance(gamma(1e-9), g), plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(relevance(epsilon(1e-9), g), plain, rtol=1e-5, atol=1e-5)
    upward = g * (z > 0)  # gamma shares a positive output among its positive terms, as z_plus does
    torch.testing.assert_close(relevance(gamma(1e9), upward), relevance(z_plus, upward), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_nothing_over_nothing_is_nothing(name: str) -> None:
    weight, bias = draw(0, 3, 4), draw(1, 3)
    weight[0], bias[0] = 0, 0  # an output that is always 0
    weight[1] = -weight[1].abs()  # an output without one positive term
    bias[1] = 0
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.5, 3.0], [0.0, 1.0, 0.0, 2.0]], dtype=DOUBLE)
    got = backward_of(RULES[name], lambda v: functional.linear(v, weight, bias), x, torch.ones(3, 3, dtype=DOUBLE))
    assert got.isfinite().all()
    got = backward_of(RULES[name], lambda v: functional.linear(v, weight * 0), x, torch.ones(3, 3, dtype=DOUBLE))
    assert got.abs().max() == 0


def test_z_plus_is_not_fooled_by_rounding() -> None:
    """An output whose terms are all negative has (z + q) / 2 = rounding, not 0; nothing may be divided by it."""
    torch.manual_seed(0)
    x, weight = torch.rand(64, 300), -torch.rand(50, 300)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, w = x.to(dtype), weight.to(dtype)
        got = backward_of(z_plus, lambda v, w=w: functional.linear(v, w), a, torch.ones(64, 50, dtype=dtype))
        assert got.abs().max() == 0


@pytest.mark.parametrize("name", RULES)
def test_channels_last_gives_the_same_numbers(name: str) -> None:
    case, last = CASES["conv2d"], torch.channels_last
    x, weight, bias, _, g = cast(case, 13, True)
    plain = backward_of(RULES[name], lambda v: case.run(v, weight, bias), x, g)
    x, weight, g = (v.contiguous(memory_format=last) for v in (x, weight, g))
    torch.testing.assert_close(backward_of(RULES[name], lambda v: case.run(v, weight, bias), x, g), plain)


WIDE = {
    "linear": Case((4, 256), (32, 256)),
    "conv2d": Case((2, 32, 5, 5), (16, 32, 3, 3), functional.conv2d, settings={"padding": 1}),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", WIDE)
@pytest.mark.parametrize("name", RULES)
def test_half_precision_is_close(name: str, case: str, autocast: bool) -> None:
    it, half = WIDE[case], torch.bfloat16
    x, weight, bias, _, g = (v.to(half).double() for v in cast(it, 17, True))
    exact = x * backward_of(RULES[name], lambda v: it.run(v, weight, bias), x, g)
    kind = torch.float32 if autocast else half

    def run(v: Tensor) -> Tensor:
        with torch.autocast("cpu", half, enabled=autocast):
            return it.run(v, weight.to(kind), bias.to(kind))

    got = backward_of(RULES[name], run, x.to(kind), g.to(half))
    assert got.dtype == kind
    assert (x * got - exact).norm() / exact.norm() < 0.02
    torch.testing.assert_close((x * got).sum(), exact.sum(), rtol=0.02, atol=0.02 * exact.norm().item())


@pytest.mark.parametrize("rule", [gamma(0.25), z_plus], ids=["gamma", "z_plus"])
def test_float16_holds_terms_that_cancel(rule: Rule) -> None:
    """The terms' absolute values add up to more than float16 can hold; their sum does not."""
    x, weight, bias, _, g = cast(Case((2, 4096), (8, 4096)), 19, True)
    x, weight, bias, g = (v.half().double() for v in (60 * x, weight, bias, g))
    assert (x.abs() @ weight.abs().T).min() > torch.finfo(torch.float16).max
    exact = x * backward_of(rule, lambda v: functional.linear(v, weight, bias), x, g)
    got = x * backward_of(rule, lambda v: functional.linear(v, weight.half(), bias.half()), x.half(), g.half())
    assert (got - exact).norm() / exact.norm() < 0.02


def test_backward_under_autocast_keeps_its_precision() -> None:
    x, weight = draw(0, 3, 8).float(), draw(1, 4, 8).float()
    with propagate(Composite("mine", {"linear": z_plus})):
        out = functional.linear(leaf := x.clone().requires_grad_(), weight)
    (plain,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (under,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(plain, under)


def test_refused_where_there_is_no_such_rule() -> None:
    x = torch.rand(1, 2, 3, 3, requires_grad=True)
    weight = torch.rand(2, 2, 2, 2)
    mine = Composite("mine", {"convolution": z_plus, "linear": z_plus})
    with propagate(mine), pytest.raises(UncoveredOperation, match=r"conv_transpose2d.*z_plus.*native"):
        functional.conv_transpose2d(x, weight)
    with propagate(mine), pytest.raises(UncoveredOperation, match=r"linear.*bias computed from.*z_plus"):
        functional.linear(x, torch.rand(3, 3), x[0, 0, 0] * 2)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [gamma, epsilon])
def test_parameters_must_be_numbers_of_0_or_more(make: Callable[[float], Rule], value: float) -> None:
    with pytest.raises(InputError, match=f"{make.__name__} .*expected a number of 0 or more"):
        make(value)


def test_rules_with_equal_parameters_are_equal() -> None:
    assert gamma(0.5) == gamma(0.5) != gamma(0.25)
    assert isinstance(z_plus, LayerRule) and z_plus.parameters == {}
