"""Laws of the conservation check: what crosses each cut adds up to the target, and what does not is shown."""

import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tests.ddtd.conftest import leak
from torch import Tensor, nn
from torch.nn import functional

from stereoclinic.ddtd.conservation import Conservation, check
from stereoclinic.ddtd.cuts import Cut
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules import functions as rules
from stereoclinic.ddtd.rules.composites import Composite, get_composite
from stereoclinic.errors import InputError

BLOCKS = ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "conv_norm_out"]


def without_biases(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    return model


def sdxl_unet() -> UNet2DConditionModel:
    """SDXL's way of conditioning, tiny: a pooled text and six sizes beside the text states."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        transformer_layers_per_block=(1, 2),
    )
    return unet.double().requires_grad_(False).eval()


def checked(unet: Any, composite: str | Composite = "epsilon-cp", *, batch: int = 2, seed: int = 0) -> Conservation:
    """The check of one prediction for latents and text states that are all noise."""
    generator, weight = torch.Generator().manual_seed(seed), unet.conv_in.weight

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(weight.dtype)

    latents, text, added = noise(4, 8, 8), noise(5, 8), None
    conditions = [text]
    if unet.config.addition_embed_type:  # SDXL: a pooled text, and six sizes
        conditions.append(noise(8))
        added = {"text_embeds": conditions[1], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * batch).to(weight)}

    def run() -> Tensor:
        return unet(latents, 999, encoder_hidden_states=text, added_cond_kwargs=added).sample

    return check(unet, run, composite, text=conditions)


def test_relevance_adds_up_at_every_cut(any_unet) -> None:
    outcome = checked(any_unet)
    assert [cut.before for cut in outcome.cuts] == [
        name for name in BLOCKS if any_unet.mid_block or name != "mid_block"
    ]
    assert all(cut.total == outcome.total > 0 for cut in outcome.cuts)
    assert outcome.error < 1e-12 and outcome.conserves
    assert outcome.uncovered == {} and outcome.fault is None


def test_without_biases_the_bias_share_is_zero(any_unet) -> None:
    outcome = checked(without_biases(any_unet))
    assert all(cut.shares["bias"] == 0 for cut in outcome.cuts)
    assert outcome.error < 1e-12


def test_what_enters_behind_a_cut(unet) -> None:
    cuts = checked(unet).cuts
    first, last = cuts[0], cuts[-1]
    assert first.shares["skips"] == last.shares["skips"] == last.shares["time"] == last.shares["text"] == 0
    assert all(cut.shares["skips"] != 0 for cut in cuts[1:-1])
    assert all(cut.shares["time"] != 0 for cut in cuts[:-1])
    assert (
        cuts[0].shares["text"] == cuts[1].shares["text"] == cuts[2].shares["text"] != 0
    )  # text enters from down_blocks.1 on,
    assert cuts[5].shares["text"] == 0  # and not behind up_blocks.0
    assert all(cut.shares["bias"] != 0 for cut in cuts)


def test_no_attention_no_text(plain_unet) -> None:
    assert all(cut.shares["text"] == 0 for cut in checked(plain_unet).cuts)


def test_the_first_cut_agrees_with_plain_autograd_on_the_inputs(unet) -> None:
    """The independent reference: no hooks in the blocks, the UNet's own arguments and embedding made leaves."""
    outcome = checked(unet, batch=3, seed=5)
    seen: list[dict[str, Tensor]] = []
    handle = unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append({"latents": args[0], "text": kwargs["encoder_hidden_states"]}),
        with_kwargs=True,
    )
    checked(unet, batch=3, seed=5)
    handle.remove()
    latents, text = seen[0]["latents"].clone().requires_grad_(), seen[0]["text"].clone().requires_grad_()
    assert len(latents) == 3
    kept: list[Tensor] = []

    def make_leaf(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    unet.time_embedding.register_forward_hook(make_leaf)
    with propagate("epsilon-cp"):
        f = unet(latents, 999, text).sample
    grads = torch.autograd.grad(f, [latents, kept[0], text], f.detach())
    want = [float((x * g).sum()) for x, g in zip((latents, kept[0], text), grads, strict=True)]
    first = outcome.cuts[0]
    assert [first.shares["hidden"], first.shares["time"], first.shares["text"]] == pytest.approx(want, rel=1e-10)
    assert first.total == pytest.approx(float(f.square().sum()), rel=1e-12)
    assert first.shares["bias"] == pytest.approx(first.total - sum(want), rel=1e-10)


def test_a_block_owes_the_next_cut_what_enters_it(unet) -> None:
    """Without time, text and biases, an `up` block without skips left would hand its relevance on unchanged."""
    cuts = checked(without_biases(unet)).cuts
    last_up, last = cuts[-2], cuts[-1]
    assert last_up.shares["hidden"] + last_up.shares["skips"] + last_up.shares["time"] == pytest.approx(
        last.shares["hidden"], rel=1e-10
    )


def test_what_does_not_conserve_is_shown(unet) -> None:
    attnlrp = checked(unet, "epsilon-attnlrp")
    assert 1e-6 < attnlrp.error < 0.1 and not attnlrp.conserves
    assert attnlrp.cuts[-1].error < 1e-12  # no attention behind the last cut
    gradient = checked(unet, "gradient")
    assert gradient.error > 0.1 and not gradient.conserves
    assert [checked(unet, name).exact for name in ("epsilon-cp", "epsilon-attnlrp", "gradient")] == [True, False, False]


def test_attnlrp_conserves_where_there_is_no_softmax(plain_unet) -> None:
    assert checked(plain_unet, "epsilon-attnlrp").error < 1e-12


def test_a_leak_is_seen_at_the_cuts_before_it_and_not_behind(unet) -> None:
    unet.up_blocks[0].register_forward_hook(lambda module, args, output: leak(output))
    errors = {cut.before: cut.error for cut in checked(unet).cuts}
    assert all(errors[name] > 1e-4 for name in BLOCKS[:5])
    assert all(errors[name] < 1e-12 for name in BLOCKS[5:])


def test_a_rule_that_does_not_conserve_is_shown(plain_unet) -> None:
    cp = get_composite("epsilon-cp")
    assert checked(plain_unet, replace(cp, name="mine", rules={**cp.rules, "silu": rules.native})).error > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_stays_within_what_counts_as_rounding(unet, dtype: torch.dtype) -> None:
    outcome = checked(unet.to(dtype))
    assert outcome.dtype == dtype
    assert outcome.error > 0 and outcome.conserves


def test_sdxl_conditions_go_with_time() -> None:
    unet = sdxl_unet()
    outcome = checked(unet)
    assert outcome.error < 1e-12
    assert all(cut.shares["time"] != 0 for cut in outcome.cuts[:-1])


def test_gradient_checkpointing_and_trainable_weights_change_nothing_but_memory(unet) -> None:
    plain = checked(unet)
    unet.train().requires_grad_(True)
    trainable = checked(unet)
    unet.enable_gradient_checkpointing()
    checkpointed = checked(unet)
    for other in (trainable, checkpointed):
        for a, b in zip(plain.cuts, other.cuts, strict=True):
            assert a.shares == pytest.approx(b.shares, rel=1e-9, abs=1e-9)
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert 0 < checkpointed.kept_bytes < plain.kept_bytes


def test_memory_is_by_sample_and_weights_are_not_counted(unet) -> None:
    needed: list[int] = []  # what SiLU's rule must keep

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        needed.append(args[0].nbytes)

    for module in {id(m): m for m in unet.modules() if isinstance(m, nn.SiLU)}.values():
        module.register_forward_pre_hook(count)
    one = checked(unet, batch=1).kept_bytes
    assert one >= sum(needed)
    assert checked(unet, batch=4).kept_bytes == pytest.approx(one, rel=0.05)
    for block in unet.down_blocks:
        for resnet in block.resnets:  # wider weights of a layer whose sizes in and out stay
            resnet.conv1 = (
                nn.Conv2d(resnet.in_channels, resnet.out_channels, 5, padding=2).double().requires_grad_(False)
            )
    assert checked(unet, batch=1).kept_bytes == one


def test_the_model_is_left_as_it_came(unet, inputs) -> None:
    before = unet(*inputs).sample
    checked(unet)
    assert torch.equal(unet(*inputs).sample, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    unet.conv_out.weight.data.fill_(math.nan)
    assert checked(unet).fault
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_nothing_is_held_on_to_afterwards(unet) -> None:
    """Gigabytes, for a large model: hooks on a graph that hold the graph would never be freed."""
    passed: list[weakref.ref[Tensor]] = []
    unet.mid_block.register_forward_hook(lambda module, args, output: passed.append(weakref.ref(output)))
    checked(unet)
    checked(unet, "gamma-cp")
    gc.collect()
    assert [each() for each in passed] == [None, None]


def test_a_seed_names_the_pass(unet) -> None:
    assert checked(unet, seed=3) == checked(unet, seed=3)
    assert checked(unet, seed=3).cuts != checked(unet, seed=4).cuts


class Mish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.mish(x)


def test_uncovered_operations_are_named(unet) -> None:
    unet.mid_block.resnets[0].nonlinearity = Mish()
    outcome = checked(unet)
    assert outcome.uncovered == {"torch.nn.functional.mish": 3}  # twice in the resnet, once on its time embedding
    errors = {cut.before: cut.error for cut in outcome.cuts}
    assert errors["mid_block"] > 1e-6 and errors["up_blocks.0"] < 1e-12  # what it costs, and where
    assert checked(unet, "gradient").uncovered == {}


@pytest.mark.parametrize(
    ("block", "parameter", "fault"),
    [
        ("down_blocks.0", "resnets.0.conv1.weight", "entering `down_blocks.1`"),
        ("conv_out", "weight", "the prediction"),
        ("time_embedding", "linear_1.weight", "the time entering `down_blocks.0`"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_named(unet, block: str, parameter: str, fault: str, value: float) -> None:
    unet.get_submodule(block).get_parameter(parameter).data.view(-1)[0] = value
    outcome = checked(unet)
    assert fault in (outcome.fault or "")
    assert outcome.cuts == () and outcome.error == math.inf and not outcome.conserves


def test_relevance_that_is_not_a_number_is_named(unet) -> None:
    """Values stay finite on the way forth, and turn on the way back, in the middle block."""
    unet.mid_block.resnets[0].norm1.register_forward_hook(
        lambda module, args, output: output.register_hook(lambda g: g * math.inf) and None
    )
    outcome = checked(unet)
    assert outcome.fault == "relevance turns NaN or infinite in `mid_block`"
    assert outcome.error == math.inf
    assert all(cut.error < 1e-12 for cut in outcome.cuts[4:])


def test_rounding_is_told_from_a_loss_by_the_dtype() -> None:
    shares = {"hidden": 0.5, "skips": 0.0, "time": 0.2, "text": 0.2, "bias": 0.1 - 1e-6}
    cut = Cut("conv_in", shares, total=1.0)
    outcome = Conservation("epsilon-cp", torch.float32, 1, 1.0, (cut,), {}, None, 0, True)
    assert outcome.error == pytest.approx(1e-6)
    assert outcome.conserves
    assert not replace(outcome, dtype=torch.float64).conserves
    assert not replace(outcome, cuts=(replace(cut, shares={**shares, "bias": 0.0}),)).conserves
    assert not replace(outcome, cuts=(replace(cut, shares={**shares, "bias": math.nan}),)).conserves


def test_bad_input(unet) -> None:
    with pytest.raises(InputError, match="Linear has no list of blocks: expected a denoiser"):
        check(nn.Linear(2, 2), lambda: torch.ones(1, 2))
    with pytest.raises(InputError, match="no block of UNet2DConditionModel ran"):
        check(unet, lambda: torch.ones(1, 2))
    with pytest.raises(InputError, match="'lrp' is not known"):
        checked(unet, "lrp")
    unet.conv_out.weight.data.zero_()
    unet.conv_out.bias.data.zero_()
    with pytest.raises(InputError, match="zero everywhere"):
        checked(unet)
