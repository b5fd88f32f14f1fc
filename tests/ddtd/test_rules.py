"""Each rule against the matrix of its own linear map, written out independently."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules.composites import COMPOSITES, Composite

DOUBLE = torch.float64
seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def backward_of(run, *inputs: Tensor, g: Tensor, composite: str = "epsilon-cp") -> tuple[Tensor, ...]:
    """What the rule passes back to each input; the output must be bit-identical to the plain one."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with propagate(composite):
        out = run(*leaves)
    assert torch.equal(out, run(*inputs))
    return torch.autograd.grad(out, leaves, g, allow_unused=True)


@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=15, deadline=None)
def test_silu_and_gelu_are_a_constant_gate(seed: int, scale: float) -> None:
    x, g = scale * draw(seed, 3, 5), draw(seed + 1, 3, 5)
    normal = torch.distributions.Normal(torch.zeros((), dtype=DOUBLE), 1)
    tanh_gate = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    for run, gate in (
        (functional.silu, 1 / (1 + torch.exp(-x))),
        (functional.gelu, normal.cdf(x)),
        (lambda v: functional.gelu(v, approximate="tanh"), tanh_gate),
    ):
        (got,) = backward_of(run, x, g=g)
        torch.testing.assert_close(got, torch.diag(gate.flatten()).mv(g.flatten()).view_as(x))
        torch.testing.assert_close(x * got, run(x) * g)  # conserved neuron by neuron


def norm_matrix(w: Tensor, x: Tensor, eps: float) -> Tensor:
    """diag(w * rstd)(I - 1 1^T / n): the forward map of a norm whose standard deviation is a constant."""
    n = x.numel()
    rstd = 1 / math.sqrt(((x - x.mean()) ** 2).mean() + eps)
    return torch.diag(w * rstd) @ (torch.eye(n, dtype=DOUBLE) - torch.ones(n, n, dtype=DOUBLE) / n)


@given(
    seed=seeds,
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    side=st.integers(2, 4),
    affine=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_group_norm(seed: int, batch: int, groups: int, per_group: int, side: int, affine: bool) -> None:
    channels = groups * per_group
    x, g = draw(seed, batch, channels, side, side), draw(seed + 1, batch, channels, side, side)
    w = draw(seed + 2, channels) if affine else None
    b = torch.zeros(channels, dtype=DOUBLE) if affine else None
    (got,) = backward_of(lambda v: functional.group_norm(v, groups, w, b, eps=1e-3), x, g=g)
    full = (torch.ones(channels, dtype=DOUBLE) if w is None else w)[:, None, None].expand(channels, side, side)
    for i in range(batch):
        for k in range(groups):
            part = slice(k * per_group, (k + 1) * per_group)
            matrix = norm_matrix(full[part].flatten(), x[i, part].flatten(), 1e-3)
            torch.testing.assert_close(got[i, part].flatten(), matrix.T @ g[i, part].flatten())
    out = functional.group_norm(x, groups, w, b, eps=1e-3)
    torch.testing.assert_close((x * got).sum(), (out * g).sum())


def test_group_norm_in_channels_last() -> None:
    x, g = draw(0, 2, 4, 3, 3), draw(1, 2, 4, 3, 3)
    last = torch.channels_last
    (plain,) = backward_of(lambda v: functional.group_norm(v, 2), x, g=g)
    (got,) = backward_of(lambda v: functional.group_norm(v, 2), x.to(memory_format=last), g=g.to(memory_format=last))
    torch.testing.assert_close(got, plain)


@given(seed=seeds, rows=st.integers(1, 3), width=st.integers(2, 6), affine=st.booleans())
@settings(max_examples=15, deadline=None)
def test_layer_norm_and_rms_norm(seed: int, rows: int, width: int, affine: bool) -> None:
    x, g = draw(seed, rows, width), draw(seed + 1, rows, width)
    w = draw(seed + 2, width) if affine else None
    full = torch.ones(width, dtype=DOUBLE) if w is None else w
    (layer,) = backward_of(lambda v: functional.layer_norm(v, (width,), w, eps=1e-3), x, g=g)
    (rms,) = backward_of(lambda v: functional.rms_norm(v, (width,), w, eps=1e-3), x, g=g)
    for i in range(rows):
        torch.testing.assert_close(layer[i], norm_matrix(full, x[i], 1e-3).T @ g[i])
        torch.testing.assert_close(rms[i], torch.diag(full / torch.sqrt((x[i] ** 2).mean() + 1e-3)) @ g[i])


def test_layer_norm_over_two_dimensions() -> None:
    x, g, w = draw(0, 2, 3, 4), draw(1, 2, 3, 4), draw(2, 3, 4)
    (got,) = backward_of(lambda v: functional.layer_norm(v, (3, 4), w), x, g=g)
    for i in range(2):
        expected = norm_matrix(w.flatten(), x[i].flatten(), 1e-5).T @ g[i].flatten()
        torch.testing.assert_close(got[i].flatten(), expected)


def test_norms_of_half_precision_keep_statistics_in_float32() -> None:
    x = (draw(0, 2, 4, 5) + 3).to(torch.bfloat16)
    g = draw(1, 2, 4, 5).to(torch.bfloat16)
    for run in (
        lambda v: functional.group_norm(v, 2),
        lambda v: functional.layer_norm(v, (5,)),
        lambda v: functional.rms_norm(v, (5,), eps=1e-5),
    ):
        (half,) = backward_of(run, x, g=g)
        (exact,) = backward_of(run, x.double(), g=g.double())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), exact, rtol=2**-7, atol=1e-6)


def by_hand(x: Tensor, w: Tensor) -> Tensor:
    """RMSNorm as transformers write it."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w


def test_a_norm_written_by_hand_equals_the_fused_rule() -> None:
    x, g, w = draw(0, 3, 6), draw(1, 3, 6), draw(2, 6)
    (hand,) = backward_of(lambda v: by_hand(v, w), x, g=g)
    (fused,) = backward_of(lambda v: functional.rms_norm(v, (6,), w, eps=1e-5), x, g=g)
    torch.testing.assert_close(hand, fused)


@given(seed=seeds, broadcast=st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_gated_product_gives_half_to_each_factor(seed: int, broadcast: bool) -> None:
    a, b = draw(seed, 2, 3, 4), draw(seed + 1, 2, 1 if broadcast else 3, 4)
    g = draw(seed + 2, 2, 3, 4)
    for run in (lambda p, q: p * q, torch.mul, lambda p, q: torch.mul(p, other=q)):
        to_a, to_b = backward_of(run, a, b, g=g)
        expected_b = g * a / 2
        torch.testing.assert_close(to_a, g * b / 2)
        torch.testing.assert_close(to_b, expected_b.sum(1, keepdim=True) if broadcast else expected_b)
        torch.testing.assert_close((a * to_a).sum() + (b * to_b).sum(), (a * b * g).sum())


def test_a_product_with_itself_and_with_a_constant() -> None:
    x, g = draw(0, 5), draw(1, 5)
    torch.testing.assert_close(backward_of(lambda v: v * v, x, g=g)[0], x * g)
    torch.testing.assert_close(backward_of(lambda v: 3 * v / 2, x, g=g)[0], 1.5 * g)
    torch.testing.assert_close(backward_of(lambda v: torch.relu(v) * g, x, g=g)[0], g * g * (x > 0))


def heads(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        draw(seed, 2, 2, 3, 4),
        draw(seed + 1, 2, 2, 5, 4),
        draw(seed + 2, 2, 2, 5, 4),
        draw(seed + 3, 2, 2, 3, 4),
    )


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as diffusers' AttnProcessor computes it."""
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    empty = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), v).reshape(2, 2, 3, 4)


def matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


FORMS = [functional.scaled_dot_product_attention, sliced, matmuls]


@pytest.mark.parametrize("form", FORMS)
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_attention_cp_is_the_transposed_probabilities(form, seed: int) -> None:
    q, k, v, g = heads(seed)
    to_q, to_k, to_v = backward_of(form, q, k, v, g=g)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / 2
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(to_v, torch.einsum("bhij,bhid->bhjd", weights, g))
    assert to_q is None and to_k is None
    torch.testing.assert_close((v * to_v).sum(), (form(q, k, v) * g).sum())


@pytest.mark.parametrize("form", FORMS)
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_attention_attnlrp_divides_by_four_four_two(form, seed: int) -> None:
    q, k, v, g = heads(seed)
    got = backward_of(form, q, k, v, g=g, composite="epsilon-attnlrp")
    plain = backward_of(form, q, k, v, g=g, composite="gradient")
    for rule, gradient, factor in zip(got, plain, (4, 4, 2), strict=True):
        torch.testing.assert_close(rule * factor, gradient)


@pytest.mark.parametrize("composite", ["epsilon-cp", "epsilon-attnlrp"])
def test_attention_with_a_mask(composite: str) -> None:
    q, k, v, g = heads(0)
    mask = torch.tensor([0.0, 0.0, 0.0, -1e9, 0.0], dtype=DOUBLE).expand(3, 5)
    run = functional.scaled_dot_product_attention
    to_v = backward_of(lambda a, b, c: run(a, b, c, attn_mask=mask), q, k, v, g=g, composite=composite)[2]
    assert to_v[:, :, 3].abs().max() == 0


@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=10, deadline=None)
def test_tanh_is_a_constant_gate_and_a_sigmoid_a_constant(seed: int, scale: float) -> None:
    x, y, g = scale * draw(seed, 3, 5), draw(seed + 1, 3, 5), draw(seed + 2, 3, 5)
    (got,) = backward_of(torch.tanh, x, g=g)
    torch.testing.assert_close(got, torch.diag((x.tanh() / x).flatten()).mv(g.flatten()).view_as(x))
    torch.testing.assert_close(x * got, x.tanh() * g)
    to_x, to_y = backward_of(lambda a, b: a.sigmoid() * b, x, y, g=g)
    torch.testing.assert_close(to_y, g / (1 + torch.exp(-x)))
    assert to_x is None


def test_tanh_at_zero_passes_everything() -> None:
    (got,) = backward_of(torch.tanh, torch.zeros(3, dtype=DOUBLE), g=draw(0, 3))
    torch.testing.assert_close(got, draw(0, 3))


def test_a_divisor_is_a_constant() -> None:
    x, y, g = draw(0, 3, 4), draw(1, 3, 1) + 5, draw(2, 3, 4)
    to_x, to_y = backward_of(lambda a, b: a / b, x, y, g=g)
    torch.testing.assert_close(to_x, g / y)
    assert to_y is None
    torch.testing.assert_close((x * to_x).sum(), (x / y * g).sum())


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As SANA computes it: tokens in columns, v with a row of ones that adds up the weights."""
    q, k = functional.relu(q).mT, functional.relu(k)
    summed = functional.pad(v.mT, (0, 0, 0, 1), value=1.0) @ k @ q
    return (summed[..., :-1, :] / (summed[..., -1:, :] + 1e-15)).mT


def in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with tokens in rows, the weights added up apart."""
    q, k = functional.relu(q), functional.relu(k)
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + 1e-15)


@pytest.mark.parametrize("form", [linear_attention, in_rows])
def test_linear_attention_cp_is_the_transposed_weights(form) -> None:
    q, k, v, g = heads(0)
    to_q, to_k, to_v = backward_of(form, q, k, v, g=g)
    scores = torch.einsum("bhid,bhjd->bhij", q.clamp(min=0), k.clamp(min=0))
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-15)
    torch.testing.assert_close(form(q, k, v), weights @ v)
    torch.testing.assert_close(to_v, torch.einsum("bhij,bhid->bhjd", weights, g))
    assert all(x is None or not x.any() for x in (to_q, to_k))
    torch.testing.assert_close((v * to_v).sum(), (form(q, k, v) * g).sum())


def test_linear_attention_attnlrp_gives_half_to_each_factor_of_each_product() -> None:
    q, k, v, g = heads(0)
    to_q, to_k, to_v = backward_of(linear_attention, q, k, v, g=g, composite="epsilon-attnlrp")
    scores = torch.einsum("bhid,bhjd->bhij", q.clamp(min=0), k.clamp(min=0))
    torch.testing.assert_close(
        4 * to_v, torch.einsum("bhij,bhid->bhjd", scores / (scores.sum(-1, keepdim=True) + 1e-15), g)
    )
    shares = [float((x * to_x).sum()) for x, to_x in ((q, to_q), (k, to_k), (v, to_v))]
    whole = float((linear_attention(q, k, v) * g).sum())
    assert shares == pytest.approx([whole / 2, whole / 4, whole / 4])


def test_a_complex_rotation_is_its_matrix() -> None:
    x, g, angles = draw(0, 3, 6), draw(1, 3, 6), draw(2, 3, 3)
    turn = torch.polar(torch.ones_like(angles), angles)

    def run(v: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(v.reshape(3, 3, 2)) * turn).flatten(1)

    (got,) = backward_of(run, x, g=g)
    for row, (cos, sin) in enumerate(zip(angles.cos(), angles.sin(), strict=True)):
        matrix = torch.block_diag(
            *(torch.stack([torch.stack([c, -s]), torch.stack([s, c])]) for c, s in zip(cos, sin, strict=True))
        )
        torch.testing.assert_close(run(x)[row], matrix @ x[row])
        torch.testing.assert_close(got[row], matrix.T @ g[row])


def test_a_product_of_two_complex_activations_gives_half_to_each() -> None:
    a, b, g = draw(0, 4, 2), draw(1, 4, 2), draw(2, 4, 2)

    def run(p: Tensor, q: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(p) * torch.view_as_complex(q))

    to_a, to_b = backward_of(run, a, b, g=g)
    plain = backward_of(run, a, b, g=g, composite="gradient")
    torch.testing.assert_close((2 * to_a, 2 * to_b), plain)
    torch.testing.assert_close((a * to_a).sum() + (b * to_b).sum(), (run(a, b) * g).sum())


def test_what_only_moves_values_is_native() -> None:
    x, g = draw(0, 2, 3, 4), draw(1, 2, 4, 3)
    torch.testing.assert_close(backward_of(lambda v: torch.einsum("nhc->nch", v), x, g=g)[0], g.mT)
    weight = draw(2, 4, 5)
    (got,) = backward_of(lambda v: torch.einsum("nhc,cd->nhd", v, weight), x, g=draw(3, 2, 3, 5))
    torch.testing.assert_close(got, draw(3, 2, 3, 5) @ weight.T)
    rows = [draw(4, 2, 3), draw(5, 4, 3)]
    padded = torch.nn.utils.rnn.pad_sequence
    got = backward_of(lambda *v: padded(list(v), batch_first=True), *rows, g=(full := draw(6, 2, 4, 3)))
    torch.testing.assert_close(got, (full[0, :2], full[1]))


@pytest.mark.parametrize("modulation", ["constant", "halves"])
def test_a_modulation_that_nothing_asks_about_keeps_nothing_or_half(modulation: str) -> None:
    x, time, g, weight = draw(0, 2, 5, 4), draw(1, 2, 3), draw(2, 2, 5, 4), draw(3, 4, 3)
    angles = draw(4, 5, 4)  # passes no layer: a fixed rotation, not modulation
    mine = Composite("mine", COMPOSITES["epsilon-cp"].rules, modulation=modulation)

    def run(v: Tensor) -> Tensor:
        scale = functional.linear(functional.silu(time), weight)
        return v * angles.cos() * (1 + scale[:, None])

    leaf = x.clone().requires_grad_()
    with propagate(mine):
        out = run(leaf)
    assert torch.equal(out, run(x))
    (got,) = torch.autograd.grad(out, leaf, g)
    (plain,) = torch.autograd.grad(run(leaf), leaf, g)
    torch.testing.assert_close(got, plain if modulation == "constant" else plain / 2)
