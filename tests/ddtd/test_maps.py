"""Relevance maps: what the sum over positions runs over, at the right places, from an unchanged walk."""

import pytest
import torch
from tests.ddtd.conftest import AXIS, THREE, measured
from torch import Tensor

from stereoclinic.ddtd.maps import Maps, Spot, _Keeper, relevance_maps, token_grid
from stereoclinic.ddtd.trajectory import Settings, bin_of
from stereoclinic.errors import InputError
from stereoclinic.pipelines.images import draw
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site, find_sites, neuron_relevance
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import load_prompts, with_seeds

ROWS = list(with_seeds(load_prompts("portraits", 2), 0, 1))
EDGES = torch.tensor([1000.0, 500.0, 0.0], dtype=torch.float64)


def one_of_each(little: Model) -> list[Site]:
    """The last site of every kind, self- and cross-attention both."""
    sites = find_sites(little.network)
    endings = ("conv2", "attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
    return [[site for site in sites if site.name.endswith(ending)][-1] for ending in endings]


def spots_of(little: Model, bins: tuple[int, ...] = (0, 1)) -> list[Spot]:
    return [Spot(site, 3 + b, b) for site in one_of_each(little) for b in bins]


def maps_of(little: Model, settings: Settings, axis: Axis = AXIS, group: int = 0) -> Maps:
    return relevance_maps(little, axis, ROWS, settings, EDGES, spots_of(little), group=group)


@pytest.mark.parametrize(
    ("settings", "axis", "group"),
    [
        (Settings(steps=4, every=1, bins=2), AXIS, 0),
        (Settings(steps=4, every=2, bins=2, guidance=3.0, composite="gradient"), AXIS, 1),
        (Settings(steps=2, bins=2, root="rooted"), AXIS, 0),
        (Settings(steps=2, bins=2), THREE, 2),
        (Settings(steps=2, bins=2, target="guidance", guidance=2.0), AXIS, 0),
    ],
)
def test_a_map_sums_to_the_neurons_relevance(little: Model, settings: Settings, axis: Axis, group: int) -> None:
    """Against `neuron_relevance` of the plain walk, added up over the steps of the spot's bin."""
    sites = find_sites(little.network)
    expected = torch.zeros(2, len(ROWS), sum(site.width for site in sites), dtype=torch.float64)  # (T, B, N)
    for step in measured(little, sites, axis, ROWS, settings):
        expected[bin_of(step.timestep, EDGES)] += step.relevance[group]
    starts = {site.name: sum(each.width for each in sites[:i]) for i, site in enumerate(sites)}
    spots = spots_of(little)
    for spot, found in zip(spots, maps_of(little, settings, axis, group).maps, strict=True):
        row = expected[spot.bin, :, starts[spot.site.name] + spot.neuron]
        torch.testing.assert_close(found.sum((1, 2)), row, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    assert expected.abs().max() > 0


def test_the_picture_is_the_one_that_sampling_draws(little: Model) -> None:
    """Looking changes nothing: the same prompts and seeds, drawn without it."""
    for guidance in (1.0, 3.0):
        found = maps_of(little, Settings(steps=3, bins=2, guidance=guidance))
        plain = draw(little, ROWS, 3, guidance)
        # To the last bit of eight, as rounding of the prediction may tip a value over.
        torch.testing.assert_close(found.pictures * 255, plain.float(), rtol=0, atol=1)


def test_maps_of_a_batch_are_those_of_its_samples(little: Model) -> None:
    settings, spots = Settings(steps=2, bins=2), spots_of(little)
    together = relevance_maps(little, AXIS, ROWS, settings, EDGES, spots)
    for i, row in enumerate(ROWS):
        alone = relevance_maps(little, AXIS, [row], settings, EDGES, spots)
        torch.testing.assert_close(alone.pictures[0] * 255, together.pictures[i] * 255, rtol=0, atol=1)
        for one, all_ in zip(alone.maps, together.maps, strict=True):
            torch.testing.assert_close(one[0], all_[i], rtol=1e-4, atol=1e-6 * float(all_.abs().max()))


def test_tokens_lie_row_by_row(little: Model) -> None:
    """What a transformer block is given, laid out on the grid, is the feature map that it was made from."""
    seen: dict[str, Tensor] = {}
    stage = little.network.down_blocks[1].attentions[0]
    handles = [
        stage.proj_in.register_forward_hook(lambda _, args, out: seen.update(features=out)),
        stage.transformer_blocks[0].register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0])),
    ]
    wide = Model(little.pipe, call={"height": 32, "width": 64})
    spots = [Spot(one_of_each(little)[1], 0, 0)]
    found = relevance_maps(wide, AXIS, ROWS[:1], Settings(steps=1, bins=1), EDGES[[0, 2]], spots)
    for handle in handles:
        handle.remove()
    assert found.pictures.shape == (1, 3, 32, 64) and found.maps[0].shape == (1, 4, 8)
    grid = token_grid(seen["tokens"].shape[1], (32, 64))
    assert torch.equal(seen["tokens"].unflatten(1, grid).permute(0, 3, 1, 2), seen["features"])


def test_a_map_is_activation_times_gradient_in_place() -> None:
    """At a linear and a convolution site, on a grid of 3 x 2, with and without a root."""
    linear, conv = Site("ff.net.2", "ff", 5), Site("conv2", "conv", 4)
    a = {"ff.net.2": torch.randn(2, 6, 5), "conv2": torch.randn(2, 4, 3, 2)}
    g = {name: torch.randn_like(value) for name, value in a.items()}
    roots = {name: torch.randn_like(value) for name, value in a.items()}
    keeper = _Keeper([Spot(linear, 1, 0), Spot(conv, 2, 0)])
    for at in (None, roots):
        rows = keeper(a, g, [linear, conv], at)
        assert [tuple(shape) for shape in keeper.shapes] == [(6,), (3, 2)]
        plain, first, second = rows.split([9, 6, 6], dim=1)
        assert torch.equal(plain, neuron_relevance(a, g, [linear, conv], at))
        whole = {name: (a[name] - (0 if at is None else at[name])) * g[name] for name in a}
        assert torch.equal(first.view(2, 3, 2), whole["ff.net.2"][..., 1].view(2, 3, 2))
        assert torch.equal(second.view(2, 3, 2), whole["conv2"][:, 2])
    nothing = keeper(a, dict.fromkeys(a), [linear, conv], None)
    assert nothing.shape == (2, 21) and not nothing.any()


def test_token_grids_follow_the_picture() -> None:
    assert token_grid(4096, (64, 64)) == (64, 64)
    assert token_grid(1024, (64, 64)) == (32, 32)
    assert token_grid(96 * 64 // 4, (768, 512)) == (48, 32)
    assert token_grid(12 * 8, (96, 64)) == (12, 8)
    assert token_grid(7 * 5, (14, 10)) == (7, 5)


def test_progress_counts_the_measured_steps(little: Model) -> None:
    ticks: list[int] = []
    spots = spots_of(little)[:1]
    relevance_maps(little, AXIS, ROWS, Settings(steps=4, every=2, bins=2), EDGES, spots, progress=ticks.append)
    assert ticks == [len(ROWS)] * 2


def test_what_cannot_be_mapped_is_refused(little: Model) -> None:
    site = one_of_each(little)[0]
    with pytest.raises(InputError, match=f"neuron {site.width} of {site.name}: expected 0 to {site.width - 1}"):
        Spot(site, site.width, 0)
    with pytest.raises(InputError, match=r"timestep bin 2 .* there are 2"):
        relevance_maps(little, AXIS, ROWS, Settings(steps=2), EDGES, [Spot(site, 0, 2)])
    with pytest.raises(InputError, match="no measured step falls between timesteps 500 and 0"):
        relevance_maps(little, AXIS, ROWS, Settings(steps=1), EDGES, [Spot(site, 0, 1)])
    with pytest.raises(InputError, match="not in this"):
        relevance_maps(little, AXIS, ROWS, Settings(steps=2), EDGES, [Spot(Site("elsewhere.conv2", "conv", 8), 0, 0)])
