"""Fusing: the hooked model without hooks, undone bit for bit, and refused where the weights cannot hold it."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tests.sns.conftest import run, same_bits, state_of, static_mask
from torch import nn

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.sns.adapter import load_mask, unload_mask
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.fuse import fuse, is_fusable, is_fused, unfuse


@pytest.fixture(scope="module")
def inputs(original):
    g = torch.Generator().manual_seed(1)
    config = original.unet.config
    return (
        torch.randn(2, config.in_channels, 8, 8, generator=g).double(),
        torch.randn(2, 3, config.cross_attention_dim, generator=g).double(),
    )


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_hooked_and_fused_agree_fusing_twice_is_once_and_unfusing_is_exact(original, inputs, seed, strength, rooted):
    unet = original.unet
    before, mask = state_of(unet), static_mask(unet, seed, rooted)
    with suppress(unet, mask, strength):
        hooked = [run(unet, inputs, t) for t in (800, 0)]
    fuse(original, mask, strength)
    once = state_of(unet)
    for t, want in zip((800, 0), hooked, strict=True):
        torch.testing.assert_close(run(unet, inputs, t), want, atol=1e-10, rtol=1e-10)
    fuse(unet, replace(mask), strength)
    assert same_bits(state_of(unet), once)
    unfuse(original)
    assert same_bits(state_of(unet), before)
    assert not is_fused(original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rooted", [False, True])
def test_lower_precisions_are_rounded_once_and_unfused_exactly(unet, dtype, rooted):
    mask = static_mask(unet, rooted=rooted)
    exact = copy.deepcopy(unet.to(dtype)).double()
    before = state_of(unet)
    fuse(unet, mask)
    assert not same_bits(state_of(unet), before)
    fuse(exact, mask)
    for name, value in exact.state_dict().items():
        # Within one rounding of the exact fold: half a unit in the last place, and what float32 leaves of sums.
        torch.testing.assert_close(
            unet.state_dict()[name].double(), value, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6
        )
    unfuse(unet)
    assert same_bits(state_of(unet), before)


def test_a_model_cast_while_fused_is_unfused_to_what_the_cast_would_have_made(unet):
    cast = state_of(copy.deepcopy(unet).half())
    fuse(unet, static_mask(unet, rooted=True))
    unet.half()
    unfuse(unet)
    assert same_bits(state_of(unet), cast)


def test_weights_that_are_not_damped_are_not_touched_nor_kept(unet):
    mask = static_mask(unet)
    before = state_of(unet)
    fuse(unet, mask)
    after = state_of(unet)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"{site.name}.weight" for site in mask.sites}
    assert after.keys() == before.keys()
    for site, span in mask.spans():
        untouched = mask.factors[0, span] == 1
        name = f"{site.name}.weight"
        assert torch.equal(after[name][:, untouched], before[name][:, untouched])


def test_a_deep_copy_is_fused_by_itself(unet):
    before = state_of(unet)
    fuse(unet, static_mask(unet, rooted=True))
    fused = state_of(unet)
    copied = copy.deepcopy(unet)
    unfuse(copied)
    assert same_bits(state_of(copied), before)
    assert same_bits(state_of(unet), fused)
    unfuse(unet)
    assert same_bits(state_of(unet), before)


def test_a_compiled_model_may_be_fused(unet, inputs):
    mask = static_mask(unet)
    with suppress(unet, mask):
        hooked = run(unet, inputs)
    compiled = torch.compile(unet, backend="eager")
    fuse(compiled, mask)
    torch.testing.assert_close(run(unet, inputs), hooked)
    unfuse(compiled)
    assert not is_fused(unet)


def unfusable(unet):
    mask, rooted = static_mask(unet), static_mask(unet, rooted=True)
    apart = mask.factors.clone()
    apart[1] = 1.0
    roots = rooted.roots.clone()
    roots[1] += 1
    return [
        (
            replace(mask, factors=mask.factors.expand(2, 2, -1), groups=("a", "b")),
            r"allocates images to a, b.*mask.group",
        ),
        (replace(mask, branch="conditional"), "only the conditional half of guidance.*--branch both"),
        (mask.windowed((900, 500)), "factors differ between timesteps.*make it with --until 0"),
        (replace(mask, factors=apart), "factors differ between timesteps"),
        (replace(mask, bin_edges=torch.tensor([1000.0, 600.0, 1.0])), "no timesteps below 1,.*--until 0"),
        (replace(rooted, roots=roots), "roots differ between timesteps.*same roots"),
        # Folded into the bias it would be off at the borders, where zeros are what the convolution sees.
        (replace(mask, roots=torch.ones_like(mask.factors)), "root at the convolution.*padding with zeros.*root zero"),
    ]


@pytest.mark.parametrize("case", range(7))
def test_masks_that_cannot_be_fused_say_why_and_what_to_do(unet, case):
    mask, match = unfusable(unet)[case]
    before = state_of(unet)
    assert is_fusable(mask) is not None
    with pytest.raises(InputError, match=f"cannot be fused: .*{match}.*with hooks") as caught:
        fuse(unet, mask)
    assert "\n" not in str(caught.value)
    assert same_bits(state_of(unet), before)
    assert not is_fused(unet)


def test_what_differs_only_where_nothing_is_damped_does_not_matter(unet):
    mask = static_mask(unet, rooted=True)
    roots = torch.where(mask.factors < 1, mask.roots, torch.randn(mask.roots.shape))
    assert is_fusable(replace(mask, roots=roots)) is None
    still = replace(mask, factors=torch.ones_like(mask.factors), bin_edges=torch.tensor([1000.0, 600.0, 100.0]))
    assert is_fusable(still) is None
    before = state_of(unet)
    fuse(unet, still)
    assert same_bits(state_of(unet), before)
    unfuse(unet)


def test_a_second_mask_or_strength_is_refused_until_the_first_is_undone(unet):
    one, two = static_mask(unet, 1), static_mask(unet, 2)
    fuse(unet, one)
    state = state_of(unet)
    for mask, strength in ((two, 1.0), (one, 0.5)):
        with pytest.raises(InputError, match="fused already; unfuse it first"):
            fuse(unet, mask, strength)
    for apply in (lambda: load_mask(unet, two), lambda: suppress(unet, two).__enter__()):
        with pytest.raises(InputError, match="is fused into this model; unfuse it first"):
            apply()
    assert same_bits(state_of(unet), state)
    unfuse(unet)
    fuse(unet, two)
    with pytest.raises(InputError, match="strength 2"):
        fuse(unet, two, 2)


def test_hooks_and_folding_do_not_damp_twice(unet):
    mask = static_mask(unet)
    load_mask(unet, mask)
    with pytest.raises(InputError, match=r"would damp on top.*unload_mask\(pipe\)"):
        fuse(unet, mask)
    unload_mask(unet)
    with suppress(unet, mask), pytest.raises(InputError, match="would damp on top"):
        fuse(unet, mask)
    fuse(unet, mask)


def test_unfusing_what_was_not_fused_or_changed_since(unet):
    with pytest.raises(InputError, match="no mask is fused"):
        unfuse(unet)
    mask = static_mask(unet)
    fuse(unet, mask)
    weight = unet.get_submodule(mask.sites[0].name).weight
    changed = weight.clone()
    weight.mul_(2)
    with pytest.raises(InputError, match="have changed since"):
        unfuse(unet)
    assert torch.equal(weight, 2 * changed)
    weight.copy_(changed)
    unfuse(unet)


def test_a_mask_of_another_model_is_refused_and_forced(unet):
    digests = {"unet_shapes": shapes_digest(unet), "unet_weights": weights_digest(unet)}
    mask = static_mask(unet, metadata=digests)
    unet.conv_in.weight.mul_(1.5)
    before = state_of(unet)
    with pytest.raises(InputError, match="other weights"):
        fuse(unet, mask)
    assert same_bits(state_of(unet), before)
    fuse(unet, mask, force=True)


def test_layers_that_cannot_take_it(unet):
    mask = static_mask(unet, rooted=True)
    site = unet.get_submodule(mask.sites[0].name)
    bias, site.bias = site.bias, None
    with pytest.raises(InputError, match="no bias that its root could be folded into"):
        fuse(unet, mask)
    fuse(unet, replace(mask, roots=None))
    unfuse(unet)
    site.bias = bias

    weight = site.weight
    site.weight = nn.Parameter(torch.zeros(weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"a Linear of torch.int8 weights"):
        fuse(unet, mask)
    site.weight = weight
    meta = copy.deepcopy(unet).to("meta")
    with pytest.raises(InputError, match="'meta' device; fuse before the model is offloaded"):
        fuse(meta, mask)


def test_a_site_with_a_lora_is_refused_until_it_is_merged(unet, inputs):
    mask = static_mask(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights=False))
    before = state_of(unet)
    with pytest.raises(InputError, match=r"has a LoRA.*merge it first"):
        fuse(unet, mask)
    assert same_bits(state_of(unet), before)
    with suppress(unet, mask):
        hooked = run(unet, inputs)
    unet.fuse_lora()
    unet.unload_lora()
    fuse(unet, mask, force=True)
    torch.testing.assert_close(run(unet, inputs), hooked)


def quantised(unet):
    """Linear layers whose weights torch packs: no parameter, and a state dict that holds more than tensors."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(unet).float(), {nn.Linear}, dtype=torch.qint8)


def in_float8(unet):
    """As diffusers keeps weights at rest in less than it computes in."""
    made = copy.deepcopy(unet).float()
    made.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "weights"), [(quantised, "packed"), (in_float8, "torch.float8_e4m3fn")])
def test_quantised_layers_are_hooked_and_not_folded_into(original, inputs, change, weights):
    digests = {"unet_shapes": shapes_digest(original.unet), "unet_weights": weights_digest(original.unet)}
    mask, unet = static_mask(original.unet, kinds=("ff", "attention"), metadata=digests), change(original.unet)
    plain = run(unet, [each.float() for each in inputs])
    for act in (fuse, load_mask):
        with pytest.raises(InputError, match="use the model it was made for"):
            act(unet, mask)
    with pytest.raises(InputError, match=rf"of {weights} weights, .*; fuse before it is quantised, or apply"):
        fuse(unet, mask, force=True)
    assert torch.equal(run(unet, [each.float() for each in inputs]), plain)
    load_mask(unet, mask, force=True)
    treated = run(unet, [each.float() for each in inputs])
    unload_mask(unet)
    with suppress(original.unet, mask):
        expected = run(original.unet, inputs).float()
    assert torch.equal(run(unet, [each.float() for each in inputs]), plain)
    moved = (treated - plain).flatten() @ (expected - run(original.unet, inputs).float()).flatten()
    assert moved > 0.5 * (treated - plain).norm() ** 2
