"""Sites, watching them, and the sum of relevance over positions."""

import pytest
import torch
from torch import nn

from stereoclinic.ddtd.neurons import SITE_KINDS, Site, Watch, find_sites, neuron_relevance, to_neurons
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.errors import InputError


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_sites_are_found_in_module_order(unet) -> None:
    sites = find_sites(unet)
    names = list(dict(unet.named_modules()))
    assert [site.name for site in sites] == [n for n in names if n in {site.name for site in sites}]
    assert {site.kind for site in sites} == set(SITE_KINDS)
    for site in sites:
        assert site.name.endswith(SITE_KINDS[site.kind])
        assert unet.get_submodule(site.name).weight.shape[1] == site.width
    assert find_sites(unet, ("ff",)) == [site for site in sites if site.kind == "ff"]
    assert all(site.kind == "conv" for site in find_sites(unet, ("conv",)))


def test_what_is_not_there_is_said(unet) -> None:
    with pytest.raises(InputError, match=r"has no site.*conv2"):
        find_sites(nn.Linear(2, 2))
    with pytest.raises(InputError, match="'mlp' is not known; choose from ff, attention, conv"):
        find_sites(unet, ("mlp",))
    with pytest.raises(InputError, match="'nowhere' is not in this UNet2DConditionModel"):
        Watch(unet, [Site("nowhere", "ff", 3)]).__enter__()


def test_watching_changes_nothing_and_leaves_no_hook(unet, inputs) -> None:
    before, plain = hooks_of(unet), unet(*inputs).sample
    sites = find_sites(unet)
    with Watch(unet, sites) as watch:
        assert torch.equal(unet(*inputs).sample, plain)
        assert list(watch.activations) and set(watch.activations) == {site.name for site in sites}
        for site in sites:
            assert to_neurons(watch.activations[site.name], site.kind).shape == (2, site.width)
        first = dict(watch.activations)
        unet(2 * inputs[0], *inputs[1:])
        assert not torch.equal(watch.activations[sites[0].name], first[sites[0].name])
    assert hooks_of(unet) == before
    with pytest.raises(ZeroDivisionError), Watch(unet, sites):
        raise ZeroDivisionError
    assert hooks_of(unet) == before


def test_every_watched_input_requires_grad_only_when_grad_is_wanted(unet, inputs) -> None:
    sites = find_sites(unet)
    with Watch(unet, sites) as watch:
        with propagate("epsilon-cp"):
            out = unet(*inputs).sample  # no input requires grad
        watched = [watch.activations[site.name] for site in sites]
        assert all(x.requires_grad for x in watched)
        grads = torch.autograd.grad(out.sum(), watched, allow_unused=True)
        assert all(g is not None for g in grads)
        with torch.no_grad():
            unet(*inputs)
        assert not any(x.requires_grad for x in watch.activations.values())


def test_positions_are_summed_in_float32_or_wider() -> None:
    x = torch.full((1, 4096, 2), 1.001, dtype=torch.bfloat16)
    assert to_neurons(x, "ff").dtype == torch.float32
    torch.testing.assert_close(to_neurons(x, "ff"), torch.full((1, 2), 4096.0))
    image = torch.arange(12.0, dtype=torch.float64).view(1, 3, 2, 2)
    assert to_neurons(image, "conv").tolist() == [[6.0, 22.0, 38.0]]
    assert to_neurons(image[..., 0, 0], "conv").tolist() == [[0.0, 4.0, 8.0]]


def test_relevance_of_neurons_plain_and_rooted() -> None:
    sites = [Site("a.ff.net.2", "ff", 2), Site("conv2", "conv", 3)]
    generator = torch.Generator().manual_seed(0)
    a = {
        "a.ff.net.2": torch.randn(2, 5, 2, generator=generator),
        "conv2": torch.randn(2, 3, 2, 2, generator=generator),
    }
    g = [torch.randn(x.shape, generator=generator) for x in a.values()]
    root = {name: torch.randn(x.shape, generator=generator) for name, x in a.items()}
    plain = neuron_relevance(a, g, sites)
    expected = torch.stack([(a["conv2"][i, j] * g[1][i, j]).sum() for i in range(2) for j in range(3)]).view(2, 3)
    torch.testing.assert_close(plain[:, 2:], expected)
    torch.testing.assert_close(plain[:, 0], (a["a.ff.net.2"] * g[0])[..., 0].sum(1))
    torch.testing.assert_close(neuron_relevance(a, g, sites, root), plain - neuron_relevance(root, g, sites))
    assert torch.equal(neuron_relevance(a, [None, g[1]], sites)[:, :2], torch.zeros(2, 2))
    assert neuron_relevance(a, g, sites, a).abs().max() == 0
