"""Damping: applied then removed is nothing, and what it does is the formula and no more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sns.conftest import hooks, inputs_of, random_mask, run

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.sns.damp import damp, effective, suppress
from stereoclinic.sns.mask import NeuronMask


@pytest.mark.parametrize("rooted", [False, True])
def test_applied_then_removed_is_the_identity_bit_for_bit(network, inputs, rooted):
    before, state, count = run(network, inputs), weights_digest(network), hooks(network)
    with suppress(network, random_mask(network, rooted=rooted)):
        during = run(network, inputs)
        assert weights_digest(network) == state
    assert not torch.allclose(during, before, atol=1e-3)
    assert torch.equal(run(network, inputs), before)
    assert hooks(network) == count


def test_an_exception_leaves_nothing_behind(network, inputs):
    before, count = run(network, inputs), hooks(network)
    suppression = suppress(network, random_mask(network))
    with pytest.raises(ZeroDivisionError), suppression:
        run(network, inputs)
        raise ZeroDivisionError
    with pytest.raises(InputError, match="differ within a batch"), suppression:
        run(network, inputs, torch.tensor([1, 2, 3, 4]))
    assert hooks(network) == count
    assert torch.equal(run(network, inputs), before)
    with suppression:  # it can be entered again, one at a time
        with pytest.raises(RuntimeError, match="active already"), suppression:
            pass
        assert not torch.equal(run(network, inputs), before)


def test_strength_zero_and_a_mask_of_ones_do_nothing_at_all(network, inputs):
    before, count = run(network, inputs), hooks(network)
    ones = random_mask(network)
    ones = random_mask(network, factors=torch.ones_like(ones.factors), rooted=True)
    for context in (suppress(network, random_mask(network, rooted=True), strength=0.0), suppress(network, ones)):
        with context:
            assert hooks(network) == count + 1  # where a pass begins, and no layer
            assert torch.equal(run(network, inputs), before)


@given(st.floats(0, 1), st.sampled_from(["ff", "attention", "conv"]), st.booleans())
def test_damping_moves_a_neuron_along_the_line_to_its_root(strength, kind, rooted):
    g = torch.Generator().manual_seed(2)
    a, dim = torch.randn((2, 5, 3, 3) if kind == "conv" else (2, 3, 5), generator=g), 1 if kind == "conv" else -1
    s, r = torch.rand(1, 5, generator=g), torch.randn(1, 5, generator=g)
    effective = 1 - strength * (1 - s)
    got = damp(a, effective, dim, (1 - effective) * r if rooted else None)
    wide = [5, 1, 1] if kind == "conv" else [5]
    s, r = s.view(wide), r.view(wide) if rooted else torch.zeros(wide)
    torch.testing.assert_close(got, a + strength * (1 - s) * (r - a))  # linear in the strength


@pytest.mark.parametrize("kind", ["ff", "attention", "conv"])
def test_the_model_feels_the_strength_linearly(network, inputs, kind):
    """Of one site alone: what reaches it moves by strength times (1 - s)."""
    site = next(site for site in find_sites(network) if site.kind == kind)
    factors = torch.linspace(0, 1, site.width).expand(2, -1)
    roots = torch.full((2, site.width), 0.3)
    mask = random_mask(network, sites=[site], factors=factors, roots=roots)
    seen = {}
    for strength in (0.0, 0.25, 1.0):
        with suppress(network, mask, strength), inputs_of(network.get_submodule(site.name)) as arrived:
            run(network, inputs)
        seen[strength] = arrived[0]
    torch.testing.assert_close(seen[0.25] - seen[0.0], 0.25 * (seen[1.0] - seen[0.0]), atol=1e-6, rtol=1e-4)
    channel = 1 if kind == "conv" else -1
    torch.testing.assert_close(
        seen[1.0].select(channel, 0), torch.full_like(seen[1.0].select(channel, 0), 0.3), atol=1e-6, rtol=0
    )


def test_a_zero_root_is_a_scaled_column_of_the_weight(network, inputs):
    mask = random_mask(network)
    mask = random_mask(network, factors=mask.factors[:1].expand(2, -1))
    x = inputs[0].clone().requires_grad_()
    with suppress(network, mask):
        hooked = run(network, (x, inputs[1]))
        (back,) = torch.autograd.grad(hooked.square().sum(), x)
    originals = {}
    for site, span in mask.spans():
        weight = network.get_submodule(site.name).weight
        originals[site.name] = weight.clone()
        column = mask.factors[0, span].view(1, -1, *[1] * (weight.ndim - 2))
        weight.mul_(column)
    fused = run(network, (x, inputs[1]))
    (expected,) = torch.autograd.grad(fused.square().sum(), x)
    for name, weight in originals.items():
        network.get_submodule(name).weight.copy_(weight)
    torch.testing.assert_close(hooked, fused, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back, expected, atol=1e-5, rtol=1e-4)  # and a gradient passes as through the weights


def test_a_window_leaves_other_timesteps_bit_identical(network, inputs):
    mask = random_mask(network).windowed((900, 700))
    for t in (999, 900, 699, 600, 0):
        before = run(network, inputs, t)
        with suppress(network, mask):
            assert torch.equal(run(network, inputs, t), before)
    low = random_mask(network, bin_edges=torch.tensor([1000.0, 600.0, 300.0]))
    before = run(network, inputs, 299)
    with suppress(network, low):
        assert torch.equal(run(network, inputs, 299), before)
    for t in (899, 700):
        before = run(network, inputs, t)
        with suppress(network, mask):
            assert not torch.equal(run(network, inputs, t), before)


def test_timesteps_may_come_as_number_scalar_or_one_each_and_choose_the_bin(network, inputs):
    with suppress(network, random_mask(network)):
        early, late = run(network, inputs, 800), run(network, inputs, 100)
        assert torch.equal(run(network, inputs, torch.tensor(800)), early)
        assert torch.equal(run(network, inputs, torch.full((4,), 100)), late)
        assert torch.equal(network(inputs[0], timestep=800, encoder_hidden_states=inputs[1]).sample, early)
    mask = random_mask(network)
    with suppress(network, random_mask(network, factors=mask.factors[:1].expand(2, -1))):
        assert torch.equal(run(network, inputs, 800), early)
        assert not torch.equal(run(network, inputs, 100), late)


def test_two_masks_compose_as_the_product_of_their_factors(network, inputs):
    one, two = random_mask(network, 1), random_mask(network, 2)
    with suppress(network, one), suppress(network, two):
        nested = run(network, inputs)
    with suppress(network, random_mask(network, factors=one.factors * two.factors)):
        torch.testing.assert_close(nested, run(network, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ff", "conv"])
def test_a_factor_of_one_changes_no_bit_not_even_a_zeros_sign(kind):
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -3.0, 7.0])
    sites = [Site(f"x.{'conv2' if kind == 'conv' else 'ff.net.2'}", kind, 8)]
    roots = torch.tensor([[1.0, -1.0, 0.0, -0.0, 2.0, -2.0, 3.0, 4.0]])
    for strength, factors in ((0.0, torch.rand(1, 8)), (0.7, torch.ones(1, 8))):
        mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), factors, roots)
        factor, offset = effective(mask, strength)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            a = odd.to(dtype).expand(2, 3, 8).contiguous()
            a = a.transpose(1, 2) if kind == "conv" else a
            got = damp(a, factor.to(dtype), sites[0].dim, offset.to(dtype))
            assert torch.equal(got.isnan(), a.isnan())
            assert torch.equal(got.nan_to_num(9.0), a.nan_to_num(9.0))
            assert torch.equal(got.signbit()[~a.isnan()], a.signbit()[~a.isnan()])


def test_half_precision_keeps_its_type(network, inputs):
    mask = random_mask(network, rooted=True)
    site = next(site for site in mask.sites if site.kind == "ff")
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    with half, suppress(network, mask), inputs_of(network.get_submodule(site.name)) as arrived:
        assert run(network, inputs).isfinite().all()
    assert arrived[0].dtype == torch.bfloat16
    a = torch.randn(2, 3, 4).bfloat16()
    assert damp(a, torch.rand(1, 4).bfloat16(), -1).dtype == torch.bfloat16


def test_a_mask_of_another_model_is_refused_on_entering(network, inputs):
    count = hooks(network)
    metadata = {"unet_shapes": shapes_digest(network), "unet_weights": "of another"}
    mask = random_mask(network, metadata=metadata)
    with pytest.raises(InputError, match="other weights"), suppress(network, mask):
        pass
    assert hooks(network) == count
    with suppress(network, mask, force=True):
        assert hooks(network) > count


def test_arguments_that_cannot_be(network):
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="strength"):
            suppress(network, random_mask(network), strength)
    with pytest.raises(InputError, match="cannot damp a str"):
        suppress("model", random_mask(network))
    with suppress(network, random_mask(network)), pytest.raises(InputError, match="without a timestep"):
        network(torch.zeros(1, 2, 8, 8), None, None)
