"""The maps of denoisers: every layer in its block, every block in its place, every cell of its value."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from stereoclinic.pipelines.sites import Site
from stereoclinic.report.anatomy import places
from stereoclinic.report.atlas import mask_map, relevance_map
from stereoclinic.report.layouts import Line, arrange, arrows
from stereoclinic.report.summary import mask_summary
from stereoclinic.sns.mask import NeuronMask


def unet_sites(levels: int = 3, layers: int = 1) -> list[Site]:
    """Names as diffusers gives them; the first level has no attention."""
    sites = []

    def block(prefix: str, stages: int, attention: bool, width: int) -> None:
        for i in range(stages if attention else 0):
            for layer in range(layers):
                inner = f"{prefix}.attentions.{i}.transformer_blocks.{layer}"
                sites.append(Site(f"{inner}.attn1.to_out.0", "attention", width))
                sites.append(Site(f"{inner}.attn2.to_out.0", "attention", width))
                sites.append(Site(f"{inner}.ff.net.2", "ff", 4 * width))
        for i in range(stages):
            sites.append(Site(f"{prefix}.resnets.{i}.conv2", "conv", width))

    for i in range(levels):
        block(f"down_blocks.{i}", 1, i > 0, 8 * (i + 1))
    for i in range(levels):
        block(f"up_blocks.{i}", 2, i < levels - 1, 8 * (levels - i))
    block("mid_block", 1, True, 8 * levels)
    return sites


def blocks_of(part: str, count: int, *layers: str) -> list[Site]:
    """A transformer's list of blocks."""

    def kind(layer: str) -> str:
        return "attention" if "to_" in layer or "[:" in layer else "other" if layer == "mlp.fc2" else "ff"

    return [Site(f"{part}.{i}.{layer}", kind(layer), 8) for i in range(count) for layer in layers]


DOUBLE = ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2")
REFINER = ("attention.to_out.0", "feed_forward.w2")

TRANSFORMERS = {
    "flux": blocks_of("transformer_blocks", 19, *DOUBLE)
    + blocks_of("single_transformer_blocks", 38, "proj_out[:8]", "proj_out[8:]"),
    "sd3": blocks_of("transformer_blocks", 23, *DOUBLE)
    + [
        Site(f"transformer_blocks.23.{layer}", kind, 8)
        for layer, kind in (("attn.to_out.0", "attention"), ("ff.net.2", "ff"))
    ],
    "z-image": blocks_of("noise_refiner", 2, *REFINER)
    + blocks_of("context_refiner", 2, *REFINER)
    + blocks_of("layers", 30, *REFINER),
    "pixart": blocks_of("transformer_blocks", 28, "attn1.to_out.0", "attn2.to_out.0", "ff.net.2"),
    "qwen-image": blocks_of("transformer_blocks", 60, *DOUBLE),
    "hunyuan-image": blocks_of("context_embedder.token_refiner.refiner_blocks", 2, "attn.to_out.0", "ff.net.2")
    + blocks_of("transformer_blocks", 20, *DOUBLE)
    + blocks_of("single_transformer_blocks", 40, "proj_out[:8]", "proj_out[8:]"),
    "unknown": [Site("embedder.gate.proj", "other", 8), *blocks_of("stages", 4, "mlp.fc2")],
}


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


def test_arrows_follow_the_data_down_through_the_middle_and_up() -> None:
    lines = [Line(place, 1, np.ones(2), np.zeros(2, bool)) for place in places(unet_sites()).values()]
    layout = arrange(lines, 2, {})
    skips = [ends for *ends, dashed in arrows(layout) if dashed]
    steps = [ends for *ends, dashed in arrows(layout) if not dashed]
    assert len(skips) == 3 and all(start[0] < end[0] and start[1] == end[1] for start, end in skips)
    centre = layout.width / 2
    down = [ends for ends in steps if ends[0][0] < centre]
    up = [ends for ends in steps if ends[0][0] > centre]
    assert len(down) == len(up) == 3  # two between blocks, and one into the middle or out of it
    assert all(start[1] < end[1] for start, end in down) and all(start[1] > end[1] for start, end in up)


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
    for axes in panels(figure).values():
        edges = [label.get_text() for label in axes.get_xticklabels()]
        assert edges[0] == "1000" and len(edges) <= 8


def maps(figure) -> dict[tuple[str, str], object]:
    """(Heading, kind of layer) -> its axes, of a transformer: a kind stands over each, headings over the first."""
    width, height = figure.get_size_inches()
    found, heading = {}, ""
    for axes in (axes for axes in figure.axes if axes.images):
        box = axes.get_position()
        over = [text for text in figure.texts if box.y1 < text.get_position()[1] < box.y1 + 0.4 / height]
        for text in over:
            if text.get_fontweight() == "bold" and abs(text.get_position()[0] - box.x0) * width < 0.01:
                heading = text.get_text()
        centre = (box.x0 + box.x1) / 2
        (kind,) = (text.get_text() for text in over if abs(text.get_position()[0] - centre) * width < 0.01)
        found[heading, kind] = axes
    return found


def test_a_transformer_is_a_column_of_blocks_with_its_streams_side_by_side() -> None:
    sites = blocks_of("transformer_blocks", 3, *DOUBLE)
    sites += blocks_of("single_transformer_blocks", 4, "proj_out[:8]", "proj_out[8:]")
    mask = mask_of(sites, 5)
    found = maps(mask_map(mask_summary(mask), "flux.pt"))
    image, text = "blocks 0 to 2: image tokens", "blocks 0 to 2: text tokens"
    joint = "single blocks 0 to 3: image and text tokens"
    kinds = ("attention", "feed-forward")
    assert list(found) == [(heading, kind) for heading in (image, text, joint) for kind in kinds]
    spans = {site.name: span for site, span in mask.spans()}
    for key, paths in {
        (image, "attention"): [f"transformer_blocks.{i}.attn.to_out.0" for i in range(3)],
        (text, "feed-forward"): [f"transformer_blocks.{i}.ff_context.net.2" for i in range(3)],
        (joint, "attention"): [f"single_transformer_blocks.{i}.proj_out[:8]" for i in range(4)],
        (joint, "feed-forward"): [f"single_transformer_blocks.{i}.proj_out[8:]" for i in range(4)],
    }.items():
        expected = torch.stack([100 * mask.damping[:, spans[path]].mean(1) for path in paths])
        np.testing.assert_allclose(np.asarray(found[key].images[0].get_array()), expected, rtol=1e-5)
    box = {key: axes.get_position() for key, axes in found.items()}
    assert box[image, "attention"].x1 < box[image, "feed-forward"].x0
    assert box[image, "feed-forward"].x1 < box[text, "attention"].x0
    assert box[image, "attention"].y0 == pytest.approx(box[text, "attention"].y0)
    assert box[joint, "attention"].y1 < box[image, "attention"].y0
    middle = (box[joint, "attention"].x0 + box[joint, "feed-forward"].x1) / 2
    assert box[image, "feed-forward"].x1 < middle < box[text, "attention"].x0


def test_shares_of_blocks_stand_beside_them() -> None:
    sites = blocks_of("layers", 3, *REFINER)
    summary = mask_summary(mask_of(sites, 4))
    figure = mask_map(summary, "m.pt")
    axes = maps(figure)["layers 0 to 2", "feed-forward"]
    to_pixels = figure.transFigure.transform
    for i, row in enumerate(summary["blocks"]):
        share = f"{100 * row['damping'] / row['neurons']:.1f} %"
        (text,) = (text for text in figure.texts if text.get_text() == share)
        at, line = to_pixels(text.get_position()), axes.transData.transform((0, i))
        assert abs(at[1] - line[1]) < 0.1 * figure.dpi  # on its line
        assert at[0] > axes.get_window_extent().x1


def test_refiners_of_image_and_text_are_side_by_side() -> None:
    found = maps(mask_map(mask_summary(mask_of(TRANSFORMERS["z-image"], 2)), "z.pt"))
    box = {heading: axes.get_position() for (heading, kind), axes in found.items() if kind == "attention"}
    noise, context = box["noise refiner 0 to 1: image tokens"], box["context refiner 0 to 1: text tokens"]
    assert noise.y0 == pytest.approx(context.y0) and noise.x1 < context.x0
    assert box["layers 0 to 29: image and text tokens"].y1 < noise.y0


def test_a_block_without_a_layer_has_an_empty_line() -> None:
    figure = mask_map(mask_summary(mask_of(TRANSFORMERS["sd3"], 2)), "sd3.pt")
    found = maps(figure)
    rows = {
        stream: np.ma.filled(found[f"blocks 0 to 23: {stream} tokens", "attention"].images[0].get_array(), np.nan)
        for stream in ("image", "text")
    }
    assert len(rows["image"]) == len(rows["text"]) == 24
    assert (
        np.isfinite(rows["image"]).all() and np.isfinite(rows["text"][:23]).all() and np.isnan(rows["text"][23]).all()
    )
    assert "White: a block without such a layer" in " ".join(words(figure)).replace("\n", " ")


def test_self_and_cross_attention_are_apart_where_a_block_has_both() -> None:
    found = maps(relevance_map(summary_of(TRANSFORMERS["pixart"], 3), "pixart"))
    assert list(found) == [("blocks 0 to 27", kind) for kind in ("self-attention", "cross-attention", "feed-forward")]


def test_two_attention_layers_of_a_stream_share_a_line() -> None:
    """Stable Diffusion 3.5's, weighted by their neurons."""
    sites = [*blocks_of("transformer_blocks", 1, *DOUBLE), Site("transformer_blocks.0.attn2.to_out.0", "attention", 24)]
    mask = mask_of(sites, 2)
    found = maps(mask_map(mask_summary(mask), "m.pt"))["block 0: image tokens", "attention"]
    own = torch.cat([mask.damping[:, span] for site, span in mask.spans() if ".to_out." in site.name], dim=1)
    assert own.shape[1] == 32
    np.testing.assert_allclose(np.asarray(found.images[0].get_array())[0], 100 * own.mean(1), rtol=1e-5)


def test_what_lies_in_no_block_is_drawn_with_its_path() -> None:
    figure = mask_map(mask_summary(mask_of(TRANSFORMERS["unknown"], 2)), "x.pt")
    drawn = [axes for axes in figure.axes if axes.images]
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in drawn] == [
        ["0", "1", "2", "3"],
        ["embedder.gate.proj"],
    ]
    assert {"stages 0 to 3", "mlp.fc2", "outside of all blocks"} <= set(words(figure))


@pytest.mark.parametrize("bins", [1, 5, 20])
@pytest.mark.parametrize("name", [*TRANSFORMERS, "unet"])
def test_nothing_that_is_written_overlaps(name: str, bins: int) -> None:
    """And all of it is in a picture that is no wider than 1200 pixels."""
    sites = unet_sites(4) if name == "unet" else TRANSFORMERS[name]
    figure = relevance_map(summary_of(sites, bins), "gender.relevance.safetensors")
    assert figure.get_size_inches()[0] * 150 <= 1200
    texts = [text for text in figure.texts if text.get_text()]
    texts += [
        text for axes in figure.axes if axes.images for text in (*axes.get_xticklabels(), *axes.get_yticklabels())
    ]
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    boxes += [("map", axes.get_window_extent()) for axes in figure.axes]
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        for other, beside in boxes[:i]:
            apart = box.x1 < beside.x0 + 1 or beside.x1 < box.x0 + 1 or box.y1 < beside.y0 + 1 or beside.y1 < box.y0 + 1
            assert apart, (text, other)
