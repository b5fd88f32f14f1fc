"""Where relevance sits: shares that add up, a noise floor that noise meets, and the neurons that were planted."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tests.pipelines.tiny import TINY, build

from stereoclinic.ddtd.relevance import SKETCHES, Relevance
from stereoclinic.errors import InputError
from stereoclinic.pipelines.model import network_of
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.report.anatomy import KINDS, STREAMS, grouped, places
from stereoclinic.report.located import by_chance, relevance_summary

SITES = [
    Site("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "attention", 300),
    Site("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0", "attention", 200),
    Site("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", "ff", 800),
    Site("down_blocks.0.resnets.0.conv2", "conv", 100),
    Site("up_blocks.1.resnets.1.conv2", "conv", 100),
    Site("mid_block.resnets.0.conv2", "conv", 500),
]
N = sum(site.width for site in SITES)
EDGES = torch.tensor([1000.0, 500.0, 0.0], dtype=torch.float64)


def made(means: torch.Tensor, seen: torch.Tensor | None = None, samples: int = 4) -> Relevance:
    """Relevance of which each label's mean tilt is given, (P, T, N); leans alternate in sign between labels."""
    labels, bins, _ = means.shape
    count = torch.full((labels, bins), float(samples), dtype=torch.float64)
    if seen is not None:
        count = count * seen
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(labels)[:labels, None]  # (P, 1)
    lean = torch.stack([sign, -sign], dim=-1).expand(labels, bins, 2)
    tilt = means.double() * count[..., None]
    return Relevance(
        SITES,
        ("female", "male"),
        [f"job {p}" for p in range(labels)],
        EDGES,
        count=count,
        lean_sum=lean * count[..., None],
        lean_sq=lean.square() * count[..., None],
        relevance_sum=torch.stack([tilt * sign[..., None], -tilt * sign[..., None]], dim=2),
        stereotype_sum=tilt,
        stereotype_sq=(means.double().square() * count[..., None]).sum(0),
        collateral=torch.zeros(labels, bins, SKETCHES, N, dtype=torch.float64),
        root_sum=torch.zeros(2, bins, N, dtype=torch.float64),
        metadata={"axis": "gender", "samples": labels * samples},
    )


def noise(labels: int, bins: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(labels, bins, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("labels", [2, 3, 12])
def test_noise_shows_what_chance_alone_would_show(labels: int) -> None:
    """With no neuron that carries anything, all of |relevance| is by chance, in every part, however few the labels."""
    found = relevance_summary(made(noise(labels)))
    assert found["total"]["chance"] == pytest.approx(1, abs=0.05)
    for row in (*found["kinds"], *found["blocks"]):
        assert row["chance"] == pytest.approx(row["share"], rel=0.25)
        assert row["share"] == pytest.approx(row["neurons"] / N, rel=0.25)
    assert all(row["chance"] == pytest.approx(1, abs=0.07) for row in found["timesteps"])


def test_chance_is_the_mean_of_a_half_normal() -> None:
    """Many labels: s sqrt(2 / pi). Two labels: s estimated from one difference, whose mean is sigma sqrt(2 / pi)."""
    stderr = torch.ones(1, 1, dtype=torch.float64)
    many, two = torch.ones(100_000, 1), torch.ones(2, 1)
    assert float(by_chance(stderr, many)) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-4)
    assert float(by_chance(stderr, two)) == pytest.approx(1.0)


def test_shares_add_up_and_nets_are_sums() -> None:
    relevance = made(noise(5))
    found = relevance_summary(relevance)
    mean = relevance.stereotype()[0]
    for rows in (found["kinds"], found["blocks"], found["sites"]):
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(row["neurons"] for row in rows) == N
        assert sum(row["sites"] for row in rows) == len(SITES)
        assert sum(row["net"] for row in rows) == pytest.approx(float(mean.sum(1).mean()))
        for t in range(2):
            assert sum(row["bins"][t] for row in rows) == pytest.approx(1)
            assert sum(row["chance_bins"][t] for row in rows) == pytest.approx(found["timesteps"][t]["chance"])
    assert [row["name"] for row in found["blocks"]] == ["down 0", "down 1", "mid", "up 1"]
    assert [row["kind"] for row in found["kinds"]] == ["conv", "self", "cross", "ff"]
    assert [row["size"] for row in found["timesteps"]] == pytest.approx(mean.abs().sum(1).tolist())
    assert [row["n"] for row in found["timesteps"]] == [20, 20]
    json.dumps(found, allow_nan=False)


def test_the_error_of_a_net_is_the_spread_between_labels() -> None:
    """Against the textbook's s / sqrt(P) of each label's own mean over bins."""
    means = noise(7)
    found = relevance_summary(made(means))
    conv = means[..., N - 500 :].sum(2).mean(1)  # (P,), the middle block
    row = next(row for row in found["blocks"] if row["name"] == "mid")
    assert row["net"] == pytest.approx(float(conv.mean()))
    assert row["net_stderr"] == pytest.approx(float(conv.std() / math.sqrt(7)))


def test_planted_neurons_are_found_and_described() -> None:
    """One that carries the stereotype in every label, one that counteracts it, one that is large in a single label."""
    means = 0.01 * noise(6)
    carries, against, once = 310, 1505, 7
    means[:, 1, carries] += 2.0
    means[:, :, against] -= 1.0
    means[0, :, once] += 9.0
    relevance = made(means)
    first, second, *rest = relevance_summary(relevance, top=5)["neurons"]
    assert {(row["site"], row["neuron"]) for row in (first, second)} == {(SITES[1].name, 10), (SITES[5].name, 5)}
    assert all((row["site"], row["neuron"]) != (SITES[0].name, once) for row in rest)
    row = next(row for row in (first, second) if row["neuron"] == 10)
    assert row["place"] == "down 1 cross 0"
    assert row["bin"] == {"number": 1, "from": 500.0, "to": 0.0}
    own = means[:, 1, carries]
    assert row["mean"] == pytest.approx(float(own.mean()))
    assert row["stderr"] == pytest.approx(float(own.std() / math.sqrt(6)))
    assert row["t"] == pytest.approx(row["mean"] / row["stderr"])
    assert row["sign"] == 1
    assert [each["relevance"]["female"] for each in row["profile"]] == pytest.approx(
        [float(value) * (-1) ** p for p, value in enumerate(own)]
    )
    assert all(each["relevance"]["male"] == -each["relevance"]["female"] for each in row["profile"])
    other = first if row is second else second
    assert other["sign"] == -1 and other["mean"] < 0 < -other["t"]


def test_half_counts_the_largest() -> None:
    means = torch.zeros(3, 2, N)
    means[..., :10] = 1.0
    found = relevance_summary(made(means))
    assert found["half"] == 5
    assert [row["half"] for row in found["timesteps"]] == [5, 5]


def test_what_was_not_measured_is_none() -> None:
    seen = torch.tensor([[1.0, 0.0]] * 4)
    found = relevance_summary(made(noise(4), seen))
    assert found["timesteps"][1] == {
        "from": 500.0, "to": 0.0, "n": 0, "labels": 0, "size": None, "chance": None, "half": None,
    }  # fmt: skip
    assert all(row["bins"][1] is None and row["chance_bins"][1] is None for row in found["sites"])
    assert sum(row["share"] for row in found["sites"]) == pytest.approx(1)
    assert all(row["bin"]["number"] == 0 for row in found["neurons"])
    nothing = relevance_summary(made(noise(4), torch.zeros(4, 2)))
    assert nothing["neurons"] == [] and nothing["total"]["chance"] is None
    json.dumps([found, nothing], allow_nan=False)


def test_one_label_has_no_error_between_labels() -> None:
    """Its neurons have the spread over samples; its nets have none, and one sample has no error at all."""
    several, one = relevance_summary(made(noise(1))), relevance_summary(made(noise(1), samples=1))
    assert all(row["net_stderr"] is None for found in (several, one) for row in found["blocks"])
    assert one["neurons"][0]["stderr"] is None and one["neurons"][0]["t"] is None
    assert one["total"]["chance"] is None
    assert several["neurons"][0]["stderr"] is not None
    json.dumps([several, one], allow_nan=False)


@pytest.mark.parametrize(
    ("path", "kind", "said", "block"),
    [
        ("down_blocks.0.resnets.1.conv2", "conv", "down 0 conv 1", "down 0"),
        ("up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0", "attention", "up 2 self 1", "up 2"),
        ("up_blocks.2.attentions.1.transformer_blocks.3.attn2.to_out.0", "attention", "up 2 cross 1.3", "up 2"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", "ff", "mid ff 0", "mid"),
        ("mid_block.attentions.0.to_out.0", "attention", "mid self 0", "mid"),
        ("down_blocks.1.attentions.2.attention.to_out.0", "attention", "down 1 attention 2", "down 1"),  # Kandinsky 3
        ("down_blocks.0.downsamplers.0.conv2", "conv", "down_blocks.0.downsamplers.0.conv2", "other"),
        ("add_time_condition.attention.to_out.0", "attention", "add_time_condition.attention", "other"),
        ("transformer_blocks.4.ff.net.2", "ff", "block 4 feed-forward", "block 4"),
        ("layers.0.feed_forward.w2", "ff", "layer 0 feed-forward", "layer 0"),
        ("noise_refiner.1.attention.to_out.0", "attention", "noise refiner 1 attention", "noise refiner 1"),
        (
            "text_fusion.refiner_blocks.0.ff.down",
            "ff",
            "text fusion refiner block 0 feed-forward",
            "text fusion refiner block 0",
        ),
        ("single_transformer_blocks.12.proj_out[64:]", "ff", "single block 12 feed-forward", "single block 12"),
        ("stages.3.mlp.fc2", "other", "stages 3 mlp.fc2", "stages 3"),
        ("head.proj", "other", "head.proj", "other"),
    ],
)
def test_places(path: str, kind: str, said: str, block: str) -> None:
    (place,) = places([Site(path, kind, 8)]).values()
    assert (str(place), place.block) == (said, block)


def said_of(*sites: tuple[str, str]) -> list[str]:
    return [str(place) for place in places(Site(path, kind, 8) for path, kind in sites).values()]


def test_a_site_names_its_stream_where_there_are_several() -> None:
    assert said_of(
        ("noise_refiner.0.attention.to_out.0", "attention"),
        ("context_refiner.0.feed_forward.w2", "ff"),
        ("layers.3.attention.to_out.0", "attention"),
    ) == ["noise refiner 0 image attention", "context refiner 0 text feed-forward", "layer 3 joint attention"]
    assert said_of(("layers.3.attention.to_out.0", "attention")) == ["layer 3 attention"]


def test_attention_is_self_or_cross_where_blocks_have_both() -> None:
    """PixArt's; Stable Diffusion 3.5's second attention is of the image alone, CogView 4's first is all there is."""
    block = "transformer_blocks.0"
    both = said_of((f"{block}.attn1.to_out.0", "attention"), (f"{block}.attn2.to_out.0", "attention"))
    assert both == ["block 0 self-attention", "block 0 cross-attention"]
    two = said_of((f"{block}.attn.to_out.0", "attention"), (f"{block}.attn2.to_out.0", "attention"))
    assert two == ["block 0 attention", "block 0 attention 2"]
    assert said_of((f"{block}.attn1.to_out.0", "attention")) == ["block 0 attention"]
    names = ("self_attention", "cross_attention")
    assert said_of(*((f"visual_transformer_blocks.0.{name}.out_layer", "attention") for name in names)) == [
        "visual block 0 self-attention",
        "visual block 0 cross-attention",
    ]


@pytest.mark.parametrize("name", sorted(TINY))
def test_no_two_sites_of_a_pipeline_share_a_name(name: str) -> None:
    sites = find_sites(network_of(build(name)))
    found = places(sites)
    assert set(found) == set(sites)
    assert len({str(place) for place in found.values()}) == len(sites)
    assert {place.kind for place in found.values()} <= set(KINDS)
    assert {place.stream for place in found.values()} <= {"", *STREAMS}
    blocks = grouped(sites, lambda members: {"sites": len(members)})["blocks"]
    assert sum(row["sites"] for row in blocks) == len(sites)


def test_a_transformer_is_summed_up_by_kind_stream_and_block() -> None:
    sites = [
        Site("transformer_blocks.0.attn.to_out.0", "attention", 300),
        Site("transformer_blocks.0.attn.to_add_out", "attention", 200),
        Site("transformer_blocks.0.ff.net.2", "ff", 800),
        Site("transformer_blocks.0.ff_context.net.2", "ff", 100),
        Site("single_transformer_blocks.0.proj_out[:100]", "attention", 100),
        Site("single_transformer_blocks.0.proj_out[100:]", "ff", 500),
    ]
    means = 0.01 * noise(6)
    means[:, :, 305] += 1.0
    means[:, :, 1510] += 2.0
    found = relevance_summary(replace(made(means), sites=sites), 2)
    assert {row["kind"]: row["neurons"] for row in found["kinds"]} == {"attention": 600, "ff": 1400}
    assert {row["stream"]: row["neurons"] for row in found["streams"]} == {"image": 1100, "text": 300, "joint": 600}
    assert {row["name"]: row["neurons"] for row in found["blocks"]} == {"block 0": 1400, "single block 0": 600}
    for rows in (found["kinds"], found["streams"], found["blocks"]):
        assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [(row["place"], row["neuron"]) for row in found["neurons"]] == [
        ("single block 0 joint feed-forward", 10),
        ("block 0 text attention", 5),
    ]


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="has kind 'gate'; expected one of ff, attention, conv"):
        places([Site("down_blocks.0.resnets.1.conv2", "gate", 8)])
