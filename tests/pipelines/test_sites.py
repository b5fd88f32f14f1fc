"""Sites: found by their paths, parted where two kinds share a layer, and relevance summed over their positions."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from tests.pipelines.tiny import build
from torch import nn

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import (
    SITE_KINDS,
    Site,
    by_layer,
    check_sites,
    find_sites,
    neuron_relevance,
    spans,
    to_neurons,
)

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def test_sites_are_found_in_module_order(unet) -> None:
    sites = find_sites(unet)
    names = list(dict(unet.named_modules()))
    assert [site.name for site in sites] == [n for n in names if n in {site.name for site in sites}]
    assert {site.kind for site in sites} == {"ff", "attention", "conv"}
    for site in sites:
        assert site.name.endswith(SITE_KINDS[site.kind])
        assert unet.get_submodule(site.name).weight.shape[1] == site.width
    assert find_sites(unet, ("ff",)) == [site for site in sites if site.kind == "ff"]
    assert all(site.kind == "conv" for site in find_sites(unet, ("conv",)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # kind -> (sites, neurons): 70 sites and 95,040 neurons; 227 and 512,960.
        (SD15, {"ff": (16, 49_920), "self": (16, 12_480), "cross": (16, 12_480), "conv": (22, 20_160)}),
        (SDXL, {"ff": (70, 332_800), "self": (70, 83_200), "cross": (70, 83_200), "conv": (17, 13_760)}),
    ],
    ids=["sd15", "sdxl"],
)
def test_sites_of_the_full_size_models(config: dict, expected: dict) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    found: dict[str, list[int]] = {}
    sites = find_sites(unet)
    for site in sites:
        kind = {"attn1": "self", "attn2": "cross"}[site.name.split(".")[-3]] if site.kind == "attention" else site.kind
        found.setdefault(kind, []).append(site.width)
    assert {kind: (len(widths), sum(widths)) for kind, widths in found.items()} == expected
    assert sum(site.width for site in sites) == sum(count for _, count in expected.values())
    names = [site.name for site in sites]
    assert "mid_block.attentions.0.transformer_blocks.0.ff.net.2" in names
    assert "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0" in names
    assert "down_blocks.0.resnets.0.conv2" in names


@pytest.mark.parametrize(("name", "layer"), [("flux", "proj_out"), ("flux2-klein", "attn.to_out")])
def test_a_layer_of_two_kinds_is_two_sites(name: str, layer: str) -> None:
    """Attention's channels first, then the feed-forward block's: together they are the layer's."""
    network = build(name).transformer
    sites = [site for site in find_sites(network) if site.layer == f"single_transformer_blocks.0.{layer}"]
    assert [site.kind for site in sites] == ["attention", "ff"]
    assert [site.start for site in sites] == [0, sites[0].width] and sites[0].width == 32  # two heads of 16
    width = network.get_submodule(sites[0].layer).in_features
    assert [site.name for site in sites] == [f"{sites[0].layer}[:32]", f"{sites[0].layer}[32:]"]
    x = torch.randn(2, 3, width)
    assert torch.equal(torch.cat([site.of(x) for site in sites], dim=-1), x)
    assert {site.stream for site in sites} == {"joint"}


def test_streams_of_a_transformer_are_told_apart() -> None:
    sites = find_sites(build("sd3").transformer)
    streams = {site.name.removeprefix("transformer_blocks.0."): site.stream for site in sites[:5]}
    assert streams == {
        "attn.to_out.0": "image",
        "attn.to_add_out": "text",
        "attn2.to_out.0": "image",
        "ff.net.2": "image",
        "ff_context.net.2": "text",
    }


def test_a_user_s_patterns_stand_in_for_the_table(unet) -> None:
    (site,) = find_sites(unet, patterns=("mid_block.*.proj_in",))
    assert (site.kind, site.width, site.dim) == ("conv", 16, 1)
    linear = find_sites(unet, patterns=("mid_block.*.to_q", "mid_block.*.proj_in"))
    assert [each.kind for each in linear] == ["conv", "other", "other"]
    with pytest.raises(InputError, match=r"--sites 'blocks.\*.nowhere' fits no layer.*its layers: conv_in, "):
        find_sites(unet, patterns=("mid_block.*.to_q", "blocks.*.nowhere"))


def test_what_is_not_there_is_said(unet) -> None:
    with pytest.raises(InputError, match="has no site; it has no linear layer or convolution"):
        find_sites(nn.ReLU())
    with pytest.raises(InputError, match=r"Sequential has no site; its layers: \*; name layers by --sites"):
        find_sites(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(InputError, match="'mlp' is not known; choose from ff, attention, conv"):
        find_sites(unet, ("mlp",))


@pytest.mark.parametrize("site", [Site(3, "ff", 4), Site("a", "mlp", 4), Site("a", "ff", 0), Site("a", "ff", True)])
def test_sites_that_no_layer_can_be_are_refused(site: Site) -> None:
    with pytest.raises(InputError, match=r"a file: site .* expected a module path"):
        check_sites([Site("b", "ff", 4), site], "a file")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_neurons_are_those_of_one_site_after_another(widths: list[int]) -> None:
    sites = [Site(f"{i // 2}.proj_out[{':4' if i % 2 == 0 else '4:'}]", "ff", width) for i, width in enumerate(widths)]
    whole = list(range(sum(widths)))
    assert [i for _, span in spans(sites) for i in whole[span]] == whole
    assert [len(whole[span]) for _, span in spans(sites)] == widths
    assert [pair for pairs in by_layer(sites).values() for pair in pairs] == list(spans(sites))
    assert list(by_layer(sites)) == list(dict.fromkeys(site.layer for site in sites))


def test_positions_are_summed_in_float32_or_wider() -> None:
    x = torch.full((1, 4096, 2), 1.001, dtype=torch.bfloat16)
    assert to_neurons(x, -1).dtype == torch.float32
    torch.testing.assert_close(to_neurons(x, -1), torch.full((1, 2), 4096.0))
    image = torch.arange(12.0, dtype=torch.float64).view(1, 3, 2, 2)
    assert to_neurons(image, 1).tolist() == [[6.0, 22.0, 38.0]]
    assert to_neurons(image[..., 0, 0], 1).tolist() == [[0.0, 4.0, 8.0]]


def test_relevance_of_neurons_plain_and_rooted() -> None:
    sites = [Site("a.ff.net.2", "ff", 2), Site("conv2", "conv", 3)]
    generator = torch.Generator().manual_seed(0)
    a = {
        "a.ff.net.2": torch.randn(2, 5, 2, generator=generator),
        "conv2": torch.randn(2, 3, 2, 2, generator=generator),
    }
    g = {name: torch.randn(x.shape, generator=generator) for name, x in a.items()}
    root = {name: torch.randn(x.shape, generator=generator) for name, x in a.items()}
    plain = neuron_relevance(a, g, sites)
    products = a["conv2"] * g["conv2"]
    expected = torch.stack([products[i, j].sum() for i in range(2) for j in range(3)]).view(2, 3)
    torch.testing.assert_close(plain[:, 2:], expected)
    torch.testing.assert_close(plain[:, 0], (a["a.ff.net.2"] * g["a.ff.net.2"])[..., 0].sum(1))
    torch.testing.assert_close(neuron_relevance(a, g, sites, root), plain - neuron_relevance(root, g, sites))
    assert torch.equal(neuron_relevance(a, {**g, "a.ff.net.2": None}, sites)[:, :2], torch.zeros(2, 2))
    assert neuron_relevance(a, g, sites, a).abs().max() == 0


def test_relevance_of_a_part_of_a_layer_is_that_part_of_the_layer_s() -> None:
    generator = torch.Generator().manual_seed(0)
    a, g = ({"p": torch.randn(2, 5, 6, generator=generator)} for _ in range(2))
    whole = neuron_relevance(a, g, [Site("p", "ff", 6)])
    parts = [Site("p[:4]", "attention", 4), Site("p[4:]", "ff", 2)]
    assert torch.equal(neuron_relevance(a, g, parts), whole)
    assert torch.equal(neuron_relevance(a, g, parts[1:]), whole[:, 4:])


def test_a_layer_that_runs_twice_in_a_pass_has_the_relevance_of_both() -> None:
    generator = torch.Generator().manual_seed(0)
    a, g = ({key: torch.randn(2, 5, 3, generator=generator) for key in ("p", "p#2", "pp")} for _ in range(2))
    once = [neuron_relevance({"p": a[key]}, {"p": g[key]}, [Site("p", "ff", 3)]) for key in ("p", "p#2")]
    torch.testing.assert_close(neuron_relevance(a, g, [Site("p", "ff", 3)]), once[0] + once[1])
