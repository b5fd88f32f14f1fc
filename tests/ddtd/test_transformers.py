"""Laws of the rules and of the conservation check, on every transformer family of diffusers."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.utils import logging
from tests.ddtd.conftest import leak
from tests.ddtd.denoisers import Call
from tests.ddtd.transformers import FAMILIES, tiny
from torch import Tensor, nn

from stereoclinic.ddtd.conservation import Conservation, check
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules import layers as layer_rules
from stereoclinic.ddtd.rules.composites import COMPOSITES, Choice, Composite
from stereoclinic.ddtd.rules.order import find_layers

logging.set_verbosity_error()  # `to` warns of modules that stay in float32

CP = COMPOSITES["epsilon-cp"]
HALVES = replace(CP, name="halves", modulation="halves")
EXACT = [*(COMPOSITES[name] for name in ("epsilon-cp", "gamma-cp", "zplus-cp", "deep-taylor")), HALVES]
ALL = [*COMPOSITES.values(), HALVES]
#: In double precision these fit no dtype: some of their modules cast to float32.
IN_SINGLE = {"Kandinsky 5"}


def named(composite: Composite) -> str:
    return composite.name


def checked(call: Call, composite: Composite = CP) -> Conservation:
    return check(call.network, call, composite, text=call.text)


def asking(call: Call) -> list[Tensor]:
    """Ask about the latents; they are the first argument."""
    first = next(iter(call.kwargs))
    value = call.kwargs[first]
    leaves = [x.clone().requires_grad_() for x in (value if isinstance(value, list) else [value])]
    call.kwargs[first] = leaves if isinstance(value, list) else leaves[0]
    return leaves


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_forward_pass_is_bit_identical(family: str) -> None:
    call = tiny(family)
    plain = call()
    asking(call)
    for composite in ALL:
        if family == "Kandinsky 3" and composite.by_terms:
            continue  # refused: see below
        with propagate(composite, call.network):
            assert torch.equal(call(), plain), composite.name


def test_the_gradient_composite_is_autograd(family: str) -> None:
    call = tiny(family)
    leaves = asking(call)
    plain = torch.autograd.grad(call().square().sum(), leaves)
    with propagate("gradient"):
        out = call()
    got = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("composite", EXACT, ids=named)
def test_relevance_adds_up_before_every_block(family: str, composite: Composite) -> None:
    outcome = checked(tiny(family), composite)
    if family == "Kandinsky 3" and composite.by_terms:
        assert set(outcome.uncovered) == {"torch.nn.functional.conv_transpose2d"}
    else:
        assert outcome.uncovered == {} and outcome.fault is None
        assert outcome.error < 1e-5 and outcome.conserves and outcome.exact
    assert len(outcome.cuts) >= 3 and all(cut.total == outcome.total > 0 for cut in outcome.cuts)


def test_relevance_adds_up_to_the_rounding_of_double_precision(family: str) -> None:
    if family in IN_SINGLE:
        pytest.skip("its time embedding stays in float32")
    outcome = checked(tiny(family).to(torch.float64))
    assert outcome.error < 1e-7 and outcome.conserves  # not 1e-12: some compute norms and rotations in float32


def test_masks_and_positions_may_be_among_what_depends_on_the_prompt(family: str) -> None:
    call = tiny(family)
    plain = checked(call)
    call.text += [x for name, x in call.kwargs.items() if "mask" in name or name == "txt_ids"]
    assert checked(call) == plain


def test_plain_gradients_do_not_add_up(family: str) -> None:
    assert checked(tiny(family), COMPOSITES["gradient"]).error > 1e-3


#: Families without learned tables, positions or tokens that are added.
@pytest.mark.parametrize("family", ["FLUX.1", "Qwen-Image", "CogView4", "Ovis", "Bria", "HunyuanImage"])
def test_without_biases_the_bias_share_is_zero(family: str) -> None:
    call = tiny(family)
    for name, parameter in call.network.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    outcome = checked(call)
    assert all(cut.shares["bias"] == 0 for cut in outcome.cuts)
    assert outcome.error < 1e-5


def test_blocks_come_in_the_order_in_which_they_run() -> None:
    orders = {name: [cut.before for cut in checked(tiny(name)).cuts] for name in ("FLUX.1", "Lumina 2", "Z-Image")}
    assert orders["FLUX.1"] == [
        *(f"transformer_blocks.{i}" for i in range(2)),
        *(f"single_transformer_blocks.{i}" for i in range(2)),
        "norm_out",
    ]
    assert orders["Lumina 2"] == ["context_refiner.0", "noise_refiner.0", "layers.0", "layers.1", "norm_out"]
    assert orders["Z-Image"] == ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1", "all_final_layer.2-1"]


def test_the_latents_meet_the_first_layer(family: str) -> None:
    call = tiny(family)
    first, met = find_layers(call.network)[0], []
    call.network.get_submodule(first.name).register_forward_pre_hook(lambda module, args: met.append(args[0]))
    asking(call)
    call()
    assert met[0].requires_grad


#: Families whose first argument of every block is the image's own tokens.
OWN_STREAM = ["FLUX.1", "SD3", "PixArt", "SANA", "Qwen-Image", "CogView4", "HunyuanImage", "Ovis", "Bria"]
ONE_SEQUENCE = ["FLUX.2", "Chroma", "AuraFlow", "Krea 2", "HiDream"]


@pytest.mark.parametrize("composite", [CP, HALVES], ids=named)
@pytest.mark.parametrize("family", [*OWN_STREAM, *ONE_SEQUENCE])
def test_the_check_decomposes_what_is_measured(family: str, composite: Composite) -> None:
    """The independent reference: nothing is asked about but the latents, and no hook changes what enters a block."""
    call = tiny(family)
    cuts = {cut.before: cut for cut in checked(call, composite).cuts}
    entered: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    for name in cuts:
        call.network.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
    asking(call)
    with propagate(composite, call.network):
        f = call()
    for name, cut in cuts.items():
        (g,) = torch.autograd.grad(f, entered[name], f.detach(), retain_graph=True)
        relevance = (entered[name] * g).detach().double().sum(2)  # (B, L)
        shares = cut.shares
        tokens = relevance.shape[1]
        if tokens == 16:
            assert float(relevance.sum()) == pytest.approx(shares["image"], rel=1e-4, abs=1e-5 * cut.total)
        else:
            image = slice(0, 16) if family == "HiDream" else slice(tokens - 16, tokens)
            assert float(relevance[:, image].sum()) == pytest.approx(shares["image"], rel=1e-4, abs=1e-5 * cut.total)
            both = shares["image"] + shares["text_tokens"]
            assert float(relevance.sum()) == pytest.approx(both, rel=1e-4, abs=1e-5 * cut.total)


def test_image_and_text_tokens_are_told_apart_in_one_sequence(family: str) -> None:
    assert all("tokens" not in cut.shares for cut in checked(tiny(family)).cuts)


def test_joining_two_streams_changes_neither() -> None:
    """Lumina's first joint block: what crosses the cut before it is what its refiners made, and nothing else."""
    before, after = checked(tiny("Lumina 2")).cuts[1:3]
    assert before.before == "noise_refiner.0" and after.before == "layers.0"
    assert before.shares["text_tokens"] == pytest.approx(after.shares["text_tokens"], rel=1e-5)


def test_skip_connections_of_a_transformer() -> None:
    cuts = checked(tiny("HunyuanDiT")).cuts
    assert [cut.shares["skips"] != 0 for cut in cuts] == [False, True, True, True, False]
    assert cuts[1].shares["skips"] == pytest.approx(cuts[3].shares["skips"])


def test_pooled_text_and_time_enter_as_modulation_and_text_states_as_text() -> None:
    for family, item in (("SD3", "text_tokens"), ("PixArt", "text"), ("SANA", "text")):
        first, last = checked(tiny(family)).cuts[0], checked(tiny(family)).cuts[-1]
        assert first.shares["modulation"] != 0 and first.shares[item] != 0
        assert last.shares["modulation"] != 0 and last.shares.get(item, 0) == 0


def test_modulation_held_constant_takes_only_what_it_adds() -> None:
    """Without shifts it takes nothing; a composite may give it half of every product."""
    call = tiny("Z-Image")  # scales and gates, no shifts
    assert all(cut.shares["modulation"] == 0 for cut in checked(call).cuts)
    assert all(cut.shares["modulation"] != 0 for cut in checked(call, HALVES).cuts)


@pytest.mark.parametrize("family", ["FLUX.1", "FLUX.2", "PixArt"])
def test_a_leak_is_seen_at_the_cuts_before_it_and_not_behind(family: str) -> None:
    call = tiny(family)
    call.network.transformer_blocks[1].register_forward_hook(
        lambda module, args, out: tuple(map(leak, out)) if isinstance(out, tuple) else leak(out)
    )
    cuts = checked(call).cuts
    place = [cut.before for cut in cuts].index("transformer_blocks.1")
    assert all(cut.error > 1e-3 for cut in cuts[: place + 1])
    assert all(cut.error < 1e-6 for cut in cuts[place + 1 :])


@pytest.mark.parametrize("family", ["FLUX.1", "Chroma", "HiDream"])
def test_a_leak_between_two_blocks_is_seen_before_both(family: str) -> None:
    """Between its lists, a network joins two streams; there nothing is a block."""
    call = tiny(family)
    norm = call.network.final_layer if family == "HiDream" else call.network.norm_out
    norm.register_forward_pre_hook(lambda module, args: (leak(args[0]), *args[1:]))
    cuts = checked(call).cuts
    assert all(cut.error > 1e-3 for cut in cuts[:-1]) and cuts[-1].error < 1e-6


def test_a_rule_that_does_not_conserve_is_shown() -> None:
    native = replace(CP, name="mine", rules={**CP.rules, "layer_norm": COMPOSITES["epsilon-attnlrp"].rules["softmax"]})
    assert checked(tiny("SD3"), native).error > 1e-2
    attnlrp = checked(tiny("SD3"), COMPOSITES["epsilon-attnlrp"])
    assert attnlrp.error > 1e-6 and not attnlrp.exact


@pytest.mark.parametrize("family", ["FLUX.1", "FLUX.2", "SD3", "PixArt", "SANA", "Z-Image", "Lumina 2", "Krea 2"])
def test_gradient_checkpointing_and_trainable_weights_change_nothing_but_memory(family: str) -> None:
    call = tiny(family)
    plain = checked(call)
    call.network.requires_grad_(True)
    trainable = checked(call)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in call.network.parameters())
    call.network.enable_gradient_checkpointing()
    checkpointed = checked(call)
    for other in (trainable, checkpointed):
        for a, b in zip(plain.cuts, other.cuts, strict=True):
            assert a.shares == pytest.approx(b.shares, rel=1e-4, abs=1e-6 * a.total)
    assert 0 < checkpointed.kept_bytes < plain.kept_bytes


@pytest.mark.parametrize("family", ["FLUX.1", "SANA", "Z-Image"])
@pytest.mark.parametrize("composite", [CP, COMPOSITES["zplus-cp"], HALVES], ids=named)
def test_gradient_checkpointing_keeps_relevance(family: str, composite: Composite) -> None:
    call = tiny(family)
    leaves = asking(call)

    def relevance() -> list[Tensor]:
        with propagate(composite, call.network):
            f = call()
        return [x * g for x, g in zip(leaves, torch.autograd.grad(f, leaves, f.detach()), strict=True)]

    plain = relevance()
    call.network.enable_gradient_checkpointing()
    torch.testing.assert_close(relevance(), plain, rtol=1e-4, atol=1e-6)


def test_a_lora_reads_as_if_it_were_merged() -> None:
    peft = pytest.importorskip("peft")
    call = tiny("FLUX.1").to(torch.float64)
    call.network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0", "net.2", "proj_mlp"]))
    for name, parameter in call.network.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(0.1)
    call.network.eval()
    gamma = Composite("mine", {**CP.rules, "linear": layer_rules.gamma(0.25)})
    by_layer = Composite("by layer", CP.rules, layers=(Choice(layer_rules.z_plus, "transformer_blocks.*.to_out.0"),))
    composites = (CP, gamma, COMPOSITES["zplus-cp"], by_layer, HALVES)
    beside = [checked(call, composite) for composite in composites]
    call.network.fuse_lora()
    call.network.unload_lora()
    for composite, outcome in zip(composites, beside, strict=True):
        assert outcome.error < 1e-12
        for a, b in zip(outcome.cuts, checked(call, composite).cuts, strict=True):
            assert a.shares == pytest.approx(b.shares, rel=1e-8, abs=1e-8 * a.total)


def test_compiled_blocks_run_eagerly() -> None:
    call = tiny("FLUX.1")
    plain = checked(call)
    for block in (*call.network.transformer_blocks, *call.network.single_transformer_blocks):
        block.compile(backend="eager")
    call()  # compiled now
    assert checked(call) == plain
    leaves = asking(call)
    with propagate(CP, call.network):
        f = call()
    assert torch.autograd.grad(f, leaves, f.detach())[0].isfinite().all()
    torch.compiler.reset()


def test_weights_that_come_and_go() -> None:
    """Sequential offloading: rules by kind of operation need no weight to be where it was."""
    accelerate = pytest.importorskip("accelerate")
    call = tiny("SD3")
    plain = [checked(call, composite).cuts for composite in (CP, COMPOSITES["zplus-cp"])]
    accelerate.cpu_offload(call.network, torch.device("cpu"), offload_buffers=True)
    assert next(call.network.parameters()).is_meta
    assert [checked(call, composite).cuts for composite in (CP, COMPOSITES["zplus-cp"])] == plain


def test_nothing_is_held_on_to_afterwards() -> None:
    call, passed = tiny("FLUX.2"), []
    call.network.transformer_blocks[1].register_forward_hook(
        lambda module, args, out: passed.append(weakref.ref(out[1]))
    )
    plain = call()
    outcomes = [checked(call), checked(call, COMPOSITES["zplus-cp"])]
    gc.collect()
    assert [made() for made in passed[1:]] == [None, None] and all(outcome.conserves for outcome in outcomes)
    assert torch.equal(call(), plain)
    assert not any(len(m._forward_pre_hooks) for m in call.network.modules())


#: What the output does not read: the last block's text. (CogView4's feed-forwards run on the image and then on the
#: text, so that what is watched last is the text.)
UNREAD = {"Qwen-Image": "transformer_blocks.1.", "CogView4": "transformer_blocks.1.ff"}


@pytest.mark.parametrize("composite", ALL, ids=named)
def test_every_site_can_be_asked_about(family: str, composite: Composite) -> None:
    """Sites in text refiners too, which the check itself holds constant."""
    from stereoclinic.pipelines.hooks import Watch
    from stereoclinic.pipelines.sites import find_sites

    call = tiny(family)
    if family == "Kandinsky 3" and composite.by_terms:
        pytest.skip("refused: transposed convolutions have no such rule")
    asking(call)
    with Watch(call.network, find_sites(call.network)) as watch:
        with propagate(composite, call.network):
            f = call()
        grads = watch.grads(f, f.detach(), retain=False)
    silent = {name for name, g in grads.items() if g is None or not g.any()}
    assert all(g is None or g.isfinite().all() for g in grads.values())
    assert all(UNREAD.get(family, "none") in name for name in silent)
