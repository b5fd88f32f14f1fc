"""Damping: applied then removed is nothing, and what it does is the formula and no more."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tests.pipelines.tiny import SMALL, build

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.sns.damp import damp, effective, suppress
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
            assert hooks(unet) == count + 1  # where a pass begins, and no layer
            assert torch.equal(run(unet, inputs), before)


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
    x = inputs[0].clone().requires_grad_()
    with suppress(unet, mask):
        hooked = run(unet, (x, inputs[1]))
        (back,) = torch.autograd.grad(hooked.square().sum(), x)
    originals = {}
    for site, span in mask.spans():
        weight = unet.get_submodule(site.name).weight
        originals[site.name] = weight.clone()
        column = mask.factors[0, span].view(1, -1, *[1] * (weight.ndim - 2))
        weight.mul_(column)
    fused = run(unet, (x, inputs[1]))
    (expected,) = torch.autograd.grad(fused.square().sum(), x)
    for name, weight in originals.items():
        unet.get_submodule(name).weight.copy_(weight)
    torch.testing.assert_close(hooked, fused, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back, expected, atol=1e-5, rtol=1e-4)  # and a gradient passes as through the weights


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
    with suppress(unet, mask, guided=True):
        after = run(unet, inputs)
    assert torch.equal(after[:2], before[:2])
    torch.testing.assert_close(after[2:], both[2:])
    # Without guidance the whole batch is conditional.
    for guided in (None, False):
        with suppress(unet, mask, guided=guided):
            assert torch.equal(run(unet, inputs), both)


@pytest.fixture(scope="module")
def pipe():
    return build("sd1")


def first_prediction(pipe, guidance):
    """Of the denoiser in the pipeline's own call, all rows."""
    seen = []
    with pipe.unet.register_forward_hook(lambda module, args, output: seen.append(output[0])):
        noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
        prompts = ["a photo of a doctor", "a photo of a nurse"]
        options = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "latent", **SMALL}
        pipe(prompts, generator=noise, **options)
    return seen[0]


def test_a_pipeline_s_guidance_is_found_out_at_every_call(pipe):
    mask, both = make(pipe.unet, branch="conditional"), make(pipe.unet)
    before, after, treated = {}, {}, {}
    for guidance in (3.0, 1.0):
        before[guidance] = first_prediction(pipe, guidance)
        with suppress(pipe, both):
            treated[guidance] = first_prediction(pipe, guidance)
    with suppress(pipe, mask):
        for guidance in (3.0, 1.0, 3.0):
            after[guidance] = first_prediction(pipe, guidance)
    assert torch.equal(after[3.0][:2], before[3.0][:2])
    torch.testing.assert_close(after[3.0][2:], treated[3.0][2:])
    assert torch.equal(after[1.0], treated[1.0])
    assert not torch.allclose(after[1.0], before[1.0], atol=1e-3)
    with suppress(pipe, mask, guided=False):  # the word of the caller goes first
        assert torch.equal(first_prediction(pipe, 3.0), treated[3.0])


def test_guidance_that_cannot_be_is_refused(unet, inputs):
    three = tuple(value[:3] for value in inputs)
    mask = make(unet, branch="conditional")
    with suppress(unet, mask, guided=True), pytest.raises(InputError, match="batch of 3 has no two halves"):
        run(unet, three)


def test_two_masks_compose_as_the_product_of_their_factors(unet, inputs):
    one, two = make(unet, 1), make(unet, 2)
    with suppress(unet, one), suppress(unet, two):
        nested = run(unet, inputs)
    with suppress(unet, make(unet, factors=one.factors * two.factors)):
        torch.testing.assert_close(nested, run(unet, inputs), atol=1e-5, rtol=1e-4)


GROUPS = ("a", "b", "c")


def allocating(unet, rooted=False, seed=3, **changes):
    parts = [make(unet, seed + i, rooted) for i in range(3)]
    changes = {"groups": GROUPS, **changes}
    roots = torch.stack([part.roots for part in parts]) if rooted else None
    return make(unet, factors=torch.stack([part.factors for part in parts]), roots=roots, **changes)


def signed_zeros(mask):
    """The same mask with every second root a zero of either sign, where an offset could change a sign."""
    roots = mask.roots.clone()
    roots[..., ::4], roots[..., 2::4] = 0.0, -0.0
    return replace(mask, roots=roots)


entries = st.lists(st.sampled_from([*GROUPS, None]), min_size=2, max_size=2)


@settings(max_examples=12)
@given(entries, entries, st.booleans(), st.sampled_from(["conditional", "both"]))
def test_each_sample_gets_its_own_whatever_its_batch_mates_get(unet, inputs, one, two, rooted, branch):
    """And one that is left alone comes out bit for bit as in the batch untreated."""
    mask = allocating(unet, rooted, branch=branch)
    untreated = run(unet, inputs)
    alone = {None: untreated}
    for group in GROUPS:
        with suppress(unet, mask.group(group), guided=True):
            alone[group] = run(unet, inputs)
    with suppress(unet, mask, guided=True) as suppression:
        for samples in (one, two):
            suppression.allot(samples)
            got = run(unet, inputs)
            for i, name in enumerate(samples):
                assert torch.equal(got[2 + i], alone[name][2 + i])
                assert torch.equal(got[i], alone[name][i])  # untreated, if the branch is the conditional one
                assert branch == "both" or torch.equal(got[i], untreated[i])


@pytest.mark.parametrize("branch", ["conditional", "both"])
@pytest.mark.parametrize("guided", [False, True])
def test_allotting_a_group_to_all_is_that_groups_mask(unet, inputs, guided, branch):
    mask = allocating(unet, rooted=True, branch=branch)
    with suppress(unet, mask.group("b"), guided=guided):
        expected = run(unet, inputs)
    for samples in ("b", ["b"], ["b"] * (2 if guided else 4)):
        with suppress(unet, mask, guided=guided) as suppression:
            suppression.allot(samples)
            assert torch.equal(run(unet, inputs), expected)


def test_left_alone_nothing_is_computed(unet, inputs, monkeypatch):
    before = run(unet, inputs)
    monkeypatch.setattr("stereoclinic.sns.damp.damp", None)  # it would raise
    for mask in (allocating(unet, rooted=True), make(unet, rooted=True), make(unet, branch="conditional")):
        with suppress(unet, mask, guided=True) as suppression:
            for samples in (None, False, [None], [False, None], torch.tensor([False, False])):
                suppression.allot(samples)
                assert torch.equal(run(unet, inputs), before)


def test_a_gate_leaves_samples_of_a_plain_mask_alone(unet, inputs):
    before = run(unet, inputs)
    with suppress(unet, make(unet, rooted=True)) as suppression:
        treated = run(unet, inputs)
        suppression.allot([True, False, None, True])
        got = run(unet, inputs)
        suppression.allot(True)
        assert torch.equal(run(unet, inputs), treated)
    assert torch.equal(got, torch.stack([treated[0], before[1], before[2], treated[3]]))


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


def test_roots_of_either_zero_leave_untouched_samples_alone(unet, inputs):
    before = run(unet, inputs)
    with suppress(unet, signed_zeros(allocating(unet, rooted=True))) as suppression:
        suppression.allot(["a", None, "b", None])
        got = run(unet, inputs)
    assert torch.equal(got[1::2], before[1::2])
    assert not torch.equal(got[::2], before[::2])


def test_what_cannot_be_allotted(unet, inputs):
    with suppress(unet, allocating(unet)) as suppression:
        with pytest.raises(InputError, match=r"images to a, b, c, and nothing was allotted yet; call allot"):
            run(unet, inputs)
        for samples in (["a", "d"], [True], [3]):
            with pytest.raises(InputError, match=r"not known; choose from a, b, c, or None"):
                suppression.allot(samples)
        with pytest.raises(InputError, match="no sample"):
            suppression.allot([])
        suppression.allot(["a", "b"])
        with pytest.raises(InputError, match=r"2 samples are allotted, but the call draws 4;"):
            run(unet, inputs)
    with suppress(unet, allocating(unet), guided=True) as suppression:
        suppression.allot(["a", "b", "c", None])
        with pytest.raises(InputError, match=r"4 samples are allotted, but the call draws 2;"):
            run(unet, inputs)
    with suppress(unet, make(unet)) as suppression, pytest.raises(InputError, match="no groups; expected True"):
        suppression.allot(["a"])


def test_samples_treated_differently_need_the_batch_whole(unet, inputs):
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block.set_chunk_feed_forward(1, 0)
    try:
        with suppress(unet, make(unet)) as suppression:
            run(unet, inputs)
            suppression.allot([True, False, True, True])
            with pytest.raises(InputError, match="ran on 1 rows of a batch of 4"):
                run(unet, inputs)
    finally:
        for block in blocks:
            block.set_chunk_feed_forward(None)


def test_half_precision_keeps_its_type(unet, inputs):
    mask = make(unet, rooted=True)
    site = next(site for site in mask.sites if site.kind == "ff")
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    with half, suppress(unet, mask), inputs_of(unet.get_submodule(site.name)) as arrived:
        assert run(unet, inputs).isfinite().all()
    assert arrived[0].dtype == torch.bfloat16
    a = torch.randn(2, 3, 4).bfloat16()
    assert damp(a, torch.rand(1, 4).bfloat16(), -1).dtype == torch.bfloat16


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
        unet(torch.zeros(1, 2, 8, 8), None, None)


def test_a_compiled_model_is_refused(unet):
    mask = make(unet)
    block = unet.mid_block
    block.compile(backend="eager")
    try:
        with pytest.raises(InputError, match="mid_block is compiled"), suppress(unet, mask):
            pass
    finally:
        block._compiled_call_impl = None
    compiled = torch.compile(unet, backend="eager")
    with pytest.raises(InputError, match="UNet2DConditionModel is compiled"), suppress(compiled, mask):
        pass


@pytest.fixture(scope="module")
def small_unet():
    """Two convolutions that are sites, for what takes long."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    return unet.eval().requires_grad_(False)


def test_a_model_compiled_while_it_is_damped_follows_the_mask_and_its_end(small_unet):
    """One graph serves all bins, so that many bins do not exhaust the compiler's patience."""
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 2, 4, 4, generator=g), torch.randn(4, 3, 8, generator=g)
    sites = find_sites(small_unet)
    shape = (2, 12, sum(site.width for site in sites))
    factors = torch.rand(shape, generator=g)
    factors[:, 3] = 1.0  # a bin where nothing is damped
    mask = NeuronMask(sites, torch.linspace(1000, 0, 13), factors, None, "conditional", {}, ("a", "b"))
    times = [torch.tensor(t) for t in range(20, 1000, 80)]
    untreated = [run(small_unet, inputs, t) for t in times]
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    with suppress(small_unet, mask, guided=True) as suppression:
        suppression.allot(["a", None])
        hooked = [run(small_unet, inputs, t) for t in times]
        suppression.allot([None, "b"])
        other = [run(small_unet, inputs, t) for t in times]
        compiled = torch.compile(small_unet, backend=backend)
        for samples, expected in ((["a", None], hooked), ([None, "b"], other)):
            suppression.allot(samples)
            for t, want in zip(times, expected, strict=True):
                assert torch.equal(run(compiled, inputs, t), want)
        assert len(graphs) == 2  # damped, and not
    for t, want in zip(times, untreated, strict=True):
        assert torch.equal(run(compiled, inputs, t), want)


@pytest.fixture
def adapted(unet):
    """A copy with a LoRA on attention outputs and feed-forward layers, and the pieces to take it off again."""
    copied = copy.deepcopy(unet)
    lora = LoraConfig(r=2, target_modules=["to_out.0", "ff.net.2"], init_lora_weights=False)
    torch.manual_seed(5)
    return copied, lora


@pytest.mark.parametrize("rooted", [False, True])
def test_a_lora_under_a_mask_acts_on_damped_activations_whichever_comes_first(unet, inputs, adapted, rooted):
    copied, lora = adapted
    digests = {"unet_shapes": shapes_digest(unet), "unet_weights": weights_digest(unet)}
    mask = make(unet, rooted=rooted, metadata=digests)
    copied.add_adapter(lora)
    undamped = run(copied, inputs)
    with suppress(copied, mask):  # the digests are those of the model beneath
        first = run(copied, inputs)
    assert torch.equal(run(copied, inputs), undamped)
    site = next(site for site in find_sites(copied) if site.kind == "attention")
    with suppress(copied, mask), inputs_of(copied.get_submodule(site.name).lora_A["default"]) as seen:
        with inputs_of(copied.get_submodule(site.name).base_layer) as base:
            run(copied, inputs)
        assert torch.equal(seen[0], base[0])
    state = {name: value for name, value in copied.state_dict().items() if "lora" in name}
    copied.unload_lora()
    assert torch.equal(run(copied, inputs), run(unet, inputs))

    with suppress(copied, mask):  # and loaded, or unloaded, beneath a mask that is on
        copied.add_adapter(lora)
        copied.load_state_dict(state, strict=False)
        assert torch.equal(run(copied, inputs), first)
        copied.unload_lora()
        treated = run(copied, inputs)
    with suppress(unet, mask):
        assert torch.equal(run(unet, inputs), treated)
    assert hooks(copied) == hooks(unet)


def test_a_model_that_is_offloaded_between_calls_is_damped_alike(unet, inputs):
    mask = make(unet, rooted=True)
    with suppress(unet, mask):
        expected = run(unet, inputs)
    copied = copy.deepcopy(unet)
    accelerate.hooks.add_hook_to_module(copied, accelerate.hooks.CpuOffload("cpu"))
    with suppress(copied, mask):
        assert torch.equal(run(copied, inputs), expected)
    accelerate.hooks.remove_hook_from_module(copied)
    with suppress(copied, mask):  # also hooked by the sequential kind, once loaded
        accelerate.cpu_offload(copied, execution_device="cpu")
        assert torch.equal(run(copied, inputs), expected)
    with (
        pytest.raises(InputError, match="'meta' device"),
        suppress(copied, replace(mask, metadata={"unet_weights": "x"})),
    ):
        pass


def test_a_deep_copy_within_the_block_is_refused(unet):
    with suppress(unet, make(unet)), pytest.raises(InputError, match="outside the block, or use load_mask"):
        copy.deepcopy(unet)
