"""Damping: applied then removed is nothing, and what it does is the formula and no more."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.ddtd.neurons import find_sites
from stereoclinic.digest import shapes_digest, weights_digest
from stereoclinic.errors import InputError
from stereoclinic.sns.damp import damp, suppress
from stereoclinic.sns.mask import NeuronMask

EDGES = torch.tensor([1000.0, 600.0, 0.0])


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        .eval()
        .requires_grad_(False)
    )


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 2, 8, 8, generator=g), torch.randn(4, 3, 8, generator=g)


def run(unet, inputs, t=800):
    return unet(inputs[0], t, encoder_hidden_states=inputs[1]).sample


def make(unet, seed=0, rooted=False, **changes):
    g = torch.Generator().manual_seed(seed)
    sites = find_sites(unet)
    shape = (2, sum(site.width for site in sites))
    factors = torch.where(torch.rand(shape, generator=g) < 0.3, torch.rand(shape, generator=g), 1.0)
    roots = torch.randn(shape, generator=g) if rooted else None
    return NeuronMask(**{"sites": sites, "bin_edges": EDGES, "factors": factors, "roots": roots, **changes})


def hooks(unet):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in unet.modules())


class Pipe:
    """What damping knows of a pipeline."""

    def __init__(self, unet, guiding):
        self.unet, self.do_classifier_free_guidance = unet, guiding


@pytest.mark.parametrize("rooted", [False, True])
def test_applied_then_removed_is_the_identity_bit_for_bit(unet, inputs, rooted):
    before, state, count = run(unet, inputs), weights_digest(unet), hooks(unet)
    with suppress(unet, make(unet, rooted=rooted)):
        during = run(unet, inputs)
        assert weights_digest(unet) == state
    assert not torch.allclose(during, before, atol=1e-3)
    assert torch.equal(run(unet, inputs), before)
    assert hooks(unet) == count


def test_an_exception_leaves_nothing_behind(unet, inputs):
    before, count = run(unet, inputs), hooks(unet)
    suppression = suppress(unet, make(unet))
    with pytest.raises(ZeroDivisionError), suppression:
        run(unet, inputs)
        raise ZeroDivisionError
    with pytest.raises(InputError, match="differ within a batch"), suppression:
        run(unet, inputs, torch.tensor([1, 2, 3, 4]))
    assert hooks(unet) == count
    assert torch.equal(run(unet, inputs), before)
    with suppression:  # it can be entered again, one at a time
        with pytest.raises(RuntimeError, match="active already"), suppression:
            pass
        assert not torch.equal(run(unet, inputs), before)


def test_strength_zero_and_a_mask_of_ones_do_nothing_at_all(unet, inputs):
    before, count = run(unet, inputs), hooks(unet)
    ones = make(unet)
    ones = make(unet, factors=torch.ones_like(ones.factors), rooted=True)
    for context in (suppress(unet, make(unet, rooted=True), strength=0.0), suppress(unet, ones)):
        with context:
            assert hooks(unet) == count + 1  # the timestep alone is noted
            assert torch.equal(run(unet, inputs), before)


@given(st.floats(0, 1), st.sampled_from(["ff", "attention", "conv"]), st.booleans())
def test_damping_moves_a_neuron_along_the_line_to_its_root(strength, kind, rooted):
    g = torch.Generator().manual_seed(2)
    a = torch.randn((2, 5, 3, 3) if kind == "conv" else (2, 3, 5), generator=g)
    s, r = torch.rand(1, 5, generator=g), torch.randn(1, 5, generator=g)
    effective = 1 - strength * (1 - s)
    got = damp(a, effective, kind, (1 - effective) * r if rooted else None)
    wide = [5, 1, 1] if kind == "conv" else [5]
    s, r = s.view(wide), r.view(wide) if rooted else torch.zeros(wide)
    torch.testing.assert_close(got, a + strength * (1 - s) * (r - a))  # linear in the strength


@contextmanager
def inputs_of(module):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    yield seen
    handle.remove()


@pytest.mark.parametrize("kind", ["ff", "attention", "conv"])
def test_the_model_feels_the_strength_linearly(unet, inputs, kind):
    """Of one site alone: what reaches it moves by strength times (1 - s)."""
    site = next(site for site in find_sites(unet) if site.kind == kind)
    factors = torch.linspace(0, 1, site.width).expand(2, -1)
    roots = torch.full((2, site.width), 0.3)
    mask = make(unet, sites=[site], factors=factors, roots=roots)
    seen = {}
    for strength in (0.0, 0.25, 1.0):
        with suppress(unet, mask, strength), inputs_of(unet.get_submodule(site.name)) as arrived:
            run(unet, inputs)
        seen[strength] = arrived[0]
    torch.testing.assert_close(seen[0.25] - seen[0.0], 0.25 * (seen[1.0] - seen[0.0]), atol=1e-6, rtol=1e-4)
    channel = 1 if kind == "conv" else -1
    torch.testing.assert_close(
        seen[1.0].select(channel, 0), torch.full_like(seen[1.0].select(channel, 0), 0.3), atol=1e-6, rtol=0
    )


def test_a_zero_root_is_a_scaled_column_of_the_weight(unet, inputs):
    mask = make(unet)
    mask = make(unet, factors=mask.factors[:1].expand(2, -1))
    with suppress(unet, mask):
        hooked = run(unet, inputs)
    originals = {}
    for site, span in mask.spans():
        weight = unet.get_submodule(site.name).weight
        originals[site.name] = weight.clone()
        column = mask.factors[0, span].view(1, -1, *[1] * (weight.ndim - 2))
        weight.mul_(column)
    fused = run(unet, inputs)
    for name, weight in originals.items():
        unet.get_submodule(name).weight.copy_(weight)
    torch.testing.assert_close(hooked, fused, atol=1e-5, rtol=1e-4)


def test_a_window_leaves_other_timesteps_bit_identical(unet, inputs):
    mask = make(unet).windowed((900, 700))
    for t in (999, 900, 699, 600, 0):
        before = run(unet, inputs, t)
        with suppress(unet, mask):
            assert torch.equal(run(unet, inputs, t), before)
    low = make(unet, bin_edges=torch.tensor([1000.0, 600.0, 300.0]))
    before = run(unet, inputs, 299)
    with suppress(unet, low):
        assert torch.equal(run(unet, inputs, 299), before)
    for t in (899, 700):
        before = run(unet, inputs, t)
        with suppress(unet, mask):
            assert not torch.equal(run(unet, inputs, t), before)


def test_timesteps_may_come_as_number_scalar_or_one_each_and_choose_the_bin(unet, inputs):
    with suppress(unet, make(unet)):
        early, late = run(unet, inputs, 800), run(unet, inputs, 100)
        assert torch.equal(run(unet, inputs, torch.tensor(800)), early)
        assert torch.equal(run(unet, inputs, torch.full((4,), 100)), late)
        assert torch.equal(unet(inputs[0], timestep=800, encoder_hidden_states=inputs[1]).sample, early)
    mask = make(unet)
    with suppress(unet, make(unet, factors=mask.factors[:1].expand(2, -1))):
        assert torch.equal(run(unet, inputs, 800), early)
        assert not torch.equal(run(unet, inputs, 100), late)


@pytest.mark.parametrize("rooted", [False, True])
def test_the_conditional_branch_leaves_the_unconditional_half_bit_identical(unet, inputs, rooted):
    mask = make(unet, rooted=rooted, branch="conditional")
    before = run(unet, inputs)
    with suppress(unet, make(unet, rooted=rooted)):
        both = run(unet, inputs)
    for context in (suppress(unet, mask, guided=True), suppress(Pipe(unet, True), mask)):
        with context:
            after = run(unet, inputs)
        assert torch.equal(after[:2], before[:2])
        torch.testing.assert_close(after[2:], both[2:])
    # Without guidance the whole batch is conditional.
    for context in (
        suppress(unet, mask),
        suppress(Pipe(unet, False), mask),
        suppress(Pipe(unet, True), mask, guided=False),
    ):
        with context:
            assert torch.equal(run(unet, inputs), both)


def test_a_pipeline_is_asked_at_every_call(unet, inputs):
    pipe = Pipe(unet, True)
    before = run(unet, inputs)
    with suppress(pipe, make(unet, branch="conditional")):
        assert torch.equal(run(unet, inputs)[:2], before[:2])
        pipe.do_classifier_free_guidance = False
        assert not torch.equal(run(unet, inputs)[:2], before[:2])


def test_guidance_that_cannot_be_is_refused(unet, inputs):
    three = tuple(value[:3] for value in inputs)
    mask = make(unet, branch="conditional")
    with suppress(unet, mask, guided=True), pytest.raises(InputError, match="batch of 3 has no two halves"):
        run(unet, three)
    pipe = Pipe(unet, True)
    del pipe.do_classifier_free_guidance
    with suppress(pipe, mask), pytest.raises(InputError, match="pass guided="):
        run(unet, inputs)
    with suppress(pipe, make(unet)):  # a mask of both branches need not know
        run(unet, inputs)


def test_two_masks_compose_as_the_product_of_their_factors(unet, inputs):
    one, two = make(unet, 1), make(unet, 2)
    with suppress(unet, one), suppress(unet, two):
        nested = run(unet, inputs)
    with suppress(unet, make(unet, factors=one.factors * two.factors)):
        torch.testing.assert_close(nested, run(unet, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("branch", ["conditional", "both"])
def test_each_sample_may_have_factors_and_roots_of_its_own(unet, inputs, guided, branch):
    samples = 2 if guided else 4
    masks = [make(unet, seed, rooted=True, branch=branch) for seed in range(samples)]
    quiet = torch.ones_like(masks[0].factors)
    first = make(unet, factors=quiet, branch=branch)  # hooks for sites that only some samples damp are added later
    expected = []
    for i, mask in enumerate(masks):
        with suppress(unet, mask, guided=guided):
            expected.append(run(unet, inputs)[i::samples])
    expected = torch.stack(expected, 1).flatten(0, 1)
    with suppress(unet, first, guided=guided) as suppression:
        before = run(unet, inputs)
        suppression.assign(torch.stack([m.factors for m in masks]), torch.stack([m.roots for m in masks]))
        torch.testing.assert_close(run(unet, inputs), expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(InputError, match="factors of"):
            run(unet, tuple(torch.cat([value, value]) for value in inputs))
        with pytest.raises(InputError, match="expected samples x"):
            suppression.assign(quiet)
        with pytest.raises(InputError, match="range 0"):
            suppression.assign(quiet[None] * 2)
        suppression.assign(quiet[None])
        assert torch.equal(run(unet, inputs), before)
    assert torch.equal(run(unet, inputs), before)


def test_half_precision_keeps_its_type(unet, inputs):
    mask = make(unet, rooted=True)
    with suppress(unet, mask), torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(unet, inputs).isfinite().all()
    a = torch.randn(2, 3, 4).bfloat16()
    assert damp(a, torch.rand(1, 4).bfloat16(), "ff").dtype == torch.bfloat16


def test_a_gradient_passes_through(unet, inputs):
    x = inputs[0].clone().requires_grad_()
    with suppress(unet, make(unet, branch="conditional"), guided=True):
        run(unet, (x, inputs[1])).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_a_mask_of_another_model_is_refused_on_entering(unet, inputs):
    count = hooks(unet)
    metadata = {"unet_shapes": shapes_digest(unet), "unet_weights": "of another"}
    mask = make(unet, metadata=metadata)
    with pytest.raises(InputError, match="other weights"), suppress(unet, mask):
        pass
    assert hooks(unet) == count
    with suppress(unet, mask, force=True):
        assert hooks(unet) > count


def test_arguments_that_cannot_be(unet):
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="strength"):
            suppress(unet, make(unet), strength)
    with pytest.raises(InputError, match="cannot damp a str"):
        suppress("model", make(unet))
    with suppress(unet, make(unet)), pytest.raises(InputError, match="without a timestep"):
        unet(torch.zeros(1, 2, 8, 8))


def test_a_compiled_model_is_refused(unet):
    mask = make(unet)
    block = unet.mid_block
    block.compile(backend="eager")
    try:
        with pytest.raises(InputError, match="mid_block is compiled"), suppress(unet, mask):
            pass
    finally:
        block._compiled_call_impl = None
