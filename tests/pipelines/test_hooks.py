"""The one set of hooks on sites: they change nothing by themselves, follow the layers, and leave no trace."""

from typing import Any

import pytest
import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig
from torch import Tensor, nn

from stereoclinic.ddtd.propagate import propagate
from stereoclinic.errors import InputError
from stereoclinic.pipelines.hooks import LAYOUTS, Hooks, Watch, with_gradients
from stereoclinic.pipelines.intercept import PASS, Pass
from stereoclinic.pipelines.sites import Site, find_sites, to_neurons


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_watching_changes_nothing_and_leaves_no_hook(unet, inputs) -> None:
    before, plain = hooks_of(unet), unet(*inputs).sample
    sites = find_sites(unet)
    with Watch(unet, sites) as watch:
        assert torch.equal(unet(*inputs).sample, plain)
        assert list(watch.activations) and set(watch.activations) == {site.layer for site in sites}
        for site in sites:
            assert to_neurons(watch.activations[site.layer], site.dim).shape == (2, site.width)
        first = dict(watch.activations)
        watch.activations.clear()
        unet(2 * inputs[0], *inputs[1:])
        assert not torch.equal(watch.activations[sites[0].layer], first[sites[0].layer])
    assert hooks_of(unet) == before
    with pytest.raises(ZeroDivisionError), Watch(unet, sites):
        raise ZeroDivisionError
    assert hooks_of(unet) == before


def test_every_watched_input_requires_grad_only_when_grad_is_wanted(unet, inputs) -> None:
    with Watch(unet, find_sites(unet)) as watch:
        with propagate("epsilon-cp"):
            out = unet(*inputs).sample  # no input requires grad
        assert all(x.requires_grad for x in watch.activations.values())
        grads = watch.grads(out, torch.ones_like(out), retain=False)
        assert grads.keys() == watch.activations.keys() and all(g is not None for g in grads.values())
        watch.activations.clear()
        with torch.no_grad():
            unet(*inputs)
        assert watch.activations and not any(x.requires_grad for x in watch.activations.values())


class Twice(nn.Module):
    """A layer that runs twice in a pass, and one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(self.layer(x).relu())
        return found


def test_each_run_of_a_layer_is_kept() -> None:
    model, x = Twice(), torch.randn(2, 5, 3)
    with Watch(model, [Site("layer", "other", 3), Site("idle", "other", 3)]) as watch:
        out = model(x)
        assert list(watch.activations) == ["layer", "layer#2"]
        torch.testing.assert_close(watch.activations["layer#2"], model.layer(x).relu())
        grads = watch.grads(out, torch.ones_like(out), retain=False)
    torch.testing.assert_close(grads["layer#2"], model.layer.weight.sum(0).expand(2, 5, 3))


def test_what_act_gives_goes_on_once(unet, inputs) -> None:
    site = find_sites(unet, ("ff",))[0]
    layer, given, plain = unet.get_submodule(site.name), [], unet(*inputs).sample
    with Hooks(unet, [site.name, site.name], lambda name, x: 0.5 * x):  # a layer that is named twice is hooked once
        layer.register_forward_hook(lambda _, args, out: given.append(args[0]))
        assert not torch.equal(unet(*inputs).sample, plain)
    unet(*inputs)
    halved, whole = given
    torch.testing.assert_close(halved, whole / 2)
    with Hooks(unet, [site.name], lambda name, x: None):
        assert torch.equal(unet(*inputs).sample, plain)


def test_a_layer_that_is_not_there_leaves_no_hook_on_the_others(unet) -> None:
    before = hooks_of(unet)
    with pytest.raises(InputError, match="'nowhere' is not in this UNet2DConditionModel"):
        Watch(unet, [find_sites(unet)[0], Site("nowhere", "ff", 3)]).__enter__()
    assert hooks_of(unet) == before


def test_hooks_follow_a_layer_into_an_adapter_and_out_of_it(unet, inputs) -> None:
    """peft puts a wrapper in the layer's place, which runs it by its own means."""
    site, seen = find_sites(unet, ("ff",))[0], []
    with Hooks(unet, [site.name], lambda name, x: seen.append(name)) as hooks:
        unet.add_adapter(LoraConfig(r=2, target_modules=["ff.net.2"]))
        hooks.follow()
        wrapper: Any = unet.get_submodule(site.name)
        assert hasattr(wrapper, "base_layer") and wrapper._forward_pre_hooks
        unet(*inputs)
        recurse_remove_peft_layers(unet)
        hooks.follow()
        unet(*inputs)
    assert seen == [site.name] * 2
    assert not hasattr(unet.get_submodule(site.name), "base_layer") and hooks_of(unet) == 0


@pytest.mark.parametrize(
    ("layout", "shape"), [(None, (2, 5, 3)), ("second", (5, 2, 3)), ("folded", (2 * 5, 3)), ("folded", (2 * 5, 4, 3))]
)
def test_rows_come_first_however_they_run_in_a_layer(layout: str | None, shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.arange(float(torch.Size(shape).numel())).view(shape)
    model.__dict__[LAYOUTS] = {} if layout is None else {"0": layout}
    model.__dict__[PASS] = Pass(0, 500.0, (0, 1), (True, True), True, 2)
    seen: list[Tensor] = []

    def act(name: str, given: Tensor) -> Tensor:
        seen.append(given)
        return given * torch.tensor([1.0, 0.0]).view(2, *[1] * (given.ndim - 1))  # the second row is silenced

    plain, bias = model(x), model[0].bias
    with Hooks(model, ["0"], act):
        found = model(x)
    assert seen[0].shape[0] == 2 and seen[0].numel() == x.numel()
    rows, silenced = (
        (each.transpose(0, 1) if layout == "second" else each).reshape(2, -1, 3) for each in (plain, found)
    )
    torch.testing.assert_close(silenced[0], rows[0])
    torch.testing.assert_close(silenced[1], bias.expand_as(silenced[1]))


class Routed(nn.Module):
    """As routed experts of diffusers: what it does at rest has no gradient, what it does in training has."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.dropout(2 * x if self.training else self.infer(x))
        return found


def test_modules_without_gradient_at_rest_have_one_for_a_while_and_drop_nothing_out() -> None:
    model, x = nn.Sequential(Routed(), nn.Dropout(0.5)).eval(), torch.ones(100, requires_grad=True)
    assert not model(x).requires_grad
    with pytest.raises(KeyError), with_gradients(model):
        assert torch.autograd.grad(model(x).sum(), x)[0].tolist() == [2.0] * 100
        raise KeyError
    assert not any(module.training for module in model.modules())
    model[0].train()
    with with_gradients(model):
        pass
    assert model[0].training  # as it was
