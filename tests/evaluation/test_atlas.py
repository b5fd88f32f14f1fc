"""The map of the UNet: every layer in its block, every block in its place, every cell of its value."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from stereoclinic.ddtd.neurons import SITE_KINDS, Site
from stereoclinic.evaluation.report.atlas import mask_map, relevance_map
from stereoclinic.evaluation.report.summary import mask_summary
from stereoclinic.sns.mask import NeuronMask


def unet_sites(levels: int = 3, layers: int = 1) -> list[Site]:
    """Names as diffusers gives them; the first level has no attention."""
    sites = []

    def block(prefix: str, stages: int, attention: bool, width: int) -> None:
        for i in range(stages if attention else 0):
            for layer in range(layers):
                inner = f"{prefix}.attentions.{i}.transformer_blocks.{layer}"
                sites.append(Site(f"{inner}.attn1.{SITE_KINDS['attention']}", "attention", width))
                sites.append(Site(f"{inner}.attn2.{SITE_KINDS['attention']}", "attention", width))
                sites.append(Site(f"{inner}.{SITE_KINDS['ff']}", "ff", 4 * width))
        for i in range(stages):
            sites.append(Site(f"{prefix}.resnets.{i}.conv2", "conv", width))

    for i in range(levels):
        block(f"down_blocks.{i}", 1, i > 0, 8 * (i + 1))
    for i in range(levels):
        block(f"up_blocks.{i}", 2, i < levels - 1, 8 * (levels - i))
    block("mid_block", 1, True, 8 * levels)
    return sites


def mask_of(sites: list[Site], bins: int) -> NeuronMask:
    neurons = sum(site.width for site in sites)
    factors = torch.rand(bins, neurons, generator=torch.Generator().manual_seed(0))
    edges = torch.linspace(1000, 0, bins + 1, dtype=torch.float64)
    return NeuronMask(sites, edges, factors, metadata={"axis": "gender"})


def summary_of(sites: list[Site], bins: int) -> dict:
    """Relevance in proportion to width, but for the first site, which holds ten times as much."""
    weight = np.array([site.width * (10.0 if i == 0 else 1.0) for i, site in enumerate(sites)])
    share = weight / weight.sum()
    edges = np.linspace(1000, 0, bins + 1)
    return {
        "axis": "gender",
        "groups": ["female", "male"],
        "labels": ["doctor", "nurse"],
        "bins": [{"from": high, "to": low} for high, low in pairwise(edges)],
        "sites": [
            {
                "name": site.name,
                "kind": site.kind,
                "neurons": site.width,
                "bins": [float(share[i])] * (bins - 1) + [None],
                "chance_bins": [float(share[i]) * (2 if i == 1 else 0.5)] * bins,
            }
            for i, site in enumerate(sites)
        ],
        "blocks": [{"name": "mid", "share": 0.25}],
        "total": {"neurons": sum(site.width for site in sites)},
        "metadata": {"composite": "epsilon-cp", "target": "lean", "samples": 24},
    }


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda each: hasattr(each, "get_text"))]


def panels(figure) -> dict[str, object]:
    """Block -> its axes, by the heading above each."""
    heads = [text for text in figure.texts if text.get_fontweight() == "bold"][:-1]  # the last is the title
    drawn = [axes for axes in figure.axes if axes.images]
    return {head.get_text().split("   ")[0]: axes for head, axes in zip(heads, drawn, strict=True)}


def test_every_layer_has_a_line_with_its_values() -> None:
    sites = unet_sites()
    mask = mask_of(sites, 4)
    figure = mask_map(mask_summary(mask), "gender.pt")
    blocks = panels(figure)
    assert list(blocks) == ["down 0", "up 2", "down 1", "up 1", "down 2", "up 0", "mid"]
    assert sum(len(axes.get_yticklabels()) for axes in blocks.values()) == len(sites)
    spans = {site.name: span for site, span in mask.spans()}
    for name, path, line in (
        ("down 1", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0", "cross 0"),
        ("up 0", "up_blocks.0.resnets.1.conv2", "conv 1"),
        ("mid", "mid_block.attentions.0.transformer_blocks.0.ff.net.2", "ff 0"),
    ):
        axes = blocks[name]
        at = [label.get_text() for label in axes.get_yticklabels()].index(line)
        expected = 100 * mask.damping[:, spans[path]].mean(1)
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array())[at], expected, rtol=1e-5)


def test_blocks_lie_where_the_data_passes() -> None:
    blocks = panels(mask_map(mask_summary(mask_of(unet_sites(), 3)), "gender.pt"))
    box = {name: axes.get_position() for name, axes in blocks.items()}
    for down, up in (("down 0", "up 2"), ("down 1", "up 1"), ("down 2", "up 0")):
        assert box[down].x1 < box[up].x0
        assert (box[down].y0 + box[down].y1) == pytest.approx(box[up].y0 + box[up].y1)  # the same floor
    assert box["down 0"].y0 > box["down 1"].y1 > box["down 1"].y0 > box["down 2"].y1
    assert box["mid"].y1 < min(each.y0 for name, each in box.items() if name != "mid")
    down = [label.get_text() for label in blocks["down 1"].get_yticklabels()]
    up = [label.get_text() for label in blocks["up 1"].get_yticklabels()]
    assert down == ["conv 0", "self 0", "cross 0", "ff 0"]  # downwards
    assert up[::-1] == ["conv 0", "self 0", "cross 0", "ff 0", "conv 1", "self 1", "cross 1", "ff 1"]  # upwards


def test_relevance_is_per_neuron_and_doubt_is_hatched() -> None:
    sites = unet_sites()
    summary = summary_of(sites, 3)
    figure = relevance_map(summary, "gender.relevance.safetensors")
    blocks = panels(figure)
    total = sum(site.width * (10.0 if i == 0 else 1.0) for i, site in enumerate(sites))
    average = total / sum(site.width for site in sites)
    values = np.asarray(blocks["down 0"].images[0].get_array())
    np.testing.assert_allclose(values[0, :2], 10 / average)
    assert np.isnan(np.ma.filled(blocks["down 0"].images[0].get_array(), np.nan)[0, 2])  # not measured
    hatched = {name: [patch for patch in axes.patches if patch.get_hatch()] for name, axes in blocks.items()}
    assert {name: len(patches) for name, patches in hatched.items() if patches} == {"down 1": 2}  # sites[1], two bins
    said = " ".join(words(figure))
    for part in ("epsilon-cp", "target lean", "axis gender: female, male", "24 samples of 2 labels", "mid   25.0 %"):
        assert part in said


def test_deep_transformers_are_summed_up() -> None:
    sites = unet_sites(layers=10)
    mask = mask_of(sites, 2)
    axes = panels(mask_map(mask_summary(mask), "deep.pt"))["down 2"]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["conv 0", "self 0 x10", "cross 0 x10", "ff 0 x10"]
    own = [span for site, span in mask.spans() if site.name.startswith("down_blocks.2") and ".attn1." in site.name]
    expected = 100 * torch.cat([mask.damping[:, span] for span in own], dim=1).mean(1)
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array())[1], expected, rtol=1e-5)


@pytest.mark.parametrize("bins", [1, 5, 50])
@pytest.mark.parametrize("kinds", [("conv",), ("attention",), ("ff", "attention", "conv")])
def test_any_selection_of_sites_and_bins_draws(bins: int, kinds: tuple[str, ...]) -> None:
    sites = [site for site in unet_sites() if site.kind in kinds]
    figure = relevance_map(summary_of(sites, bins), "x")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    width, height = Image.open(file).size
    assert 200 < width < 1000 and 100 < height < 1000
    edges = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels() if axes.images]
    assert edges[0] == "1000" and len(edges) <= 8


def test_sites_of_no_unet_are_drawn_in_one_column() -> None:
    sites = [Site(f"transformer_blocks.{i}.ff.net.2", "ff", 16) for i in range(3)]
    axes = panels(mask_map(mask_summary(mask_of(sites, 2)), "dit.pt"))["other"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [site.name for site in sites]
