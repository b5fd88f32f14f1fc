"""Laws of the modified backward pass on whole UNets."""

import threading
from collections.abc import Mapping
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules.composites import COMPOSITES, Composite, get_composite
from stereoclinic.errors import InputError, UncoveredOperation
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.sites import find_sites, neuron_relevance

RULED = ["epsilon-cp", "epsilon-attnlrp"]
DOUBLE = torch.float64


def without_biases(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    return model


def direction(like: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def shares(model: nn.Module, inputs: tuple[Tensor, ...], composite: str) -> tuple[Tensor, list[Tensor]]:
    """Target (B,) and the relevance (B,) of latent, text and time embedding (the sinusoids, made a leaf)."""
    latent, t, text = inputs
    latent, text = latent.clone().requires_grad_(), text.clone().requires_grad_()
    kept = []

    def make_leaf(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept.append(output.detach().double().requires_grad_())
        return kept[0]

    handle = model.time_proj.register_forward_hook(make_leaf)
    with propagate(composite):
        out = model(latent, t, text).sample
    handle.remove()
    target = (out * direction(out)).flatten(1).sum(1)
    leaves = [latent, text, kept[0]]
    grads = torch.autograd.grad(target.sum(), leaves, allow_unused=True)
    parts = [
        torch.zeros_like(target) if g is None else (x * g).flatten(1).sum(1) for x, g in zip(leaves, grads, strict=True)
    ]
    return target.detach(), [part.detach() for part in parts]


def relevance(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    composite: str,
    *,
    cotangent: Tensor | None = None,
    thread: bool = False,
) -> Tensor:
    """Neuron relevance (B, N) of <output, direction>, backward outside the context."""
    sites = find_sites(model)
    with Watch(model, sites) as watch:
        with propagate(composite, model):
            out = model(*inputs).sample
        cotangent = direction(out) if cotangent is None else cotangent
        box: list[Mapping[str, Tensor | None]] = []
        worker = threading.Thread(target=lambda: box.append(watch.grads(out, cotangent, retain=False)))
        if thread:
            worker.start()
            worker.join()
        else:
            worker.run()
    return neuron_relevance(watch.activations, box[0], sites)


@pytest.mark.parametrize("composite", sorted(COMPOSITES))
def test_forward_is_bit_identical_inside_and_after(any_unet, inputs, composite: str) -> None:
    latent, t, text = inputs
    with torch.no_grad():
        plain = any_unet(*inputs).sample
    with propagate(composite, any_unet):
        inside = any_unet(latent.clone().requires_grad_(), t, text.clone().requires_grad_()).sample
        with torch.no_grad():
            quiet = any_unet(*inputs).sample
    after = any_unet(latent.clone().requires_grad_(), t, text).sample
    assert torch.equal(inside, plain) and torch.equal(quiet, plain) and torch.equal(after, plain)


def test_after_leaving_the_gradient_is_the_plain_one(unet, inputs) -> None:
    before = relevance(unet, inputs, "gradient")
    relevance(unet, inputs, "epsilon-cp")
    assert torch.equal(relevance(unet, inputs, "gradient"), before)


def test_latent_text_and_time_add_up_to_the_target(any_unet, inputs) -> None:
    target, parts = shares(without_biases(any_unet), inputs, "epsilon-cp")
    assert all(part.abs().min() > 0 for part in (parts[0], parts[2]))
    assert ((sum(parts) - target).abs() / target.abs()).max() <= 1e-5


def test_attnlrp_conserves_where_there_is_no_softmax(plain_unet, inputs) -> None:
    target, parts = shares(without_biases(plain_unet), inputs, "epsilon-attnlrp")
    assert ((sum(parts) - target).abs() / target.abs()).max() <= 1e-5


def test_plain_gradients_do_not_conserve(unet, inputs) -> None:
    target, parts = shares(without_biases(unet), inputs, "gradient")
    assert ((sum(parts) - target).abs() / target.abs()).max() > 1e-2


def test_a_relu_net_without_biases_gives_gradient_times_input() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3, bias=False)]
    net = nn.Sequential(*layers).double().requires_grad_(False)
    x = torch.randn(2, 2, 4, 4, dtype=DOUBLE, requires_grad=True)
    (plain,) = torch.autograd.grad(net(x).sum(), x)
    for composite in RULED:
        with propagate(composite):
            out = net(x)
        (got,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(got, plain)
        torch.testing.assert_close((x * got).sum(), out.sum())


@pytest.mark.parametrize("composite", RULED)
def test_a_batch_equals_its_samples(any_unet, inputs, composite: str) -> None:
    together = relevance(any_unet, inputs, composite)
    cotangent = direction(inputs[0])
    for i in range(len(together)):
        one = tuple(x[i : i + 1] for x in inputs)
        alone = relevance(any_unet, one, composite, cotangent=cotangent[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])


@pytest.mark.parametrize("composite", RULED)
@given(a=st.floats(-3, 3), b=st.floats(-3, 3))
@settings(max_examples=3, deadline=None)
def test_linear_in_the_cotangent(unet_once, inputs_once, composite: str, a: float, b: float) -> None:
    u, v = direction(inputs_once[0], 1), direction(inputs_once[0], 2)
    of = partial(relevance, unet_once, inputs_once, composite)
    torch.testing.assert_close(of(cotangent=a * u + b * v), a * of(cotangent=u) + b * of(cotangent=v))


def test_gradient_composite_is_autograd_and_refuses_nothing(unet, inputs) -> None:
    latent = inputs[0].clone().requires_grad_()
    with propagate("gradient"):
        out = unet(latent, *inputs[1:]).sample
        loss = torch.sigmoid(out).exp().cumsum(0).sum()
    (got,) = torch.autograd.grad(loss, latent)
    plain_loss = torch.sigmoid(unet(latent, *inputs[1:]).sample).exp().cumsum(0).sum()
    (plain,) = torch.autograd.grad(plain_loss, latent)
    assert torch.equal(got, plain)


@pytest.mark.parametrize("composite", sorted(COMPOSITES))
@pytest.mark.parametrize("thread", [False, True])
def test_gradient_checkpointing_changes_nothing(unet, inputs, composite: str, thread: bool) -> None:
    latent, t, text = inputs
    live = (latent.clone().requires_grad_(), t, text)
    plain = relevance(unet, live, composite)
    unet.train()  # diffusers checkpoints in any mode; there is no dropout to differ
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(relevance(unet, live, composite, thread=thread), plain)


def test_gradient_checkpointing_with_backward_inside_the_context(unet, inputs) -> None:
    latent = inputs[0].clone().requires_grad_()

    def run() -> Tensor:
        with propagate("epsilon-attnlrp"):
            out = unet(latent, *inputs[1:]).sample
            return torch.autograd.grad(out, latent, direction(out))[0]

    plain = run()
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(run(), plain)


def test_reentrant_checkpointing_is_refused() -> None:
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    with propagate("epsilon-cp"), pytest.raises(UncoveredOperation, match="use_reentrant=False"):
        functional.silu(checkpoint(lambda v: functional.silu(layer(v)), x, use_reentrant=True))


@pytest.mark.parametrize("composite", RULED)
def test_backward_on_another_thread(unet, inputs, composite: str) -> None:
    assert torch.equal(relevance(unet, inputs, composite, thread=True), relevance(unet, inputs, composite))


def test_a_forward_on_another_thread_is_left_alone(unet, inputs) -> None:
    plain, box = relevance(unet, inputs, "gradient"), []
    x = torch.randn(3, dtype=DOUBLE, requires_grad=True)
    with propagate("epsilon-cp"):
        worker = threading.Thread(target=lambda: box.append(torch.erf(x)))
        worker.start()
        worker.join()
        with pytest.raises(UncoveredOperation):
            torch.erf(x)
    assert len(box) == 1
    assert torch.equal(relevance(unet, inputs, "gradient"), plain)


@pytest.mark.parametrize("composite", RULED)
def test_the_innermost_of_two_nested_contexts_wins(unet, inputs, composite: str) -> None:
    alone = relevance(unet, inputs, composite)
    for outer in COMPOSITES:
        with propagate(outer, unet):
            assert torch.equal(relevance(unet, inputs, composite), alone)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * g


MIXING = {
    "erf": torch.erf,
    "exp": lambda x: x.exp(),
    "prelu": lambda x: functional.prelu(x, torch.ones(1, dtype=DOUBLE)),
    "mish": functional.mish,
    "bilinear": lambda x: functional.bilinear(x, x, torch.ones(2, 4, 4, dtype=DOUBLE)),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "cumsum": lambda x: x.cumsum(0),
    "div": lambda x: torch.div(x, x, rounding_mode="floor"),
    "pow": lambda x: x**3,
    "max": lambda x: x.max(0),
    "mul": lambda x: x.clone().mul_(x),
    "linear": lambda x: functional.linear(x, x * 2),
    "silu": lambda x: functional.silu(x, inplace=True),
    "Twice": lambda x: functional.silu(Twice.apply(x)),
}


@pytest.mark.parametrize("composite", RULED)
@pytest.mark.parametrize("name", MIXING)
def test_an_operation_without_a_rule_is_refused_by_name(name: str, composite: str) -> None:
    x = torch.rand(3, 4, dtype=DOUBLE, requires_grad=True)
    with propagate(composite), pytest.raises(UncoveredOperation, match=f"{name}.*") as raised:
        MIXING[name](x)
    assert "no rule" in str(raised.value) or "no relevance rule" in str(raised.value)
    assert torch.equal(torch.erf(x), x.detach().erf())  # and the context was left


def test_a_dead_end_raises_only_when_relevance_reaches_it() -> None:
    x = torch.rand(3, 3, dtype=DOUBLE, requires_grad=True)
    for run, name in ((lambda v: v**2, "pow"), (lambda v: v @ v, "matmul")):
        with propagate("epsilon-cp"):
            out = run(x)
        with pytest.raises(UncoveredOperation, match=f"relevance reached `(__)?{name}"):
            out.sum().backward()


def test_what_does_not_require_grad_is_never_refused() -> None:
    x, live = torch.rand(3, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE, requires_grad=True)
    with propagate("epsilon-cp"):
        assert torch.erf(x).exp().sum() > 0
        assert live.shape == (3,) and live.argmax() >= 0 and (live > 0).all()
        with torch.no_grad():
            torch.erf(live)
        assert live.detach().requires_grad_().requires_grad


class Mixer(nn.Module):
    def __init__(self, operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


def test_a_unet_with_an_uncovered_activation_is_refused(unet, inputs) -> None:
    unet.mid_block.resnets[0].nonlinearity = Mixer(functional.mish)
    with propagate("epsilon-cp"), pytest.raises(UncoveredOperation, match=r"mish.*epsilon-cp.*`gradient`"):
        unet(inputs[0].clone().requires_grad_(), *inputs[1:])


def test_scale_shift_time_embedding_is_covered(inputs) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )
    unet = without_biases(unet.double().requires_grad_(False).eval())
    plain = unet(*inputs).sample
    with propagate("epsilon-cp"):
        assert torch.equal(unet(inputs[0].clone().requires_grad_(), *inputs[1:]).sample, plain)
    # The 1 of h * (1 + scale) takes a share as a bias does, so the parts need not add up to the target.
    target, parts = shares(unet, inputs, "epsilon-cp")
    assert all(torch.isfinite(part).all() for part in (target, *parts))


def test_composites_are_found_by_name() -> None:
    assert get_composite("epsilon-cp") is COMPOSITES["epsilon-cp"]
    with pytest.raises(InputError, match=r"'lrp' is not known; choose one of deep-taylor, .*, zplus-cp, or"):
        propagate("lrp")
    with pytest.raises(InputError, match="expected plain or rooted"):
        Composite("mine", {}, root="deep")
